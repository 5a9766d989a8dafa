"""A batch that goes on, one token for every row at a time: operation by operation, or as a CUDA graph.

A graph launches a whole step at once, where a GPU otherwise waits for one small operation after the other. It remembers
addresses and shapes, so that what it reads and writes are tensors of its own: the rows of a batch, more columns of keys
and values than are in use, and a count of tokens per row on the device.

B rows · v vocabulary
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nestling.infer.family import View
from nestling.model.cache import GROWING, Cache
from nestling.model.width import product

COLUMNS = 256  # of keys and values: a graph has a multiple, of which at least half are free at its start
WORTH = 16  # tokens: fewer are not worth a graph, which costs a few steps
KEPT = 2  # graphs of a view that wait to be used again, each with its keys and values
CLOSE = 0.05  # of the largest logit: how far rounding may take a graph from the operations, in bf16

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records a step that works in place: (what does it again, where its result is each time)."""

log = logging.getLogger(__name__)


def last_logits(view: View, ids_BL: Tensor, cache: Cache, mask_BL: Tensor | None = None) -> Tensor:
    """Logits after the last position alone, [B, v]."""
    device = _device(view)
    mask_BL = None if mask_BL is None else mask_BL.to(device)
    hidden_BLd = view.model.hidden(ids_BL.to(device), view.widths, cache, mask_BL)
    return product(hidden_BLd[:, -1], view.model.head_weight(view.widths))


def step(view: View, tokens: Sequence[int], cache: Cache) -> Tensor:
    """The logits [B, v] that follow when every row of the cache has got one more token."""
    return last_logits(view, torch.tensor(tokens)[:, None], cache)


def _device(view: View) -> torch.device:
    return view.model.ends.get_parameter("backbone.embeddings.weight").device


