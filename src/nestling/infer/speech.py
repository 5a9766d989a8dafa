"""What turns the texts of a model directory into tokens and back; read when it is first needed."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from nestling.tokenizer import end_tokens, read_tokenizer


@dataclass(frozen=True, eq=False)
class Speech:
    """The tokenizer beside a model's weights, and the tokens that end a text."""

    directory: Path

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.directory)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        return end_tokens(self.directory)
