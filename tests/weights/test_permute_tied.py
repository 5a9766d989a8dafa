"""Every axis of a checkpoint with tied embeddings permuted: one matrix in the file, the same function in stock."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import nestling
import stock
from nestling import cli
from nestling.weights.transform import permute
from strategies import architectures, rankings


@given(data=st.data(), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_a_tied_model_with_every_axis_permuted_is_the_same_function(
    fresh: Callable[[], Path], data: st.DataObject, seed: int
) -> None:
    architecture, directory = data.draw(architectures(needs="M*-", kinds="M*-", least=2)), fresh()
    model = stock.build(architecture, seed, tie_word_embeddings=True)
    model.lm_head.weight.data.copy_(model.model.embeddings.weight.data)
    model.save_pretrained(directory / "two")
    config, stored = json.loads((directory / "two" / "config.json").read_text()), stock.tensors(directory / "two")
    stock.write(directory / "one", config, {name: v for name, v in stored.items() if name != "lm_head.weight"})
    permute(directory / "one", data.draw(rankings(replace(architecture, untied=False))), directory / "ranked")
    ranked = stock.tensors(directory / "ranked")
    assert ranked.keys() == stored.keys() - {"lm_head.weight"}
    config = json.loads((directory / "ranked" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    head = {"lm_head.weight": ranked["backbone.embeddings.weight"].clone()}
    found = stock.load(stock.write(directory / "loaded", config, {**ranked, **head}))
    ids = stock.tokens(architecture.vocab_size, seed=seed)
    stock.assert_same(stock.logits(stock.float64(found), ids), stock.logits(stock.float64(model), ids))


def test_a_slice_says_that_stock_ties_no_head_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock.save(stock.TINY, tmp_path / "two")
    config, stored = json.loads((tmp_path / "two" / "config.json").read_text()), stock.tensors(tmp_path / "two")
    tied = config | {"tie_word_embeddings": True}
    stock.write(tmp_path / "one", tied, {name: v for name, v in stored.items() if name != "lm_head.weight"})
    (tmp_path / "size.json").write_text('{"hidden_size": 12}')
    for source in ("one", "two"):
        words = ["slice", tmp_path / source, "--submodel", tmp_path / "size.json", "--out", tmp_path / f"cut-{source}"]
        monkeypatch.setattr(sys, "argv", ["nestling", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        said = "model.lm_head.weight = model.get_input_embeddings().weight"
        assert (said in capsys.readouterr().err) == (source == "one")
        assert (said in (tmp_path / f"cut-{source}" / "README.md").read_text()) == (source == "one")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut-one").eval()
    model.lm_head.weight = model.get_input_embeddings().weight
    ids = stock.tokens(16)
    with torch.no_grad():
        stock.assert_same(nestling.load(tmp_path / "cut-one")["100%"](ids).logits, stock.logits(model, ids), 1e-5)
