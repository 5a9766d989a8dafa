"""Quantities as people write and read them: bytes, tokens, counts with a prefix."""

import re
from collections.abc import Sequence

from nestling.errors import NestlingError

COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
"""Prefix of a number of parameters -> its factor."""
BYTES = {f"{p}{b}": (1024 if b == "ib" else 1000) ** n for n, p in enumerate("kmgt", 1) for b in ("b", "ib")}
"""Unit of a number of bytes -> its factor."""
_CONTEXT = {"": 1, "k": 1024, "m": 1024**2}
_MAX_CONTEXT = 1024**3


def parse_count(text: str, what: str) -> int:
    """`65B`, `500M` or a plain number, at least one. what: said first in an error."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kmb]?)", text.strip().lower())
    if match is None or (count := int(float(match[1]) * COUNTS[match[2]])) < 1:
        raise NestlingError(f"{what} = {text!r} is not a count; write it as 65B or 500M")
    return count


def parse_bytes(text: str, what: str) -> int:
    """`5GB`, `512MiB` or a plain number of bytes, at least one. what: said first in an error."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([kmgt]i?b|b?)", text.strip().lower())
    if match is None or (count := int(float(match[1]) * (BYTES | {"": 1, "b": 1})[match[2]])) < 1:
        raise NestlingError(f"{what}: {text!r} is not a number of bytes; write it as 5GB or 512MiB")
    return count


def parse_context(text: str) -> int:
    """Tokens of a context length: `4096`, or in units of 1024 and 1024² tokens, `8k`, `128k`, `1M`."""
    match = re.fullmatch(r"([0-9]{1,12})([km]?)", text.strip().lower())
    if match is None:
        raise NestlingError(f"context {text!r} is not a number of tokens; write 4096, 8k, 128k or 1M (k is 1024)")
    tokens = int(match[1]) * _CONTEXT[match[2]]
    if not 1 <= tokens <= _MAX_CONTEXT:
        raise NestlingError(f"context {text!r} is {tokens:,} tokens; allowed: 1 … {_MAX_CONTEXT:,}")
    return tokens


def show_context(tokens: int) -> str:
    """`128k`, `1M`, or the number itself."""
    for unit, name in ((1024**2, "M"), (1024, "k")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)


def show_count(count: float) -> str:
    """`110.00B`, `1.25M`, or the number itself."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:,.2f}{name}"
    return f"{count:,.0f}"


def show_span(seconds: float) -> str:
    """`12.50 days`, `3.2 hours`, `40 minutes`, or seconds."""
    for unit, name, digits in ((86400, "days", 2), (3600, "hours", 1), (60, "minutes", 0)):
        if seconds >= unit:
            return f"{seconds / unit:,.{digits}f} {name}"
    return f"{seconds:.2g} seconds"


def decimal(count: float, unit: str = "B") -> str:
    """`24.62 GB`: three decimal digits a prefix."""
    return _scaled(count, 1000, [prefix + unit for prefix in ("", "k", "M", "G", "T", "P", "E")])


def binary(count: float) -> str:
    """`22.93 GiB`."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))


def _scaled(count: float, step: int, units: Sequence[str]) -> str:
    power = 0
    while power + 1 < len(units) and count >= step ** (power + 1):
        power += 1
    return f"{count / step**power:,.2f} {units[power]}" if power else f"{count:.0f} {units[0]}"
