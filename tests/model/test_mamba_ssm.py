"""Where mamba-ssm and causal-conv1d are called: plain forms of what they document stand in for them, on the CPU.

benchmarks/mamba_ssm/check.py runs the real kernels of mamba-ssm, in Triton's interpreter.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import stock
from nestling.arch.submodel import Submodel
from nestling.model import mamba_ssm
from nestling.model.cache import Cache
from nestling.model.native import library
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard

# channels in multiples of 8, as causal-conv1d has them
HYBRID = replace(stock.SPOKEN, mamba_num_heads=8, mamba_head_dim=4, n_groups=2, ssm_state_size=8)
SMALL = Submodel(hidden_size=16, mamba_num_heads=4)


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    return_final_states: bool = False,
) -> Any:
    """[b, l, h, p], [b, l, h], [h], [b, l, g, n] twice, [h]; a token at a time, heads of a group side by side."""
    batch, length, heads, channels = x.shape
    assert B.shape == C.shape == (batch, length, B.shape[2], B.shape[3])
    assert (dt.shape, A.shape, D.shape) == ((batch, length, heads), (heads,), (heads,))
    assert z is None
    assert dt_bias is None
    assert seq_idx is None or seq_idx.dtype == torch.int32
    state = x.new_zeros(batch, heads, channels, B.shape[3], dtype=torch.float32)
    state = state if initial_states is None else initial_states.float()
    B, C = (t.float().repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    found = []
    for t in range(length):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        put = dt[:, t, :, None, None] * x[:, t].float()[..., None] * B[:, t, :, None]
        state = (dt[:, t] * A).exp()[..., None, None] * state + put
        found.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    y = torch.stack(found, 1).to(x.dtype)
    return (y, state) if return_final_states else y


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """x [b, c, l] with channels last in memory, weight [c, k], initial_states [b, c, k - 1]."""
    (batch, channels, _length), taps = x.shape, weight.shape[1]
    assert x.stride(1) == 1
    assert x.stride(0) % 8 == 0
    assert x.stride(2) % 8 == 0
    assert channels % 8 == 0
    assert weight.shape == (channels, taps)
    assert weight.stride(1) == 1
    assert activation == "silu"
    assert not (seq_idx is not None and initial_states is not None)
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    before = x.new_zeros(batch, channels, taps - 1) if initial_states is None else initial_states
    assert before.dtype == x.dtype
    assert initial_states is None or before.stride(1) == 1
    seen = torch.cat([before, x], 2).float()
    total = torch.zeros(x.shape) if bias is None else bias[:, None].expand(x.shape).float()
    for back in range(taps):
        there = seen[:, :, taps - 1 - back : seen.shape[2] - back]
        if seq_idx is not None and back:
            there = there * F.pad(seq_idx[:, back:] == seq_idx[:, :-back], (back, 0))[:, None]
        total = total + there * weight[:, -1 - back, None]
    return F.silu(total).to(x.dtype)


class Calls:
    """Counts what is called."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run, self.count = run, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return self.run(*args, **kwargs)


Install = Callable[..., tuple[Calls, Calls]]


