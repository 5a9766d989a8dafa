"""What a sub-model costs: parameters, bytes by precision, caches and FLOPs, all read off the table.

Every cost is a sum over blocks (the layers, and "model" for what is outside of them), and what one block costs depends
on its kind and its axis sizes alone. Whoever knows the costs of blocks knows those of every sub-model (`total`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from nestling.arch.architecture import Architecture, block_tensors
from nestling.arch.axes import Sizes, size
from nestling.arch.nemotron_h import CACHES, Stored
from nestling.arch.submodel import WHOLE, Submodel, complete, layer_sizes

BF16, FP32 = 2, 4  # bytes

BlockCost = Callable[[Architecture, str, Sizes], Any]
"""(architecture, kind, axis sizes) -> what one block of this kind costs."""


@dataclass(frozen=True)
class Cost:
    """The costs of one sub-model. Bytes are of bf16 weights and KV cache and of float32 Mamba state.

    `flops_per_token` counts one forward pass at a negligible context: two per weight of every matrix product and of the
    convolution, five per element of SSM state (decay, input, output). Attention adds `flops_per_context_token` for
    every token it looks back on.
    """

    parameters: int
    active_parameters: int
    bytes: int
    kv_bytes_per_token: int
    ssm_bytes_per_sequence: int
    flops_per_token: int
    flops_per_context_token: int

    def kv_bytes(self, context: int) -> int:
        """Keys and values of one sequence of `context` tokens."""
        return self.kv_bytes_per_token * context

    def flops(self, context: int) -> int:
        """Of one token that looks back on `context` tokens, itself included."""
        return self.flops_per_token + self.flops_per_context_token * context


@dataclass(frozen=True)
class Precision:
    """How a model is stored and run: linear maps inside blocks in `bits` per weight, other weights in `rest` bytes.

    The rest is the embeddings, the output head, the convolutions, the experts' router, norms and biases. A linear map
    has a scale of `scale` bytes per `group` weights of a row, or a single one (None). Rows are padded to whole bytes.
    kv, window, state: bytes per element of keys and values, of the convolution's window, and of the SSM state.
    """

    bits: int
    rest: int
    scale: int = 0
    group: int | None = None
    kv: int = BF16
    window: int = BF16
    state: int = FP32


PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision(8 * FP32, FP32, kv=FP32, window=FP32),
    "bf16": Precision(8 * BF16, BF16),
    "fp8": Precision(8, BF16, scale=FP32, kv=1),
    "int4": Precision(4, BF16, scale=BF16, group=128),
}
"""What models are commonly stored and run in: whole floats; one scale per matrix, keys and values in fp8 too; one scale
per 128 weights, and all else in bf16 (W4A16). SSM states drift in fewer than 32 bits, so they keep them."""


# ---- of one block


def block_parameters(architecture: Architecture, kind: str, sizes: Sizes) -> Any:
    return sum(row.layout.numel(sizes) * _copies(row, sizes) for row in _parameters(architecture, kind))


def block_active(architecture: Architecture, kind: str, sizes: Sizes) -> Any:
    """Parameters one token uses: of routed experts only the chosen ones."""
    chosen = architecture.num_experts_per_tok
    return sum(row.layout.numel(sizes) * (chosen if _routed(row) else 1) for row in _parameters(architecture, kind))


def block_weight_bytes(architecture: Architecture, kind: str, sizes: Sizes, precision: Precision) -> int:
    return sum(_bytes(row, kind, sizes, precision) * _copies(row, sizes) for row in _parameters(architecture, kind))


def block_state_bytes(kind: str, sizes: Sizes, precision: Precision) -> int:
    """Of the Mamba state of one sequence: SSM state and window."""
    return precision.state * _cached(kind, "ssm", sizes) + precision.window * _cached(kind, "conv", sizes)


def block_kv_bytes(kind: str, sizes: Sizes, precision: Precision) -> int:
    """Of the keys and values of one token."""
    return precision.kv * (_cached(kind, "key", sizes) + _cached(kind, "value", sizes))


def _block_cost(architecture: Architecture, kind: str, sizes: Sizes) -> Counter[str]:
    """The fields of `Cost`."""
    bf16, chosen = PRECISIONS["bf16"], architecture.num_experts_per_tok
    products = [row for row in _parameters(architecture, kind) if len(row.layout.dims) > 1]
    if kind == "model" and architecture.untied:
        products = products[1:]  # embeddings are looked up; where they are the head too, they are multiplied with
    multiplied = sum(row.layout.numel(sizes) * (chosen if _routed(row) else 1) for row in products)
    looked_back = 2 * 2 * size("G", sizes) * sizes["q"] * sizes["c"] if kind == "*" else 0
    return Counter(
        parameters=block_parameters(architecture, kind, sizes),
        active_parameters=block_active(architecture, kind, sizes),
        bytes=block_weight_bytes(architecture, kind, sizes, bf16),
        kv_bytes_per_token=block_kv_bytes(kind, sizes, bf16),
        ssm_bytes_per_sequence=block_state_bytes(kind, sizes, bf16),
        flops_per_token=2 * multiplied + 5 * _cached(kind, "ssm", sizes),
        flops_per_context_token=looked_back,
    )


def _parameters(architecture: Architecture, kind: str) -> Iterator[Stored]:
    return (row for row in block_tensors(architecture, kind) if not row.buffer)


def _routed(row: Stored) -> bool:
    return "{e}" in row.name


def _copies(row: Stored, sizes: Sizes) -> Any:
    return sizes["e"] if _routed(row) else 1


def _bytes(row: Stored, kind: str, sizes: Sizes, precision: Precision) -> int:
    shape = row.layout.shape(sizes)
    if kind == "model" or len(shape) != 2 or "e" in row.layout.axes:
        return precision.rest * row.layout.numel(sizes)
    rows, columns = shape
    scales = rows * _ceil(columns, precision.group) if precision.group else 1
    return rows * _ceil(columns * precision.bits, 8) + precision.scale * scales


def _ceil(count: int, divisor: int) -> int:
    return -(-count // divisor)


def _cached(kind: str, name: str, sizes: Sizes) -> Any:
    layout = CACHES.get(kind, {}).get(name)
    return layout.numel(sizes) if layout is not None else 0


# ---- of a sub-model


def total(architecture: Architecture, submodel: Submodel, block_cost: BlockCost) -> Any:
    """The sum over the blocks of a sub-model."""
    return sum(
        count * block_cost(architecture, kind, dict(sizes)) for (kind, sizes), count in blocks(architecture, submodel)
    )


@lru_cache(maxsize=1024)
def blocks(architecture: Architecture, submodel: Submodel) -> tuple[tuple[tuple[str, Any], int], ...]:
    """The different blocks of a sub-model, (kind, axis sizes), and how many of each it has."""
    outside = architecture.sizes(hidden_size=complete(architecture, submodel).hidden_size)
    every = [("model", outside), *((kind, sizes) for _, kind, sizes in layer_sizes(architecture, submodel))]
    return tuple(Counter((kind, tuple(sizes.items())) for kind, sizes in every).items())


def parameters(architecture: Architecture, submodel: Submodel = WHOLE) -> int:
    """The number of parameters; equals `numel` of the model that stock transformers builds (buffers do not count)."""
    return total(architecture, submodel, block_parameters)


def weight_bytes(architecture: Architecture, submodel: Submodel, precision: Precision) -> int:
    """Bytes of the weights alone, buffers left out, as if every one of them were stored in this precision."""
    return total(architecture, submodel, partial(block_weight_bytes, precision=precision))


def cost(architecture: Architecture, submodel: Submodel = WHOLE) -> Cost:
    found: Counter[str] = Counter()
    for (kind, sizes), count in blocks(architecture, submodel):
        for name, amount in _block_cost(architecture, kind, dict(sizes)).items():
            found[name] += count * amount
    return Cost(**found)
