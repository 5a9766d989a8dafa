"""Slices of mixtures of experts in transformers as users load it, whose default takes not every size."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nestling
import stock
from nestling import cli
from nestling.evaluate.stock import load_stock

MIXTURE = replace(
    stock.TINY,
    hybrid_override_pattern="ME*E",
    moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=12,
)


@pytest.mark.parametrize(("size", "odd"), [("n_routed_experts", False), ("moe_intermediate_size", True)])
def test_sizes_that_transformers_cannot_group_are_said_and_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], size: str, odd: bool
) -> None:
    stock.save(MIXTURE, tmp_path / "whole")
    (tmp_path / "size.json").write_text(f'{{"{size}": 5}}')
    words = ["slice", tmp_path / "whole", "--submodel", tmp_path / "size.json", "--out", tmp_path / "cut"]
    monkeypatch.setattr(sys, "argv", ["nestling", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    warned = "is no multiple of 8, which transformers' default for experts needs" in capsys.readouterr().err
    card = (tmp_path / "cut" / "README.md").read_text()
    assert warned == odd == ('from_pretrained("DIRECTORY", experts_implementation="eager")' in card)
    ids, model = stock.tokens(16), load_stock(tmp_path / "cut")
    assert (model.config._experts_implementation == "eager") == odd
    family = nestling.load(tmp_path / "cut")
    with torch.no_grad():
        stock.assert_same(family["100%"](ids).logits, stock.logits(model, ids), 1e-5)
