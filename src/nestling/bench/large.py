"""Decode of a size of a billion parameters by view, one row in bfloat16, against reading its weights once.

No token can take less time than reading what it is multiplied by. Weights are random and in memory alone, one storage
of 2.5 GB; what is read for comparison is as many bytes of it as the size's products have.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nestling.arch.architecture import Architecture
from nestling.arch.submodel import Submodel, tensors
from nestling.bench.agree import TOLERANCE, agree
from nestling.bench.figure import Figure
from nestling.bench.models import TINY, shape
from nestling.bench.turns import Bench, Run
from nestling.infer.family import View
from nestling.infer.generate import PACKED, start
from nestling.infer.steps import step
from nestling.infer.timing import aligned, laid_into
from nestling.model.nemotron_h import NemotronH

BILLION = shape(
    2048,
    4 * "M-M*-M-M*-",
    vocab_size=32768,
    n_groups=8,
    mamba_num_heads=64,
    ssm_state_size=128,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=128,
)
SIZES = {"whole": Submodel(), "prefix": Submodel(None, 1920, 7168, 56)}
PROMPT, TOKENS = 16, 4
BLOCK = 2**20  # random numbers, over and over
WIDE = 4096  # numbers of a row that is read


def figures(bench: Bench) -> Iterator[Figure]:
    architecture = TINY if bench.quick else BILLION
    sizes = {"whole": Submodel()} if bench.quick else SIZES
    storage = random_storage(architecture, bench.device)
    model = laid_into(storage, architecture)
    few = laid_into(storage, replace(architecture, hybrid_override_pattern="M*-"))
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *few.named_parameters()]:
            if "norm" in name:
                parameter.fill_(1)
    for name, submodel in sizes.items():
        error = _check(name, few, submodel)
        yield _figure(bench, name, View(model, submodel), storage, error)


def random_storage(architecture: Architecture, device: str) -> Tensor:
    """Numbers of about 0.02 for all weights of a model, in bfloat16."""
    count = sum(aligned(each.numel()) for each in NemotronH(architecture, device="meta").parameters())
    block = (torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).to(device, torch.bfloat16)
    return torch.empty(-(-count // BLOCK), BLOCK, dtype=torch.bfloat16, device=device).copy_(block).flatten()


def decode(view: View, rows: int = 1) -> Run:
    """A few tokens more of every sequence, each time; they are short, so that weights are all that counts."""
    cache, _ = start(view, [list(range(PROMPT))] * rows)

    @torch.inference_mode()
    def run() -> None:
        for token in range(TOKENS):
            step(view, [token] * rows, cache)

    return run


def reading(storage: Tensor, count: int) -> dict[str, Run]:
    """Adding up so many numbers of the storage as often as `decode` has tokens, in two ways."""
    rows = storage[: count - count % (2 * WIDE)].view(torch.float32).view(-1, WIDE)  # two numbers in one
    ways: dict[str, Run] = {"a sum": rows.sum, "a product": lambda: torch.mv(rows, rows[0])}

    def often(way: Run) -> Run:
        return lambda: [way() for _ in range(TOKENS)]

    return {name: often(way) for name, way in ways.items()}


def _figure(bench: Bench, name: str, view: View, storage: Tensor, error: float) -> Figure:
    multiplied = [t.numel for t in tensors(view.model.architecture, view.submodel) if "embeddings" not in t.name]
    ways = reading(storage, sum(multiplied))
    times = bench.in_turn({"ours": decode(view.held(PACKED)), **ways})
    way, seconds = times.quickest(*ways), times.median("ours") / TOKENS
    return Figure(
        "large", f"decode, {name}, {view.parameters / 1e9:.2f} B, bf16, 1 row", f"reading its weights, {way} (best)",
        "× as fast", times.ratio(way, "ours"), 0.6, seconds,
        bench.limits.of_read(sum(multiplied) * storage.element_size(), seconds), "reading", error,
    )  # fmt: skip


def _check(name: str, few: NemotronH, submodel: Submodel) -> float:
    """Some layers of the same widths: the logits after a prompt and after one more token, against float64."""
    small = replace(submodel, layers=None)

    def logits(model: NemotronH) -> Callable[[], Sequence[Tensor]]:
        def run() -> Sequence[Tensor]:
            view = View(model, small).held(PACKED)
            cache, first = start(view, [list(range(PROMPT))])
            return [first, step(view, [PROMPT], cache)]

        return torch.inference_mode()(run)

    exact = logits(copy.deepcopy(few).double())()
    return agree(f"large, {name}", {"ours": logits(few)}, exact, TOLERANCE[torch.bfloat16])
