"""What a recipe's [data] is: a table of its sources, one of its stages, and a batch, decoded."""

from dataclasses import dataclass
from itertools import accumulate, groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from nestling.console import console
from nestling.data.batches import Batch
from nestling.data.corpus import Corpus, Shape, open_corpus
from nestling.errors import NestlingError
from nestling.recipe import Recipe, parent_architecture
from nestling.tokenizer import read_tokenizer

COLOURS = ("cyan", "yellow")


@dataclass(frozen=True)
class Opened:
    """The training text of a recipe, as its stages read it."""

    corpus: Corpus
    stages: tuple[Shape, ...]
    tokenizer: Tokenizer


def opened(recipe: Recipe) -> Opened:
    """Tokenise what is not yet in OUT/data; an error if the data cannot be used or does not last."""
    if recipe.data is None:
        raise NestlingError(f"{recipe.title!r} has no [data] but a [task], whose problems are made as they are needed")
    directory = recipe.text_tokenizer
    vocabulary = parent_architecture(recipe).vocab_size
    corpus = open_corpus(
        recipe.data, directory, vocabulary, seed=recipe.seed, cache=recipe.text_cache, say=console.print
    )
    stages = tuple(Shape(stage.steps, stage.batch, stage.length or 0) for stage in recipe.train.stages)
    return Opened(corpus, stages, read_tokenizer(directory))


def show_counts(made: Opened, out: Console) -> None:
    sources = Table("source", "weight", "documents", "tokens", "learnt", "skipped", title="training text")
    for name, weight, tokens in made.corpus.sources:
        counts = [f"{tokens.about[key]:,}" for key in ("documents", "tokens", "counted", "skipped")]
        sources.add_row(escape(name), f"{weight:g}", *counts)
    stages = Table("stage", "rows x length", "steps", "data lasts for", "filled", "split", "dropped", title="stages")
    for number, shape in enumerate(made.stages, 1):
        reading = made.corpus.reading(shape.rows, shape.length)
        became, pairs = reading.counts(), sum(int(part.pieces.sizes_P.sum()) for part in reading.parts)
        filled = f"{pairs / became['rows'] / shape.length:.1%}" if made.corpus.section.packing else "by length"
        shown = [f"{shape.rows:,} x {shape.length:,}", f"{shape.steps:,}", f"{reading.steps:,} steps", filled]
        stages.add_row(str(number), *shown, f"{became['split']:,}", f"{became['dropped']:,}")
    out.print(sources, stages)


def show_batch(made: Opened, step: int, rows: int, out: Console) -> None:
    """The first rows of the batch of a step of the whole run."""
    ends = list(accumulate(shape.steps for shape in made.stages))
    if step >= ends[-1]:
        raise NestlingError(f"--step {step}: the training has {ends[-1]} steps, 0 to {ends[-1] - 1}")
    stage = next(number for number, end in enumerate(ends) if step < end)
    batch = made.corpus.data(made.stages)(stage, step)
    shown = min(rows, len(batch.inputs_BL))
    out.print(
        f"\nstep {step} of stage {stage + 1}: {len(batch.inputs_BL)} rows of {batch.inputs_BL.shape[1]} tokens, "
        f"{batch.tokens:,} of them real, {int(batch.counted_BL.sum()):,} learnt; ‹…› is read and not learnt, "
        "┃ divides documents"
    )
    for row in range(shown):
        out.print(_row(batch, row, made.tokenizer))
    if shown < len(batch.inputs_BL):
        out.print(f"({len(batch.inputs_BL) - shown} more rows: --rows)")


def _row(batch: Batch, row: int, tokenizer: Tokenizer) -> Text:
    real = batch.real_BL[row]
    ids = real.long() if batch.documents_BL is None else batch.documents_BL[row]
    documents = ids[real].unique_consecutive().tolist()
    line = Text(f"row {row}: {int(real.sum())} tokens, documents: {len(documents)}\n")
    for number, document in enumerate(documents):
        here = real & (ids == document)
        targets, counted = batch.targets_BL[row][here].tolist(), batch.counted_BL[row][here].tolist()
        tokens = [(int(batch.inputs_BL[row][here][0]), False), *zip(targets, counted, strict=True)]
        line.append(" ┃ " if number else "┃ ", style="bold red")
        line.append(_document(tokens, tokenizer, COLOURS[number % len(COLOURS)]))
    return line


def _document(tokens: list[tuple[int, bool]], tokenizer: Tokenizer, colour: str) -> Text:
    text = Text()
    for learnt, group in groupby(tokens, key=lambda token: token[1]):
        words = tokenizer.decode([token for token, _ in group], skip_special_tokens=False).replace("\n", "⏎")
        text.append(words if learnt else f"‹{words}›", style=f"not bold {colour}" if learnt else f"dim {colour}")
    return text
