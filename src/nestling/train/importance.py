"""Rank every axis and every layer of a model by importance, from forward passes only (arXiv 2511.16664)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestling.arch.architecture import Architecture
from nestling.errors import NestlingError, nearest
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.progress import progress
from nestling.train import metrics
from nestling.train.ablation import head_sums
from nestling.train.depth import METHODS, Depth, cosine_layers, last_norm, rank_layers, run
from nestling.train.metrics import AXES, FOLDS, METRICS, Metric, Statistic, key, places
from nestling.train.partial import Batches, Partial, Placed, Sums, accumulate, counter
from nestling.weights.ranking import Ranking

DEFAULTS = dict.fromkeys(METRICS, "contribution") | {"e": "reap"}
"""The one-pass metric that won on the demo's parents (five seeds, benchmarks/ranking/2026-11-24.md): zero-shot slices
of all axes at 90 % cost 0.20 nats by it, 0.31 by magnitude, 0.48 by the published metrics, 1.22 at random. For heads
`ablation` did better still; it costs a branch per head, so it is asked for by name. Depth is iterative by default: as
good as one-shot for one or two layers of seven, closer to the best set for three."""

TENSORS = {
    "norm": "the output of {layer}norm",
    "x": "the x part of the output of {layer}mixer.in_proj",
    "gated": "the input of {layer}mixer.out_proj",
    "up": "the output of {layer}mixer.up_proj",
    "hidden": "the input of {layer}mixer.down_proj",
    "heads": "the input of {layer}mixer.o_proj",
    "shared": "the input of {layer}mixer.shared_experts.down_proj",
    "expert": "the input of a down_proj of {layer}mixer.experts",
    "routed": "the output of {layer}mixer.experts",
}
"""Site of a forward pass -> what a person finds there in the checkpoint."""


@dataclass(frozen=True)
class Method:
    """How to rank.

    chosen: (axis letter, metric name) where it is not the default. max_drop: layers the iterative form takes away, by
    default half of them; those left are ordered by its last round. seed: of the metric `random`.
    """

    chosen: tuple[tuple[str, str], ...] = ()
    depth: str = "iterative"
    max_drop: int | None = None
    seed: int = 0

    @property
    def metrics(self) -> dict[str, str]:
        """Axis letter -> metric name, of every axis."""
        return {**DEFAULTS, **dict(self.chosen)}

    @staticmethod
    def of(chosen: Mapping[str, str], depth: str = "iterative", max_drop: int | None = None, seed: int = 0) -> "Method":
        """From names a person gave: `{"ffn": "pre"}`; what is not named is the default."""
        if depth not in METHODS:
            raise NestlingError(f"unknown depth method {depth!r}; {nearest(depth, METHODS)}")
        if max_drop is not None and depth != "iterative":
            raise NestlingError(f"max_drop bounds the iterative depth ranking; it says nothing about {depth!r}")
        named = tuple(metrics.parse(axis, metric) for axis, metric in chosen.items())
        return Method(named, depth, max_drop, seed)

    def rounds(self, layers: int) -> int:
        """How often layers are measured."""
        if self.depth != "iterative":
            return 1
        if self.max_drop is not None and not 1 <= self.max_drop < layers:
            raise NestlingError(
                f"max_drop = {self.max_drop} is outside 1 … {layers - 1} for a model of {layers} layers"
            )
        return self.max_drop or max(layers // 2, 1)

    def to_json(self, architecture: Architecture) -> dict[str, Any]:
        """How this model is ranked: the metrics of the axes that it has."""
        rounds = self.rounds(len(architecture.hybrid_override_pattern))
        depth = {"method": self.depth, **({"rounds": rounds} if self.depth == "iterative" else {})}
        axes = {axis for axis, _ in places(architecture)}
        own = {axis: name for axis, name in self.metrics.items() if axis in axes}
        return {"metrics": metrics.spelled(own), "depth": depth, "seed": self.seed}


@torch.no_grad()
def rank(model: NemotronH, batches: Batches, method: Method | None = None, partial: Partial | None = None) -> Ranking:
    """Measure every axis and every layer, and sort: orders are most important first. partial: goes on from there.

    It is computed where the model is.
    """
    batches = Placed(batches, model.ends.get_parameter("backbone.embeddings.weight").device)
    method, partial = method or Method(), partial or Partial()
    if not len(batches):
        raise NestlingError("ranking needs calibration data: there is none")
    rounds = method.rounds(len(model.layers))
    scores, halves = width_scores(model, batches, method, partial)
    if method.depth == "cosine":
        depth = cosine_layers(model, batches, partial)
    else:
        depth = rank_layers(model, batches, rounds, partial)
    return _ranking(scores, halves, depth, len(batches))


def _ranking(scores: dict[str, np.ndarray], halves: dict[str, np.ndarray], depth: Depth, batches: int) -> Ranking:
    orders = {name: np.argsort(-score, axis=-1, kind="stable") for name, score in scores.items()}
    both = {**halves, "layers": depth.halves} if batches > 1 else {}
    stability = {name: spearman(*two) for name, two in both.items()}
    return Ranking(orders, depth.layers, {**scores, "layers": depth.scores}, stability, depth.rounds)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation, the mean over rows of [outer, size]; one position alone agrees with itself."""
    if one.shape[-1] < 2:
        return 1.0
    rows = zip(_ranks(one), _ranks(other), strict=True)
    return float(np.mean([np.corrcoef(a, b)[0, 1] if a.std() * b.std() else float((a == b).all()) for a, b in rows]))


