"""Reading a wish for a size: `75%` of the parameters, a count such as `7.5B`, or bytes at a context, `16GiB@128k`."""

import re
from dataclasses import dataclass

from nestling.arch.cost import Cost, cost
from nestling.arch.submodel import Architecture, Submodel
from nestling.errors import NestlingError

_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_BYTES = {f"{p}{b}": (1024 if b == "ib" else 1000) ** n for n, p in enumerate("kmgt", 1) for b in ("b", "ib")}
_CONTEXT = {"": 1, "k": 1024, "m": 1024**2}
MAX_CONTEXT = 1024**3
_HELP = "write a share such as 75%, a count such as 9B or 350M, or bytes at a context such as 16GiB@128k"


@dataclass(frozen=True)
class Target:
    """At most `value` of `of`: "parameters", or "bytes" of weights, KV cache and Mamba state at `context` tokens."""

    of: str
    value: int
    context: int = 0

    def measure(self, architecture: Architecture, submodel: Submodel) -> int:
        """What a sub-model has of it."""
        return self._of(cost(architecture, submodel))

    def _of(self, costs: Cost) -> int:
        if self.of == "parameters":
            return costs.parameters
        return costs.bytes + costs.ssm_bytes_per_sequence + costs.kv_bytes(self.context)


def parse_context(text: str) -> int:
    """Tokens of a context length: `4096`, or in units of 1024 and 1024² tokens, `8k`, `128k`, `1M`."""
    match = re.fullmatch(r"([0-9]{1,12})([km]?)", text.strip().lower())
    if match is None:
        raise NestlingError(f"context {text!r} is not a number of tokens; write 4096, 8k, 128k or 1M (k is 1024)")
    tokens = int(match[1]) * _CONTEXT[match[2]]
    if not 1 <= tokens <= MAX_CONTEXT:
        raise NestlingError(f"context {text!r} is {tokens:,} tokens; allowed: 1 … {MAX_CONTEXT:,}")
    return tokens


def parse_wish(text: str, whole: int) -> Target:
    """What a wish asks for, out of a model that has `whole` parameters. Bytes are of bf16 weights and KV cache."""
    plain = text.strip().lower()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb%]?)", plain):
        number, unit = float(match[1]), match[2]
        return Target("parameters", int(number / 100 * whole) if unit == "%" else int(number * _COUNTS[unit]))
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b)(?:@(\S+))?", plain):
        context = parse_context(match[3]) if match[3] else 0
        return Target("bytes", int(float(match[1]) * _BYTES[match[2]]), context)
    if re.fullmatch(r"\d+(?:\.\d+)?\s*ms", plain):
        raise NestlingError(f"budget {text!r}: latencies cannot be asked for yet; {_HELP}")
    raise NestlingError(f"budget {text!r} is not a size; {_HELP}")


def parse_bytes(text: str, what: str) -> int:
    """`5GB`, `512MiB` or a plain number of bytes, at least one."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b|b?)", text.strip().lower())
    if match is None or (count := int(float(match[1]) * (_BYTES | {"": 1, "b": 1})[match[2]])) < 1:
        raise NestlingError(f"{what}: {text!r} is not a number of bytes; write it as 5GB or 512MiB")
    return count


def parse_target(text: str, whole: int) -> int:
    """Parameters a wish asks for, at most, out of a model that has `whole`."""
    target = parse_wish(text, whole)
    if target.of != "parameters":
        raise NestlingError(f"budget {text!r} cannot be trained yet; write a share such as 75% or a count such as 9B")
    if not 0 < target.value <= whole:
        raise NestlingError(f"budget {text!r} asks for {target.value:,} parameters; the whole model has {whole:,}")
    return target.value
