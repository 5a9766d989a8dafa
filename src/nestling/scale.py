"""A recipe on GPUs, `nestling plan RECIPE --gpus N`: memory of a rank, time by stage, and the alternatives' cost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from nestling.arch.architecture import Architecture
from nestling.arch.presets import PRESETS
from nestling.arch.submodel import WHOLE, Submodel
from nestling.dry_run import Figures, example, forward_flops, stage_figures, table
from nestling.errors import NestlingError
from nestling.gpus import MFU, Gpu
from nestling.layouts import USABLE, cheapest, would_fit
from nestling.memory import Layout
from nestling.paper import COMPRESSION
from nestling.recipe import Recipe, parent_architecture
from nestling.units import decimal, show_count, show_span


def figures(recipe: Recipe, ranks: int, gpu: Gpu, mfu: float = MFU) -> Figures:
    """The layout on `ranks` GPUs, bytes of a rank, seconds and GPU-hours by stage, and the alternatives' GPU-hours."""
    architecture, how = parent_architecture(recipe), recipe.train
    if any(stage.length is None for stage in how.stages):
        raise NestlingError("--gpus needs the length of every stage: give [[train.stages]] a length")
    choice = cheapest(architecture, how, ranks, gpu)
    spread = how.model_copy(update={"activation_checkpointing": choice.layout.activation_checkpointing})
    family = example(architecture, how)
    rate = 3600 * gpu.flops * mfu  # FLOPs of a GPU-hour
    stages = [stage_figures(architecture, spread, family, index) for index in range(len(how.stages))]
    apart = {name: _alone(architecture, submodel, stages, choice.layout, rate) for name, submodel in family.items()}
    total = {key: sum(stage[key] for stage in stages) for key in ("tokens", "flops")}
    of_paper = architecture == PRESETS[PAPERS]
    return {
        "gpus": ranks,
        "gpu": asdict(gpu),
        "mfu": mfu,
        "layout": asdict(choice.layout),
        "memory": choice.memory,
        "usable": int(USABLE * gpu.memory),
        "fits": choice.fits,
        "would_fit": [] if choice.fits else would_fit(architecture, how, ranks, gpu),
        "stages": [_time(stage["tokens"], stage["flops"], ranks, rate) for stage in stages],
        "elastic": _time(total["tokens"], total["flops"], ranks, rate),
        "apart": apart,
        "apart_total": _total(list(apart.values())),
        **({"published": _published(list(apart.values())[1:])} if of_paper else {}),
    }


def _time(tokens: int, flops: int, ranks: int, rate: float) -> Figures:
    return {"tokens": tokens, "flops": flops, "seconds": 3600 * flops / rate / ranks, "gpu_hours": flops / rate}


def _alone(
    architecture: Architecture, submodel: Submodel, stages: Sequence[Figures], layout: Layout, rate: float
) -> Figures:
    """One size distilled from the parent on the tokens of every stage."""
    passes = 4 if layout.activation_checkpointing else 3
    flops = sum(
        stage["tokens"] * (forward_flops(architecture, WHOLE, stage["length"]) + passes * of_size)
        for stage in stages
        for of_size in [forward_flops(architecture, submodel, stage["length"])]
    )
    return {"tokens": sum(stage["tokens"] for stage in stages), "gpu_hours": flops / rate}


def _total(rows: Sequence[Figures]) -> Figures:
    return {key: sum(row[key] for row in rows) for key in ("tokens", "gpu_hours")}


PAPERS = "nemotron-nano-12b-v2"


def _published(smaller: Sequence[Figures]) -> Figures:
    """The tokens that Minitron-SSM took for the 9B and the 6B; which had how many is not stated, so the mean counts."""
    both, tokens = _total(smaller), sum(COMPRESSION) * 10**9
    return {"tokens": tokens, "gpu_hours": tokens * both["gpu_hours"] / both["tokens"]}


# ---- printing


def show(found: Figures) -> None:
    console = Console(highlight=False)
    layout, gpu = found["layout"], found["gpu"]
    title = (
        f"on {found['gpus']:,} × {gpu['name']} ({decimal(gpu['memory'])}, {decimal(gpu['flops'], 'FLOP/s')} in bf16)"
    )
    console.print(table([f"one rank, {title}"], _memory(found)))
    console.print(f"Layout, {'the cheapest that fits' if found['fits'] else 'that needs least'}: {_said(layout)}.")
    console.print(f"In the recipe: {_written(layout)}", markup=False, soft_wrap=True)
    if not found["fits"]:
        advice = "; or ".join(found["would_fit"]) or "nothing that was tried: a smaller model"
        console.print(f"It does not fit. What would: {advice}.")
    console.print(table(["tokens", "FLOPs", "time", "GPU-hours"], _times(found)))
    console.print(
        f"Time at {found['mfu']:.0%} of the peak speed, every FLOP counted, those done again too; communication and "
        "loading are in that share. An assumption, not a measurement: --mfu says another."
    )
    console.print(table(["tokens", "GPU-hours"], _compared(found)))


def _said(layout: Mapping[str, Any]) -> str:
    yes = {"activation_checkpointing": "activation checkpointing", "offload": "teacher in the CPU's memory"}
    told = [words if layout[key] else f"no {words}" for key, words in yes.items()]
    kept = "whole weights given up after the forward pass" if layout["reshard"] else "whole weights kept"
    return f"shards on {layout['ranks']} ranks, micro_batch = {layout['micro_batch']}, {', '.join(told)}, {kept}"


def _written(layout: Mapping[str, Any]) -> str:
    """The layout in the words of a recipe."""
    train = {"micro_batch": layout["micro_batch"], "activation_checkpointing": layout["activation_checkpointing"]}
    kept = (
        {"reshard": layout["reshard"], "offload_teacher": layout["offload"]}
        if layout["ranks"] > 1
        else {"offload_teacher": layout["offload"]}
    )
    parts = {"[train]": train, "[layout]": kept}
    return "; ".join(
        f"{name} {', '.join(f'{k} = {str(v).lower()}' for k, v in of.items())}" for name, of in parts.items()
    )


def _memory(found: Figures) -> Iterator[Sequence[str]]:
    for name, size in found["memory"].items():
        yield name, decimal(size)
    yield f"usable, {USABLE:.0%}", decimal(found["usable"])


def _times(found: Figures) -> Iterator[Sequence[str]]:
    rows = [*found["stages"], found["elastic"]]
    names = [*(f"stage {number}" for number in range(1, len(rows))), "in all"]
    for name, row in zip(names, rows, strict=True):
        yield name, show_count(row["tokens"]), f"{row['flops']:.3g}", show_span(row["seconds"]), _hours(row)


def _compared(found: Figures) -> Iterator[Sequence[str]]:
    yield _row("one elastic run, all sizes", found["elastic"])
    for name, row in found["apart"].items():
        yield _row(f"{name} distilled alone, same tokens", row)
    yield _row("all of them, each alone", found["apart_total"])
    if "published" in found:
        yield _row("9B and 6B with Minitron-SSM's published tokens", found["published"])


def _row(name: str, row: Mapping[str, float]) -> Sequence[str]:
    return name, show_count(row["tokens"]), _hours(row)


def _hours(row: Mapping[str, float]) -> str:
    hours = row["gpu_hours"]
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
