"""Floating-point types on the way from file to file, without torch: bf16, fp16 and fp32, rounded to nearest even."""

from collections.abc import Callable

import numpy as np

from nestling.errors import NestlingError, nearest
from nestling.weights.gather import Buffers
from nestling.weights.header import ITEMSIZE

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""What a user may ask for -> safetensors' type code."""
TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Type code -> the spelling of a config's `dtype`."""
_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
_INFINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
"""Its bits; NaN has larger ones."""
FEW = 1 / 8  # of all numbers: more of them are not picked out

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


def converter(stored: str, wanted: str, name: str, buffers: Buffers | None = None) -> Convert | None:
    """From one type's bytes to another's, or None where they are the same. name: the tensor, for the error.

    buffers: where the other bytes come to lie. A finite value that the new type cannot hold is a NestlingError.
    """
    if stored == wanted:
        return None

    infinite, room = _INFINITE[wanted], buffers or Buffers()
    given, made = (np.dtype(f"<u{ITEMSIZE[code]}") for code in (stored, wanted))

    def rounded(bits: np.ndarray) -> np.ndarray:
        values = _values(bits, stored)
        with np.errstate(over="ignore"):
            found = _bfloat16(values) if wanted == "BF16" else values.astype(_NUMPY[wanted]).view(made)
        magnitudes = found & (np.iinfo(made).max >> 1)  # without signs numbers ascend as their bits do
        if magnitudes.max(initial=0) >= infinite and (lost := np.isfinite(values) & (magnitudes == infinite)).any():
            code = next(key for key, value in DTYPES.items() if value == wanted)
            raise NestlingError(f"tensor {name}: {float(values[lost][0]):g} does not fit into {code}; use bf16 or fp32")
        return found

    def convert(data: np.ndarray) -> np.ndarray:
        bits = data.view(given)
        written = room.empty(bits.size, made.itemsize).reshape(-1).view(made)
        if (stored, wanted) != ("BF16", "F16") or len(others := _rebiased(bits, written)) > FEW * len(bits):
            written[:] = rounded(bits)
        elif len(others):
            written[others] = rounded(bits[others])
        return written.view(np.uint8)

    return convert


def _rebiased(bits: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Write bfloat16 as float16, exact in its normal range: 3 bits more of the fraction, 112 less of the exponent.

    Returns where numbers are not in that range: smaller ones (and zeros), larger ones, and what is not finite.
    """
    least, infinite, bias = 113 << 7, 143 << 7, 112 << 7
    np.subtract(bits, bias, out=place)
    place <<= 3  # which drops the sign
    place |= bits & 0x8000
    magnitudes = bits & 0x7FFF
    magnitudes -= least  # those below it wrap around
    return np.flatnonzero(magnitudes >= infinite - least)


def _values(bits: np.ndarray, stored: str) -> np.ndarray:
    if stored == "BF16":
        return (bits.astype("<u4") << 16).view("<f4")
    return bits.view(_NUMPY[stored])


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; NaN stays a NaN."""
    bits = _to_odd(values) if values.dtype == np.float64 else values.astype("<f4", copy=False).view("<u4")
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    if (bits & 0x7FFFFFFF).max(initial=0) > _INFINITE["F32"]:
        rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype("<u2")


def _to_odd(values: np.ndarray) -> np.ndarray:
    """Bits of float64 as float32, towards zero and then, where that lost something, with the last bit set.

    No such number lies halfway between two bfloat16s or on one, so that rounding it again is rounding once.
    """
    nearest_ = values.astype("<f4")
    away = np.abs(nearest_.astype("<f8")) > np.abs(values)
    inexact = nearest_ != values
    return (nearest_.view("<u4") - away) | inexact
