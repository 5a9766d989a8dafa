"""What a score on a sample of problems says about the model: unbiased estimates and 95 % intervals."""

from collections.abc import Sequence
from math import comb, sqrt
from statistics import fmean

Z = 1.959964
"""Standard deviations on either side that hold 95 % of a normal distribution."""


def wilson(correct: float, count: float, z: float = Z) -> tuple[float, float]:
    """The Wilson score interval of a share. Neither number need be whole: `count` may be an effective sample size."""
    share = correct / count
    centre = share + z * z / (2 * count)
    spread = z * sqrt(max(share * (1 - share), 0) / count + z * z / (4 * count * count))
    return (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)


def mean_interval(scores: Sequence[float], samples: int = 1) -> tuple[float, float]:
    """The 95 % interval of the mean of scores in [0, 1], each of them a mean over `samples` answers to one problem.

    Answers to one problem are a cluster: what counts is how the clusters' means vary. Their variance gives an effective
    sample size (between the number of problems and that of answers) for Wilson's interval, which at one answer each
    is Wilson's itself.
    """
    count, mean = len(scores), fmean(scores)
    variance = sum((score - mean) ** 2 for score in scores) / count**2
    binomial = max(mean * (1 - mean), 0.0)
    most = count * samples if binomial > 0 else count
    effective = min(binomial / variance, most) if variance > 0 else most
    low, high = wilson(mean * effective, effective)
    return max(low, 0.0), min(high, 1.0)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased chance that of `k` answers drawn from `samples`, `correct` of them right, one is right.

    Chen et al., "Evaluating Large Language Models Trained on Code" (2021), equation 1.
    """
    assert 0 <= correct <= samples >= k >= 1
    return 1 - comb(samples - correct, k) / comb(samples, k)


def ratio_interval(totals: Sequence[float], weights: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of Σ totals / Σ weights over clusters (linearised variance); None for fewer than two."""
    count, weight = len(totals), sum(weights)
    if count < 2:
        return None
    ratio = sum(totals) / weight
    residuals = sum((total - ratio * size) ** 2 for total, size in zip(totals, weights, strict=True))
    error = sqrt(count / (count - 1) * residuals) / weight
    return ratio - Z * error, ratio + Z * error
