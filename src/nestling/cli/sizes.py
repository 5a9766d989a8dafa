"""Verbs that use the sizes of a family: eval, generate, serve, report. Heavy imports come when a verb runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from nestling import ranks
from nestling.cli.app import Device, app
from nestling.errors import NestlingError


@app.command("eval")
@ranks.together()
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
    device: Device = "auto",
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
    every output to TASK.jsonl beside it. Stopped, it goes on where it was; nothing is downloaded. Under torchrun,
    processes share out the batches.

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
    subjects = open_subjects(directory, budget or [], backend, device)
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
    device: Device = "auto",
) -> None:
    """Continue a text with one size of a family. Reads a checkpoint, writes to standard output as tokens come.

    Example: nestling generate out/demo/elastic --budget 75% --prompt '50+23-88=' --temperature 0
    """
    import time

    from nestling.tokenizer import encode, end_tokens, read_tokenizer, token_ids
    from nestling.weights.elastic import open_elastic

    if "" in (stop or []):
        raise NestlingError("--stop '' is empty, which every text would end before; leave it out")
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
    from nestling.model.device import find_device

    view = load(directory, device=find_device(device, "--device "))[budget]
    written = Written(tokenizer, stop or [], lambda piece: print(piece, end="", flush=True))
    began = time.monotonic()
    try:
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
    finally:
        if written.begun:  # a line of its own for what is said next
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
    device: Device = "auto",
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
        Settings(host, port, api_key, insecure, name, pins, cache_bytes, chunk, rows, grace, limits, device),
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
    same tables as report.md for a model card. Of a run alone: its own report again. Of a study: the paper's tables with
    what was measured beside what it printed.

    Example: nestling report out/demo
    """
    from nestling.evaluate.story import tell

    if len(paths) == 1 and out is None and (paths[0] / "study.json").is_file():
        from nestling.study.page import tell as tell_study

        tell_study(paths[0])
        return
    if len(paths) == 1 and out is None and ((paths[0] / "run.json").is_file() or not any(paths[0].rglob("*.json"))):
        tell(paths[0])
        return
    from nestling.evaluate.results_page import write_page

    page, card = write_page(paths, out)
    print(f"{page}: the whole page, to open in a browser\n{card}: its tables, for a model card")
