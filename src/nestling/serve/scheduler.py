"""Continuous batching over the sizes of a family: who is read, who goes on, who waits. No threads, no clock, no HTTP.

A request waits until its cache fits, then its prompt is read, then it goes on by a token per step until it ends:

    submit → waiting ─ admit ─► reading ─ read ─► going on ─► ended
             fair by client     in chunks         a batch per size

Every step reads at most `chunk` tokens of prompts and gives every request that goes on its next token, so a long prompt
delays nobody's next token by more than its chunk. Requests of one size share their products; sizes take turns within a
step. What a request gets depends on nothing but itself.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nestling.arch.submodel import Submodel
from nestling.errors import NestlingError
from nestling.infer.family import View
from nestling.infer.generate import start
from nestling.infer.sampling import Row, choose
from nestling.infer.steps import last_logits, step
from nestling.model.cache import Cache
from nestling.serve.room import Room
from nestling.units import binary


@dataclass(eq=False)
class Request:
    """One sequence that someone wants of one size. `top` asks for the log-probability of each token, and of so many
    others at its place."""

    view: View
    row: Row
    client: str = ""
    top: int | None = None
    read: int = 0  # tokens of the prompt

    @property
    def size(self) -> Submodel:
        return self.view.submodel

    @property
    def tokens(self) -> int:
        """At most, at its end."""
        return len(self.row.prompt) + self.row.limit


@dataclass(frozen=True)
class Heard:
    """A request's next token, None for an end token; the request has ended where its row has a reason."""

    request: Request
    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Batch:
    """The requests of one size that go on together, a row of the cache each."""

    requests: list[Request] = field(default_factory=list)
    cache: Cache = field(default_factory=Cache)

    def join(self, requests: Sequence[Request], cache: Cache) -> None:
        if self.requests:
            self.cache.join(cache, len(self.requests), len(requests))
        else:
            self.cache = cache
        self.requests += requests

    def leave(self) -> None:
        """Let go of those that have ended."""
        going = [place for place, request in enumerate(self.requests) if request.row.reason is None]
        if len(going) == len(self.requests):
            return
        self.requests = [self.requests[place] for place in going]
        if going:
            self.cache.keep(going)
        else:
            self.cache = Cache()


