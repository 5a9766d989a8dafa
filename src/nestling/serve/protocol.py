"""What clients send, as OpenAI's API has it, and the limits that a server sets."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nestling.errors import NestlingError


@dataclass(frozen=True)
class Limits:
    """Of one request, but for `open`: requests in hand or waiting at a time."""

    prompt_tokens: int = 32768
    max_tokens: int = 4096
    n: int = 16
    stops: int = 16
    open: int = 256
    body_bytes: int = 4 * 2**20
    seconds: float = 600.0


_REFUSED = ("tools", "functions", "logit_bias", "audio", "suffix", "echo", "best_of", "use_beam_search", "guided_json")


class Asked(BaseModel):
    """What both endpoints take. Fields that change nothing here (user, metadata …) may be there."""

    model_config = ConfigDict(extra="allow")

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def check(self, limits: Limits) -> None:
        """Refuse what this server does not do, rather than leave it out in silence."""
        for key in _REFUSED:
            if (self.model_extra or {}).get(key):
                raise NestlingError(f"{key} is not supported")
        _within("n", self.n or 1, limits.n)
        _within("max_tokens", self.max_tokens or 1, limits.max_tokens)
        _within("the number of stop strings", len(self.stops), limits.stops)


def _within(what: str, given: int, limit: int) -> None:
    if given > limit:
        raise NestlingError(f"{what} = {given} is more than this server's limit of {limit}")


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None

    def plain(self) -> dict[str, Any]:
        """For a template, with the text in one piece."""
        parts = self.content if isinstance(self.content, list) else None
        return self.model_dump() | {"content": self.content if parts is None else "".join(part.text for part in parts)}


class Chat(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self, limits: Limits) -> None:
        super().check(limits)
        _within("max_completion_tokens", self.max_completion_tokens or 1, limits.max_tokens)


class Completion(Asked):
    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Failure(Exception):
    """What a client is told, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
