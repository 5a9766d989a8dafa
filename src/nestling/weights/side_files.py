"""The JSON files that Nestling puts beside weights, checked on reading, because people edit them.

`nestling.json` describes the family of an elastic checkpoint, `nestling-slice.json` what was cut out of one.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestling.arch.cost import PRECISIONS
from nestling.arch.targets import UNITS
from nestling.errors import NestlingError
from nestling.weights.convert import DTYPES
from nestling.weights.files import read_regular_json
from nestling.weights.writing import HASH

FILE, SLICE_FILE = "nestling.json", "nestling-slice.json"
FORMAT = 1
HETERO = ("auto", "pad", "code")
_LARGEST = 10**18  # of counts and seconds: beyond it is no figure of a model


@dataclass(frozen=True)
class Value:
    """A single value, or a whole of any content: how to say what is allowed, and whether one is."""

    allowed: str
    test: Callable[[Any], bool]


@dataclass(frozen=True)
class Keys:
    """An object with these keys; other keys may stand beside them and are left alone."""

    known: "Mapping[str, Shape]"
    needed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Named:
    """An object of any keys that pass `name`, whose items all have one shape."""

    name: Value
    item: "Shape"


@dataclass(frozen=True)
class Listed:
    """A list, whose items all have one shape."""

    item: "Shape"


Shape = Value | Keys | Named | Listed


def _number(low: float, high: float, allowed: str, *kinds: type) -> Value:
    return Value(allowed, lambda value: type(value) in kinds and low <= value <= high)


ANYTHING = Value("anything", lambda value: True)
TEXT = Value("a text", lambda value: isinstance(value, str))
OBJECT = Value("an object", lambda value: isinstance(value, dict))
COUNT = _number(0, _LARGEST, "an integer, zero or above", int)
AMOUNT = _number(0, _LARGEST, "a number, zero or above", int, float)
SHARE = _number(0, 1, "a number from 0 to 1", int, float)
FLAG = Value("true or false", lambda value: isinstance(value, bool))
NAME = Value("a name of printable letters", lambda value: bool(value.strip()) and value.isprintable())
DIGEST = Value("32 hexadecimal digits", lambda value: isinstance(value, str) and _is_hex(value))
HASHES = Named(Value("the name of a file beside it", lambda value: value.isprintable() and "/" not in value), DIGEST)
INTERVAL = Value("null, or two numbers, zero or above", lambda value: _is_interval(value))
PROVENANCE = Keys({"seconds": AMOUNT})

_UNIT = Value(", ".join(UNITS), lambda value: value in UNITS)
_PRECISION = Value(", ".join(PRECISIONS), lambda value: isinstance(value, str) and value in PRECISIONS)
_EVALUATION: dict[str, Shape] = {
    "task": TEXT,
    "backend": TEXT,
    "interval": INTERVAL,
    "exact_match": SHARE,
    "problems": COUNT,
    "perplexity": AMOUNT,  # and documents, instead of these two
    "documents": COUNT,
}
_BUDGET: dict[str, Shape] = {
    "submodel": OBJECT,
    "target": Keys({"of": _UNIT, "value": AMOUNT, "context": COUNT, "precision": _PRECISION}, ("of", "value")),
    "parameters": COUNT,
    "tokens": COUNT,
    "evaluations": Listed(Keys(_EVALUATION, ("task", "backend", "interval"))),
}
SIDECAR = Keys(
    {
        "budgets": Named(NAME, Keys(_BUDGET, ("submodel",))),
        "search_space": OBJECT,
        "provenance": PROVENANCE,
        HASH: HASHES,
    },
    ("budgets",),
)
_RECORD: dict[str, Shape] = {
    "by": TEXT,
    "source": TEXT,
    "budget": Value("a text or null", lambda value: value is None or isinstance(value, str)),
    "submodel": OBJECT,
    "parameters": COUNT,
    "hetero": Value(", ".join(HETERO), lambda value: value in HETERO),
    "provenance": PROVENANCE,
}
_TYPE = Value(f"null, {', '.join(DTYPES.values())}", lambda value: value is None or value in DTYPES.values())
RECORD = Keys(_RECORD | {"source_hashes": HASHES, "attends": FLAG, "dtype": _TYPE, HASH: HASHES}, tuple(_RECORD))


def read_sidecar(directory: Path) -> dict[str, Any]:
    """nestling.json of an elastic checkpoint; {} of a directory that has none."""
    return _read(directory / FILE, SIDECAR, "correct it, or take the file from where the checkpoint was written")


def read_record(directory: Path) -> dict[str, Any]:
    """nestling-slice.json of a directory that was cut out; {} of any other."""
    return _read(directory / SLICE_FILE, RECORD, "correct it, or cut the slice again")


def _read(file: Path, shape: Shape, remedy: str) -> dict[str, Any]:
    if not os.path.lexists(file):
        return {}
    value = read_regular_json(file, unique=True)
    if type(given := value.get("format")) is not int or given != FORMAT:
        raise NestlingError(f"{file}: format {_spelled(given)} cannot be read; this version reads format {FORMAT}")
    if complaint := next(wrong(value, shape), None):
        raise NestlingError(f"{file}: {complaint}; {remedy}")
    return value


def wrong(value: Any, shape: Shape, where: str = "") -> Iterator[str]:
    """What is wrong with a JSON value, one line each: `budgets.50%.tokens is "many"; allowed: …`."""
    if isinstance(shape, Value):
        if not shape.test(value):
            yield f"{where} is {_spelled(value)}; allowed: {shape.allowed}"
    elif isinstance(shape, Listed):
        if not isinstance(value, list):
            yield f"{where} is {_spelled(value)}; allowed: a list"
            return
        for place, item in enumerate(value):
            yield from wrong(item, shape.item, f"{where}.{place}")
    elif not isinstance(value, dict):
        yield f"{where} is {_spelled(value)}; allowed: an object"
    else:
        yield from _wrong_keys(value, shape, where)
        for key, item in value.items():
            inner = shape.item if isinstance(shape, Named) else shape.known.get(key, ANYTHING)
            yield from wrong(item, inner, f"{where}.{key}".lstrip("."))


def _wrong_keys(value: Mapping[str, Any], shape: Keys | Named, where: str) -> Iterator[str]:
    within = f" in {where}" if where else ""
    if isinstance(shape, Keys):
        yield from (f"{key!r} is missing{within}" for key in shape.needed if key not in value)
    else:
        names = (key for key in value if not shape.name.test(key))
        yield from (f"the key {_spelled(key)}{within} is not allowed; allowed: {shape.name.allowed}" for key in names)


def _is_hex(text: str) -> bool:
    return len(text) == 32 and set(text) <= set("0123456789abcdef")


def _is_interval(value: Any) -> bool:
    return value is None or isinstance(value, list) and len(value) == 2 and all(map(AMOUNT.test, value))


def _spelled(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