def _ranks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Places in ascending order, per row of [..., size]; equal values share the mean of their places."""
    for row in values.reshape(-1, values.shape[-1]):
        _, place, count = np.unique(row, return_inverse=True, return_counts=True)
        yield (np.cumsum(count) - (count - 1) / 2)[place]


# ---- widths


def width_scores(
    model: NemotronH, batches: Batches, method: Method, partial: Partial
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Score per position of every rankable axis, "d" [d], "f.L" [f], "h.L" [g, h], "p.L" [p], "q.L" [G, q]; and the
    same from the even and from the odd batches alone, [2, ...], for the metrics that look at data.
    """
    scores, halves = {}, {}
    sums = _width_sums(model, batches, method, partial)
    dear = [axis for axis, name in method.metrics.items() if name == "ablation"]
    ablated = head_sums(model, batches, dear, partial) if dear else {}
    for axis, layer in places(model.architecture):
        name, place = method.metrics[axis], key(axis, layer)
        if name == "magnitude":
            scores[place] = metrics.magnitude(model, axis, layer).numpy()
        elif name == "random":
            scores[place] = metrics.random(model.architecture, axis, layer, method.seed).numpy()
        elif name == "ablation":
            scores[place] = (ablated[place].sum(0) / ablated["scale"].sum()).numpy()
            halves[place] = (ablated[place] / ablated["scale"][:, None, None]).numpy()
        else:
            sites = [layer] if axis != "d" else [*range(len(model.layers)), None]
            even, odd = _site_sums(sums, METRICS[axis][name], sites)
            weights = _weights(model, METRICS[axis][name], sites)
            scores[place] = _folded(model, axis, name, (even + odd) * weights)
            halves[place] = np.stack([_folded(model, axis, name, half * weights) for half in (even, odd)])
    return scores, halves


def _weights(model: NemotronH, metric: Metric, layers: Sequence[int | None]) -> Tensor:
    """What the sums of a site are multiplied by, [S, c]."""
    if not metric.weighted:
        return torch.ones((), dtype=torch.float64)
    return torch.cat([metrics.reading(model, metric.site, layer) for layer in layers])


def _folded(model: NemotronH, axis: str, name: str, sums_Sc: Tensor) -> np.ndarray:
    metric = METRICS[axis][name]
    if metric.weighted:  # shares: every block of a model counts alike
        sums_Sc = sums_Sc / sums_Sc.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return FOLDS[axis](metric.finish(sums_Sc), model.architecture.sizes()).numpy()


def _width_sums(model: NemotronH, batches: Batches, method: Method, partial: Partial) -> Sums:
    """One pass over the data for all axes: metrics that share a statistic share its sums. No logits are computed."""
    architecture = model.architecture
    needed = {METRICS[axis][name] for axis, name in method.metrics.items() if name in METRICS[axis]}
    if not needed:
        return {}
    statistics = {(metric.site, metric.statistic) for metric in needed}
    sizes, count = architecture.sizes(), len(model.layers)

    def measure(ids_BL: Tensor, real_BL: Tensor) -> Sums:
        found: Sums = {}

        chosen_Ne: Tensor | None = None

        def watch(layer: int | None, site: str, x_BLc: Tensor) -> None:
            nonlocal chosen_Ne
            site, _, expert = site.partition(".")
            if site == "chosen":
                chosen_Ne = x_BLc.flatten(0, 1)
            for own, statistic in statistics:
                if own != site:
                    continue
                name = _sum_name(layer, site, statistic)
                if not expert:
                    found[name] = _finite(statistic(x_BLc, real_BL, sizes), layer, site)
                    continue
                assert chosen_Ne is not None
                real_n = real_BL.flatten()[chosen_Ne[:, int(expert)]]
                sums_c = _finite(statistic(x_BLc[None], real_n[None], sizes), layer, site)
                found.setdefault(name, sums_c.new_zeros(sizes["e"], len(sums_c)))[int(expert)] = sums_c

        x_BLd = run(model, model.embed(ids_BL, hard(architecture)), range(count), tick, watch)
        watch(None, "norm", last_norm(model, x_BLd))
        return found

    with progress("rank widths", len(batches) * count, "layers") as show:
        tick = counter(show, partial.done.get("widths", 0) * count, _note(architecture))
        return accumulate("widths", batches, measure, partial)


def _note(architecture: Architecture) -> Callable[[int], str]:
    """What is being ranked while a layer is computed: `layer 4: hidden, ffn`."""
    by_letter = {letter: name for name, letter in AXES.items()}
    of_layer: dict[int | None, list[str]] = {}
    for axis, layer in places(architecture):
        of_layer.setdefault(layer, []).append(by_letter[axis])
    return lambda layer: f"layer {layer}: {', '.join([*of_layer[None], *of_layer.get(layer, [])])}"


def _sum_name(layer: int | None, site: str, statistic: Statistic) -> str:
    return f"{'last' if layer is None else layer}.{site}.{statistic.__name__}"


def _site_sums(sums: Sums, metric: Metric, layers: Sequence[int | None]) -> Tensor:
    """The sums a metric folds, of the same site of these layers: [2, S, c]; of experts, [2, e, c]."""
    found = [sums[_sum_name(layer, metric.site, metric.statistic)] for layer in layers]
    return torch.cat([own if metric.site == "expert" else own[:, None] for own in found], 1)


def _finite(sums: Tensor, layer: int | None, site: str) -> Tensor:
    if not sums.isfinite().all():
        where = "backbone.norm_f" if layer is None else TENSORS[site].format(layer=f"backbone.layers.{layer}.")
        what = f"the output of {where}" if layer is None else where
        raise NestlingError(
            f"{what} is not finite on the calibration data: the model is broken, or its dtype too narrow"
        )
    return sums
