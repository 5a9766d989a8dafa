"""Verbs about checkpoints: plan, rank, slice, bench, verify. Heavy imports come when a verb runs."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nestling import ranks
from nestling.cli.app import Device, GpuFlops, GpuMemory, GpuName, Gpus, Mfu, Overwrite, app
from nestling.cli.quick import start_sooner
from nestling.errors import NestlingError
from nestling.gpus import MFU


@app.command()
def plan(
    target: Annotated[
        str | None, typer.Argument(help="A preset's name, a config.json, a model directory, or a recipe.")
    ] = None,
    context: Annotated[
        str | None, typer.Option(help="Tokens of a sequence, as 4096, 8k or 1M (k is 1024); 128k if not given.")
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's tables, recomputed, instead of a TARGET.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print exact figures as JSON instead of tables.")] = False,
    gpus: Gpus = None,
    gpu: GpuName = None,
    gpu_memory: GpuMemory = None,
    gpu_flops: GpuFlops = None,
    mfu: Mfu = MFU,
) -> None:
    """Print what a model and its budgets are and cost: shape, parameters, bytes by precision, caches, FLOPs.

    Reads shapes and no weights, writes nothing. Of a recipe (RECIPE.toml) it prints what `train --dry-run` does, and
    with --gpus 64 --gpu h100 memory per rank, wall time, and the cheapest layout that fits.

    Example: nestling plan nemotron-nano-12b-v2 --context 128k
    """
    if target is not None and target.endswith(".toml"):
        from nestling.cli.recipes import show_recipe
        from nestling.recipe import read_recipe

        if context is not None or paper:
            raise NestlingError("a recipe has lengths of its own: leave --context and --paper out")
        show_recipe(read_recipe(target), gpus, gpu, gpu_memory, gpu_flops, mfu, as_json)
        return
    if gpus or gpu or gpu_memory or gpu_flops:
        raise NestlingError("--gpus plans the training of a recipe: nestling plan RECIPE.toml --gpus 64")

    from nestling import printout
    from nestling.paper import tables
    from nestling.plan import CONTEXT, PRESETS, figures
    from nestling.units import parse_context

    if (target is None) != paper:
        raise NestlingError(f"name one: --paper, or a TARGET (config.json, directory, or {', '.join(PRESETS)})")
    if paper and context is not None:
        raise NestlingError("--context does not apply to --paper, whose figures have no context length")
    tokens = CONTEXT if context is None else parse_context(context)
    found = tables() if target is None else figures(target, tokens)
    if as_json:
        printout.show_json(found)
    elif target is None:
        printout.show_paper(found)
    else:
        printout.show_plan(target, found)


@app.command()
@ranks.together()
def rank(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="Any nemotron_h directory.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE.jsonl[=WEIGHT]",
            help='Calibration data: JSON lines with a "text", or "messages" for the chat template. Repeatable.',
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write, new or empty; with --inspect the page, FILE.html.")
    ] = None,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Show the ranking that a checkpoint has, and write it as a page.")
    ] = False,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Exactly so many samples; without it all there are, at most 1024.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each to use at most.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 8,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="AXIS=METRIC", help="Instead of an axis's default, as ffn=pre. Repeatable."),
    ] = None,
    depth: Annotated[str, typer.Option(help="How layers are ranked: iterative, one-shot or cosine.")] = "iterative",
    max_drop: Annotated[
        int | None, typer.Option(help="Layers the iterative form takes away; by default half of them.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the metric random.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Order every axis by importance. Reads a model and text, writes an elastic checkpoint with the same function.

    Axes: hidden, ffn, mamba_heads, mamba_channels, attention_heads. Each has metrics of its own, magnitude and random.

    With --inspect it reads a ranked checkpoint, needs no data, and writes one page: NAME-ranking.html beside it.

    Under torchrun, processes share out the batches; the ranking is that of one process.

    Example: nestling rank MODEL --data texts.jsonl --out ELASTIC
    """
    if inspect:
        _inspect(context, directory, out)
        return
    if not data or out is None:
        raise NestlingError("rank needs --data FILE.jsonl and --out DIRECTORY (or --inspect, to look at a ranking)")

    from nestling.model.device import find_device
    from nestling.train.calibration import Source, open_texts
    from nestling.train.importance import Method
    from nestling.train.rank import Job, run
    from nestling.weights.elastic import open_elastic
    from nestling.weights.output import check_output

    place = find_device(device, "--device ")
    if wrong := [given for given in metric or [] if given.count("=") != 1]:
        raise NestlingError(f"--metric {wrong[0]}: write AXIS=METRIC, as in --metric ffn=pre")
    method = Method.of(dict(given.split("=") for given in metric or []), depth, max_drop, seed)
    sources = [Source.parse(given) for given in data]
    elastic = open_elastic(directory)
    method.rounds(len(elastic.architecture.hybrid_override_pattern))
    check_output(out, overwrite=overwrite)
    texts = open_texts(sources, directory, elastic.architecture.vocab_size, samples, length, batch)
    ranking = run(Job(elastic, texts, method, out, place), overwrite=overwrite)
    print(f"{out}: ranked, the same function as {directory}")
    if ranking.stability and ranks.first():
        least = min(ranking.stability, key=lambda name: ranking.stability[name])
        print(
            f"least stable between halves of the data: {_part(least)}, Spearman {ranking.stability[least]:.2f}",
            file=sys.stderr,
        )


