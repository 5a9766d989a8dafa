"""A device that is not the CPU, for machines without one: its tensors say `chip`, and the CPU computes them.

Everything that a GPU refuses is refused: an operation that mixes its tensors with the CPU's (numbers and indices may
be), and random numbers from a generator of the CPU. Our own operations run their bodies as they would on a GPU.
Registering a device is for good, so this is for a process of its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "chip"
AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
MOVES = {torch.ops.aten._to_copy, torch.ops.aten.to, torch.ops.aten.copy_}
INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put_}


class Module(_DummyBackendModule):
    """`torch.chip`: what a benchmark asks a device for."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def synchronize(self) -> None:
        pass

    def memory_allocated(self) -> int:
        return 0

    def max_memory_allocated(self) -> int:
        return 1

    def reset_peak_memory_stats(self) -> None:
        pass


class Held(Tensor):
    """A tensor of the chip, and the tensor of the CPU that has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Held":
        return Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=f"{NAME}:0",
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{NAME}({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the chip's mode")


class Chip(TorchDispatchMode):
    """Computes on the chip while it is entered. own: the Python function of our own operations, by their name."""

    def __init__(self, own: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.own = own
        self.ran: set[str] = set()  # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        held = [leaf for leaf in leaves if isinstance(leaf, Held)]
        self.ran.add(func.name())
        if held and func.namespace == "nestling":
            with self:
                return self.own[func.name()](*args, **(kwargs or {}))
        if held and func.overloadpacket not in MOVES:
            strangers = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, Held) and t.ndim > 0]
            allowed = func.overloadpacket in INDEXED and isinstance(args[0], Held)
            assert not strangers or allowed, f"{func} mixes {NAME} with the CPU: {[tuple(t.shape) for t in strangers]}"
        asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        there = asked[0].type == NAME if asked else bool(held)
        if func.overloadpacket is torch.ops.aten.copy_:
            there = isinstance(args[0], Held)
        assert not (there and any(isinstance(leaf, torch.Generator) for leaf in leaves)), f"{func}: the CPU's generator"
        found = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs or {}))
        if not there:
            return found
        known = {id(t.held): t for t in held}
        with torch.inference_mode(False):  # a view of a parameter is no tensor of inference, and may not become one
            return tree_map(
                lambda t: known[id(t)] if id(t) in known else Held(t) if isinstance(t, Tensor) else t, found
            )


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, Held):
        return leaf.held
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == NAME else leaf


def register() -> Chip:
    from nestling.model import conv, scan

    _setup_privateuseone_for_python_backend(NAME, Module())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=chip) moves by an operation, which is seen here
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # not only what torch knows of them
    AUTOCAST.fallback(torch.library.fallthrough_kernel)  # autocast leaves everything as it is
    operations = (conv.conv, conv.conv_backward, scan.scan, scan.scan_backward)
    return Chip({op._opoverload.name(): op._init_fn for op in operations})
