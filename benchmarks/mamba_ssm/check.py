"""mamba-ssm's own Triton kernels, called as a model on a GPU calls them, run by Triton's interpreter on a CPU.

    make check-mamba-ssm

Says how far results and gradients are from float64, beside our own operations in the same precision, and nothing of
speed. In float16: the interpreter multiplies bf16 as integers. The convolution of causal-conv1d is CUDA code, which no
CPU runs; its reference in Python stands in for it.
"""

import contextlib
import os
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from nestling.arch.architecture import Architecture
from nestling.model import mamba_ssm
from nestling.model.cache import Cache
from nestling.model.nemotron_h import NemotronH

HYBRID = Architecture(
    "M*-M",
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    n_groups=2,
    mamba_num_heads=8,
    mamba_head_dim=16,
    ssm_state_size=16,
    num_key_value_heads=2,
    num_attention_heads=4,
    head_dim=16,
)
LENGTH, HALF = 300, torch.float16


def pretend() -> None:
    """What the packages need of a GPU that an interpreter has not."""
    torch.cuda.device = lambda *given: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.get_device_properties = lambda *given: types.SimpleNamespace(multi_processor_count=1)  # type: ignore
    Autotuner._bench = lambda self, *given, config, **more: [0.0, 0.0, 0.0]  # type: ignore[method-assign]
    for name in ("mamba_ssm", "causal_conv1d"):  # without what their __init__ loads, which is compiled for a GPU
        found = find_spec(name)
        assert found is not None
        assert found.submodule_search_locations is not None
        package = types.ModuleType(name)
        package.__path__ = list(found.submodule_search_locations)
        sys.modules[name] = package
    compiled = types.ModuleType("causal_conv1d.cpp_functions")
    for function in ("fwd", "bwd", "update"):
        setattr(compiled, f"causal_conv1d_{function}_function", None)
    sys.modules[compiled.__name__] = compiled
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref

    def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Any, seq_idx: Any, window: Any, activation: str) -> Any:
        return causal_conv1d_ref(x, weight, bias, window, activation=activation, seq_idx=seq_idx)

    sys.modules["causal_conv1d"].causal_conv1d_fn = causal_conv1d_fn  # type: ignore[attr-defined]


def model(dtype: torch.dtype) -> NemotronH:
    made, generator = NemotronH(HYBRID), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return made.to(dtype)


def learnt(dtype: torch.dtype, documents: bool) -> list[Tensor]:
    """Logits, and the gradients of every weight."""
    ids = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    numbers = (torch.arange(LENGTH) // 70).expand(2, -1) if documents else None
    network = model(dtype)
    logits = network(ids, documents_BL=numbers).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]


def continued(dtype: torch.dtype) -> list[Tensor]:
    """The logits of a prompt in two pieces, and of one more token."""
    ids = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    network, cache = model(dtype), Cache()
    with torch.inference_mode():
        return [network(piece, None, cache).logits for piece in ids.split([170, LENGTH - 171, 1], 1)]


def worst(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error of a tensor, norm against norm."""
    return max(float((one.double() - true).norm() / true.norm()) for one, true in zip(found, exact, strict=True))


def main() -> None:
    pretend()
    packages = ", ".join(f"{name} {version(name)}" for name in ("mamba-ssm", "causal-conv1d", "triton", "torch"))
    print(f"{packages}; the largest error of a tensor against float64, norm by norm\n")
    print("| float16 | theirs | ours |\n|---|---|---|")
    cases: dict[str, Callable[[torch.dtype], list[Tensor]]] = {
        "logits and gradients": lambda dtype: learnt(dtype, False),
        "logits and gradients of packed documents": lambda dtype: learnt(dtype, True),
        "a prompt in two pieces, one more token": continued,
    }
    mamba_ssm.DEVICES = ("cpu",)
    failed = not (mamba_ssm._agrees("scan", HALF) and mamba_ssm._agrees("conv", HALF))
    for name, case in cases.items():
        exact = case(torch.float64)
        theirs = worst(case(HALF), exact)
        mamba_ssm.DEVICES = ("cuda",)
        ours = worst(case(HALF), exact)
        mamba_ssm.DEVICES = ("cpu",)
        print(f"| {name} | {theirs:.4f} | {ours:.4f} |", flush=True)
        failed |= not theirs <= 1.5 * ours
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
