"""Is a slice in stock transformers the same function as its view inside the checkpoint it was cut from?"""

from pathlib import Path

import torch

from nestling.errors import NestlingError
from nestling.evaluate.stock import load_stock
from nestling.infer.family import View
from nestling.model.store import load_model
from nestling.units import decimal
from nestling.weights.convert import TORCH
from nestling.weights.cut import Output

TOLERANCE = 1e-5
BATCH, LENGTH = 2, 64


def parity(cut: Output, directory: str | Path, seed: int = 0) -> str:
    """Compare the logits of random tokens, in float32; returns what was shown. A difference is a NestlingError.

    Where the slice was rounded to another type, the view's weights are rounded too.
    """
    _check_memory(cut)
    model = load_model(cut.elastic, None if cut.dtype is None else getattr(torch, TORCH[cut.dtype])).float()
    vocabulary = cut.elastic.architecture.vocab_size
    ids = torch.randint(vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        ours = View(model, cut.submodel)(ids).logits
        theirs = load_stock(directory, dtype=torch.float32, trust_remote_code=cut.hetero == "code")(
            ids, use_cache=False
        ).logits
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if not difference <= TOLERANCE:
        raise NestlingError(
            f"{directory}: its logits in stock transformers differ from the view inside {cut.elastic.checkpoint.path} "
            f"by {difference:.1e} of the largest; allowed: {TOLERANCE:.0e}. Do not use it, and please report this"
        )
    shown = f"{difference:.1e} of the largest (float32, {ids.numel()} tokens)"
    return f"logits in stock transformers equal the view's to {shown}"


def _check_memory(cut: Output) -> None:
    """Refuse what would not fit: the view and the slice, both in float32."""
    need = 4 * (sum(entry.numel for entry in cut.elastic.checkpoint.entries.values()) + cut.parameters)
    if (free := _available_memory()) is not None and need > free:
        raise NestlingError(
            f"--verify compares in float32 and needs {decimal(need)} of memory, {decimal(free)} are free; "
            "`nestling verify SLICE --inside ELASTIC` compares the files bit for bit in constant memory"
        )


def _available_memory() -> int | None:
    """Bytes that a new process could use, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
