"""Where a training runs: its device, and its spread over the processes of torchrun (FSDP2). Only this knows a mesh.

Every rank holds a shard of each weight, of its gradient and of its optimizer state, and computes its own rows of the
global batch (data/batches.py). A block's weights are whole while it runs, so that prefix views are what they are on one
process. Losses are divided by what counts in the global batch: gradients are summed over ranks, never averaged.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor, nn

from nestling import ranks
from nestling.model.nemotron_h import NemotronH
from nestling.train.optimize import Optimization


@dataclass(frozen=True)
class Layout:
    """Where this process computes, and what it keeps. Nothing of it changes what is learnt, beyond rounding.

    reshard: whether a student's block gives its whole weights up after its forward pass, and gathers them again for its
    backward pass. replicas: how many groups of ranks hold all shards each; weights are gathered within a group only.
    offload_teacher: whether the teacher's blocks are in the CPU's memory, and on the device while they run. patience:
    minutes that a rank waits for another within a step before it gives up.
    """

    device: torch.device = torch.device("cpu")
    reshard: bool = True
    replicas: int = 1
    offload_teacher: bool = False
    patience: float = 30


HERE = Layout()


def spread(model: NemotronH, how: Optimization, layout: Layout = HERE, *, trained: bool) -> NemotronH:
    """The same model on its device, of which this rank keeps a shard of every weight; of one process, all of it.

    trained: these are master weights, in float32 at least. Blocks are exchanged in the precision that is computed
    in. Embeddings, head and last norm stay whole from the forward pass to the end of the backward pass, for the loss of
    a few positions at a time multiplies by the head outside of the model's forward.
    """
    away = layout.offload_teacher and not trained
    if ranks.size() == 1:
        model = widened(model) if trained else model
        return _visiting(model, layout.device) if away else model.to(layout.device)
    from torch.distributed import group
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        FSDPModule,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = _mesh(group.WORLD, layout.device.type, layout.replicas, timedelta(minutes=layout.patience))
    narrow = torch.bfloat16 if how.precision == "bf16" else None
    policy = MixedPrecisionPolicy(narrow, torch.float32 if narrow else None, cast_forward_inputs=False)
    place = CPUOffloadPolicy(pin_memory=layout.device.type != "cpu") if away else OffloadPolicy()
    reshard = layout.reshard or not trained  # a teacher has no backward pass that would end it
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, offload_policy=place)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return widened(model) if trained else model


def _visiting(model: NemotronH, device: torch.device) -> NemotronH:
    """A frozen model whose blocks come to a device while they run; what is outside of blocks stays there."""

    def come(block: nn.Module, given: Any) -> None:
        for module, leaf, weight in homes[block]:
            module._parameters[leaf] = nn.Parameter(weight.to(device), requires_grad=False)

    def leave(block: nn.Module, given: Any, made: Any) -> None:
        for module, leaf, weight in homes[block]:
            module._parameters[leaf] = weight

    model.ends.to(device)
    homes = {block: _weights(block) for block in model.layers}
    for block in model.layers:
        block.register_forward_pre_hook(come)
        block.register_forward_hook(leave, always_call=True)
    return model


def _weights(block: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    found = [(module, leaf, weight) for module in block.modules() for leaf, weight in module._parameters.items()]
    return [(module, leaf, weight) for module, leaf, weight in found if weight is not None]


@lru_cache(maxsize=1)
def _mesh(world: Any, device: str, replicas: int, patience: timedelta) -> Any:
    """All ranks in a row or, of several replicas, in a row each; less patient than the group they are all in."""
    from torch.distributed import new_group
    from torch.distributed.device_mesh import DeviceMesh

    backend = "gloo" if device == "cpu" else "nccl"
    if replicas == 1:
        return DeviceMesh.from_group(new_group(timeout=patience, backend=backend), device)
    every = torch.arange(ranks.size()).view(replicas, -1)
    groups = [
        {rank: made for row in rows.tolist() for made in [new_group(row, patience, backend)] for rank in row}
        for rows in (every.T, every)  # all ranks make all groups
    ]
    own = [each[ranks.rank()] for each in groups]
    return DeviceMesh.from_group(own, device, mesh=every, mesh_dim_names=("replicate", "shard"))


def widened(model: NemotronH) -> NemotronH:
    """With weights of float32 at least."""
    return model.to(reduce(torch.promote_types, {p.dtype for p in model.parameters()}, torch.float32))


def add_up(gradients: Iterable[Tensor | None]) -> None:
    """Sum over ranks, in place, gradients of what every rank has whole; those that are missing are so on all ranks."""
    found = [gradient for gradient in gradients if gradient is not None]
    if ranks.size() == 1 or not found:
        return
    from torch.distributed import all_reduce

    flat = torch.cat([gradient.reshape(-1) for gradient in found]).cpu()  # over the group that all ranks are in
    all_reduce(flat)
    for gradient, summed in zip(found, flat.split([gradient.numel() for gradient in found]), strict=True):
        gradient.copy_(summed.view_as(gradient))
