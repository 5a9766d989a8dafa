"""From logits to the next token of every row: greedy, or a draw that the row's own seed decides.

B rows · v vocabulary. A draw is the inverse of the cumulative distribution at a uniform number from the row's own
generator, so what a row draws does not depend on the rows beside it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nestling.errors import NestlingError


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 takes the most probable token. top_k: only the k most probable tokens, 0 for all of them.

    top_p: only the most probable tokens that together reach this probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise NestlingError(f"temperature = {self.temperature} must be 0 or above; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise NestlingError(f"top_p = {self.top_p} is outside (0, 1]; 1 leaves every token in")
        if self.top_k < 0:
            raise NestlingError(f"top_k = {self.top_k} must be 0 or above; 0 leaves every token in")


@dataclass(eq=False)
class Row:
    """One sequence: what it began with, and the tokens it has got since."""

    prompt: Sequence[int]
    limit: int  # tokens it may get
    sampling: Sampling = Sampling()
    ends: frozenset[int] = frozenset()  # tokens that end it, and are left out
    seed: str = "0"
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None  # why it ended: "stop" or "length"

    def __post_init__(self) -> None:
        self.uniform = random.Random(self.seed).random

    def take(self, token: int) -> bool:
        """Add the next token; returns whether it is one to show."""
        if token in self.ends:
            self.reason = "stop"
            return False
        self.tokens.append(token)
        if len(self.tokens) >= self.limit:
            self.reason = "length"
        return True


def choose(logits_Bv: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of every row."""
    tokens = logits_Bv.argmax(-1).tolist()
    drawn = [place for place, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        samplings = [rows[place].sampling for place in drawn]
        numbers = [rows[place].uniform() for place in drawn]
        for place, token in zip(drawn, draw(logits_Bv[drawn], samplings, numbers).tolist(), strict=True):
            tokens[place] = token
    return tokens


def draw(logits_Bv: Tensor, samplings: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """One token per row, where the cumulative probability passes the row's uniform number in [0, 1)."""
    temperature_B = logits_Bv.new_tensor([sampling.temperature for sampling in samplings], dtype=torch.float64)
    logits_Bv = logits_Bv.double()
    below_best_Bv = logits_Bv - logits_Bv.max(dim=-1, keepdim=True).values  # lest a low temperature make two infinities
    scaled_Bv = below_best_Bv / temperature_B[:, None]
    order_Bv = None
    if any(sampling.top_p < 1 or sampling.top_k for sampling in samplings):
        scaled_Bv, order_Bv = scaled_Bv.sort(dim=-1, descending=True, stable=True)
    probability_Bv = scaled_Bv.softmax(-1)
    if order_Bv is not None:
        probability_Bv = _kept(probability_Bv, samplings)
    below_Bv = probability_Bv.cumsum(-1)
    total_B1 = below_Bv[:, -1:]
    reached_B1 = total_B1 * below_Bv.new_tensor(uniform)[:, None]
    reached_B1 = reached_B1.minimum(total_B1.nextafter(torch.zeros_like(total_B1)))  # the product may round up to it
    place_B1 = torch.searchsorted(below_Bv, reached_B1, right=True)
    return (place_B1 if order_Bv is None else order_Bv.gather(1, place_B1))[:, 0]


def _kept(probability_Bv: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Zero for what top_k and then top_p leave out, of probabilities in falling order."""
    rank_v = torch.arange(probability_Bv.shape[-1], device=probability_Bv.device)
    k_B = rank_v.new_tensor([sampling.top_k or len(rank_v) for sampling in samplings])
    probability_Bv = probability_Bv * (rank_v < k_B[:, None])
    before_Bv = probability_Bv.cumsum(-1) - probability_Bv
    p_B = before_Bv.new_tensor([sampling.top_p if sampling.top_p < 1 else 2.0 for sampling in samplings])
    return probability_Bv * (before_Bv < p_B[:, None] * probability_Bv.sum(-1, keepdim=True))
