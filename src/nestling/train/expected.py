"""What a router's choice is expected to cost, in any unit a budget has, with gradients.

    E[C] = E[C_model] + Σ_layers gate · E[C_block],   E[C_block] = Σ_candidates π_d(d) π_f(f) … C_block(d, f, …)

The axes draw independently, so a block's expectation is the table of its costs at every combination of candidates,
contracted with the probabilities of each axis. The table is made by the function that counts, `Target.block`: at
one-hot probabilities the expectation is `Target.measure`. For costs that are affine in each axis, as parameters are, it
is also the cost at the expected sizes (Nemotron Elastic, section 3; the form of NVIDIA's code).
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nestling.arch.architecture import Architecture, fields_of
from nestling.arch.search import SearchSpace
from nestling.arch.targets import Target
from nestling.train.router import Probabilities, gates


@dataclass(frozen=True, eq=False)
class BlockCosts:
    """Of one kind of block: its axes that have candidates, and its cost for every combination, one dim per axis."""

    fields: tuple[str, ...]
    table: Tensor

    def expected(self, pi: Sequence[Tensor]) -> Tensor:
        """pi: the probabilities of each axis, in the order of the fields."""
        found = self.table
        for weight in pi:
            found = torch.tensordot(weight.to(found.dtype), found.to(weight.device), dims=([0], [0]))
        return found


Costs = Mapping[str, BlockCosts]  # kind -> costs, "model" for what is outside of layers


def block_costs(architecture: Architecture, space: SearchSpace, target: Target) -> Costs:
    """Everything a budget's expected cost needs; made once, in float64."""
    kinds = ("model", *sorted(set(architecture.hybrid_override_pattern)))
    return {kind: _block(architecture, space, target, kind) for kind in kinds}


def _block(architecture: Architecture, space: SearchSpace, target: Target, kind: str) -> BlockCosts:
    fields = tuple(field for field in fields_of(kind if kind != "model" else "") if field in space)
    counts = [
        target.block(architecture, kind, architecture.sizes(**dict(zip(fields, sizes, strict=True))))
        for sizes in itertools.product(*(space[field] for field in fields))
    ]
    table = torch.tensor(counts, dtype=torch.float64).reshape([len(space[field]) for field in fields])
    return BlockCosts(fields, table)


def expected_cost(
    architecture: Architecture, order: Sequence[int], space: SearchSpace, costs: Costs, pi: Probabilities
) -> Tensor:
    """E[C], float64. order: the layers, the one kept longest first."""
    made: dict[tuple[str, ...], Tensor] = {}  # layers whose sizes are chosen together cost the same

    def block(kind: str, layer: int | None = None) -> Tensor:
        axes = tuple(space.axis(field, layer) for field in costs[kind].fields)
        if (kind, *axes) not in made:
            made[kind, *axes] = costs[kind].expected([pi[axis] for axis in axes])
        return made[kind, *axes]

    total = block("model")
    for layer, gate in zip(order, gates(architecture, space, pi), strict=True):
        total = total + gate.double() * block(architecture.hybrid_override_pattern[layer], layer)
    return total
