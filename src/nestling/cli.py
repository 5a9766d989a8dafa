"""The command line. Verbs read a directory or a recipe and write a directory; bad input is one line and exit 2."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import nestling
from nestling.errors import NestlingError, nearest
from nestling.stopping import stoppable

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


@app.command()
def plan(
    target: Annotated[str | None, typer.Argument(help="A preset's name, a config.json, or a model directory.")] = None,
    context: Annotated[
        str | None, typer.Option(help="Tokens of a sequence, as 4096, 8k or 1M (k is 1024); 128k if not given.")
    ] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's tables, recomputed, instead of a TARGET.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print exact figures as JSON instead of tables.")] = False,
) -> None:
    """Print what a model and its budgets are and cost: shape, parameters, bytes by precision, caches, FLOPs.

    Reads shapes and no weights, writes nothing.

    Example: nestling plan nemotron-nano-12b-v2 --context 128k
    """
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
def pretrain(recipe: Recipe, quick: Quick = False, seed: Seed = None, out: RunOut = None) -> None:
    """Train the parent of a recipe from scratch. Reads the recipe, writes OUT/parent.

    Example: nestling pretrain runs/demo.toml
    """
    _pipeline(recipe, quick, seed, out).run(until="parent")


@app.command()
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
    overwrite: Overwrite = False,
) -> None:
    """Order every axis by importance. Reads a model and text, writes an elastic checkpoint with the same function.

    Axes: hidden, ffn, mamba_heads, mamba_channels, attention_heads. Each has metrics of its own, magnitude and random.

    With --inspect it reads a ranked checkpoint, needs no data, and writes one page: NAME-ranking.html beside it.

    Example: nestling rank MODEL --data texts.jsonl --out ELASTIC
    """
    if inspect:
        _inspect(context, directory, out)
        return
    if not data or out is None:
        raise NestlingError("rank needs --data FILE.jsonl and --out DIRECTORY (or --inspect, to look at a ranking)")

    from nestling.train.calibration import Source, open_texts
    from nestling.train.importance import Method
    from nestling.train.rank import Job, run
    from nestling.weights.elastic import open_elastic
    from nestling.weights.output import check_output

    if wrong := [given for given in metric or [] if given.count("=") != 1]:
        raise NestlingError(f"--metric {wrong[0]}: write AXIS=METRIC, as in --metric ffn=pre")
    method = Method.of(dict(given.split("=") for given in metric or []), depth, max_drop, seed)
    sources = [Source.parse(given) for given in data]
    elastic = open_elastic(directory)
    method.rounds(len(elastic.architecture.hybrid_override_pattern))
    check_output(out, overwrite=overwrite)
    texts = open_texts(sources, directory, elastic.architecture.vocab_size, samples, length, batch)
    ranking = run(Job(elastic, texts, method, out), overwrite=overwrite)
    print(f"{out}: ranked, the same function as {directory}")
    if ranking.stability:
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

    from nestling.recipe import read_recipe
    from nestling.train.show import opened, show_batch, show_counts

    made = opened(read_recipe(recipe, quick=quick, seed=seed, out=out))
    show_counts(made, console := Console(highlight=False))
    if show:
        show_batch(made, step, rows, console)


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
    from nestling.progress import progress
    from nestling.units import decimal, parse_bytes
    from nestling.weights.card import NO_ATTENTION
    from nestling.weights.files import read_json
    from nestling.weights.slicing import plan_slices

    names = budget or []
    if (not names) == (submodel is None):
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
    target: Annotated[
        str, typer.Argument(help="A preset's name, a config.json, a model directory, or a recipe (its search space).")
    ],
    out: Annotated[Path, typer.Option("--out", help="JSON file to write.")],
    latency: Annotated[bool, typer.Option("--latency", help="Time candidate sizes on this machine.")] = False,
    candidates: Annotated[int, typer.Option(min=16, help="How many sizes are timed.")] = 48,
    batch: Annotated[int, typer.Option(min=1, help="Sequences decoded at a time.")] = 1,
    context: Annotated[str, typer.Option(help="Tokens behind the one that is timed, as 512 or 8k.")] = "512",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    rounds: Annotated[int, typer.Option(min=3, help="In which every size has its turn.")] = 15,
    seed: Annotated[int, typer.Option(min=0, help="Of the sizes that are drawn.")] = 0,
) -> None:
    """Make the latency table that budgets such as 20ms are read off. Reads shapes and no weights, writes one file.

    What is timed is a token of decoding after a context, of random sizes with random weights, interleaved.

    Example: nestling bench runs/demo.toml --latency --out latency.json
    """
    from nestling.infer.timing import Timing, time_submodels
    from nestling.infer.timing import candidates as drawn
    from nestling.progress import progress
    from nestling.units import parse_context
    from nestling.weights.convert import parse_dtype
    from nestling.weights.files import read_json, write_json

    if not latency:
        raise NestlingError("say what to measure: --latency")
    if out.exists() and "rows" not in read_json(out):
        raise NestlingError(f"{out}: exists and is not a latency table; choose another --out")
    if not out.absolute().parent.is_dir():  # said before minutes of timing
        raise NestlingError(f"{out}: there is no directory {out.parent}; make it, or choose another --out")
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


@app.command("eval")
def eval_(
    directory: Annotated[Path, typer.Argument(help="An elastic checkpoint, or any model directory with a tokenizer.")],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "--task",
            metavar="NAME[:OPTION=VALUE,…],…",
            help="math-500, aime-24, aime-25, gpqa, livecodebench-v5, mmlu-pro, math, choices or perplexity, each with "
            ":file=PATH; or a task of reasoning-gym. Repeatable.",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", help="A size by name or wish, or all. Repeatable; else the whole.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory of results and every output; stopped, it goes on there.")
    ] = None,
    problems: Annotated[int | None, typer.Option(min=1, help="Only the first so many of a task.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers to each problem, instead of the task's.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Instead of the task's; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(min=1e-6, max=1.0, help="Instead of the task's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer, instead of the task's.")] = None,
    pass_at: Annotated[list[int] | None, typer.Option(min=1, help="Also pass@K of the samples. Repeatable.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that are computed together.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of drawn tokens, and of reasoning-gym's held-out problems.")] = 0,
    backend: Annotated[
        str, typer.Option(help="nestling (views of one storage), transformers, or auto: nestling where it can.")
    ] = "auto",
    chat: Annotated[
        bool | None, typer.Option(help="Ask through the chat template; by default where there is one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    thinking: Annotated[bool | None, typer.Option(help="Reasoning on or off, if the chat template knows it.")] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let livecodebench-v5 run what the model writes, limited.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin again instead of going on.")] = False,
) -> None:
    """Judge every size: generation with verifiers, multiple choice, perplexity, with 95 % intervals.

    Reads a checkpoint and the data that tasks name, prints a line per size and task, writes OUT/SIZE/TASK.json, and
    every output to TASK.jsonl beside it. Stopped, it goes on where it was; nothing is downloaded.

    Example: nestling eval out/demo/elastic --budget all --tasks chain_sum:min_terms=2,max_terms=3,max_digits=2
    """
    from nestling.evaluate.chat import Chat
    from nestling.evaluate.evaluation import Evaluation, make_tasks, say
    from nestling.evaluate.spec import parse_tasks
    from nestling.evaluate.subject import check_directory, open_subjects
    from nestling.evaluate.suite import Overrides

    check_directory(directory)
    given = Overrides(
        problems, samples, temperature, top_p, max_tokens, tuple(pass_at or ()), Chat(chat, system, thinking),
        allow_code_execution,
    )  # fmt: skip
    made = make_tasks(parse_tasks(tasks or []), given, seed)
    subjects = open_subjects(directory, budget or [], backend)
    command = " ".join(["nestling", *sys.argv[1:]])
    Evaluation(made, subjects, out, batch, seed, overwrite, command).run(lambda result: print(say(result), flush=True))


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(help="A model directory with a tokenizer.")],
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue; with --chat, what the user says.")],
    budget: Annotated[str | None, typer.Option(help="A size by name, such as 50%, or a wish, such as 7.5B.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Only the most probable tokens that together reach this.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Only so many of the most probable tokens; 0 for all.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Text to end before. Repeatable.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
) -> None:
    """Continue a text with one size of a family. Reads a checkpoint, writes to standard output as tokens come.

    Example: nestling generate out/demo/elastic --budget 75% --prompt '50+23-88=' --temperature 0
    """
    import time

    from nestling.tokenizer import encode, end_tokens, read_tokenizer, token_ids
    from nestling.weights.elastic import open_elastic

    elastic = open_elastic(directory)
    elastic.submodel(budget)
    tokenizer, vocabulary = read_tokenizer(directory), elastic.architecture.vocab_size
    if chat:
        from nestling.infer.chat import chat_template

        text = chat_template(directory)([{"role": "user", "content": prompt}], {})
        ids = token_ids(tokenizer, text, vocabulary, "the prompt", special=False)
    else:
        ids = encode(tokenizer, prompt, vocabulary)

    from nestling.infer.family import load
    from nestling.infer.generate import generate as continue_
    from nestling.infer.text import Written

    view, written = (
        load(directory)[budget],
        Written(tokenizer, stop or [], lambda piece: print(piece, end="", flush=True)),
    )
    began = time.monotonic()
    (row,) = continue_(
        view,
        [ids],
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        eos=end_tokens(directory),
        seed=seed,
        told=written.told,
    )
    written.end()
    print(flush=True)
    print(f"{len(row)} tokens, {len(row) / (time.monotonic() - began):.0f} tokens/s", file=sys.stderr)


@app.command()
def serve(
    directory: Annotated[Path, typer.Argument(help="A model directory with a tokenizer.")],
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="Another address than this machine's own needs a key.")] = "127.0.0.1",
    api_key: Annotated[
        str | None, typer.Option(envvar="NESTLING_API_KEY", help="What clients must send; better in the environment.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Stand open on any address, without a key.")] = False,
    name: Annotated[str | None, typer.Option(help="Of the models, instead of the directory's.")] = None,
    pin: Annotated[list[str] | None, typer.Option(help="A size to pack for good: faster, at its bytes.")] = None,
    cache: Annotated[str, typer.Option(help="Bytes that the caches of all requests may hold.")] = "1GiB",
    chunk: Annotated[int, typer.Option(min=3, help="Tokens of prompts read between two tokens of others.")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="Sequences computed at a time; more wait.")] = 64,
    queue: Annotated[int, typer.Option(min=1, help="Sequences in hand or waiting; more are refused.")] = 256,
    max_prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt at most.")] = 32768,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a request may ask for.")] = 4096,
    seconds: Annotated[float, typer.Option(min=1, help="That a request may take.")] = 600.0,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that running streams have after a stop.")] = 30,
) -> None:
    """Serve every size of a family from one copy of the weights, over OpenAI's API. Reads a checkpoint, writes nothing.

    Example: nestling serve out/demo/elastic --port 8000
    """
    from nestling.units import parse_bytes
    from nestling.weights.elastic import open_elastic

    elastic = open_elastic(directory)
    for size in pin or []:
        elastic.submodel(size)
    try:
        from nestling.serve.server import Limits, Settings
        from nestling.serve.server import serve as run
    except ModuleNotFoundError as error:
        raise NestlingError(f"serving needs {error.name}: pip install 'nestling[serve]'") from None
    limits = Limits(prompt_tokens=max_prompt, max_tokens=max_tokens, open=queue, seconds=seconds)
    pins, cache_bytes = tuple(pin or ()), parse_bytes(cache, "--cache")
    run(
        directory,
        Settings(host, port, api_key, insecure, name, pins, cache_bytes, chunk, rows, grace, limits),
    )


@app.command()
def report(
    paths: Annotated[
        list[Path], typer.Argument(help="The output of `nestling run`, directories of `nestling eval --out`, or both.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page, PAGE.html; else report.html beside results.")
    ] = None,
) -> None:
    """Tell of evaluations, or of a run, on one page that works offline. Reads results, writes report.html.

    Of evaluations: scores with intervals, the front of score against cost, what the family saves, its sizes, and the
    same tables as report.md for a model card. Of a run alone: its own report again.

    Example: nestling report out/demo
    """
    from nestling.evaluate.story import tell

    if len(paths) == 1 and out is None and ((paths[0] / "run.json").is_file() or not any(paths[0].rglob("*.json"))):
        tell(paths[0])
        return
    from nestling.evaluate.results_page import write_page

    page, card = write_page(paths, out)
    print(f"{page}: the whole page, to open in a browser\n{card}: its tables, for a model card")


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


def main() -> None:
    """Run the command line: exit 0, or 2 with one line about bad input, or 130 when stopped."""
    with stoppable():
        sys.exit(_run())


def _run() -> int:
    try:
        code = app(standalone_mode=False) or 0
    except typer.Abort:
        code = 130
    except Exception as error:
        print(_line(error), file=sys.stderr)
        code = 2
    if code == 130:  # typer's way to hand on that it was stopped
        raise KeyboardInterrupt
    return code


def _line(error: Any) -> str:
    """What to say about bad input; anything else is a defect of ours, and raised on."""
    if isinstance(error, NestlingError):
        return f"nestling: {error}"
    if not hasattr(error, "format_message"):  # click's errors, whose module is typer's own affair
        raise error
    message = error.format_message()
    return message if "\n" in message else f"nestling: {message}"
