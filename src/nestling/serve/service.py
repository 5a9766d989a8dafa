"""From what a client asks to pieces of text as they come: the asyncio side of the engine thread."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from nestling.errors import NestlingError
from nestling.infer.family import View
from nestling.infer.sampling import Row, Sampling
from nestling.serve.choice import Choice, Piece
from nestling.serve.engine import Engine
from nestling.serve.metrics import Metrics
from nestling.serve.models import Models
from nestling.serve.protocol import Asked, Chat, Completion, Failure, Limits
from nestling.serve.scheduler import Heard, Request, Scheduler


@dataclass(frozen=True)
class Asking:
    """What a client wants, checked: choices of one or more prompts, whose tokens are counted once each."""

    choices: list[Choice]
    prompt_tokens: int
    heard: asyncio.Queue[Heard | Failure] = field(default_factory=asyncio.Queue)

    def usage(self) -> dict[str, int]:
        completion = sum(choice.tokens for choice in self.choices)
        total = self.prompt_tokens + completion
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion, "total_tokens": total}


class Service:
    """Everything a server holds; `follow` is the only way to its engine."""

    def __init__(self, models: Models, scheduler: Scheduler, limits: Limits | None = None) -> None:
        self.models, self.limits = models, limits or Limits()
        self.engine = Engine(scheduler, self._told)
        self.metrics = Metrics(scheduler)
        self.following: dict[Request, asyncio.Queue[Heard | Failure]] = {}
        self.loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.engine.start()

    def _told(self, heard: list[Heard] | None) -> None:
        """In the engine's thread, once per step."""
        assert self.loop is not None
        self.metrics.look()
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._deliver, heard)

    def _deliver(self, heard: list[Heard] | None) -> None:
        if heard is None:
            self._fail(Failure(500, "the model failed on this step; the request can be sent again"))
            return
        for said in heard:
            if (queue := self.following.get(said.request)) is not None:
                queue.put_nowait(said)

    def cut_off(self) -> int:
        """Whatever is in hand fails, because the server is stopping. Returns how many choices that is."""
        self._fail(Failure(503, "the server is stopping; the answer is not complete"))
        return len(self.following)

    def _fail(self, failure: Failure) -> None:
        for waiting in self.following.values():
            waiting.put_nowait(failure)

    async def follow(self, asking: Asking) -> AsyncGenerator[Piece]:
        """The pieces of all choices as they come. Whoever stops following sets its choices free within a step."""
        choices = {choice.request: choice for choice in asking.choices}
        began, first, outcome = time.monotonic(), True, "cancelled"
        self.metrics.prompt.inc(asking.prompt_tokens)
        try:
            for request in choices:
                self.engine.submit(request)
            while any(choice.finish is None for choice in asking.choices):
                heard = await self._next(asking.heard, began)
                if first:
                    self.metrics.first.observe(time.monotonic() - began)
                    first = False
                choice = choices[heard.request]
                if choice.finish is None:
                    piece = choice.take(heard)
                    self.metrics.generated.inc(heard.token is not None)
                    if piece.finish is not None:
                        self.engine.cancel(choice.request)  # no longer of use, where a stop string ended it
                    yield piece
            outcome = "finished"
        except Failure:
            outcome = "failed"
            raise
        finally:
            self.let_go(asking)
            self.metrics.requests.labels(outcome).inc()

    def let_go(self, asking: Asking) -> None:
        """Whatever was made by `chat` or `completion` is in hand until it is let go of."""
        for choice in asking.choices:
            if self.following.pop(choice.request, None) is not None:
                self.engine.cancel(choice.request)

    async def _next(self, queue: asyncio.Queue[Heard | Failure], began: float) -> Heard:
        left = self.limits.seconds - (time.monotonic() - began)
        try:
            if left <= 0:
                raise TimeoutError
            async with asyncio.timeout(left):  # wait_for of Python 3.11 forgets that it was cancelled as an item came
                heard = await queue.get()
        except TimeoutError:
            raise Failure(503, f"this took longer than the server's limit of {self.limits.seconds:g} s") from None
        if isinstance(heard, Failure):
            raise heard
        return heard

    # ---- what is asked

    async def chat(self, asked: Chat, client: str) -> Asking:
        view = await self._view(asked)
        render = self.models.render
        if render is None:
            raise Failure(400, self.models.no_chat, param="messages")
        text = render([message.plain() for message in asked.messages], asked.chat_template_kwargs or {})
        prompt = await asyncio.to_thread(self.models.encode, text, False)
        thinking = text.rstrip().endswith("<think>")
        asked.max_tokens = asked.max_completion_tokens or asked.max_tokens
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        return self._asking(asked, view, [prompt], client, top, asked.max_tokens or self.limits.max_tokens, thinking)

    async def completion(self, asked: Completion, client: str) -> Asking:
        view = await self._view(asked)
        prompts = await asyncio.to_thread(self._prompts, asked.prompt)
        return self._asking(asked, view, prompts, client, asked.logprobs, asked.max_tokens or 16, None)

    async def _view(self, asked: Asked) -> View:
        asked.check(self.limits)
        known = self.models.known(asked.model)
        return await asyncio.to_thread(self.models.find, asked.model) if known is None else known

    def _prompts(self, given: str | Sequence[str | int | list[int]]) -> list[list[int]]:
        if isinstance(given, str):
            return [self.models.encode(given)]
        if all(isinstance(item, int) for item in given):
            return [self.models.checked([item for item in given if isinstance(item, int)])]
        prompts = [item for item in given if not isinstance(item, int)]
        return [self.models.encode(item) if isinstance(item, str) else self.models.checked(item) for item in prompts]

    def _asking(
        self,
        asked: Asked,
        view: View,
        prompts: list[list[int]],
        client: str,
        top: int | None,
        max_tokens: int,
        thinking: bool | None,
    ) -> Asking:
        """The requests behind it, refused here where they ask for too much."""
        n, limits = asked.n or 1, self.limits
        if not all(prompts):
            raise NestlingError("the prompt is empty")
        if (longest := max(map(len, prompts))) > limits.prompt_tokens:
            raise NestlingError(f"the prompt has {longest:,} tokens; this server's limit is {limits.prompt_tokens:,}")
        if n * len(prompts) > limits.open:
            raise NestlingError(f"{n * len(prompts)} choices in one request; this server's limit is {limits.open}")
        if len(self.following) + n * len(prompts) > limits.open:
            raise Failure(429, f"{len(self.following)} requests are in hand; try again in a moment", "queue_full")
        temperature = 1.0 if asked.temperature is None else asked.temperature
        sampling = Sampling(temperature, asked.top_p or 1.0, max(asked.top_k or 0, 0))
        seed = secrets.randbits(64) if asked.seed is None else asked.seed
        choices: list[Choice] = []
        for place, prompt in enumerate(prompts):
            for sample in range(n):
                row = Row(prompt, max_tokens, sampling, self.models.ends, f"{seed} {place} {sample}")
                request = Request(view, row, client, top)
                self.engine.scheduler.check(request)
                choices.append(Choice(len(choices), request, self.models.tokenizer, asked.stops, thinking))
        asking = Asking(choices, sum(map(len, prompts)))
        self.following.update(dict.fromkeys((choice.request for choice in choices), asking.heard))
        return asking
