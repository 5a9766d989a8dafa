"""The two forms of OpenAI's answers, whole and in chunks."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Protocol

from tokenizers import Tokenizer

from nestling.serve.choice import Piece, chat_logprobs, completion_logprobs
from nestling.serve.service import Asking


class Form(Protocol):
    prefix: str
    whole: str
    chunk: str

    def opening(self, asking: Asking) -> Iterator[dict[str, Any]]:
        """Chunks before the first piece."""

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A piece as a chunk, if it shows anything."""

    def choice(self, pieces: list[Piece]) -> dict[str, Any]:
        """A finished choice."""


class ChatForm:
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def opening(self, asking: Asking) -> Iterator[dict[str, Any]]:
        for choice in asking.choices:
            yield self._chunk(choice.index, {"role": "assistant", "content": ""}, None, None)

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        delta = _thoughts(piece.reasoning) | ({"content": piece.text} if piece.text else {})
        logprobs = None if piece.heard is None else chat_logprobs(piece.heard, self.tokenizer)
        if delta or piece.finish or logprobs:
            yield self._chunk(piece.index, delta, piece.finish, logprobs)

    def _chunk(self, index: int, delta: dict[str, Any], finish: str | None, logprobs: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {"object": self.chunk, "choices": [choice]}

    def choice(self, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        reasoning = "".join(piece.reasoning for piece in pieces)
        message = {"role": "assistant", "content": text, "refusal": None} | _thoughts(reasoning)
        said = [found for piece in pieces if piece.heard and (found := chat_logprobs(piece.heard, self.tokenizer))]
        logprobs = {"content": [entry for one in said for entry in one["content"]], "refusal": None} if said else None
        return {"index": pieces[0].index, "message": message, "logprobs": logprobs, "finish_reason": pieces[-1].finish}


def _thoughts(reasoning: str) -> dict[str, Any]:
    """Under the name of now and under the one that older clients read."""
    return {"reasoning": reasoning, "reasoning_content": reasoning} if reasoning else {}


class CompletionForm:
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def opening(self, asking: Asking) -> Iterator[dict[str, Any]]:
        return iter(())

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        logprobs = None if piece.heard is None else completion_logprobs(piece.heard, self.tokenizer)
        if piece.text or piece.finish or logprobs:
            choice = {"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish}
            yield {"object": self.chunk, "choices": [choice]}

    def choice(self, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        said = [f for piece in pieces if piece.heard and (f := completion_logprobs(piece.heard, self.tokenizer))]
        logprobs: dict[str, list[Any]] | None = {key: [] for key in said[0]} if said else None
        offset = 0
        for one in said:
            assert logprobs is not None
            for key, values in (one | {"text_offset": [offset]}).items():
                logprobs[key] += values
            offset += len(one["tokens"][0])
        return {"index": pieces[0].index, "text": text, "logprobs": logprobs, "finish_reason": pieces[-1].finish}


async def collected(pieces: AsyncGenerator[Piece], asking: Asking, form: Form, stamp: dict[str, Any]) -> dict[str, Any]:
    """A whole answer."""
    of: dict[int, list[Piece]] = {choice.index: [] for choice in asking.choices}
    async with aclosing(pieces):
        async for piece in pieces:
            of[piece.index].append(piece)
    choices = [form.choice(found) for found in of.values()]
    return stamp | {"object": form.whole, "choices": choices, "usage": asking.usage()}
