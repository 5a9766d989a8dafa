"""A recorded step does again what the operations do, whatever leaves, grows or goes wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stock
from nestling.arch.submodel import WHOLE, Submodel
from nestling.infer import steps
from nestling.infer.family import View
from nestling.infer.generate import generate
from nestling.model.native import library
from nestling.model.nemotron_h import NemotronH

HYBRID = stock.SPOKEN
SMALL = Submodel((0, 1, 2, 4), 16, 20, mamba_num_heads=4, mamba_head_dim=3, num_attention_heads=2)
PROMPTS = [stock.tokens(23, 1, length, seed=length)[0].tolist() for length in (1, 3, 9, 20, 33)]
REFUSED = {"_local_scalar_dense", "lift_fresh", "nonzero", "item"}
"""What a CUDA graph cannot record: the host waits for a value, or gives one."""


class Recorder(TorchDispatchMode):
    """What a CUDA graph is: the same operations on the same tensors, again and again, with no Python in between."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert func.__name__.partition(".")[0] not in REFUSED, f"{func} cannot be recorded"
        made = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for func, args, kwargs, made in self.done:
            again = func(*args, **kwargs)
            memory = {t.untyped_storage().data_ptr() for t in tensors(args, kwargs)}
            for old, new in zip(tensors(made), tensors(again), strict=True):
                if new.untyped_storage().data_ptr() not in memory:  # neither in place nor a view
                    old.copy_(new)


def tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Records:
    """Instead of `steps.record`; counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.count += 1
        run()  # as the first two of a CUDA graph, it leaves things behind
        recorder = Recorder()
        with recorder:
            result = run()
        return recorder.replay, result


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Records:
    """Decoding with recorded steps of torch's operations; what kernels write no recorder sees."""
    made = Records()
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.setattr(steps.Graphed, "trusted", None)
    monkeypatch.setattr(steps.Graphed, "waiting", type(steps.Graphed.waiting)())
    monkeypatch.setattr("nestling.infer.generate.steps", lambda view, cache, tokens: steps.Graphed(view, cache, made))
    return made


def view(submodel: Submodel = WHOLE) -> View:
    model = NemotronH(HYBRID, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return View(model.requires_grad_(False).eval(), submodel).held()


def plain(of: View, prompts: list[list[int]], **how: Any) -> list[list[int]]:
    """Operation by operation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nestling.infer.generate.steps", lambda view, cache, tokens: steps.Steps(view, cache))
        return generate(of, prompts, **how)


def ends(rows: list[list[int]]) -> int:
    """A token that ends some rows early and some never."""
    tokens = {token for row in rows for token in row}
    return max(tokens, key=lambda token: sum(token in row for row in rows) * sum(token not in row for row in rows))


@pytest.mark.parametrize("submodel", [WHOLE, SMALL], ids=["whole", "small"])
@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[2]] * 2], ids=["unequal", "alike"])
def test_recorded_is_the_same(records: Records, submodel: Submodel, prompts: list[list[int]]) -> None:
    of = view(submodel)
    expected = plain(of, prompts, max_tokens=30)
    assert generate(of, prompts, max_tokens=30) == expected
    (graph,) = steps.Graphed.waiting[of].values()
    with torch.inference_mode():
        for held in (held for state in graph.cache.layers.values() for held in state.values()):
            held.fill_(float("nan"))  # whatever it has seen
    assert generate(of, prompts, max_tokens=30) == expected
    assert records.count == 1  # the same graph, filled anew
    assert len({tuple(row) for row in expected}) > 1 or prompts[0] == prompts[1]


def test_rows_that_end(records: Records) -> None:
    of = view()
    eos = ends(plain(of, PROMPTS, max_tokens=40))
    expected = plain(of, PROMPTS, max_tokens=40, eos=eos)
    assert len({len(row) for row in expected}) > 1
    assert generate(of, PROMPTS, max_tokens=40, eos=eos) == expected
    drawn = {"max_tokens": 20, "temperature": 1.0, "n": 3, "seed": 4, "eos": eos}
    assert generate(of, PROMPTS, **drawn) == plain(of, PROMPTS, **drawn)


def test_columns_that_are_full(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "COLUMNS", 64)
    of = view()
    assert generate(of, PROMPTS, max_tokens=150) == plain(of, PROMPTS, max_tokens=150)
    assert records.count == 2  # of 128 and 192 columns


def test_two_at_a_time_have_a_graph_each(records: Records) -> None:
    of, others = view(), []
    expected = [plain(of, [prompt], max_tokens=20)[0] for prompt in PROMPTS[2:4]]

    def told(row: int, token: int) -> bool:
        seen.append(token)
        if len(seen) == 5:
            others.extend(generate(of, PROMPTS[3:4], max_tokens=20))
        return False

    for _ in range(2):  # then with graphs that wait
        seen: list[int] = []
        assert [*generate(of, PROMPTS[2:3], max_tokens=20, told=told), others.pop()] == expected
    assert records.count == 3  # one of a shape waits


def test_what_cannot_be_recorded_or_differs_goes_on_as_before(
    records: Records, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    of = view()
    expected = plain(of, PROMPTS, max_tokens=20)

    def refuses(run: Callable[[], Tensor]) -> Any:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def errs(run: Callable[[], Tensor]) -> Any:
        replay, result = records(run)
        return lambda: (replay(), result.mul_(1.1)), result

    for record, words in ((refuses, "not permitted when stream is capturing"), (errs, "differs from its operations")):
        monkeypatch.setattr(steps.Graphed, "trusted", None)
        monkeypatch.setattr(
            "nestling.infer.generate.steps", lambda view, cache, tokens, r=record: steps.Graphed(view, cache, r)
        )
        caplog.clear()
        assert generate(of, PROMPTS, max_tokens=20) == expected
        assert [words in line.getMessage() for line in caplog.records] == [True]  # said once
        assert generate(of, PROMPTS, max_tokens=20) == expected
        assert len(caplog.records) == 1


def test_graphs_are_for_many_tokens_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def kind(device: str, tokens: int) -> type:
        monkeypatch.setattr(steps, "_device", lambda view: torch.device(device))
        return type(steps.steps(of, steps.Cache(), tokens))

    of = view()
    assert kind("cpu", 1000) is kind("cuda", steps.WORTH - 1) is steps.Steps
    assert kind("cuda", steps.WORTH) is steps.Graphed
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert kind("cuda", 1000) is steps.Steps
