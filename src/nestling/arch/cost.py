"""What a sub-model costs: parameters, bytes, caches and FLOPs, all read off the table."""

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
