"""Sizes that differ between layers, as a checkpoint that brings its own code: writing its config and reading it.

The config is a stock one of the widest layers; `per_layer_config`, transformers' own field, says what each layer has.
"""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from nestling.arch.architecture import Architecture
from nestling.arch.nemotron_h import KINDS, PER_LAYER
from nestling.arch.submodel import Submodel, complete, standalone
from nestling.errors import NestlingError

CODE = ("configuration_nestling.py", "modeling_nestling.py")
"""The files beside the weights that `trust_remote_code` runs."""

_AUTO_MAP = {
    "AutoConfig": "configuration_nestling.NestlingConfig",
    "AutoModel": "modeling_nestling.NestlingModel",
    "AutoModelForCausalLM": "modeling_nestling.NestlingForCausalLM",
}
_HELD = {field: kind for field, kind in PER_LAYER.items() if kind != "M"}
"""Field that a layer may have a value of its own for -> its block kind. Engines give all Mamba states one shape."""


def code_config(architecture: Architecture, submodel: Submodel, config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of config.json for a sub-model with per-layer sizes; `config` is that of the whole model."""
    spec, widest = complete(architecture, submodel), standalone(architecture, submodel)
    own = {
        layer: {field: size}
        for field, kind in _HELD.items()
        if isinstance(sizes := getattr(spec, field), tuple)
        for layer, size in zip(_layers(widest, kind), sizes, strict=True)
    }
    per_layer = {str(layer): own[layer] for layer in sorted(own)}
    return widest.to_config(config) | {"per_layer_config": per_layer, "auto_map": dict(_AUTO_MAP)}


def copy_code(directory: Path) -> None:
    """Put the configuration and modelling files beside the weights."""
    for name in CODE:
        (directory / name).write_bytes((resources.files("nestling") / "custom_code" / name).read_bytes())


def per_layer_sizes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What the stored layers are, as fields of a `Submodel` of `Architecture.from_config(config)`; {} if all are whole.

    Reads what `code_config` writes and what transformers makes of it when it saves: entries that equal the widest are
    left out, and layer numbers are padded with zeros.
    """
    if (given := config.get("per_layer_config")) is None:
        return {}
    architecture = Architecture.from_config(config)
    own = _own_sizes(architecture, given)
    sizes = {
        field: tuple(
            own.get(layer, {}).get(field, getattr(architecture, field)) for layer in _layers(architecture, kind)
        )
        for field, kind in _HELD.items()
        if any(field in changed for changed in own.values())
    }
    try:
        complete(architecture, Submodel.from_json(sizes))
    except NestlingError as error:
        raise NestlingError(f"per_layer_config: {error}") from None
    return sizes


def _layers(architecture: Architecture, kind: str) -> list[int]:
    return [layer for layer, letter in enumerate(architecture.hybrid_override_pattern) if letter == kind]


def _own_sizes(architecture: Architecture, given: Any) -> dict[int, dict[str, int]]:
    """Layer -> field -> size, every layer there and every field one that its kind of block may change."""
    if not isinstance(given, Mapping):
        raise NestlingError(
            f'per_layer_config must be an object such as {{"1": {{"intermediate_size": 64}}}}, not {given!r}'
        )
    own: dict[int, dict[str, int]] = {}
    for key, changed in given.items():
        layer = _layer(architecture, key)
        if layer in own:
            raise NestlingError(f"per_layer_config names layer {layer} twice")
        _check_changed(layer, architecture.hybrid_override_pattern[layer], changed)
        own[layer] = dict(changed)
    return own


def _layer(architecture: Architecture, key: Any) -> int:
    count = len(architecture.hybrid_override_pattern)
    if not re.fullmatch("[0-9]{1,9}", str(key)) or int(key) >= count:
        raise NestlingError(f"per_layer_config: layer {key!r} does not exist; the model has layers 0 … {count - 1}")
    return int(key)


def _check_changed(layer: int, kind: str, changed: Any) -> None:
    allowed = [field for field, of_kind in _HELD.items() if of_kind == kind]
    if not isinstance(changed, Mapping):
        raise NestlingError(f"per_layer_config: layer {layer} must be an object of sizes, not {changed!r}")
    for field, size in changed.items():
        if field not in allowed:
            raise NestlingError(
                f"per_layer_config: layer {layer} ({KINDS[kind]}) cannot have its own {field}; "
                f"allowed: {', '.join(allowed) or 'nothing'}"
            )
        if type(size) is not int:
            raise NestlingError(f"per_layer_config: {field} of layer {layer} must be an integer, not {size!r}")
