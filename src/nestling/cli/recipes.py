"""Verbs that read a recipe: run, pretrain, train, data. Heavy imports come when a verb runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nestling import ranks
from nestling.cli.app import GpuFlops, GpuMemory, GpuName, Gpus, Mfu, Quick, Recipe, RunOut, Seed, app
from nestling.errors import NestlingError, nearest
from nestling.gpus import MFU


@app.command("run")
@ranks.together()
def run_(recipe: Recipe, quick: Quick = False, seed: Seed = None, out: RunOut = None) -> None:
    """Do everything a recipe says, skipping what is done. Reads the recipe, writes its output directory.

    A recipe with a [study] is run arm by arm and seed by seed instead, one result after the other.

    Example: nestling run runs/demo.toml
    """
    pipeline = _pipeline(recipe, quick, seed, out)
    if pipeline.recipe.study is None:
        pipeline.run()
        return
    if seed is not None:
        raise NestlingError(
            f"{recipe}: --seed {seed} is of one run, and the recipe is a study with seeds of its own: study.seeds"
        )
    if ranks.size() > 1:
        raise NestlingError(f"{recipe}: a study is run by one process; start it without torchrun")
    from nestling.study.study import Study

    Study(pipeline.recipe, pipeline.source, quick).run()


def _pipeline(recipe: Path, quick: bool, seed: int | None, out: str | None) -> Any:
    from nestling.pipeline import Pipeline
    from nestling.recipe import read_recipe

    options = [*(["--quick"] if quick else []), *([f"--seed {seed}"] if seed is not None else [])]
    with ranks.said_once():
        found = read_recipe(recipe, quick=quick, seed=seed, out=out)
    return Pipeline(found, " ".join(["nestling run", str(recipe), *options]), quick)


@app.command()
@ranks.together()
def pretrain(recipe: Recipe, quick: Quick = False, seed: Seed = None, out: RunOut = None) -> None:
    """Train the parent of a recipe from scratch. Reads the recipe, writes OUT/parent.

    Example: nestling pretrain runs/demo.toml
    """
    _pipeline(recipe, quick, seed, out).run(until="parent")


@app.command()
@ranks.together()
def train(
    recipe: Recipe,
    quick: Quick = False,
    seed: Seed = None,
    out: RunOut = None,
    on_change: Annotated[
        str, typer.Option(help="If the recipe has changed since it was stopped: refuse, restart, or continue.")
    ] = "refuse",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print shapes, steps, tokens, FLOPs and memory, and train nothing.")
    ] = False,
    gpus: Gpus = None,
    gpu: GpuName = None,
    gpu_memory: GpuMemory = None,
    gpu_flops: GpuFlops = None,
    mfu: Mfu = MFU,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: exact figures instead of tables.")] = False,
) -> None:
    """Distil a whole family in one run, and what it needs before. Reads the recipe, writes OUT/elastic.

    Under torchrun, processes share out the rows of every batch and the weights: docs/scale.md.

    Example: nestling train runs/demo.toml
    """
    if dry_run:
        from nestling.recipe import read_recipe

        show_recipe(
            read_recipe(recipe, quick=quick, seed=seed, out=out), gpus, gpu, gpu_memory, gpu_flops, mfu, as_json
        )
        return
    if gpus or gpu or gpu_memory or gpu_flops or as_json:
        raise NestlingError("--gpus, --gpu, --gpu-memory, --gpu-flops and --json are of a plan: add --dry-run")
    if on_change not in (allowed := ("refuse", "restart", "continue")):
        raise NestlingError(f"--on-change {on_change!r} is unknown; {nearest(on_change, allowed)}")
    pipeline = _pipeline(recipe, quick, seed, out)
    pipeline.on_change = on_change
    pipeline.run(until="train")


def show_recipe(
    recipe: Any,
    gpus: int | None,
    gpu: str | None,
    memory: str | None,
    flops: float | None,
    mfu: float,
    as_json: bool,
) -> None:
    """What a recipe trains and costs, on one process or on so many GPUs."""
    import json

    from nestling import dry_run, scale
    from nestling.gpus import find_gpu
    from nestling.layouts import check_ranks

    if gpus is None and (gpu or memory or flops):
        raise NestlingError("say how many GPUs there are: --gpus 8")
    card = find_gpu(gpu, memory, flops)
    if gpus is not None:
        check_ranks([stage.batch for stage in recipe.train.stages], gpus, f"--gpus {gpus}")
    found = dry_run.figures(recipe)
    if gpus is not None:
        found["scale"] = scale.figures(recipe, gpus, card, mfu)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    dry_run.show(found)
    if gpus is not None:
        scale.show(found["scale"])


@app.command()
def data(
    recipe: Recipe,
    show: Annotated[bool, typer.Option("--show", help="Print a batch, decoded: documents, what is learnt.")] = False,
    step: Annotated[int, typer.Option(min=0, help="Which one: a step of the whole training.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Rows of it to print at most.")] = 4,
    quick: Quick = False,
    seed: Seed = None,
    out: RunOut = None,
) -> None:
    """Tokenise the [data] of a recipe, count it, and show what is trained on. Reads the recipe, writes OUT/data.

    Example: nestling data --show runs/prose.toml --step 10
    """
    from rich.console import Console

    from nestling.data.show import opened, show_batch, show_counts
    from nestling.recipe import read_recipe

    made = opened(read_recipe(recipe, quick=quick, seed=seed, out=out))
    show_counts(made, console := Console(highlight=False))
    if show:
        show_batch(made, step, rows, console)
