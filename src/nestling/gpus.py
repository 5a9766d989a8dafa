"""GPUs that a training can be planned for: memory and dense bf16 speed, as their vendors' data sheets state them."""

from dataclasses import dataclass

from nestling.errors import NestlingError, nearest
from nestling.units import parse_bytes

MFU = 0.35
"""Share of the peak speed that all FLOPs run at. An assumption: Llama 3 reports 0.38 to 0.43 on H100s (arXiv
2407.21783, table 4), and our scan is not a fused kernel."""


@dataclass(frozen=True)
class Gpu:
    """memory: bytes, of 10^9 to the GB. flops: dense bf16 tensor-core FLOP/s; data sheets often print twice as many,
    with sparsity."""

    name: str
    memory: int
    flops: float
    source: str


GPUS = {
    "a100": Gpu("A100 80 GB", 80 * 10**9, 312e12, "NVIDIA A100 data sheet"),
    "h100": Gpu("H100 SXM", 80 * 10**9, 989e12, "NVIDIA H100 data sheet, SXM: 1979 TFLOP/s with sparsity"),
    "h200": Gpu("H200 SXM", 141 * 10**9, 989e12, "NVIDIA H200 data sheet, SXM: 1979 TFLOP/s with sparsity"),
    "b200": Gpu("B200", 180 * 10**9, 2250e12, "NVIDIA HGX B200 data sheet: 4.5 PFLOP/s with sparsity"),
    "l40s": Gpu("L40S", 48 * 10**9, 362e12, "NVIDIA L40S data sheet: 733 TFLOP/s with sparsity"),
    "mi300x": Gpu("MI300X", 192 * 10**9, 1307e12, "AMD Instinct MI300X data sheet"),
}
"""By the name that `--gpu` takes."""


def find_gpu(name: str | None, memory: str | None, flops: float | None) -> Gpu:
    """A GPU of the table, by default the H100, with these figures instead of its own; or one that both figures say."""
    if name is None and memory is not None and flops is not None:
        return Gpu("a GPU of yours", parse_bytes(memory, "--gpu-memory"), flops, "given")
    key = (name or "h100").lower()
    if key not in GPUS:
        raise NestlingError(
            f"--gpu {name!r} is unknown; {nearest(key, GPUS)}; or say --gpu-memory 80GB and --gpu-flops 9.9e14 instead"
        )
    known = GPUS[key]
    given = known.memory if memory is None else parse_bytes(memory, "--gpu-memory")
    return Gpu(known.name, given, known.flops if flops is None else flops, known.source)
