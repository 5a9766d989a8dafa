"""How a training is spread over the processes that torchrun started (FSDP2): the only file that knows a mesh.

Every rank holds a shard of each weight, of its gradient and of its optimizer state, and computes its own rows of the
global batch (data/batches.py). A block's weights are whole while it runs, so that prefix views are what they are on one
process. Losses are divided by what counts in the global batch: gradients are summed over ranks, never averaged.
"""

from collections.abc import Iterable
from datetime import timedelta
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from nestling import ranks
from nestling.model.nemotron_h import NemotronH
from nestling.train.optimize import Optimization

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for another within a step before it gives up."""


def spread(model: NemotronH, how: Optimization, *, trained: bool) -> NemotronH:
    """The same model, of which this rank keeps a shard of every weight; of one process, all of it.

    trained: these are master weights, in float32 at least. Blocks are exchanged in the precision that is computed
    in. Embeddings, head and last norm stay whole from the forward pass to the end of the backward pass, for the loss of
    a few positions at a time multiplies by the head outside of the model's forward.
    """
    if ranks.size() == 1:
        return widened(model) if trained else model
    from torch.distributed import group
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = _mesh(group.WORLD)
    narrow = torch.bfloat16 if how.precision == "bf16" else None
    policy = MixedPrecisionPolicy(narrow, torch.float32 if narrow else None, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return widened(model) if trained else model


@lru_cache(maxsize=1)
def _mesh(world: Any) -> Any:
    """All ranks of a process group in a row, less patient than it is."""
    from torch.distributed import new_group
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(new_group(timeout=PATIENCE), "cpu")


def widened(model: NemotronH) -> NemotronH:
    """With weights of float32 at least."""
    return model.to(reduce(torch.promote_types, {p.dtype for p in model.parameters()}, torch.float32))


def add_up(gradients: Iterable[Tensor | None]) -> None:
    """Sum over ranks, in place, gradients of what every rank has whole; those that are missing are so on all ranks."""
    found = [gradient for gradient in gradients if gradient is not None]
    if ranks.size() == 1 or not found:
        return
    from torch.distributed import all_reduce

    flat = torch.cat([gradient.reshape(-1) for gradient in found])
    all_reduce(flat)
    for gradient, summed in zip(found, flat.split([gradient.numel() for gradient in found]), strict=True):
        gradient.copy_(summed.view_as(gradient))
