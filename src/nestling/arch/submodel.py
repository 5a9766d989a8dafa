"""The values: `Architecture`, read from a Hugging Face config, and `Submodel`, one member of its family."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property, lru_cache
from typing import Any

from nestling.arch.axes import Layout, Sizes
from nestling.arch.nemotron_h import ELASTIC, FIELDS, KINDS, PER_LAYER, TABLE, Stored
from nestling.errors import NestlingError, nearest

_LETTERS = {name: letter for letter, name in KINDS.items()} | {"mamba": "M", "mamba2": "M", "attention": "*"}
_RENAMED = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_dt_min": "time_step_min",
    "num_local_experts": "n_routed_experts",
}
_ONLY = {"mamba_hidden_act": "silu", "mlp_hidden_act": "relu2", "moe_latent_size": None, "attention_bias": False}

_LIMIT, _LIMITS = 10**9, {"n_routed_experts": 10**4}  # of a size; every expert is a tensor to count


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
        valid, what = type(value) in (int, float) and 0 <= value < 1, "a number from 0 to 1"
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


Size = int | tuple[int, ...] | None


@dataclass(frozen=True)
class Submodel:
    """One member of a family, as a partial Hugging Face config: what is absent (None) is as in the whole model.

    `layers` are the indices kept, ascending. The fields of `PER_LAYER` take one size, or one per kept layer of
    the kind. A sub-model is a prefix of every ranked axis, so sizes say it all.
    """

    layers: tuple[int, ...] | None = None
    hidden_size: int | None = None
    intermediate_size: Size = None
    mamba_num_heads: Size = None
    mamba_head_dim: int | None = None
    num_attention_heads: Size = None
    n_routed_experts: int | None = None
    moe_intermediate_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None

    def __post_init__(self) -> None:
        for key, value in self.given().items():
            whole = tuple(value) if isinstance(value, list) else value
            listed = isinstance(whole, tuple)
            allowed = key in (*PER_LAYER, "layers") if listed else key != "layers"
            if not allowed or not all(type(item) is int for item in (whole if listed else (whole,))):
                raise NestlingError(f"sub-model: {key} must be {_allowed(key)}, not {value!r}")
            object.__setattr__(self, key, whole)

    def given(self) -> dict[str, Any]:
        """The keys that are set."""
        return {key: value for key in _SUBMODEL_KEYS if (value := getattr(self, key)) is not None}

    @staticmethod
    def from_json(spec: Any) -> "Submodel":
        if not isinstance(spec, Mapping):
            raise NestlingError(f'a sub-model is a JSON object such as {{"hidden_size": 4480}}, not {spec!r}')
        for key in spec:
            if key not in _SUBMODEL_KEYS:
                raise NestlingError(f"sub-model: unknown key {key!r}; {nearest(str(key), _SUBMODEL_KEYS)}")
        return Submodel(**spec)

    def to_json(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.given().items()}


_SUBMODEL_KEYS = tuple(field.name for field in fields(Submodel))


def _allowed(key: str) -> str:
    if key == "layers":
        return "a list of layer indices"
    return "an integer, or a list of one per kept layer" if key in PER_LAYER else "an integer"


WHOLE = Submodel()


@dataclass(frozen=True)
class Tensor:
    """One stored tensor of a sub-model: where it comes from in the whole model, and its sizes there and here."""

    name: str
    source: str
    layout: Layout
    full: Sizes
    kept: Sizes
    layer: int | None = None  # in the whole model
    buffer: bool = False
    expert: int | None = None

    @cached_property
    def shape(self) -> tuple[Any, ...]:
        return self.layout.shape(self.kept)

    @property
    def numel(self) -> Any:
        return self.layout.numel(self.kept)

    def axes(self, sizes: Sizes) -> list[tuple[str, Any]]:
        """The named axes of the layout with their sizes."""
        return [(axis, sizes[axis]) for axis in sorted(self.layout.axes) if not axis.isdigit()]


@lru_cache(maxsize=1024)
def complete(architecture: Architecture, submodel: Submodel) -> Submodel:
    """The sub-model with every key that its blocks have spelled out, validated against the whole model."""
    layers = _layers(architecture, submodel)
    kinds = "".join(architecture.hybrid_override_pattern[layer] for layer in layers)
    if foreign := submodel.given().keys() - {"layers", *architecture.elastic_fields}:
        blocks = ", ".join(sorted(set(architecture.hybrid_override_pattern)))
        raise NestlingError(f"sub-model: {min(foreign)} does not apply to a model of blocks {blocks}")
    named = [field for field in architecture.elastic_fields if field in fields_of(kinds) or field in submodel.given()]
    spelled = {field: _validated(architecture, field, getattr(submodel, field), kinds) for field in named}
    if "E" in kinds and spelled["n_routed_experts"] < (least := architecture.num_experts_per_tok):
        raise NestlingError(f"sub-model: n_routed_experts must be at least num_experts_per_tok = {least}")
    return Submodel(layers=layers, **spelled)


def _validated(architecture: Architecture, field: str, given: Size, kinds: str) -> Any:
    limit = getattr(architecture, field)
    if given is None:
        return limit
    for value in given if isinstance(given, tuple) else (given,):
        if not 1 <= value <= limit:
            raise NestlingError(f"sub-model: {field} = {value} is outside 1 … {limit}, the size in the whole model")
        architecture.sizes(**{field: value})
    if isinstance(given, tuple) and len(given) != (count := kinds.count(PER_LAYER[field])):
        kind = KINDS[PER_LAYER[field]]
        raise NestlingError(f"sub-model: {field} lists {len(given)} sizes; the kept layers have {count} of kind {kind}")
    if isinstance(given, tuple) and len(set(given)) < 2:
        return given[0] if given else limit
    return given


def _layers(architecture: Architecture, submodel: Submodel) -> tuple[int, ...]:
    count = len(architecture.hybrid_override_pattern)
    layers = tuple(range(count)) if submodel.layers is None else submodel.layers
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise NestlingError(f"sub-model: layer {outside[0]} does not exist; the model has layers 0 … {count - 1}")
    if not layers or list(layers) != sorted(set(layers)):
        raise NestlingError(f"sub-model: layers must be ascending indices, each once, at least one; not {list(layers)}")
    return layers


def layer_sizes(architecture: Architecture, submodel: Submodel = WHOLE) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(index in the whole model, kind, axis sizes) of every kept layer."""
    spec = complete(architecture, submodel)
    given = {field: value for field, value in spec.given().items() if field != "layers"}
    seen: dict[str, int] = {}
    made: dict[tuple[Any, ...], dict[str, Any]] = {}
    for layer in spec.layers or ():
        kind = architecture.hybrid_override_pattern[layer]
        nth = seen[kind] = seen.get(kind, -1) + 1
        own = {field: _nth(value, nth if PER_LAYER.get(field) == kind else 0) for field, value in given.items()}
        if (alike := tuple(own.values())) not in made:
            made[alike] = architecture.sizes(**own)
        yield layer, kind, dict(made[alike])


