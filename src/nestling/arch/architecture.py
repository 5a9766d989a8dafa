"""`Architecture`: the shape of one nemotron_h model, read from a Hugging Face config and written back."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from nestling.arch.nemotron_h import ELASTIC, FIELDS, KINDS, TABLE, Stored
from nestling.errors import NestlingError, nearest

_LETTERS = {name: letter for letter, name in KINDS.items()} | {"mamba": "M", "mamba2": "M", "attention": "*"}
_RENAMED = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_min": "time_step_min",
    "num_local_experts": "n_routed_experts",
}
_ONLY = {
    "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2", "moe_latent_size": None, "attention_bias": False,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LIMIT, _LIMITS = 10**9, {"n_routed_experts": 10**4}  # of a size; every expert is a tensor to count
_BELOW = {"routed_scaling_factor": 1000}  # of numbers that are no sizes; the others are below 1


@cache
def fields_of(kinds: str) -> tuple[str, ...]:
    """The config fields that size the elastic axes of a model of these block kinds."""
    elastic = ELASTIC & {axis for kind in ("model", *kinds) for row in TABLE[kind] for axis in row.layout.axes}
    return tuple(field for field, axes in FIELDS.items() if axes.split()[-1] in elastic)


@dataclass(frozen=True)
class Architecture:
    """The shape of one nemotron_h model; field names and defaults are transformers' own.

    `untied` says whether the checkpoint stores an output head of its own. Stock transformers always does, whatever
    `tie_word_embeddings` says, so a bare config counts two matrices.
    """

    hybrid_override_pattern: str
    vocab_size: int = 131072
    hidden_size: int = 4096
    intermediate_size: int = 21504
    n_groups: int = 8
    mamba_num_heads: int = 128
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    conv_kernel: int = 4
    num_key_value_heads: int = 8
    num_attention_heads: int = 32
    head_dim: int = 128
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 7688
    moe_shared_expert_intermediate_size: int = 7688
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    use_bias: bool = False
    use_conv_bias: bool = True
    mlp_bias: bool = False
    layer_norm_epsilon: float = 1e-5
    time_step_min: float = 0.001
    untied: bool = True

    def __post_init__(self) -> None:
        if unknown := set(self.hybrid_override_pattern) - set(KINDS):
            raise NestlingError(f"block kinds {sorted(unknown)} are unknown; allowed: {', '.join(KINDS)}")
        if not self.hybrid_override_pattern:
            raise NestlingError("the model has no layers: hybrid_override_pattern is empty")
        for field in fields(self)[1:]:
            _check_value(field.name, getattr(self, field.name), field.default)
        self.sizes()
        if "E" in self.hybrid_override_pattern and self.num_experts_per_tok > self.n_routed_experts:
            limit = self.n_routed_experts
            raise NestlingError(f"num_experts_per_tok = {self.num_experts_per_tok} exceeds n_routed_experts = {limit}")

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> "Architecture":
        """Read a Hugging Face config, in transformers' spelling or in NVIDIA's published one."""
        if (given := config.get("model_type")) != "nemotron_h":
            raise NestlingError(f"model_type {given!r} is not supported; supported: 'nemotron_h'")
        config = {_RENAMED.get(key, key): value for key, value in config.items() if value is not None}
        config.setdefault("head_dim", config.get("attention_head_dim", Architecture.head_dim))  # NVIDIA's first configs
        for key, allowed in _ONLY.items():
            if config.get(key, allowed) != allowed:
                raise NestlingError(f"{key} = {config[key]!r} is not supported; supported: {allowed!r}")
        known = {field.name for field in fields(Architecture)} - {"untied", "hybrid_override_pattern"}
        return Architecture(_pattern(config), **{key: config[key] for key in known if key in config})

    def to_config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """`base` with this shape written into it, in both spellings of the pattern, so that every tool can read it."""
        shape = {key: value for key, value in asdict(self).items() if key != "untied"}
        stale = {*_RENAMED, "layer_types", "auto_map", "per_layer_config", "_name_or_path"}
        return (
            {key: value for key, value in base.items() if key not in stale}
            | shape
            | ({"attention_head_dim": self.head_dim} if "attention_head_dim" in base else {})
            | {
                "architectures": ["NemotronHForCausalLM"],
                "model_type": "nemotron_h",
                "layers_block_type": [KINDS[kind] for kind in self.hybrid_override_pattern],
                "num_hidden_layers": len(self.hybrid_override_pattern),
                "mamba_ssm_cache_dtype": "float32",
            }
        )

    @property
    def elastic_fields(self) -> tuple[str, ...]:
        """The config fields that a sub-model of this one may change: their innermost axis is here and elastic."""
        return fields_of(self.hybrid_override_pattern)

    @property
    def groupable(self) -> bool:
        """Whether transformers' default for experts, torch's grouped product, takes their sizes: rows of 16 bytes."""
        return "E" not in self.hybrid_override_pattern or not (self.hidden_size % 8 or self.moe_intermediate_size % 8)

    def sizes(self, **changed: Any) -> dict[str, Any]:
        """Axis -> size, with some config fields changed. Refuses a count that does not divide by its outer axis."""
        sizes: dict[str, Any] = {}
        for field, axes in sorted(FIELDS.items(), key=lambda item: len(item[1])):
            value = changed.get(field, getattr(self, field))
            *outer, axis = axes.split()
            for other in outer:
                value = _divide(field, value, sizes[other], next(f for f, a in FIELDS.items() if a == other))
            sizes[axis] = value
        return sizes


def _check_value(field: str, value: Any, default: Any) -> None:
    if isinstance(default, bool):
        valid, what = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        valid, what = type(value) is int and value >= 1, "a positive integer"
    else:
        below = _BELOW.get(field, 1)
        valid, what = type(value) in (int, float) and 0 <= value < below, f"a number from 0 to {below}"
    if not valid:
        raise NestlingError(f"{field} must be {what}, not {value!r}")
    if type(value) is int and value > (limit := _LIMITS.get(field, _LIMIT)):
        raise NestlingError(f"{field} is absurd; at most {limit:,} is allowed")


def _divide(field: str, value: Any, outer: int, outer_field: str) -> Any:
    if not isinstance(value, int):
        return value / outer  # an expected size
    if value < 1 or value % outer:
        lower = max(value // outer, 1) * outer
        raise NestlingError(
            f"{field} = {value} cannot be shared by {outer_field} = {outer}; nearest: {lower}, {lower + outer}"
        )
    return value // outer


def _pattern(config: Mapping[str, Any]) -> str:
    blocks = config.get("layers_block_type", config.get("layer_types"))
    if blocks is None and isinstance(config.get("hybrid_override_pattern"), str):
        return config["hybrid_override_pattern"]
    if not isinstance(blocks, list):
        raise NestlingError("config.json names no layers: hybrid_override_pattern or layers_block_type is needed")
    for block in blocks:
        if not isinstance(block, str) or block not in _LETTERS:
            raise NestlingError(f"layers_block_type has {block!r}; {nearest(str(block), KINDS.values())}")
    return "".join(_LETTERS[block] for block in blocks)


def block_tensors(architecture: Architecture, kind: str) -> Iterator[Stored]:
    """The rows of the table that this architecture stores for one block kind (or for `model`)."""
    return (row for row in TABLE[kind] if row.when is None or getattr(architecture, row.when))


def block_axes(architecture: Architecture, kind: str) -> set[str]:
    """The axes that shape the blocks of one kind."""
    axes = set().union(*(row.layout.axes for row in block_tensors(architecture, kind)))
    return {axis for axis in axes if not axis.isdigit()}
