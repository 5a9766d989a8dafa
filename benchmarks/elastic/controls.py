"""What only a study needs: a teacher that is the data, and norms that know no active width."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from nestling.arch.architecture import Architecture
from nestling.arch.axes import size
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import Width, Widths
from nestling.tokenizer import EOS

CERTAIN = 100.0  # e^-100: nothing beside float32's 1


class Solutions(nn.Module):
    """Is certain of the token that comes next in its input, so that KL from it is cross-entropy with the solution.

    What follows the last input of the longest rows is not seen there; it is always the end of the text.
    """

    def __init__(self, architecture: Architecture, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.architecture, self.end = architecture, tokenizer.token_to_id(EOS)

    def hidden(self, inputs_BL: Tensor, widths: None = None, documents_BL: Tensor | None = None) -> Tensor:
        assert documents_BL is None, "one problem per row"
        next_BL = F.pad(inputs_BL[:, 1:], (0, 1), value=self.end)
        return CERTAIN * F.one_hot(next_BL, self.architecture.vocab_size).float()

    def head_weight(self) -> Tensor:
        return torch.eye(self.architecture.vocab_size)


class WholeWidthNorms(NemotronH):
    """Its norms divide by all channels of the whole model, whatever is on."""

    def hidden(self, input_ids_BL: Tensor, widths: Widths | None = None, *rest: Any, **named: Any) -> Tensor:
        return super().hidden(input_ids_BL, widths and whole(widths), *rest, **named)


class Whole(Width):
    def active(self, *axes: str) -> int:
        return math.prod(size(axis, self.full) for axis in axes)


def whole(widths: Widths) -> Widths:
    def changed(width: Width) -> Whole:
        return Whole(width.full, width.kept, width.masks, width.gate)

    return Widths(changed(widths.ends), tuple((layer, changed(width)) for layer, width in widths.layers))