def _part(key: str) -> str:
    """What a key of a ranking is called: `q.3` is the attention heads of layer 3."""
    from nestling.evaluate.spelling import AXES

    letter, _, layer = key.partition(".")
    axis = AXES.get(letter)
    groups = f", the mean over its {axis.inside}s" if axis and axis.inside else ""
    return f"{axis.name if axis else key}{f' of layer {layer}' if layer else ''}{groups}"


def _inspect(context: typer.Context, directory: Path, out: Path | None) -> None:
    from nestling.evaluate.inspection import inspect

    for name, source in ((name, context.get_parameter_source(name)) for name in context.params):
        if source and source.name == "COMMANDLINE" and name not in ("directory", "inspect", "out"):
            raise NestlingError(
                f"--{name.replace('_', '-')} is of no use with --inspect, which ranks nothing; leave it out"
            )
    inspect(directory, out)


@app.command("slice")
def slice_(
    directory: Annotated[Path, typer.Argument(help="An elastic checkpoint, or any nemotron_h directory.")],
    out: Annotated[Path, typer.Option("--out", help="Directory to write; {budget} in it stands for each size's name.")],
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", help="A size by name, or a wish: 7.5B, 60%, 16GiB@128k. Several are cut in one pass."),
    ] = None,
    submodel: Annotated[Path | None, typer.Option("--submodel", help="A partial HF config as a JSON file.")] = None,
    hetero: Annotated[
        str, typer.Option(help="Sizes that differ between layers: auto refuses, pad zero-pads, code adds custom code.")
    ] = "auto",
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32 instead of the type of the source.")] = None,
    shard_size: Annotated[str, typer.Option(help="Bytes of a weight file at most, such as 5GB.")] = "5GB",
    latency_table: Annotated[
        Path | None, typer.Option(help="For budgets such as 20ms: a file of nestling bench --latency.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--verify", help="Then load it in stock transformers and compare with the view inside.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Cut sizes out, with no training. Reads a checkpoint, writes standalone ones that stock tools load.

    Example: nestling slice out/demo/elastic --budget 50% --out my-half
    """
    start_sooner()
    from nestling.progress import progress
    from nestling.units import decimal, parse_bytes
    from nestling.weights.card import NO_ATTENTION, ODD_EXPERTS, TIED
    from nestling.weights.files import read_json
    from nestling.weights.slicing import plan_slices

    names = budget or []
    if names and submodel is not None:
        raise NestlingError("--budget and --submodel both name a size; give one of them")
    if not names and submodel is None:
        raise NestlingError("name a size: --budget NAME, as often as you like, or --submodel FILE.json")
    if submodel is not None and "{budget}" in str(out):
        raise NestlingError(f"--out {out}: {{budget}} stands for the name of a --budget, which a --submodel has not")
    sizes: dict[str, Any] = _by_output(str(out), names) if submodel is None else {str(out): read_json(submodel)}
    shard_bytes = parse_bytes(shard_size, "--shard-size")
    slicing = plan_slices(
        directory,
        sizes,
        hetero=hetero,
        dtype=dtype,
        shard_bytes=shard_bytes,
        overwrite=overwrite,
        latency_table=latency_table,
    )
    with progress(f"slice {', '.join(names or [str(submodel)])}", slicing.nbytes, "B") as show:
        slicing.write(_counted(show))
    notes = slicing.notes()
    for path, cut in slicing.outputs.items():
        print(f"{path}: {cut.parameters:,} parameters, {decimal(cut.nbytes)}")
        if path in notes:
            print(f"nestling: note: {path}: {notes[path]}", file=sys.stderr)
        if not cut.attends:
            print(f"nestling: warning: {path}: {NO_ATTENTION}", file=sys.stderr)
        if not cut.elastic.architecture.untied:
            print(f"nestling: warning: {path}: the {TIED}", file=sys.stderr)
        if not cut.groupable:
            print(f"nestling: warning: {path}: {ODD_EXPERTS}", file=sys.stderr)
    if check:
        from nestling.evaluate.parity import parity

        for path, cut in slicing.outputs.items():
            print(f"{path}: {parity(cut, path)}")


def _by_output(out: str, budgets: list[str]) -> dict[str, str]:
    """Output directory -> the wish for it."""
    if len(budgets) > 1 and "{budget}" not in out:
        raise NestlingError(f"--out {out} is one directory for {len(budgets)} sizes; write --out '{out}/{{budget}}'")
    sizes = {out.replace("{budget}", budget.replace("/", "-")): budget for budget in budgets}
    if len({budget.lower() for budget in budgets}) < len(budgets) or len(sizes) < len(budgets):
        raise NestlingError(f"--budget names a size twice: {', '.join(budgets)}")
    return sizes


def _counted(show: Any) -> Any:
    """From what was done since the last call to what is done in all."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        show(done)

    return advance


@app.command()
def bench(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            help="Rows of the speed table, all by default; with --latency a preset, config, model or recipe."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny work, one round: does it run, do results agree?")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda: one GPU, models in bf16.")] = "cpu",
    vllm: Annotated[
        Path | None, typer.Option("--vllm", metavar="PYTHON", help="Also against vLLM: the Python that has it.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the table as Markdown to this file.")] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Make a latency table instead.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="The latency table to write.")] = None,
    candidates: Annotated[int, typer.Option(min=16, help="Latency: how many sizes are timed.")] = 48,
    batch: Annotated[int, typer.Option(min=1, help="Latency: sequences decoded at a time.")] = 1,
    context: Annotated[str, typer.Option(help="Latency: tokens behind the one timed, as 512 or 8k.")] = "512",
    dtype: Annotated[str, typer.Option(help="Latency: fp32, bf16 or fp16.")] = "fp32",
    rounds: Annotated[int | None, typer.Option(min=1, help="Everything has one turn in each: 5, latency 15.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Latency: of the sizes that are drawn.")] = 0,
) -> None:
    """The speed table: hot paths against named rivals on the same work, in turns; or the table that budgets in ms need.

    Reads nothing, or with --latency the shapes of a model; writes the files that are named. Results are checked against
    float64 references before anything is timed. A latency table is of random sizes with random weights: a token of
    decoding after a context, interleaved.

    Example: nestling bench step decode --json speed.json, nestling bench runs/demo.toml --latency --out latency.json
    """
    if latency:
        if not what or len(what) != 1 or out is None:
            raise NestlingError(
                "bench --latency takes one preset, config.json, model directory or recipe, and --out FILE"
            )
        _latency_table(what[0], out, candidates, batch, context, dtype, rounds or 15, seed)
        return
    if out is not None:
        raise NestlingError("bench --out is for --latency; the speed table is written by --json FILE and --save FILE")
    from nestling.bench.table import show

    show(what or (), quick, rounds or 5, json_file, save, device, vllm)


