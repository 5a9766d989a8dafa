"""Reading a wish for a size: `75%` of the parameters, or a count such as `9B`, `350M`, `400k`, `400000`."""

import re

from nestling.errors import NestlingError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_target(text: str, whole: int) -> int:
    """Parameters a wish asks for, at most, out of a model that has `whole`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmb%]?)", text.strip().lower())
    if match is None:
        raise NestlingError(f"budget {text!r} is not a size; write a share such as 75% or a count such as 9B or 350M")
    number, unit = float(match[1]), match[2]
    target = int(number / 100 * whole) if unit == "%" else int(number * _UNITS[unit])
    if not 0 < target <= whole:
        raise NestlingError(f"budget {text!r} asks for {target:,} parameters; the whole model has {whole:,}")
    return target
