"""The scan and the convolution by the CUDA kernels of mamba-ssm and causal-conv1d, where these are installed.

They multiply numbers of 16 bits as they are, and wider ones in TF32, so that they are for models in 16 bits alone. At
their first use they are compared with our own operations in float64 on the CPU; if they differ, ours go on.

B batch · L length · g group · h head in its group · p head channel · n state · k taps · c channels of the convolution
"""

import importlib
import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # theirs
CLOSE = 0.03  # of the largest number: how far rounding to bf16 may take a result or a gradient
HOMES = {"scan": "mamba_ssm.ops.triton.ssd_combined", "conv": "causal_conv1d"}
NAMES = {"scan": "mamba_chunk_scan_combined", "conv": "causal_conv1d_fn"}
DEVICES = ("cuda",)
HALVES = (torch.bfloat16, torch.float16)

log = logging.getLogger(__name__)


def scans(x_BLghp: Tensor, precision: torch.dtype | None) -> bool:
    """Whether a sequence is scanned by mamba-ssm in a model of this precision."""
    return _serves(x_BLghp, precision) and _agrees("scan", precision)


def convolves(x_BLc: Tensor, taps_kc: Tensor) -> bool:
    """Whether causal-conv1d has a kernel for these sizes."""
    fits = x_BLc.shape[2] % 8 == 0 and 2 <= len(taps_kc) <= 4
    return fits and _serves(x_BLc, x_BLc.dtype) and _agrees("conv", x_BLc.dtype)


