"""Verbs that read a recipe: run, pretrain, train, data. Heavy imports come when a verb runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.app import Quick, Recipe, RunOut, Seed, app
from nestling.errors import NestlingError, nearest


@app.command("run")
def run_(recipe: Recipe, quick: Quick = False, seed: Seed = None, out: RunOut = None) -> None:
    """Do everything a recipe says, skipping what is done. Reads the recipe, writes its output directory.

    Example: nestling run runs/demo.toml
    """
    _pipeline(recipe, quick, seed, out).run()


def _pipeline(recipe: Path, quick: bool, seed: int | None, out: str | None) -> Any:
    from nestling.pipeline import Pipeline
    from nestling.recipe import read_recipe

    options = [*(["--quick"] if quick else []), *([f"--seed {seed}"] if seed is not None else [])]
    return Pipeline(
        read_recipe(recipe, quick=quick, seed=seed, out=out), " ".join(["nestling run", str(recipe), *options]), quick
    )


@app.command()
def pretrain(recipe: Recipe, quick: Quick = False, seed: Seed = None, out: RunOut = None) -> None:
    """Train the parent of a recipe from scratch. Reads the recipe, writes OUT/parent.

    Example: nestling pretrain runs/demo.toml
    """
    _pipeline(recipe, quick, seed, out).run(until="parent")


@app.command()
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
) -> None:
    """Distil a whole family in one run, and what it needs before. Reads the recipe, writes OUT/elastic.

    Example: nestling train runs/demo.toml
    """
    if dry_run:
        from nestling.dry_run import figures, show
        from nestling.recipe import read_recipe

        show(figures(read_recipe(recipe, quick=quick, seed=seed, out=out)))
        return
    if on_change not in (allowed := ("refuse", "restart", "continue")):
        raise NestlingError(f"--on-change {on_change!r} is unknown; {nearest(on_change, allowed)}")
    pipeline = _pipeline(recipe, quick, seed, out)
    pipeline.on_change = on_change
    pipeline.run(until="train")


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
