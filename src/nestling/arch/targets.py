"""Budgets as people write them, and what each counts.

75%  9B  350M                          parameters
75%-active  3B-active                  parameters that one token uses (of routed experts only the chosen ones)
16GiB@128k  16GiB@128k:fp8  60%@32k    bytes of weights, KV cache and Mamba state of one sequence of that length,
                                       in a precision of `PRECISIONS`, bf16 if none is named
20ms                                   milliseconds a token, as a latency table says (nestling bench --latency)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nestling.arch.architecture import Architecture
from nestling.arch.axes import Sizes
from nestling.arch.cost import (
    PRECISIONS,
    block_active,
    block_kv_bytes,
    block_parameters,
    block_state_bytes,
    block_weight_bytes,
    total,
)
from nestling.arch.submodel import WHOLE, Submodel
from nestling.errors import NestlingError, nearest
from nestling.units import BYTES, COUNTS, binary, parse_context, show_context

if TYPE_CHECKING:  # it takes numpy
    from nestling.arch.latency import Latencies

UNITS = ("parameters", "active parameters", "bytes", "latency")
LEAST = 0.98
"""A sub-model for a target has at least this share of it, and never more than it."""
_HELP = (
    "write a share such as 75%, a count such as 9B or 350M, active parameters such as 3B-active, "
    "bytes at a context such as 16GiB@128k or 16GiB@128k:fp8, or milliseconds a token such as 20ms"
)
_WISH = re.compile(
    r"(?P<number>[0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(?P<unit>%|ms|[kmb]?|[kmgt]i?b)(?P<active>[- ]active)?"
    r"(?:@(?P<context>[^:]*))?(?::(?P<precision>.*))?"
)


@dataclass(frozen=True)
class Target:
    """At most `value` of `of`: "parameters", "active parameters", "bytes" of weights, caches and state, or "latency".

    Bytes are of one sequence of `context` tokens, in a precision of `PRECISIONS`. Latency is in milliseconds a token,
    as the table says.
    """

    of: str
    value: float
    context: int = 0
    precision: str = "bf16"
    table: "Latencies | None" = None

    def block(self, architecture: Architecture, kind: str, sizes: Sizes) -> float:
        """What one block has of it."""
        if self.of == "parameters":
            return block_parameters(architecture, kind, sizes)
        if self.of == "active parameters":
            return block_active(architecture, kind, sizes)
        if self.table is not None:
            return self.table.block(architecture, kind, sizes)
        held = PRECISIONS[self.precision]
        weights = block_weight_bytes(architecture, kind, sizes, held)
        return weights + block_state_bytes(kind, sizes, held) + self.context * block_kv_bytes(kind, sizes, held)

    def measure(self, architecture: Architecture, submodel: Submodel) -> float:
        """What a sub-model has of it."""
        return total(architecture, submodel, self.block)

    def share(self, architecture: Architecture) -> float:
        """Of what the whole model has. Budgets in different units are ordered by it."""
        return self.value / self.measure(architecture, WHOLE)

    def is_met(self, count: float) -> bool:
        least, most = self.range
        return least <= count <= most

    def show(self, *counts: float) -> str:
        """An amount of it, or the ends of a range, with the unit."""
        if self.of == "latency":
            return f"{' … '.join(f'{count:,.3f}' for count in counts)} ms a token"
        if self.of != "bytes":
            return f"{' … '.join(f'{count:,.0f}' for count in counts)} {self.of}"
        where = f" at {show_context(self.context)} tokens" if self.context else ""
        return f"{' … '.join(map(binary, counts))}{where} in {self.precision}"

    @property
    def range(self) -> tuple[float, float]:
        """What meets it."""
        return LEAST * self.value, self.value

    def to_json(self) -> dict[str, Any]:
        """Without the table, which is a file of its own."""
        how = {"context": self.context, "precision": self.precision} if self.of == "bytes" else {}
        return {"of": self.of, "value": self.value, **how}


def by_size(architecture: Architecture, targets: Mapping[str, Target]) -> dict[str, Target]:
    """Largest first."""
    return dict(sorted(targets.items(), key=lambda item: -item[1].share(architecture)))


def parse_wish(text: str, architecture: Architecture, latencies: "Latencies | None" = None) -> Target:
    """What a wish asks for, out of this model. latencies: for wishes in milliseconds."""
    match = _WISH.fullmatch(text.strip().lower())
    if match is None:
        raise NestlingError(f"budget {text!r} is not a size; {_HELP}")
    unit, stored = match["unit"], match["context"] is not None or match["precision"] is not None
    if unit == "ms" and not stored and not match["active"]:
        return _latency(text, float(match["number"]), architecture, latencies)
    if unit == "ms" or (unit in COUNTS and stored) or (match["active"] and (stored or unit not in {*COUNTS, "%"})):
        raise NestlingError(f"budget {text!r} mixes two units; {_HELP}")
    if unit in COUNTS or (unit == "%" and not stored):
        target = Target("active parameters" if match["active"] else "parameters", 0)
    else:
        context = 0 if match["context"] is None else parse_context(match["context"])
        target = Target("bytes", 0, context, _precision(match["precision"], text))
    if unit == "%":
        return replace(target, value=int(float(match["number"]) / 100 * target.measure(architecture, WHOLE)))
    return replace(target, value=int(float(match["number"]) * (COUNTS | BYTES)[unit]))


def _latency(text: str, value: float, architecture: Architecture, latencies: "Latencies | None") -> Target:
    if latencies is None:
        raise NestlingError(
            f"budget {text!r} needs a table of latencies of this model on this machine: make one with nestling bench "
            "--latency, and name it: nestling slice --latency-table, or latency_table in [train]"
        )
    latencies.check(architecture)
    return Target("latency", value, table=latencies)


def _precision(given: str | None, text: str) -> str:
    if given is not None and given not in PRECISIONS:
        raise NestlingError(f"budget {text!r}: precision {given!r} is unknown; {nearest(given, PRECISIONS)}")
    return given or "bf16"


def parse_target(text: str, architecture: Architecture, latencies: "Latencies | None" = None) -> Target:
    """What a budget to be trained asks for: as a wish, but less than the whole model, or exactly it."""
    target = parse_wish(text, architecture, latencies)
    whole = target.measure(architecture, WHOLE)
    if not 0 < target.value <= whole:
        asked, held = target.show(target.value), target.show(whole)
        raise NestlingError(f"budget {text!r} asks for {asked}; the whole model, which is always trained, has {held}")
    return target
