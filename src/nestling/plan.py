"""`nestling plan`: what a model and each of its budgets are and cost, read off the table without touching weights."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nestling.arch.architecture import Architecture, block_axes
from nestling.arch.cost import PRECISIONS, cost, weight_bytes
from nestling.arch.nemotron_h import FIELDS
from nestling.arch.presets import PRESETS
from nestling.arch.submodel import WHOLE, Submodel, complete
from nestling.errors import NestlingError, nearest
from nestling.weights.files import read_json

CONTEXT = 128 * 1024

Figures = dict[str, Any]


def figures(target: str, context: int = CONTEXT) -> Figures:
    """The target's own figures, under "budgets" those of each member of its family with the same keys, and "family".

    All are integers, bytes or FLOPs, at `context` tokens where a length matters.
    """
    architecture, stored, budgets = _read(target)
    whole = member(architecture, stored, context)
    members = {name: member(architecture, submodel, context) for name, submodel in budgets.items()}
    return {**whole, "family": _family(whole, members), "budgets": members}


def member(architecture: Architecture, submodel: Submodel, context: int) -> Figures:
    """The shape and the costs of one size."""
    found = cost(architecture, submodel)
    cache = found.kv_bytes(context)
    return {
        **asdict(found),
        "weight_bytes": {name: weight_bytes(architecture, submodel, given) for name, given in PRECISIONS.items()},
        "context": context,
        "kv_bytes": cache,
        "sequence_bytes": cache + found.ssm_bytes_per_sequence,
        "flops_at_context": found.flops(context),
        "shape": shape(architecture, submodel),
    }


def shape(architecture: Architecture, submodel: Submodel) -> Figures:
    """The sizes of one member as config fields: those that its kept blocks have, a list where layers differ."""
    spec = complete(architecture, submodel).to_json()
    pattern = "".join(architecture.hybrid_override_pattern[layer] for layer in spec["layers"])
    axes = set().union(*(block_axes(architecture, kind) for kind in ("model", *pattern)))
    sizes = {
        field: spec.get(field, getattr(architecture, field)) for field in FIELDS if FIELDS[field].split()[-1] in axes
    }
    active = {"num_experts_per_tok": architecture.num_experts_per_tok} if "E" in pattern else {}
    return {"hybrid_override_pattern": pattern, "layers": spec["layers"], **sizes, **active}


def _family(whole: Figures, members: Mapping[str, Figures]) -> Figures:
    """Bytes of weights by precision: all sizes in one checkpoint, which is the whole model, and each in its own."""
    together = whole["weight_bytes"]
    apart = {name: sum(each["weight_bytes"][name] for each in members.values()) for name in together}
    saved = {name: apart[name] - together[name] for name in together}
    return {"together_bytes": together, "separate_bytes": apart, "saved_bytes": saved}


def architecture_of(target: str) -> Architecture:
    """The shape of a preset, a config.json or a directory."""
    return _read(target)[0]


def _read(target: str) -> tuple[Architecture, Submodel, Mapping[str, Submodel]]:
    """The widest layers of a model, what of them it has, and its budgets."""
    path = Path(target)
    if target.lower() in PRESETS:
        return PRESETS[target.lower()], WHOLE, {"100%": WHOLE}
    if os.path.isdir(path):
        from nestling.weights.elastic import FILE, open_elastic  # slow to import

        if any(path.glob("*.safetensors*")) or (path / FILE).exists():
            elastic = open_elastic(path)
            return elastic.architecture, elastic.whole, elastic.budgets if elastic.uniform else {"100%": elastic.whole}
        path = path / "config.json"
    elif not (os.path.isfile(path) or path.suffix == ".json" or len(path.parts) > 1):
        raise NestlingError(f"{target!r} is neither a path nor a preset; {nearest(target, PRESETS)}")
    return _read_config(path), WHOLE, {"100%": WHOLE}


def _read_config(path: Path) -> Architecture:
    config = read_json(path)
    try:
        return Architecture.from_config(config)
    except NestlingError as error:
        raise NestlingError(f"{path}: {error}") from None
