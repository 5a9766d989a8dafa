"""A training step's memory is linear in the length of its rows, packed or not; long packed rows are as short ones."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nestling.model import context
from nestling.model.native import library
from nestling.model.nemotron_h import NemotronH
from nestling.train.pretrain import initialize

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training" / "length.py"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("length_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_twice_the_length_takes_at_most_twice_the_memory_packed_or_not() -> None:
    length = script()
    small = replace(length.MODEL, hybrid_override_pattern="M*-", hidden_size=48, intermediate_size=96, vocab_size=256)
    short, long = (length.peak(tokens, model=small) for tokens in (4096, 8192))
    assert short < long <= 2.1 * short
    assert long == pytest.approx(length.peak(8192, packed=True, model=small), rel=0.02)


def test_documents_attended_to_one_by_one_are_those_behind_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library", lambda: None)
    model = initialize(NemotronH(script().MODEL), 0).double()
    ids = torch.randint(8192, (2, 23), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[1] * 9 + [2] + [3] * 13, [1] * 20 + [0] * 3])
    found = []
    for dense in (2048, 0):
        monkeypatch.setattr(context, "DENSE", dense)
        logits = model(ids, documents_BL=documents).logits
        model.zero_grad()
        logits.square().mean().backward()
        found.append([logits, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
