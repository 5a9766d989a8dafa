"""Text in, text out: stock transformers and its tokenizer say what follows; pieces joined are the whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nestling
import stock
from nestling.errors import NestlingError
from nestling.infer.family import Family
from nestling.infer.generate import generate
from talking import family as save

PROMPTS = ["hello", "a", "żółw and more"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("writing")
    save(made)
    return made


@pytest.fixture(scope="module")
def family(directory: Path) -> Family:
    return nestling.load(directory / "elastic")


@pytest.mark.parametrize(("size", "cut"), [("100%", "elastic"), ("50%", "half")])
def test_greedy_texts_are_stocks_with_its_own_tokenizer(directory: Path, family: Family, size: str, cut: str) -> None:
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(directory / cut), stock.load(directory / cut)
    wanted = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=1, pad_token_id=0)
        wanted.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    assert family[size].generate(PROMPTS, max_tokens=20) == wanted
    assert [family[size].generate(prompt, max_tokens=20) for prompt in PROMPTS] == wanted
    assert len(set(wanted)) > 1


def test_draws_are_those_of_the_same_settings_on_tokens(family: Family) -> None:
    view, how = family["50%"], {"max_tokens": 15, "temperature": 0.9, "top_p": 0.8, "top_k": 50, "seed": 3}
    tokenizer = view.speech.tokenizer
    rows = generate(view, [tokenizer.encode(prompt).ids for prompt in PROMPTS], eos=1, **how)
    assert view.generate(PROMPTS, **how) == [tokenizer.decode(row) for row in rows]
    assert view.generate(PROMPTS, **how | {"seed": 4}) != view.generate(PROMPTS, **how)


@pytest.mark.parametrize("stop", [(), "one"])
def test_pieces_joined_are_the_whole_and_come_one_by_one(family: Family, stop: object) -> None:
    view, steps = family["50%"], []
    whole = view.generate("hello", max_tokens=30)
    stop = whole[9:11] if stop else ()
    wanted = whole[: whole.index(stop)] if stop else whole
    hook = view.model.layers[0].register_forward_pre_hook(lambda module, args: steps.append(1))
    try:
        pieces = view.stream("hello", max_tokens=30, stop=stop)
        first = next(pieces)
        early = len(steps)
        assert first + "".join(pieces) == wanted
    finally:
        hook.remove()
    assert early < len(steps) / 2
    assert view.generate("hello", max_tokens=30, stop=["never", *([stop] if stop else [])]) == wanted


def test_a_stream_that_is_dropped_leaves_gradients_as_they_were(family: Family) -> None:
    pieces = family["50%"].stream("hello", max_tokens=30)
    next(pieces)
    assert not torch.is_inference_mode_enabled()
    pieces.close()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stop": ""}, "a stop string is empty"),
        ({"stop": ["x", ""]}, "a stop string is empty"),
        ({"max_tokens": 0}, "max_tokens = 0 must be 1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0}, "top_p = 0"),
        ({"prompts": ""}, "the prompt is empty"),
        ({"prompts": ["a", "\ud800"]}, "half a character"),
    ],
)
def test_what_cannot_be_done_is_said(family: Family, given: dict[str, object], words: str) -> None:
    with pytest.raises(NestlingError, match=words):
        family["50%"].generate(**{"prompts": "a"} | given)


def test_no_prompts_no_texts_and_no_directory_no_text(family: Family) -> None:
    assert family["50%"].generate([]) == []
    with pytest.raises(NestlingError, match=r"take one from nestling.load\(DIR\)"):
        replace(family["50%"], speech=None).generate("a")
