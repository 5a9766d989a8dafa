"""Muon (Jordan 2024) in the parameters' own precision.

torch.optim.Muon always multiplies in bfloat16, which processors without bfloat16 units emulate: on such a CPU it took
three quarters of a training step here. This is the same update without the cast; a test holds the two together.
Of a matrix that is sharded over ranks every rank makes the whole update, and keeps its part.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nestling import ranks

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest semi-orthogonal matrix to it, scaled so that its entries have AdamW's usual size."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                whole = ranks.whole(parameter.grad.lerp(momentum, group["momentum"]))
                update = ranks.shard_of(orthogonalize(whole), parameter)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """The semi-orthogonal factor of a matrix, approximately: singular values driven to about 1 (Newton-Schulz)."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
