"""What is evaluated: one size of a family as a view of its checkpoint, or a directory in stock transformers.

Both do the same two things: continue prompts, and give the logits of token sequences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from nestling.errors import NestlingError, nearest
from nestling.evaluate.stock import load_stock
from nestling.tokenizer import end_token, end_tokens, read_tokenizer
from nestling.weights.elastic import Elastic, open_elastic
from nestling.weights.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

BACKENDS = ("auto", "nestling", "transformers")
Ids = Sequence[Sequence[int]]
Continue = Callable[[Ids, "Sampling", Sequence[int]], list[list[int]]]
"""prompts, how they are continued, a seed for each -> new tokens, without the end token."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. Temperature 0 takes the most probable token, and ignores top_p."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 16

    def __post_init__(self) -> None:
        from nestling.infer.sampling import Sampling as Drawn  # it imports torch

        Drawn(self.temperature, self.top_p)  # refuses what cannot be drawn


@dataclass(frozen=True, eq=False)
class Subject:
    """One model. `about` is its provenance; `files` what its answers depend on, with hashes."""

    name: str
    directory: Path
    backend: str
    about: Mapping[str, Any]
    files: Mapping[str, str]
    tokenizer: "Tokenizer"
    vocabulary: int
    end: int | None
    start: int | None
    continue_: Continue = field(repr=False)
    logits: "Callable[[Tensor, Tensor], Tensor]" = field(repr=False)
    """ids, mask [B, L], padded on the left -> logits [B, L, vocabulary]."""

    @property
    def shares_stream(self) -> bool:
        """Whether answers drawn in one batch depend on one another, as stock transformers draws them."""
        return self.backend == "transformers"


def open_subjects(
    directory: str | Path, budgets: Sequence[str], backend: str = "auto", device: str = "cpu"
) -> list[Subject]:
    """One subject per budget: names, wishes, or `all`; without any the whole model. Weights are loaded once.

    backend: `nestling` for views of a nemotron_h directory, `transformers` for any that it loads, one size each.
    device: where they compute, cpu, cuda or auto; what goes in and comes out is on the CPU.
    """
    if backend not in BACKENDS:
        raise NestlingError(f"--backend {backend!r} is unknown; {nearest(backend, BACKENDS)}")
    directory = Path(directory)
    if is_foreign(directory):
        _check_stock(directory, backend, "is of another architecture than nemotron_h")
        return [_stock_subject(directory, budgets, None, device)]
    elastic = open_elastic(directory)
    if not elastic.uniform:
        _check_stock(directory, backend, "has sizes of its own per layer")
    wishes = _wishes(elastic, budgets)
    for _, wish in wishes:
        elastic.submodel(wish)
    if backend == "transformers" or not elastic.uniform:
        return [_stock_subject(directory, budgets, elastic, device)]
    return _views(directory, elastic, wishes, device)


def _check_stock(directory: Path, backend: str, why: str) -> None:
    if backend == "nestling":
        raise NestlingError(
            f"{directory} {why}, which --backend nestling cannot run; leave it out, or say transformers"
        )


def check_directory(directory: Path) -> None:
    """Refuse what cannot be evaluated, before anything else is read."""
    if not is_foreign(directory):
        open_elastic(directory)
    read_tokenizer(directory)


def is_foreign(directory: Path) -> bool:
    """Whether a directory says that it is a model of another architecture, which only stock transformers can run."""
    if not (directory / "config.json").is_file():
        return False
    try:
        kind = read_json(directory / "config.json").get("model_type")
    except NestlingError:
        return False
    return isinstance(kind, str) and kind != "nemotron_h"


def _wishes(elastic: Elastic, budgets: Sequence[str]) -> list[tuple[str, str | None]]:
    """(what it is called, what is asked for) of every size."""
    if not budgets:
        return [(elastic.checkpoint.path.resolve().name, None)]
    names = [name for given in budgets for name in (elastic.budgets if given.lower() == "all" else [given])]
    return [(name, name) for name in dict.fromkeys(names)]


def _views(directory: Path, elastic: Elastic, wishes: Sequence[tuple[str, str | None]], device: str) -> list[Subject]:
    from nestling.arch.cost import cost
    from nestling.infer.family import load
    from nestling.model.device import find_device

    place = find_device(device, "--device ")
    tokenizer, files = read_tokenizer(directory), hashes(directory)
    family = load(directory, device=place)
    subjects = []
    for name, wish in wishes:
        view = family[wish]
        spent = cost(elastic.architecture, view.submodel)
        about = {
            "directory": str(directory),
            "budget": wish,
            "submodel": view.submodel.to_json(),
            "parameters": spent.parameters,
            "active_parameters": spent.active_parameters,
            "bytes": spent.bytes,
        }
        subjects.append(
            Subject(
                name,
                directory,
                "nestling",
                about,
                files,
                tokenizer,
                elastic.architecture.vocab_size,
                end_token(directory),
                start_token(directory),
                _continue_in(view, end_tokens(directory)),
                _logits_in(view),
            )
        )
    return subjects


