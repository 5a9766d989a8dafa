"""One choice of an answer: from tokens to pieces of text, with its stops, thoughts and log-probabilities."""

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from nestling.infer.text import Decoder, Stops, Thought
from nestling.serve.scheduler import Heard, Request


@dataclass(frozen=True)
class Piece:
    """What one token adds to a choice; `finish` is set on its last piece."""

    index: int
    text: str
    reasoning: str = ""
    finish: str | None = None
    heard: Heard | None = None


class Choice:
    """thinking: whether the prompt opened a thought; None where thoughts are text like any other."""

    def __init__(
        self, index: int, request: Request, tokenizer: Tokenizer, stops: list[str], thinking: bool | None = None
    ) -> None:
        self.index, self.request = index, request
        self.decoder, self.stops = Decoder(tokenizer), Stops(stops)
        self.thought = None if thinking is None else Thought(thinking)
        self.tokens = 0
        self.finish: str | None = None

    def take(self, heard: Heard) -> Piece:
        """The piece for the next token. After `finish` nothing more is to come, whatever the request still gets."""
        text = ""
        if heard.token is not None:
            self.tokens += 1
            text = self.stops.add(self.decoder.add(heard.token))
        if self.stops.found is not None or heard.token is None:
            self.finish = "stop"
        elif self.tokens >= self.request.row.limit:
            self.finish = "length"
        if self.finish is not None and self.stops.found is None:
            text += self.stops.add(self.decoder.end())
            text += self.stops.end()
        reasoning, answer = ("", text) if self.thought is None else self.thought.add(text)
        if self.finish is not None and self.thought is not None:
            late = self.thought.end()
            reasoning, answer = reasoning + late[0], answer + late[1]
        return Piece(self.index, answer, reasoning, self.finish, heard)


def chat_logprobs(heard: Heard, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if heard.token is None or heard.logprob is None:
        return None
    named = [_named(tokenizer, token, logprob) for token, logprob in heard.top]
    return {"content": [_named(tokenizer, heard.token, heard.logprob) | {"top_logprobs": named}], "refusal": None}


def completion_logprobs(heard: Heard, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if heard.token is None or heard.logprob is None:
        return None
    top = {tokenizer.decode([token], skip_special_tokens=False): logprob for token, logprob in heard.top}
    text = tokenizer.decode([heard.token], skip_special_tokens=False)
    return {"tokens": [text], "token_logprobs": [heard.logprob], "top_logprobs": [top], "text_offset": [0]}


def _named(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    text = tokenizer.decode([token], skip_special_tokens=False)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
