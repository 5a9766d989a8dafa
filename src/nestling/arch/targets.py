"""Reading a wish for a size: `75%` of the parameters, a count such as `7.5B`, or bytes at a context, `16GiB@128k`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nestling.arch.cost import cost, parameters
from nestling.arch.submodel import WHOLE, Architecture, Submodel
from nestling.errors import NestlingError
from nestling.units import COUNTS, parse_bytes, parse_context

LEAST = 0.98
"""A sub-model for a target has at least this share of it, and never more than it."""
_HELP = "write a share such as 75%, a count such as 9B or 350M, or bytes at a context such as 16GiB@128k"


@dataclass(frozen=True)
class Target:
    """At most `value` of `of`: "parameters", or "bytes" of weights, KV cache and Mamba state at `context` tokens."""

    of: str
    value: float
    context: int = 0

    def measure(self, architecture: Architecture, submodel: Submodel) -> int:
        """What a sub-model has of it."""
        if self.of == "parameters":
            return parameters(architecture, submodel)
        costs = cost(architecture, submodel)
        return costs.bytes + costs.ssm_bytes_per_sequence + costs.kv_bytes(self.context)

    def share(self, architecture: Architecture) -> float:
        """Of what the whole model has. Budgets in different units are ordered by it."""
        return self.value / self.measure(architecture, WHOLE)

    def is_met(self, count: float) -> bool:
        """Whether this much of it is within the target, and no less than `LEAST` of it."""
        return LEAST * self.value <= count <= self.value

    def to_json(self) -> dict[str, Any]:
        return {"of": self.of, "value": self.value} | ({"context": self.context} if self.of == "bytes" else {})


def by_size(architecture: Architecture, targets: Mapping[str, Target]) -> dict[str, Target]:
    """Largest first."""
    return dict(sorted(targets.items(), key=lambda item: -item[1].share(architecture)))


def parse_wish(text: str, whole: int) -> Target:
    """What a wish asks for, out of a model that has `whole` parameters. Bytes are of bf16 weights and KV cache."""
    plain = text.strip().lower()
    if match := re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kmb%]?)", plain):
        number, unit = float(match[1]), match[2]
        return Target("parameters", int(number / 100 * whole) if unit == "%" else int(number * COUNTS[unit]))
    if re.fullmatch(r"[0-9]{1,18}(?:\.[0-9]{1,18})?\s*[kmgt]i?b(?:@\S+)?", plain):
        size, _, context = plain.partition("@")
        return Target("bytes", parse_bytes(size, "budget"), parse_context(context) if context else 0)
    if re.fullmatch(r"\d+(?:\.\d+)?\s*ms", plain):
        raise NestlingError(f"budget {text!r}: latencies cannot be asked for yet; {_HELP}")
    raise NestlingError(f"budget {text!r} is not a size; {_HELP}")


def parse_target(text: str, whole: int) -> Target:
    """The parameters a wish asks for, at most, out of a model that has `whole`."""
    target = parse_wish(text, whole)
    if target.of != "parameters":
        raise NestlingError(f"budget {text!r} cannot be trained yet; write a share such as 75% or a count such as 9B")
    if not 0 < target.value <= whole:
        raise NestlingError(f"budget {text!r} asks for {target.value:,} parameters; the whole model has {whole:,}")
    return target
