"""A conversation as the text that a model was trained on, by the chat template beside its weights."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nestling.errors import NestlingError

Render = Callable[[Sequence[Mapping[str, Any]], Mapping[str, Any]], str]
"""(messages, the template's own options such as enable_thinking) -> the prompt, ready for the model's answer."""


def chat_template(directory: str | Path) -> Render:
    """The template of a model directory, in stock transformers' hands."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise NestlingError("a chat template needs stock transformers: pip install 'nestling[hf]'") from None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError):
        raise NestlingError(f"{directory} has no tokenizer that transformers can load; a chat needs one") from None
    if tokenizer.chat_template is None:
        raise NestlingError(f"{directory} has no chat template, so it takes text to continue and no conversations")

    own = inspect.signature(tokenizer.apply_chat_template).parameters  # another template among them, that is a program

    def render(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        if taken := sorted(own.keys() & options.keys()):
            raise NestlingError(f"{taken[0]} cannot be given to the chat template; only variables that it reads can")
        given = {**options, "tokenize": False, "add_generation_prompt": True}
        try:
            return str(tokenizer.apply_chat_template(list(messages), **given))
        except Exception as error:  # a template raises what it likes, also on purpose
            raise NestlingError(f"the chat template refuses this conversation: {error}") from None

    return render
