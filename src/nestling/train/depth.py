"""Which layers matter: normalized MSE on the logits without a layer, at once or one after the other; or cosine.

    s_j = Σ (M_full - M_without j)² / Σ M_full²            (Nemotron Elastic, arXiv 2511.16664)

M_full is always the whole model. *One-shot* measures every layer once. *Iterative* takes the least important layer away
and measures the others again without it.

What is computed. Per batch the residual stream walks up the layers; at layer j a branch runs the layers *above* j from
there, so what lies below a removed layer is never recomputed: n(n - 1)/2 layer passes per round of n layers instead of
n(n - 1). What is held is one batch's stream, one branch and the whole model's last hidden state, whatever the number of
samples or rounds; a later round walks again instead of keeping every batch's streams, which costs n of those n²/2.

No logits are ever computed. The output head is linear, so ‖W a - W b‖² = (a - b)ᵀ WᵀW (a - b), and WᵀW is [d, d]
however large the vocabulary. It is made once, and multiplied, in float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.console import console
from nestling.errors import NestlingError
from nestling.model.block import rms_norm
from nestling.model.context import Context, Watch
from nestling.model.nemotron_h import NemotronH
from nestling.model.pointwise import wide
from nestling.model.width import hard
from nestling.progress import Progress, progress
from nestling.train.partial import Batches, Partial, Sums, Tick, accumulate, counter

METHODS = ("iterative", "one-shot", "cosine")
ROWS = 4096  # of the output head, or tokens, turned into float64 at a time


@dataclass(frozen=True)
class Depth:
    """layers: the one to keep longest first. scores: of a removed layer the error when it went, else the last round's.

    rounds: the error of leaving each layer out, [round, layer], NaN where it was gone. halves: the first round's over
    the even and the odd batches, [2, layer].
    """

    layers: tuple[int, ...]
    scores: np.ndarray
    rounds: np.ndarray
    halves: np.ndarray


def rank_layers(model: NemotronH, batches: Batches, rounds: int, partial: Partial) -> Depth:
    """Rank by normalized MSE; one round is the one-shot form, `rounds` are how many layers are taken away in turn."""
    count = len(model.layers)
    passes = len(batches) * planned(count, rounds)
    _announce(count, rounds, passes, len(batches))
    removed: list[int] = []
    errors, halves = [], np.empty(0)
    gram = head_gram(model)
    with progress("rank layers", passes, "layers") as show:
        for index in range(rounds):
            sums = _round(model, batches, gram, removed, partial, show)
            both = (sums["error"] / sums["scale"][:, None]).numpy()
            error = (sums["error"].sum(0) / sums["scale"].sum()).numpy()
            halves = halves if index else both
            error[removed] = np.nan
            errors.append(error)
            removed.append(int(np.nanargmin(error)))
    return _ranked(np.stack(errors), removed, halves)


def _ranked(rounds: np.ndarray, removed: list[int], halves: np.ndarray) -> Depth:
    scores = rounds[-1].copy()
    for error, layer in zip(rounds, removed, strict=True):
        scores[layer] = error[layer]
    rest = [int(layer) for layer in np.argsort(-scores, kind="stable") if layer not in removed]
    return Depth((*rest, *reversed(removed)), scores, rounds, halves)


def _round(
    model: NemotronH, batches: Batches, gram: Tensor, removed: list[int], partial: Partial, show: Progress
) -> Sums:
    index, count = len(removed), len(model.layers)
    title = f"layers {index}"
    before = len(batches) * planned(count, index)
    each = planned(count, index + 1) - planned(count, index)
    tick = counter(show, before + partial.done.get(title, 0) * each, lambda layer: f"round {index + 1}")

    def measure(ids_BL: Tensor, real_BL: Tensor) -> Sums:
        return leave_one_out(model, ids_BL, real_BL, gram, removed, tick)

    return accumulate(title, batches, measure, partial)


def leave_one_out(
    model: NemotronH, ids_BL: Tensor, real_BL: Tensor, gram: Tensor, removed: list[int], tick: Tick = lambda layer: None
) -> Sums:
    """error [layers]: Σ (M_full - M_without)² over the real tokens of a batch, without a layer and the removed ones;
    zero for those. scale []: Σ M_full².
    """
    everything = range(len(model.layers))
    kept = [layer for layer in everything if layer not in removed]
    real = real_BL.bool()
    x_BLd = model.embed(ids_BL, hard(model.architecture))
    full = last_norm(model, run(model, x_BLd, everything, tick)[real])
    error = torch.zeros(len(everything), dtype=torch.float64)
    for place, layer in enumerate(kept):
        above = kept[place + 1 :]
        without = last_norm(model, run(model, x_BLd, above, tick)[real])
        error[layer] = energy(without, full, gram).cpu()
        if not error[layer].isfinite():
            raise NestlingError(f"layer {layer}: the logits of the model without it are not finite")
        if above:
            x_BLd = run(model, x_BLd, [layer], tick)
    return {"error": error, "scale": energy(full, None, gram)}


def planned(count: int, rounds: int) -> int:
    """Layer passes per batch of so many rounds."""
    sizes = [count - index for index in range(rounds)]
    return sum(count + n * (n - 1) // 2 + (n - 1) for n in sizes)


def recomputed(count: int, rounds: int) -> int:
    """Layer passes per batch if every model without a layer were run from the bottom."""
    return sum(count + n * (n - 1) for n in (count - index for index in range(rounds)))


def _announce(count: int, rounds: int, passes: int, batches: int) -> None:
    """The work, before it starts."""
    saved = 1 - planned(count, rounds) / recomputed(count, rounds)
    console.print(
        f"rank layers: rounds {rounds}, batches {batches}, {passes:,} layer passes in all: as much as "
        f"{passes / count / batches:,.0f} forward passes over the data ({saved:.0%} saved by not recomputing what lies "
        "below a removed layer)",
        soft_wrap=True,
    )


def run(
    model: NemotronH,
    x_BLd: Tensor,
    layers: Iterable[int],
    tick: Tick = lambda layer: None,
    watch: Watch | None = None,
) -> Tensor:
    """The residual stream after these layers, at full width."""
    widths = dict(hard(model.architecture).layers)
    context = Context.of(x_BLd, None, None, watch)
    for layer in layers:
        x_BLd = model.layers[layer](x_BLd, widths[layer], context, None)
        tick(layer)
    return x_BLd


def last_norm(model: NemotronH, x_Xd: Tensor) -> Tensor:
    """What the output head multiplies, [..., d]."""
    width = hard(model.architecture).ends
    return rms_norm(x_Xd, model.ends.part("backbone.norm_f.weight", width), width, model.eps)


def head_gram(model: NemotronH) -> Tensor:
    """WᵀW of the output head, [d, d] in float64."""
    name = "lm_head.weight" if model.architecture.untied else "backbone.embeddings.weight"
    weight = model.ends.get_parameter(name)
    gram = weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for rows in weight.split(ROWS):
        gram += rows.double().T @ rows.double()
    return gram


def energy(one_Td: Tensor, other_Td: Tensor | None, gram: Tensor) -> Tensor:
    """‖W one - W other‖² over all tokens (other: None for zero), [] in float64."""
    total = gram.new_zeros(())
    for start in range(0, len(one_Td), ROWS):
        difference = one_Td[start : start + ROWS].double()
        if other_Td is not None:
            difference = difference - other_Td[start : start + ROWS]
        total += ((difference @ gram) * difference).sum()
    return total


def cosine_layers(model: NemotronH, batches: Batches, partial: Partial) -> Depth:
    """The cheap proxy, one forward pass: a layer scores 1 - mean cosine of its residual stream before and after."""

    def measure(ids_BL: Tensor, real_BL: Tensor) -> Sums:
        x_BLd, real = model.embed(ids_BL, hard(model.architecture)), real_BL.bool()
        cosines = []
        for layer in range(len(model.layers)):
            after = run(model, x_BLd, [layer], tick)
            cosine = F.cosine_similarity(wide(x_BLd[real]), wide(after[real]), dim=-1).sum(dtype=torch.float64)
            if not cosine.isfinite():
                raise NestlingError(f"layer {layer}: its residual stream is not finite")
            cosines.append(cosine)
            x_BLd = after
        return {"cosine": torch.stack(cosines), "tokens": real.sum().double()}

    with progress("rank layers", len(batches) * len(model.layers), "layers") as show:
        tick = counter(show, partial.done.get("cosine", 0) * len(model.layers), "layer {}".format)
        sums = accumulate("cosine", batches, measure, partial)
    halves = 1 - (sums["cosine"] / sums["tokens"][:, None]).numpy()
    scores = 1 - (sums["cosine"].sum(0) / sums["tokens"].sum()).numpy()
    layers = tuple(int(layer) for layer in np.argsort(-scores, kind="stable"))
    return Depth(layers, scores, scores[None], halves)
