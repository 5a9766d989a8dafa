"""The router: from a budget to sizes, by Gumbel-Softmax over the candidates of every axis (Nemotron Elastic, §3).

One small MLP per axis: u one-hot of the budget, h = LeakyReLU(W1 u + b1), z = W2 h + b2,
π = softmax((scale z + g) / τ) with g ~ Gumbel.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.arch.architecture import Architecture
from nestling.arch.nemotron_h import FIELDS
from nestling.arch.search import SearchSpace, field_of
from nestling.model.width import Width, Widths

HIDDEN = 256

Probabilities = Mapping[str, Tensor]  # axis of a search space -> π over its candidates


class Router(nn.Module):
    """π per axis for each budget; the axes draw independent noise."""

    def __init__(self, space: SearchSpace, budgets: int, generator: torch.Generator) -> None:
        super().__init__()
        self.space, self.budgets = space, budgets
        self.heads = nn.ModuleDict(
            {
                axis: nn.Sequential(nn.Linear(budgets, HIDDEN), nn.LeakyReLU(), nn.Linear(HIDDEN, len(space[axis])))
                for axis in space.axes
            }
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.02, generator=generator)

    def forward(
        self, budget: int, temperature: float, scale: float, generator: torch.Generator | None = None
    ) -> Probabilities:
        """Probabilities for one budget (its index); without a generator there is no noise."""
        weight = next(self.parameters())
        device, one_hot = weight.device, F.one_hot(torch.tensor(budget, device=weight.device), self.budgets).to(weight)
        noise = {axis: _gumbel(len(self.space[axis]), generator).to(device) for axis in self.heads}  # drawn on the CPU
        return {
            axis: ((scale * head(one_hot) + noise[axis]) / temperature).softmax(-1) for axis, head in self.heads.items()
        }

    @torch.no_grad()
    def choose(self, budget: int) -> dict[str, int]:
        """The most probable candidate of every axis."""
        return {axis: self.space[axis][int(pi.argmax())] for axis, pi in self(budget, 1.0, 1.0).items()}


def _gumbel(count: int, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.zeros(count)
    uniform = torch.rand(count, generator=generator).clamp(1e-9, 1 - 1e-7)
    return -(-uniform.log()).log()


def annealed(start: float, end: float, progress: float) -> float:
    """Linear from start to end over a run, progress 0 … 1."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def soft(architecture: Architecture, order: Sequence[int], space: SearchSpace, pi: Probabilities) -> Widths:
    """The one relaxation: every axis masked by Σ_c π_c · [position < c], every layer gated by Σ_k π_k · [rank < k].

    At one-hot π this is exactly the 0/1 mask of the chosen sub-model; the norms divide by Σ mask, the active width.
    """
    full = architecture.sizes()
    masks = {axis: _mask(architecture, space, axis, weight) for axis, weight in pi.items() if axis != "layers"}

    def width(layer: int | None, gate: Tensor | float = 1.0) -> Width:
        named = {field: masks.get(space.axis(field, layer)) for field, _ in space.candidates}
        return Width(full, full, {FIELDS[f].split()[-1]: mask for f, mask in named.items() if mask is not None}, gate)

    ranked = zip(order, gates(architecture, space, pi), strict=True)
    return Widths(width(None), tuple(sorted((layer, width(layer, gate)) for layer, gate in ranked)))


def _mask(architecture: Architecture, space: SearchSpace, axis: str, weight: Tensor) -> Tensor:
    """How much of every position counts; heads are counted inside their group."""
    full = architecture.sizes()
    *outer, inner = FIELDS[field_of(axis)].split()
    per = full[outer[0]] if outer else 1
    return _covered(full[inner], [size // per for size in space[axis]], weight)


def gates(architecture: Architecture, space: SearchSpace, pi: Probabilities) -> Tensor:
    """How much of every layer's residual write counts, in the order of the ranking."""
    count = len(architecture.hybrid_override_pattern)
    return _covered(count, space["layers"], pi["layers"]) if "layers" in pi else torch.ones(count)


def _covered(size: int, candidates: Sequence[int], weight: Tensor) -> Tensor:
    """[size]: how much of the probability lies on candidates that include each position."""
    includes = torch.arange(size, device=weight.device)[:, None] < torch.tensor(candidates, device=weight.device)
    return includes.to(weight.dtype) @ weight
