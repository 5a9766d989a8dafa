"""Every axis of a checkpoint with tied embeddings permuted: one matrix in the file, the same function in stock."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

import stock
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
