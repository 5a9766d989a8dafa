"""Importance of every part of a model, from forward passes only (Nemotron Elastic, section on importance; PAPER §1).

Sums run over all real calibration tokens, in float64. Activations are taken in absolute value before they are summed,
so that signs cannot cancel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nestling.arch.submodel import WHOLE, Submodel
from nestling.errors import NestlingError
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.progress import progress
from nestling.weights.ranking import Ranking


@dataclass(frozen=True)
class Calibration:
    """Token batches [B, L], right-padded; real_BL is 1 where a token is not padding."""

    batches: Sequence[tuple[Tensor, Tensor]]


def rank(model: NemotronH, calibration: Calibration) -> Ranking:
    """Measure every axis and every layer, and sort. The ranking's orders are most important first."""
    if not calibration.batches:
        raise NestlingError("ranking needs calibration data: there is none")
    with torch.no_grad():
        scores = width_scores(model, calibration)
        scores["layers"] = depth_scores(model, calibration)
    for key, score in scores.items():
        if not np.isfinite(score).all():
            raise NestlingError(f"ranking: the importance of {key} is not finite; the model or the data is broken")
    orders = {key: np.argsort(-score, axis=-1, kind="stable") for key, score in scores.items()}
    layers = tuple(int(layer) for layer in orders.pop("layers"))
    return Ranking(orders, layers, scores)


def width_scores(model: NemotronH, calibration: Calibration) -> dict[str, np.ndarray]:
    """Score per position of every rankable axis: "d" [d], "f.L" [f], "h.L" [g, h], "p.L" [p], "q.L" [G, q].

    hidden channels: Σ |norm output| over tokens and all norms. FFN neurons: Σ |hidden| after the non-linearity. Mamba:
    s = Σ |x part of the input projection| per (head, channel); a channel scores ‖s‖₂ over all heads, a head ‖s‖₂ over
    its channels. Attention heads: Σ ‖the head's slice of the output projection's input‖₂.
    """
    sums: dict[tuple[int | None, str], Tensor] = {}
    sizes = model.architecture.sizes()
    with progress("rank widths", len(calibration.batches), "batches") as show:
        for done, (ids_BL, real_BL) in enumerate(calibration.batches):

            def watch(layer: int | None, site: str, x: Tensor, real_BL: Tensor = real_BL) -> None:
                total = _magnitude(site, x, sizes)[real_BL.bool()].sum(0, dtype=torch.float64)
                sums[layer, site] = sums.get((layer, site), 0) + total

            model(ids_BL, watch=watch)
            show(done + 1)
    return _scores(sums, sizes)


def _magnitude(site: str, x_BLc: Tensor, sizes: dict[str, int]) -> Tensor:
    return x_BLc.unflatten(-1, (-1, sizes["c"])).norm(dim=-1) if site == "heads" else x_BLc.abs()


def _scores(sums: dict[tuple[int | None, str], Tensor], sizes: dict[str, int]) -> dict[str, np.ndarray]:
    hidden = torch.stack([total for (_, site), total in sums.items() if site == "norm"]).sum(0)
    scores = {"d": hidden}
    for (layer, site), total in sums.items():
        if site == "hidden":
            scores[f"f.{layer}"] = total
        elif site == "heads":
            scores[f"q.{layer}"] = total.unflatten(0, (sizes["G"], sizes["q"]))
        elif site == "x":
            per_channel = total.unflatten(0, (sizes["g"], sizes["h"], sizes["p"]))
            scores[f"h.{layer}"] = per_channel.norm(dim=-1)
            scores[f"p.{layer}"] = per_channel.flatten(0, 1).norm(dim=0)
    return {key: score.numpy() for key, score in scores.items()}


def depth_scores(model: NemotronH, calibration: Calibration) -> np.ndarray:
    """Normalized MSE on the logits when one layer is left out: Σ (full - without)² / Σ full², [layers]."""
    count = len(model.architecture.hybrid_override_pattern)
    without = [hard(model.architecture, _without(WHOLE, layer, count)) for layer in range(count) if count > 1]
    error, scale = np.zeros(count), 0.0
    with progress("rank layers", len(calibration.batches), "batches") as show:
        for done, (ids_BL, real_BL) in enumerate(calibration.batches):
            full = model(ids_BL).logits[real_BL.bool()].double()
            scale += float(full.square().sum())
            for layer, widths in enumerate(without):
                error[layer] += float((model(ids_BL, widths).logits[real_BL.bool()] - full).square().sum())
            show(done + 1)
    return error / scale


def _without(submodel: Submodel, layer: int, count: int) -> Submodel:
    return replace(submodel, layers=tuple(other for other in range(count) if other != layer))