def _nth(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, tuple) else value


def block_tensors(architecture: Architecture, kind: str) -> Iterator[Stored]:
    """The rows of the table that this architecture stores for one block kind (or for `model`)."""
    return (row for row in TABLE[kind] if row.when is None or getattr(architecture, row.when))


@lru_cache(maxsize=64)
def tensors(architecture: Architecture, submodel: Submodel = WHOLE) -> tuple[Tensor, ...]:
    """Every stored tensor of a sub-model, in checkpoint order. All counts and transforms are folds over this."""
    full = architecture.sizes()
    kept_model = full | {"d": complete(architecture, submodel).hidden_size}
    first, *last = (
        Tensor(row.name, row.name, row.layout, full, kept_model) for row in block_tensors(architecture, "model")
    )
    blocks = [
        Tensor(
            name.format(layer=new, e=expert),
            name.format(layer=old, e=expert),
            row.layout,
            full,
            kept,
            old,
            row.buffer,
            expert if "{e}" in row.name else None,
        )
        for new, (old, kind, kept) in enumerate(layer_sizes(architecture, submodel))
        for row in block_tensors(architecture, kind)
        for name in ("backbone.layers.{layer}." + row.name,)
        for expert in range(kept["e"] if "{e}" in row.name else 1)
    ]
    return (first, *blocks, *last)


def standalone(architecture: Architecture, submodel: Submodel) -> Architecture:
    """The architecture of a sub-model by itself. Sizes that differ between layers become the widest (zero-padded)."""
    spec = complete(architecture, submodel)
    pattern = "".join(architecture.hybrid_override_pattern[layer] for layer in spec.layers or ())
    sizes: dict[str, Any] = {field: _widest(value) for field, value in spec.given().items() if field != "layers"}
    return replace(architecture, hybrid_override_pattern=pattern, **sizes)


def _widest(value: Any) -> int:
    return max(value) if isinstance(value, tuple) else value


def narrowed(architecture: Architecture, submodel: Submodel, limit: Submodel) -> Submodel:
    """`submodel`, spelled out, with no layer wider than it is in `limit`, which keeps every layer."""
    spec, sizes = complete(architecture, submodel), dict[str, Any]()
    for field, kind in PER_LAYER.items():
        if isinstance(widths := getattr(limit, field), tuple) and (own := getattr(spec, field)) is not None:
            of = (layer for layer, letter in enumerate(architecture.hybrid_override_pattern) if letter == kind)
            kept = [width for layer, width in zip(of, widths, strict=True) if layer in (spec.layers or ())]
            sizes[field] = tuple(min(_nth(own, nth), width) for nth, width in enumerate(kept))
    return complete(architecture, replace(spec, **sizes))


def is_within(architecture: Architecture, smaller: Submodel, larger: Submodel) -> bool:
    """Whether every component of `smaller` is a component of `larger`: per axis, per layer and for the layer set."""
    large = {layer: sizes for layer, _, sizes in layer_sizes(architecture, larger)}
    return all(
        layer in large and all(sizes[axis] <= large[layer][axis] for axis in block_axes(architecture, kind))
        for layer, kind, sizes in layer_sizes(architecture, smaller)
    )


def block_axes(architecture: Architecture, kind: str) -> set[str]:
    """The axes that shape the blocks of one kind."""
    axes = set().union(*(row.layout.axes for row in block_tensors(architecture, kind)))
    return {axis for axis in axes if not axis.isdigit()}
