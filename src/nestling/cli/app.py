"""The program and its options: what comes before a verb, and what several verbs take."""

from pathlib import Path
from typing import Annotated

import typer

import nestling

app = typer.Typer(
    name="nestling",
    help="Train once, get every size: elastic checkpoints of hybrid Mamba-2 / attention / MLP language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Out = Annotated[Path, typer.Option("--out", help="Directory to write; it must not exist, or be empty.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that Nestling wrote before.")]
Recipe = Annotated[Path, typer.Argument(help="A recipe, such as runs/demo.toml.")]
Quick = Annotated[bool, typer.Option("--quick", help="The recipe's small form, into its own directory.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Instead of the recipe's seed.")]
RunOut = Annotated[str | None, typer.Option("--out", help="Instead of the recipe's output directory.")]
Budget = Annotated[str | None, typer.Option("--budget", help="A size of the family by name, such as 50%.")]

Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")]

Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Plan a recipe on so many GPUs.")]
GpuName = Annotated[str | None, typer.Option("--gpu", help="Their kind: a100, h100 (the default), h200, b200, l40s, …")]
GpuMemory = Annotated[str | None, typer.Option("--gpu-memory", help="Instead of the kind's, such as 80GB.")]
GpuFlops = Annotated[float | None, typer.Option("--gpu-flops", min=1, help="Dense bf16 FLOP/s, such as 9.9e14.")]
Mfu = Annotated[float, typer.Option("--mfu", min=0.01, max=1, help="Share of the peak speed that is reached.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"nestling {nestling.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What comes before a verb."""