def scan(
    x_BLghp: Tensor,
    dt_BLgh: Tensor,
    A_gh: Tensor,
    B_BLgn: Tensor,
    C_BLgn: Tensor,
    D_gh: Tensor,
    state_Bghpn: Tensor | None,
    documents_BL: Tensor | None,
    precision: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`ssd`: y [B, L, g, h, p] in `precision`, and the state in float32."""
    x, B, C = (t.to(precision) for t in (x_BLghp, B_BLgn, C_BLgn))
    y, last = _theirs("scan")(
        x.flatten(2, 3),
        dt_BLgh.flatten(2),
        A_gh.flatten(),
        B,
        C,
        CHUNK,
        D=D_gh.flatten(),
        initial_states=None if state_Bghpn is None else state_Bghpn.flatten(1, 2),
        seq_idx=_numbers(documents_BL),
        return_final_states=True,
    )
    return y.view(x_BLghp.shape), last.unflatten(1, A_gh.shape)


def conv(
    x_BLc: Tensor, taps_kc: Tensor, bias_c: Tensor | None, window_Bkc: Tensor, documents_BL: Tensor | None
) -> Tensor:
    """silu of the causal convolution [B, L, c], in the dtype of x. No document goes on from a window."""
    window = None if documents_BL is not None else window_Bkc.to(x_BLc.dtype).contiguous().mT
    places = x_BLc.stride(0), x_BLc.stride(1), x_BLc.storage_offset()
    aligned = x_BLc.stride(2) == 1 and all(place % 8 == 0 for place in places)
    x_BcL = (x_BLc if aligned else x_BLc.contiguous()).mT
    taps_ck, numbers = taps_kc.mT.contiguous(), _numbers(documents_BL)
    return _theirs("conv")(x_BcL, taps_ck, bias_c, numbers, window, activation="silu").mT


def _numbers(documents_BL: Tensor | None) -> Tensor | None:
    return None if documents_BL is None else documents_BL.to(torch.int32).contiguous()


def _serves(x: Tensor, precision: torch.dtype | None) -> bool:
    return x.device.type in DEVICES and precision in HALVES and not torch.compiler.is_compiling()


@cache
def _theirs(what: str) -> Any:
    """Their function; None if they are not installed, or cannot be loaded."""
    package = HOMES[what].partition(".")[0]
    try:
        return getattr(importlib.import_module(HOMES[what]), NAMES[what])
    except Exception as failure:  # one that was built for another torch fails in many ways
        if not (isinstance(failure, ModuleNotFoundError) and failure.name == package):
            log.warning("%s is not used, it cannot be loaded: %s", package, failure)
        return None


# ---- whether they are to be trusted


@cache
def _agrees(what: str, precision: torch.dtype) -> bool:
    """Whether their kernels are here and give what ours do, gradients too, from a window or state and of documents."""
    if _theirs(what) is None:
        return False
    package = HOMES[what].partition(".")[0]
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(DEVICES[0], enabled=False),
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),  # not those of checkpointing
        ):
            error = max(_error(*CASES[what](precision, documents), documents) for documents in (False, True))
    except Exception as failure:  # another version's signature, a GPU that they do not support
        log.warning("%s is not used: %s", package, failure)
        return False
    if error > CLOSE:
        log.warning("%s is not used: it differs from our own operations by %.2g", package, error)
    return error <= CLOSE


Run = Callable[..., Sequence[Tensor]]
Case = tuple[list[tuple[tuple[int, ...], torch.dtype]], Run, Run]
"""Shapes and dtypes of inputs, and two functions of them and of documents, [B, L] or None, that should do the same."""

LENGTH, DOCUMENT = 300, 70


def _scan_case(precision: torch.dtype, documents: bool) -> Case:
    from nestling.model.ssd import ssd

    g, h, p, n = 2, 3, 16, 16
    x, dt, A, B, C = (2, LENGTH, g, h, p), (2, LENGTH, g, h), (g, h), (2, LENGTH, g, n), (2, LENGTH, g, n)
    inputs = [(x, precision), (dt, torch.float32), (A, torch.float32), (B, precision), (C, precision)]
    inputs += [(A, torch.float32)] + [((2, g, h, p, n), torch.float32)] * (not documents)

    def steady(run: Run) -> Run:
        """Positive steps, decays below 1."""

        def call(numbers: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, *rest: Tensor) -> Sequence[Tensor]:
            B, C, D, *state = rest
            return run(x, dt.exp() / 20, -A.exp(), B, C, D, state[0] if state else None, numbers)

        return call

    ours = steady(lambda x, dt, A, B, C, D, S, numbers: ssd(x, dt, A, B, C, D, S, documents_BL=numbers))
    return inputs, ours, steady(partial(scan, precision=precision))


def _conv_case(precision: torch.dtype, documents: bool) -> Case:
    from nestling.model.ssd import causal_conv

    c, k = 64, 4
    inputs = [((2, LENGTH, c), precision), ((k, c), torch.float32), ((c,), torch.float32)]
    inputs += [((2, k - 1, c), precision)] * (not documents)

    def windowed(run: Callable[..., Tensor]) -> Run:
        def call(numbers: Tensor | None, x: Tensor, taps: Tensor, bias: Tensor, *window: Tensor) -> Sequence[Tensor]:
            return [run(x, taps, bias, window[0] if window else x.new_zeros(2, k - 1, c), numbers)]

        return call

    return inputs, windowed(lambda *given: causal_conv(*given)[0]), windowed(conv)


CASES = {"scan": _scan_case, "conv": _conv_case}


def _error(inputs: list[tuple[tuple[int, ...], torch.dtype]], ours: Run, theirs: Run, documents: bool) -> float:
    """How far results and gradients are apart, theirs on the device and ours in float64 on the CPU."""
    draw = torch.Generator().manual_seed(0)
    numbers = (torch.arange(LENGTH) // DOCUMENT).expand(2, -1) if documents else None
    drawn = [torch.randn(shape, generator=draw).to(dtype) for shape, dtype in inputs]
    exact = [t.double().requires_grad_() for t in drawn]
    given = [t.to(DEVICES[0]).requires_grad_() for t in drawn]
    expected = list(ours(numbers, *exact))
    found = list(theirs(None if numbers is None else numbers.to(DEVICES[0]), *given))
    weights = [torch.randn(y.shape, generator=draw) for y in expected]
    expected += torch.autograd.grad(expected, exact, [w.double() for w in weights])
    found += torch.autograd.grad(found, given, [w.to(y) for w, y in zip(weights, found, strict=True)])
    return max(_apart(one, other) for one, other in zip(expected, found, strict=True))


def _apart(expected: Tensor, found: Tensor) -> float:
    """The largest difference in units of the largest number; infinite where something is not a number."""
    expected, found = expected.detach(), found.detach().cpu().double()
    apart = float((found - expected).abs().max() / expected.abs().max())
    return apart if apart == apart else float("inf")