class Steps:
    """Operation by operation."""

    def __init__(self, view: View, cache: Cache) -> None:
        self.view, self.cache = view, cache

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """The logits [B, v] that follow one more token of every row; the next call may overwrite them."""
        return step(self.view, tokens, self.cache)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order."""
        self.cache.keep(rows)

    def close(self) -> None:
        """Nothing follows."""


def steps(view: View, cache: Cache, tokens: int) -> Steps:
    """The quickest way to give the rows of a cache up to so many tokens each."""
    device = _device(view)
    alike = "E" not in view.model.architecture.hybrid_override_pattern  # how many tokens an expert has differs
    graphs = device.type == "cuda" and tokens >= WORTH and alike and not torch.is_autocast_enabled("cuda")
    return Graphed(view, cache, partial(record, device=device)) if graphs else Steps(view, cache)


@dataclass(eq=False)
class Graph:
    """A recorded step, and the tensors that it reads and writes."""

    cache: Cache
    ids_B1: Tensor
    logits_Bv: Tensor
    replay: Callable[[], None]

    @staticmethod
    def of(view: View, like: Cache, rows: int, columns: int, record: Record) -> "Graph":
        """Record a step of a cache that has so many rows and columns; what it holds is filled in later."""
        at_B = torch.zeros(rows, dtype=torch.int64, device=_device(view))
        cache, ids_B1 = Cache({}, columns - 1, at_B=at_B), at_B[:, None].clone()
        for layer, state in like.layers.items():
            shapes = {n: (*h.shape[:2], columns, h.shape[3]) if n in GROWING else h.shape for n, h in state.items()}
            cache.layers[layer] = {name: state[name].new_zeros(shape) for name, shape in shapes.items()}

        def run() -> Tensor:
            seen = Cache({layer: dict(state) for layer, state in cache.layers.items()}, columns - 1, at_B=at_B)
            logits_Bv = last_logits(view, ids_B1, seen)
            for layer, state in cache.layers.items():
                for name, held in state.items():
                    if (new := seen.layers[layer][name]) is not held:
                        held.copy_(new)
            at_B.add_(1)
            return logits_Bv

        replay, logits_Bv = record(run)
        return Graph(cache, ids_B1, logits_Bv, replay)

    def fill(self, cache: Cache) -> None:
        """Take over what a cache holds, as a copy. What is masked must be finite: behind its columns are zeros."""
        assert self.cache.at_B is not None
        self.cache.at_B.copy_(torch.tensor(cache.each(len(self.ids_B1))))
        for layer, state in cache.layers.items():
            for name, held in state.items():
                room = self.cache.layers[layer][name]
                if name in GROWING:
                    room[:, :, held.shape[2] :] = 0
                    room = room[:, :, : held.shape[2]]
                room.copy_(held)

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        self.ids_B1.copy_(torch.tensor(tokens)[:, None])
        self.replay()
        return self.logits_Bv


class Graphed(Steps):
    """As graphs. Rows that have left are computed on until half of them are gone; then, and when its columns are full,
    another graph follows."""

    waiting: WeakKeyDictionary[View, OrderedDict[tuple[int, int], Graph]] = WeakKeyDictionary()
    trusted: bool | None = None  # by this process; the first graph is compared with the operations

    def __init__(self, view: View, cache: Cache, record: Record) -> None:
        super().__init__(view, cache)
        self.record = record
        self.graph: Graph | None = None
        self.key = 0, 0  # of the graph: its rows and columns
        self.rows: list[int] = []  # of these, those that go on

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        if self.graph is not None and self.cache.length >= self.key[1]:
            self.cache.keep(self.rows)
            self.graph = None  # it will not be long enough again soon
        if self.graph is None and Graphed.trusted is not False:
            self._enter(tokens)
        if self.graph is None:
            return super().__call__(tokens)
        given = dict(zip(self.rows, tokens, strict=True))
        logits_Bv = self.graph([given.get(row, 0) for row in range(self.key[0])])
        self.cache.advance(1)
        return logits_Bv if len(given) == len(logits_Bv) else logits_Bv[self.rows]

    def keep(self, rows: Sequence[int]) -> None:
        if self.graph is None:
            super().keep(rows)
            return
        self.rows = [self.rows[row] for row in rows]
        if 2 * len(self.rows) <= self.key[0]:
            self._leave()

    def close(self) -> None:
        """The graph may be used again."""
        if self.graph is not None:
            found = Graphed.waiting.setdefault(self.view, OrderedDict())
            found[self.key] = self.graph
            while len(found) > KEPT:
                found.popitem(last=False)
        self.graph = None

    def _leave(self) -> None:
        """From the graph's cache back to one of one's own."""
        self.cache.keep(self.rows)
        self.close()

    def _enter(self, tokens: Sequence[int]) -> None:
        """Go on in a graph, if there is one that does what the operations do."""
        rows, columns = len(tokens), -(-(self.cache.length + COLUMNS // 2) // COLUMNS) * COLUMNS
        try:
            graph = self._found(rows, columns)
            graph.fill(self.cache)
            if Graphed.trusted is None:
                if not self._agrees(graph, tokens):
                    _distrust("a recorded step differs from its operations")
                    return
                Graphed.trusted = True
                graph.fill(self.cache)
        except RuntimeError as error:
            _distrust(f"a step could not be recorded: {error}")
            return
        held = {layer: dict(state) for layer, state in graph.cache.layers.items()}
        self.graph, self.key, self.rows = graph, (rows, columns), list(range(rows))
        self.cache = Cache(held, self.cache.length, self.cache.lengths)

    def _agrees(self, graph: Graph, tokens: Sequence[int]) -> bool:
        """Whether two steps of a graph are two steps of operations: the second sees what the first left behind."""
        cache = self.cache.copy()
        for _ in range(2):
            expected_Bv, found_Bv = step(self.view, tokens, cache), graph(tokens)
            if not (found_Bv - expected_Bv).abs().max() <= CLOSE * expected_Bv.abs().max():  # not a number either
                return False
        return True

    def _found(self, rows: int, columns: int) -> Graph:
        waiting = Graphed.waiting.get(self.view, OrderedDict()).pop((rows, columns), None)
        return waiting or Graph.of(self.view, self.cache, rows, columns, self.record)


def _distrust(why: str) -> None:
    Graphed.trusted = False
    Graphed.waiting.clear()
    log.warning("CUDA graphs are not used, decoding goes on operation by operation: %s", why)


def record(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """A step as a CUDA graph. Other threads go on meanwhile; a recording that fails leaves their stream as it was."""
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        now, aside, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            for _ in range(2):  # what libraries set up at a first call is not to be recorded
                run()
        now.wait_stream(aside)
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            result = run()
    return graph.replay, result
