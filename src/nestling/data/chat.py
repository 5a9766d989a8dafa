"""Chats through the template of the model's tokenizer, and which of their tokens the assistant said."""

import re
from functools import cache
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError
from nestling.weights.files import reason

Chat = list[dict[str, Any]]
Span = tuple[int, int]
"""Characters of a text, from and up to."""


class BadDocument(NestlingError):
    """One text or chat cannot be used, the others may: the message says where it is."""


def is_chat(messages: Any) -> bool:
    return isinstance(messages, list) and len(messages) > 0 and all(isinstance(message, dict) for message in messages)


def render(directory: Path, messages: Chat, where: str, **options: Any) -> str:
    """The text of a chat."""
    return str(_apply(directory, messages, where, tokenize=False, **options))


def assistant_tokens(directory: Path, messages: Chat, where: str) -> tuple[list[int], list[bool]] | None:
    """Token ids, and True where the template's {% generation %} marks say so; None if it has no such marks."""
    if not re.search(r"\{%-?\s*generation\s*-?%\}", str(_tokenizer(directory).chat_template)):
        return None
    made = _apply(directory, messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return list(made["input_ids"]), [bool(mark) for mark in made["assistant_masks"]]


def assistant_spans(directory: Path, messages: Chat, where: str) -> tuple[str, list[Span]]:
    """The text of a chat, and the characters of every assistant's turn in it, its end mark included.

    A turn begins where the chat before it, rendered with the prompt for an answer, ends. That is only known if what is
    rendered of a beginning is a beginning of the whole, and is refused otherwise.
    """
    text = render(directory, messages, where)
    spans = []
    for turn, message in enumerate(messages):
        if message.get("role") == "assistant":
            before = render(directory, messages[:turn], where, add_generation_prompt=True)
            until = render(directory, messages[: turn + 1], where)
            if not (until.startswith(before) and text.startswith(until)):
                raise NestlingError(
                    f"{where}: the model's chat template renders the beginning of a chat differently from the whole, "
                    "so that the assistant's turns cannot be told; put {% generation %} marks around them in the "
                    "template, or train with loss_on = 'all'"
                )
            spans.append((len(before), len(until)))
    return text, spans


def _apply(directory: Path, messages: Chat, where: str, **options: Any) -> Any:
    tokenizer = _tokenizer(directory)
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # templates are programs, and raise what they like
        raise BadDocument(f"{where}: the model's chat template refuses this: {error}".split("\n")[0]) from None


@cache
def _tokenizer(directory: Path) -> Any:
    try:
        import jinja2  # noqa: F401 - what transformers renders with
        from transformers import AutoTokenizer
    except ImportError:
        raise NestlingError('"messages" need a chat template renderer: pip install "nestling[hf]" jinja2') from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError) as error:
        raise NestlingError(f"{directory} has no tokenizer that transformers can load: {reason(error)}") from None
    if tokenizer.chat_template is None:
        raise NestlingError(f'{directory} has no chat template; give lines with "text" instead of "messages"')
    return tokenizer
