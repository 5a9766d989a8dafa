"""`Submodel`: one member of a family, and every tensor that it has."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

from nestling.arch.architecture import Architecture, block_axes, block_tensors, fields_of
from nestling.arch.axes import Layout, Sizes
from nestling.arch.nemotron_h import KINDS, PER_LAYER
from nestling.errors import NestlingError, nearest

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
    if "E" in kinds and spelled["n_routed_experts"] < (least := least_experts(architecture)):
        raise NestlingError(
            f"sub-model: n_routed_experts must be at least {least}: num_experts_per_tok is "
            f"{architecture.num_experts_per_tok}, and transformers needs two"
        )
    return Submodel(layers=layers, **spelled)


def least_experts(architecture: Architecture) -> int:
    """A token's own; and two, since transformers scores a group of experts by its best two."""
    return min(max(architecture.num_experts_per_tok, 2), architecture.n_routed_experts)


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
