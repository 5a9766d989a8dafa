"""Sizes looked at along the way: the counts against generation one token at a time, and when they are made."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("reasoning_gym")

from test_elastic import HOW, TARGETS, TINY, run, sums

import stock
from nestling.arch.submodel import WHOLE, Submodel
from nestling.data.batches import encoded
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.tasks import Task, distinct, problems
from nestling.tokenizer import character_tokenizer
from nestling.train.watch import Watch

TASK = Task("chain_sum", (("max_digits", 1), ("max_terms", 2), ("min_digits", 1), ("min_terms", 2)))
