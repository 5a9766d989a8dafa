"""What a sub-model costs: parameters, bytes by precision, caches and FLOPs, all read off the table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nestling.arch.axes import size
from nestling.arch.nemotron_h import CACHES
from nestling.arch.submodel import WHOLE, Architecture, Submodel, Tensor, layer_sizes, tensors

BF16, FP32 = 2, 4  # bytes


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
    """How weights are stored: `bits` per weight of the linear maps inside blocks, `rest` bytes per weight elsewhere.

    The rest is the embeddings, the output head, the convolutions, the experts' router, norms and biases. A linear map
    has a scale of `scale` bytes per `group` weights of a row, or a single one (None). Rows are padded to whole bytes.
    """

    bits: int
    rest: int
    scale: int = 0
    group: int | None = None


PRECISIONS: Mapping[str, Precision] = {
    "fp32": Precision(8 * FP32, FP32),
    "bf16": Precision(8 * BF16, BF16),
    "fp8": Precision(8, BF16, scale=FP32),
    "int4": Precision(4, BF16, scale=BF16, group=128),
}
"""What weights are commonly stored in: whole floats, one scale per matrix, one scale per 128 weights."""


def weight_bytes(architecture: Architecture, submodel: Submodel, precision: Precision) -> int:
    """Bytes of the weights alone, buffers left out, as if every one of them were stored in this precision."""
    stored = (tensor for tensor in tensors(architecture, submodel) if not tensor.buffer)
    return sum(_bytes(tensor, precision) for tensor in stored)


def _bytes(tensor: Tensor, precision: Precision) -> int:
    if tensor.layer is None or len(tensor.shape) != 2 or "e" in tensor.layout.axes:
        return precision.rest * tensor.numel
    rows, columns = tensor.shape
    scales = rows * _ceil(columns, precision.group) if precision.group else 1
    return rows * _ceil(columns * precision.bits, 8) + precision.scale * scales


def _ceil(count: int, divisor: int) -> int:
    return -(-count // divisor)


def parameters(architecture: Architecture, submodel: Submodel = WHOLE) -> int:
    """The number of parameters; equals `numel` of the model that stock transformers builds (buffers do not count)."""
    return sum(tensor.numel for tensor in tensors(architecture, submodel) if not tensor.buffer)


def cost(architecture: Architecture, submodel: Submodel = WHOLE) -> Cost:
    stored = [tensor for tensor in tensors(architecture, submodel) if not tensor.buffer]
    active = {tensor.name: _active(architecture, tensor) for tensor in stored}
    embedding = stored[0].name
    multiplied = sum(active[tensor.name] for tensor in stored if len(tensor.shape) > 1 and tensor.name != embedding)
    if not architecture.untied:
        multiplied += active[embedding]
    total = sum(tensor.numel for tensor in stored)
    ssm = _cache_numel(architecture, submodel, "M", ("ssm",))
    attention = sum(
        2 * 2 * size("G", sizes) * sizes["q"] * sizes["c"]
        for _, kind, sizes in layer_sizes(architecture, submodel)
        if kind == "*"
    )
    return Cost(
        parameters=total,
        active_parameters=round(sum(active.values())),
        bytes=BF16 * total,
        kv_bytes_per_token=BF16 * _cache_numel(architecture, submodel, "*", ("key", "value")),
        ssm_bytes_per_sequence=BF16 * _cache_numel(architecture, submodel, "M", ("conv",)) + FP32 * ssm,
        flops_per_token=round(2 * multiplied + 5 * ssm),
        flops_per_context_token=attention,
    )


def _active(architecture: Architecture, tensor: Tensor) -> Any:
    """Parameters one token uses: of routed experts only the chosen ones."""
    routed = ".experts." in tensor.name
    return tensor.numel * architecture.num_experts_per_tok / tensor.kept["e"] if routed else tensor.numel


def _cache_numel(architecture: Architecture, submodel: Submodel, kind: str, names: tuple[str, ...]) -> int:
    return sum(
        CACHES[kind][name].numel(sizes)
        for _, block, sizes in layer_sizes(architecture, submodel)
        if block == kind
        for name in names
    )