@pytest.fixture(autouse=True)
def ours_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: there are no kernels in C++."""
    monkeypatch.setattr(library, "library", lambda: None)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """(scan, conv) -> counters of both, installed for the CPU and not yet looked at."""

    def install_(scan: Callable[..., Any] | None = chunk_scan, conv: Callable[..., Any] | None = conv1d) -> Any:
        counted = {"scan": scan and Calls(scan), "conv": conv and Calls(conv)}
        monkeypatch.setattr(mamba_ssm, "DEVICES", ("cpu",))
        monkeypatch.setattr(mamba_ssm, "_theirs", lambda what: counted[what])
        mamba_ssm._agrees.cache_clear()
        return counted["scan"], counted["conv"]

    yield install_
    mamba_ssm._agrees.cache_clear()


def model(dtype: torch.dtype = torch.bfloat16) -> NemotronH:
    made, generator = NemotronH(HYBRID), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return made.to(dtype)


def ids(length: int = 40) -> Tensor:
    return stock.tokens(23, 2, length, seed=3)


def close(found: Tensor, expected: Tensor) -> None:
    assert float((found.float() - expected.float()).abs().max()) <= 0.08 * float(expected.float().abs().max())


def apart(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def learnt(network: NemotronH, documents: bool) -> list[Tensor]:
    numbers = (torch.arange(40) // 11).expand(2, -1) if documents else None
    logits = network(ids(), hard(HYBRID, SMALL), documents_BL=numbers).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for name, p in network.named_parameters() if "A_log" in name or "conv" in name)]


def continued(network: NemotronH) -> Tensor:
    """The logits of a prompt in two pieces, and of one more token."""
    cache = Cache()
    with torch.inference_mode():
        return torch.cat([network(piece, None, cache).logits for piece in ids().split([23, 16, 1], 1)], 1)


def test_they_are_looked_at_within_checkpoints(install: Install) -> None:
    """What is kept for backward there is not what checkpointing keeps."""
    found = []
    for checkpointing in (True, False):
        scan, _ = install()
        network = model()
        network.gradient_checkpointing = checkpointing
        found.append(learnt(network, documents=True))
        assert scan.count > 2
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (ModuleNotFoundError("none", name="mamba_ssm"), 0),
        (ImportError("undefined symbol"), 1),
        (OSError("no libcudart"), 1),
    ],
)
def test_what_cannot_be_loaded_is_said_unless_it_is_not_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failure: Exception, said: int
) -> None:
    def fails(name: str) -> None:
        raise failure

    monkeypatch.setattr(mamba_ssm.importlib, "import_module", fails)
    mamba_ssm._theirs.cache_clear()
    assert [mamba_ssm._theirs("scan") for _ in range(2)] == [None, None]
    assert len(caplog.records) == said
    mamba_ssm._theirs.cache_clear()


@pytest.mark.parametrize("documents", [False, True])
def test_a_model_learns_through_them(install: Install, documents: bool) -> None:
    exact, ours = learnt(model(torch.float64), documents), learnt(model(), documents)
    scan, conv = install()
    found = learnt(model(), documents)
    layers = HYBRID.hybrid_override_pattern.count("M")
    assert (scan.count, conv.count) == (2 + layers, 2 + layers)  # two to be looked at
    for theirs, here, true in zip(found, ours, exact, strict=True):
        assert apart(theirs, true) <= 2 * apart(here, true) + 0.03  # bf16 is far from exact with both


def test_a_prompt_is_read_through_them(install: Install) -> None:
    expected = continued(model())
    scan, conv = install()
    close(continued(model()), expected)
    layers = HYBRID.hybrid_override_pattern.count("M")
    assert (scan.count, conv.count) == (2 + 2 * layers, 2 + 2 * layers)  # a single token is not a sequence


def test_wider_models_are_not_theirs(install: Install) -> None:
    scan, conv = install()
    expected = continued(model(torch.float32))
    assert scan.count == conv.count == 0
    install(None, None)
    assert torch.equal(continued(model(torch.float32)), expected)


def test_one_without_the_other(install: Install) -> None:
    expected = continued(model())
    for only in ({"conv": None}, {"scan": None}):
        install(**only)
        close(continued(model()), expected)


def wrong(change: Callable[[dict[str, Any]], Any], run: Callable[..., Any] = chunk_scan) -> Callable[..., Any]:
    """Theirs with its named arguments changed."""

    def call(*args: Any, **kwargs: Any) -> Any:
        change(kwargs)
        return run(*args, **kwargs)

    return call


def halved(*args: Any, **kwargs: Any) -> Any:
    """A gradient of x that is wrong, behind a result that is right."""
    x, *rest = args
    return chunk_scan(x / 2 + x.detach() / 2, *rest, **kwargs)


def not_a_number(*args: Any, **kwargs: Any) -> Any:
    y, state = chunk_scan(*args, **kwargs)
    return y * float("nan"), state


WRONG = {
    "B and C swapped": lambda x, dt, A, B, C, *rest, **how: chunk_scan(x, dt, A, C, B, *rest, **how),
    "documents ignored": wrong(lambda how: how.update(seq_idx=None)),
    "state ignored": wrong(lambda how: how.update(initial_states=None)),
    "half a gradient": halved,
    "not a number": not_a_number,
}


@pytest.mark.parametrize("how", WRONG)
def test_what_differs_is_not_used(install: Install, caplog: pytest.LogCaptureFixture, how: str) -> None:
    expected = continued(model())
    install(WRONG[how], None)
    assert torch.equal(continued(model()), expected)
    assert ["mamba_ssm is not used: " in line.getMessage() for line in caplog.records] == [True]


def test_another_signature_and_another_convolution_are_not_used(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    expected = continued(model())
    install(lambda *args: None, wrong(lambda how: how.update(activation="silu"), lambda x, *a, **k: x))
    assert torch.equal(continued(model()), expected)
    said = sorted(line.getMessage().partition(":")[0] for line in caplog.records)
    assert said == ["causal_conv1d is not used", "mamba_ssm is not used"]