def _logits_in(view: Any) -> "Callable[[Tensor, Tensor], Tensor]":
    import torch

    place = next(view.model.parameters()).device

    def logits(ids: "Tensor", mask: "Tensor") -> "Tensor":
        ids = ids.to(place)
        if mask.all() or not view.model.architecture.use_bias:
            return view(ids, attention_mask=mask.to(place)).logits.cpu()
        out = torch.zeros(*ids.shape, view.model.architecture.vocab_size)
        for row, count in enumerate(mask.sum(1).tolist()):  # the convolution would see that bias at padding
            out[row, -count:] = view(ids[row : row + 1, -count:]).logits[0].cpu()
        return out

    return logits


def _continue_in(view: Any, ends: Sequence[int]) -> Continue:
    from nestling.infer.generate import PACKED, generate

    view = view.held(PACKED)  # once for all batches

    def continue_(prompts: Ids, how: Sampling, seeds: Sequence[int]) -> list[list[int]]:
        top_p = how.top_p if how.temperature > 0 else 1.0
        return generate(
            view,
            prompts,
            max_tokens=how.max_tokens,
            temperature=how.temperature,
            top_p=top_p,
            eos=ends,
            seed=list(seeds),
        )

    return continue_


def _stock_subject(directory: Path, budgets: Sequence[str], elastic: Elastic | None, device: str) -> Subject:
    """The whole directory in stock transformers; it has no other sizes."""
    if budgets:
        raise NestlingError(
            f"{directory}: stock transformers runs the directory as it is, so --budget does not apply; "
            "cut the size out first (nestling slice)"
        )
    if elastic is not None and "*" not in elastic.architecture.hybrid_override_pattern:
        raise NestlingError(f"{directory} has no attention layer, and stock transformers cannot generate without one")
    from nestling.model.device import find_device

    place = find_device(device, "--device ")
    tokenizer = read_tokenizer(directory)
    model = load_stock(directory, trust_remote_code=elastic is not None and not elastic.uniform).to(place)
    count = sum(parameter.numel() for parameter in model.parameters())
    about = {"directory": str(directory), "budget": None, "parameters": count, "bytes": 2 * count}
    return Subject(
        directory.resolve().name,
        directory,
        "transformers",
        about,
        hashes(directory),
        tokenizer,
        model.config.vocab_size,
        end_token(directory),
        start_token(directory),
        _continue_stock(model, end_tokens(directory)),
        _stock_logits(model),
    )


def _continue_stock(model: Any, ends: Sequence[int]) -> Continue:
    import torch

    from nestling.infer.generate import left_padded

    def continue_(prompts: Ids, how: Sampling, seeds: Sequence[int]) -> list[list[int]]:
        ids, mask = left_padded(prompts)
        drawn = {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0} if how.temperature > 0 else {}
        settings = {"eos_token_id": list(ends) or None, "pad_token_id": next(iter(ends), 0), **drawn}
        with torch.random.fork_rng():
            torch.manual_seed(seeds[0])  # one stream for the batch
            out = model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=how.max_tokens,
                do_sample=bool(drawn),
                **settings,
            )
        rows = out[:, ids.shape[1] :].tolist()
        return [list(takewhile(lambda token: token not in ends, row)) for row in rows]

    return continue_


def _stock_logits(model: Any) -> "Callable[[Tensor, Tensor], Tensor]":
    def logits(ids: "Tensor", mask: "Tensor") -> "Tensor":
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        placed = {} if model.config.model_type == "nemotron_h" else {"position_ids": positions}
        given = {"input_ids": ids, "attention_mask": mask} | placed
        return model(**{name: value.to(model.device) for name, value in given.items()}, use_cache=False).logits.cpu()

    return logits


def start_token(directory: Path) -> int | None:
    """What a text without a context is conditioned on: the bos token, else the end token."""
    first = read_json(directory / "config.json").get("bos_token_id")
    return first if isinstance(first, int) else end_token(directory)


def hashes(directory: Path) -> dict[str, str]:
    """xxh3_128 of the files that an answer depends on: configs, tokenizer, weights. A size is told by its sub-model."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    kept = [name for name in names if name.endswith((".json", ".safetensors", ".jinja", ".model", ".py"))]
    ours = [name for name in kept if not name.startswith("nestling")]
    return {name: _hash(directory / name) for name in ours if not name.endswith(".index.json")}


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while data := file.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()
