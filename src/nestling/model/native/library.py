"""The kernels of this directory, built with the machine's C++ compiler at their first use and kept in the user's cache.

Where there is no compiler, or where the environment says NESTLING_KERNELS=off, torch's own operations are used instead.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

SWITCH = "NESTLING_KERNELS"
COMPILERS = ("c++", "g++", "clang++")
SOURCES = Path(__file__).parent
WIDEST = 64  # bytes of a vector, of any machine
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti")
PARTS = (  # compiled side by side
    ("kernels.cpp", "-DREAL=float", "-DSTORED=float"),
    ("kernels.cpp", "-DREAL=double", "-DSTORED=double"),
    ("kernels.cpp", "-DREAL=float", "-DSTORED=bfloat16", "-DNARROW"),
    ("layers.cpp",),
)
TUNED = ("-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native",)  # as compilers spell it
TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}

counting: ContextVar[bool] = ContextVar("counting", default=False)
"""Where it is set, kernels run on tensors without values too, and do nothing: what memory they need is counted."""

log = logging.getLogger(__name__)


def runs(*tensors: Tensor, dtype: torch.dtype | None = None, narrow: bool = False) -> bool:
    """Whether kernels run on tensors like these. Not where there are no values, except to be compiled or counted.

    dtype: of what kernels are given, if it is not theirs. narrow: they take bfloat16 too, and sum in float32.
    """
    first = tensors[0]
    dtype, alike = dtype or first.dtype, all(t.device.type == "cpu" and t.dtype == first.dtype for t in tensors)
    if not alike or dtype not in TYPES or (dtype == torch.bfloat16 and not narrow):
        return False
    if not torch.compiler.is_compiling():  # which cannot follow what comes now
        if counting.get():
            return True
        if any(isinstance(t, FakeTensor) for t in tensors):
            return False
    return available()


def available() -> bool:
    return library() is not None


# what torch.compiler.assume_constant_result does; it would import the compiler, which takes a second
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def call(name: str, dtype: torch.dtype, *values: int | Tensor | None) -> None:
    """Run a kernel for tensors of a dtype. Its arguments are the fields of its struct; a tensor is the address of its
    first element."""
    if not counting.get():
        getattr(library(), f"{name}_{TYPES[dtype]}")(arguments(values))


def arguments(values: Sequence[int | Tensor | None]) -> bytes:
    return struct.pack(f"{len(values)}q", *[t.data_ptr() if isinstance(t, Tensor) else t or 0 for t in values])


def summed_in(dtype: torch.dtype) -> torch.dtype:
    """In what kernels compute, given tensors of a dtype."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def numbers(documents: Tensor | None) -> Tensor | None:
    """Numbers of documents as kernels read them."""
    return None if documents is None else documents.to(torch.int64).contiguous()


def lanes(dtype: torch.dtype) -> int:
    """How many elements a vector of the machine has; of the widest one, where memory is counted."""
    if counting.get():
        return WIDEST // summed_in(dtype).itemsize
    found: int = getattr(library(), f"lanes_{TYPES[dtype]}")()
    return found


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def opaque() -> bool:
    """Whether autograd or torch.compile must see one operation; calling it costs a little."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, built if need be; None where there are none."""
    if not (compiler := _compiler()):
        return None
    try:
        return _loaded(compiler)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()[-500:]
        log.warning(
            "the kernels could not be built with %s, torch's operations are used: %s", " ".join(compiler), reason
        )
        return None


def expected() -> bool:
    """Whether there will be kernels, of which none is built for this."""
    return bool(_compiler())


def _compiler() -> list[str]:
    """The command that builds kernels; nothing where there are to be none."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false") or platform.system() != "Linux":
        return []
    return shlex.split(os.environ.get("CXX", "")) or [name for name in COMPILERS if shutil.which(name)][:1]


def _loaded(compiler: Sequence[str]) -> ctypes.CDLL:
    place = _built(compiler)
    try:
        return ctypes.CDLL(str(place))
    except OSError:  # damaged: once more
        place.unlink(missing_ok=True)
        return ctypes.CDLL(str(_built(compiler)))


def _built(compiler: Sequence[str]) -> Path:
    """The path of the library. It is built under another name first: others may be building it too."""
    openmp = _loaded_openmp()
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    digest = hashlib.sha256(repr([compiler, FLAGS, TUNED, PARTS, openmp, _machine()]).encode())
    for path in sources:
        digest.update(path.read_bytes())
    place = _cache() / f"kernels-{digest.hexdigest()[:16]}.so"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as work:
        compiled, linked = [f"{work}/{number}.o" for number in range(len(PARTS))], f"{work}/kernels.so"
        commands = (
            [*compiler, *FLAGS, *TUNED, *defined, "-c", str(SOURCES / source), "-o", to]
            for (source, *defined), to in zip(PARTS, compiled, strict=True)
        )
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        # torch's threads: a second set of them would wait in the way of the first
        _run([*compiler, "-shared", *compiled, openmp or "-fopenmp", "-o", linked])
        os.replace(linked, place)
    return place


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)


def _loaded_openmp() -> str:
    """The path of the OpenMP library that torch has loaded."""
    lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line}
    return min((path for path in paths if Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))), default="")


def _machine() -> str:
    """What the compiler tunes for: a cache may be shared by machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nestling"