def _latency_table(
    target: str, out: Path, candidates: int, batch: int, context: str, dtype: str, rounds: int, seed: int
) -> None:
    from nestling.infer.timing import Timing, time_submodels
    from nestling.infer.timing import candidates as drawn
    from nestling.progress import progress
    from nestling.units import parse_context
    from nestling.weights.convert import parse_dtype
    from nestling.weights.files import check_writable, read_json, write_json

    if out.exists() and "rows" not in read_json(out):
        raise NestlingError(f"{out}: exists and is not a latency table; choose another --out")
    check_writable(out)
    how = Timing(batch, parse_context(context), parse_dtype(dtype) or "F32", rounds)
    architecture, space = _architecture_and_space(target)
    sizes = drawn(architecture, space, candidates, seed)
    with progress(f"time {len(sizes)} sizes", rounds * len(sizes), "turns") as show:
        table = time_submodels(architecture, sizes, how, show)
    write_json(out, table.to_json())
    typical, worst = table.held_out()
    print(f"{out}: {len(sizes)} sizes, {min(table.times):.3f} … {max(table.times):.3f} ms a token")
    print(f"sizes that the table has not seen: off by {typical:.1%} (median), {worst:.1%} (worst)")


def _architecture_and_space(target: str) -> Any:
    from nestling.plan import architecture_of
    from nestling.recipe import search_space

    return search_space(target) if target.endswith(".toml") else (architecture_of(target), None)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="Any nemotron_h directory.")],
    inside: Annotated[
        Path | None, typer.Option(help="The checkpoint it was cut from, or a larger slice of it.")
    ] = None,
) -> None:
    """Check checksums, shapes, finite values, and with --inside nestedness. Reads checkpoints, writes nothing.

    Example: nestling verify my-half --inside out/demo/elastic
    """
    from nestling.progress import progress
    from nestling.weights.elastic import open_elastic
    from nestling.weights.verify import verify as check

    total = sum(entry.nbytes for entry in open_elastic(directory).checkpoint.entries.values())
    with progress(f"verify {directory}", total * (1 if inside is None else 2), "B") as show:
        shown = check(directory, inside, _counted(show))
    print("\n".join(f"{directory}: {line}" for line in shown))
