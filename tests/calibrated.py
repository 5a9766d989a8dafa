"""One small hybrid with every kind of block, groups and biases, and the texts it is ranked on."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import nestling
from nestling.arch.architecture import Architecture
from nestling.model.nemotron_h import NemotronH

HYBRID = Architecture(
    "M-*M*-",
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    n_groups=2,
    mamba_num_heads=8,
    mamba_head_dim=4,
    ssm_state_size=4,
    num_key_value_heads=2,
    num_attention_heads=8,
    head_dim=4,
    use_bias=True,
    mlp_bias=True,
)
LENGTHS = [(9, 5, 7), (12, 12), (3,)]


def texts() -> Iterator[Tensor]:
    """Rows of tokens without padding."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(29, (length,), generator=generator) for batch in LENGTHS for length in batch)


def calibration(padding: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The same rows in padded batches."""
    rows, batches = list(texts()), []
    for lengths in LENGTHS:
        chosen, rows = rows[: len(lengths)], rows[len(lengths) :]
        ids = torch.full((len(lengths), max(lengths)), padding)
        for row, text in zip(ids, chosen, strict=True):
            row[: len(text)] = text
        batches.append((ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]))
    return batches


def opened(directory: Path, dtype: torch.dtype | None = torch.float64) -> NemotronH:
    return nestling.load(directory, dtype=dtype).model