class Scheduler:
    """cache_bytes: what all caches may hold together. chunk: tokens of prompts read per step. rows: requests that may
    be read or go on at a time."""

    def __init__(self, *, cache_bytes: int, chunk: int = 256, rows: int = 64) -> None:
        assert chunk >= 3
        self.chunk, self.rows, self.room = chunk, rows, Room(cache_bytes)
        self.waiting: dict[str, deque[Request]] = {}  # by client, the one whose turn it is first
        self.reading: deque[tuple[Request, Cache]] = deque()
        self.batches: dict[Submodel, Batch] = {}

    # ---- from outside, between steps

    def check(self, request: Request) -> None:
        """Refuse a request that could not be held even alone."""
        need = self.room.needed([request])
        if need > self.room.limit:
            raise NestlingError(
                f"{request.tokens:,} tokens (prompt and max_tokens) need {binary(need)} of cache, and there are "
                f"{binary(self.room.limit)}; ask for fewer tokens, or for a smaller size"
            )

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self.check(request)
        self.waiting.setdefault(request.client, deque()).append(request)

    def cancel(self, request: Request, reason: str = "cancelled") -> None:
        """Take a request out; what it holds is free when the next step begins."""
        request.row.reason = request.row.reason or reason

    def clear(self) -> None:
        """Let go of everything."""
        self.waiting, self.batches = {}, {}
        self.reading.clear()

    @property
    def queued(self) -> int:
        return sum(map(len, self.waiting.values()))

    @property
    def active(self) -> list[Request]:
        """All that hold a cache."""
        return [request for request, _ in self.reading] + [r for batch in self.batches.values() for r in batch.requests]

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.reading and not self.batches

    @property
    def held_bytes(self) -> int:
        caches = [cache for _, cache in self.reading] + [batch.cache for batch in self.batches.values()]
        return sum(cache.nbytes for cache in caches)

    # ---- a step

    @torch.inference_mode()
    def step(self) -> list[Heard]:
        """Let go of the ended, admit what fits, read a chunk, and give everyone who goes on a token."""
        self._let_go()
        self._admit()
        heard = [*self._read(), *self._go_on()]
        self._let_go()
        return heard

    def _let_go(self) -> None:
        self.reading = deque((request, cache) for request, cache in self.reading if request.row.reason is None)
        for batch in self.batches.values():
            batch.leave()
        self.batches = {size: batch for size, batch in self.batches.items() if batch.requests}
        alive = {client: deque(r for r in queue if r.row.reason is None) for client, queue in self.waiting.items()}
        self.waiting = {client: queue for client, queue in alive.items() if queue}

    def _admit(self) -> None:
        """Clients take turns. Whoever's turn it is and does not fit holds the others back, lest it be starved."""
        while self.waiting:
            client, queue = next(iter(self.waiting.items()))
            active = self.active
            if len(active) >= self.rows or self.room.needed([*active, queue[0]]) > self.room.limit:
                return
            self.reading.append((queue.popleft(), Cache()))
            del self.waiting[client]
            if queue:
                self.waiting[client] = queue  # behind the others

    def _read(self) -> Iterator[Heard]:
        """A chunk of one long prompt, or several short ones of one size side by side."""
        if not self.reading:
            return
        request, cache = self.reading.popleft()
        left = len(request.row.prompt) - request.read
        if request.read or left > self.chunk:
            count = left if left <= self.chunk else self.chunk - (left == self.chunk + 1)  # one token is no sequence
            piece = torch.tensor([request.row.prompt[request.read : request.read + count]])
            logits_Bv = last_logits(request.view, piece, cache)
            request.read += count
            if count < left:
                self.reading.append((request, cache))
                return
            together = [request]
        else:
            together = [request, *self._side_by_side(request)]
            cache, logits_Bv = start(request.view, [other.row.prompt for other in together])
        yield from _hear(logits_Bv, together)
        self.batches.setdefault(request.size, Batch()).join(together, cache)

    def _side_by_side(self, first: Request) -> list[Request]:
        """Others of the same size whose whole prompts fit into this chunk; they leave the queue."""
        taken: list[Request] = []
        longest = len(first.row.prompt)
        for request, _ in list(self.reading):
            widest = max(longest, len(request.row.prompt))
            if request.size == first.size and not request.read and widest * (len(taken) + 2) <= self.chunk:
                taken.append(request)
                longest = widest
        self.reading = deque(item for item in self.reading if item[0] not in taken)
        return taken

    def _go_on(self) -> Iterator[Heard]:
        for batch in self.batches.values():
            batch.leave()
            if batch.requests:
                last = [request.row.tokens[-1] for request in batch.requests]
                yield from _hear(step(batch.requests[0].view, last, batch.cache), batch.requests)


def _hear(logits_Bv: Tensor, requests: Sequence[Request]) -> list[Heard]:
    """Choose everyone's next token."""
    tokens = choose(logits_Bv, [request.row for request in requests])
    said = _logprobs(logits_Bv, tokens, requests)
    heard = []
    for place, (request, token) in enumerate(zip(requests, tokens, strict=True)):
        shown = request.row.take(token)
        heard.append(Heard(request, token if shown else None, *said.get(place, ())))
    return heard


def _logprobs(
    logits_Bv: Tensor, tokens: Sequence[int], requests: Sequence[Request]
) -> Mapping[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """Place -> the log-probability of its token and the most probable ones, where they were asked for."""
    said = {}
    for place, request in enumerate(requests):
        if request.top is not None:
            logprobs_v = logits_Bv[place].double().log_softmax(-1)
            best = logprobs_v.topk(min(request.top, len(logprobs_v)))
            top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            said[place] = (float(logprobs_v[tokens[place]]), top)
    return said
