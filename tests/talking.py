"""Models to evaluate: a tiny random family that reads any text byte by byte, and one that says what a script says."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import nestling
import stock
from nestling.arch.submodel import Submodel
from nestling.evaluate.subject import Sampling, Subject, open_subjects
from nestling.weights.elastic import open_elastic, sidecar
from nestling.weights.files import write_json

BYTES = replace(stock.TINY, vocab_size=260, time_step_min=1e-6)
HALF = Submodel(hidden_size=10, intermediate_size=16, mamba_num_heads=2)


def byte_tokenizer() -> Tokenizer:
    """One token per byte, after <pad> = 0, <eos> = 1 and <bos> = 2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(["<pad>", "<eos>", "<bos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    return tokenizer


def save_tokenizer(directory: Path, template: str | None = None) -> None:
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>"}
    extra = {} if template is None else {"chat_template": template}
    write_json(directory / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False, **extra})
    write_json(directory / "generation_config.json", {"pad_token_id": 0, "eos_token_id": 1, "do_sample": False})


def family(directory: Path, seed: int = 2, template: str | None = None) -> Path:
    """An elastic checkpoint with the budgets 100% and 50%, and beside it the slice `half`."""
    stock.save(BYTES, directory / "elastic", seed=seed, bos_token_id=None, eos_token_id=1)
    save_tokenizer(directory / "elastic", template)
    elastic = open_elastic(directory / "elastic")
    budgets = {"100%": Submodel(), "50%": elastic.submodel(HALF)}
    write_json(directory / "elastic" / "nestling.json", sidecar(BYTES, budgets, {}))
    nestling.slice(directory / "elastic", "50%", directory / "half")
    return directory / "elastic"


def subject(directory: Path, budget: str = "50%") -> Subject:
    (one,) = open_subjects(directory, [budget])
    return one


def scripted(like: Subject, says: Callable[[str], str]) -> Subject:
    """A subject that answers each prompt with a text: its tokens, cut at the limit as a model's would be."""

    def continue_(prompts: Sequence[Sequence[int]], how: Sampling, seeds: Sequence[int]) -> list[list[int]]:
        texts = [says(like.tokenizer.decode(list(ids))) for ids in prompts]
        return [like.tokenizer.encode(text).ids[: how.max_tokens] for text in texts]

    return replace(like, continue_=continue_)


def lines(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
