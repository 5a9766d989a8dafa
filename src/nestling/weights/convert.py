"""Floating-point types on the way from file to file, without torch: bf16, fp16 and fp32, rounded to nearest even."""

from collections.abc import Callable

import numpy as np

from nestling.errors import NestlingError, nearest

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""What a user may ask for -> safetensors' type code."""
TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Type code -> the spelling of a config's `dtype`."""
_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}

Convert = Callable[[np.ndarray], np.ndarray]
"""Flat bytes of one type to flat bytes of another."""


def parse_dtype(text: str | None) -> str | None:
    """`bf16` -> `BF16`; None keeps every type as it is."""
    if text is None:
        return None
    if text.lower() not in DTYPES:
        raise NestlingError(f"dtype {text!r} cannot be written; {nearest(text.lower(), DTYPES)}")
    return DTYPES[text.lower()]


def target(stored: str, wanted: str | None) -> str:
    """The type a tensor is written in: only plain floats change; FP8 needs its scale, and integers are no weights."""
    return wanted if wanted and stored in TORCH else stored


def converter(stored: str, wanted: str, name: str) -> Convert | None:
    """From one type's bytes to another's, or None where they are the same. name: the tensor, for the error.

    A finite value that the new type cannot hold is a NestlingError.
    """
    if stored == wanted:
        return None

    def convert(data: np.ndarray) -> np.ndarray:
        values = _values(data, stored)
        with np.errstate(over="ignore"):
            written = _bfloat16(values) if wanted == "BF16" else values.astype(_NUMPY[wanted])
        infinite = _infinite(written)
        if infinite.any() and (lost := np.isfinite(values) & infinite).any():
            code = next(key for key, value in DTYPES.items() if value == wanted)
            raise NestlingError(f"tensor {name}: {float(values[lost][0]):g} does not fit into {code}; use bf16 or fp32")
        return written.view(np.uint8)

    return convert


def _values(data: np.ndarray, stored: str) -> np.ndarray:
    if stored == "BF16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4")
    return data.view(_NUMPY[stored])


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; NaN stays a NaN."""
    bits = _to_odd(values) if values.dtype == np.float64 else values.astype("<f4").view("<u4")
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _to_odd(values: np.ndarray) -> np.ndarray:
    """Bits of float64 as float32, towards zero and then, where that lost something, with the last bit set.

    No such number lies halfway between two bfloat16s or on one, so that rounding it again is rounding once.
    """
    nearest_ = values.astype("<f4")
    away = np.abs(nearest_.astype("<f8")) > np.abs(values)
    inexact = nearest_ != values
    return (nearest_.view("<u4") - away) | inexact


def _infinite(written: np.ndarray) -> np.ndarray:
    return np.isinf(written) if written.dtype.kind == "f" else (written & 0x7FFF) == 0x7F80
