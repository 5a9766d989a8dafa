"""Hypothesis strategies: random architectures, the sub-models of one, and rankings of every axis."""

import numpy as np
from hypothesis import strategies as st

from nestling.arch.architecture import Architecture
from nestling.arch.nemotron_h import ELASTIC, FIELDS, PER_LAYER
from nestling.arch.submodel import Submodel
from nestling.weights.ranking import Ranking

_MOE = ("n_routed_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size")
_DENSE = {"mamba_num_heads": "M", "mamba_head_dim": "M", "num_attention_heads": "*", "intermediate_size": "-"}
OF_KIND = _DENSE | dict.fromkeys(_MOE, "E")
"""Elastic field -> the block kind it shapes (hidden_size shapes them all)."""


@st.composite
def architectures(
    draw: st.DrawFn, needs: str = "", kinds: str = "M*-E", max_layers: int = 5, least: int = 1
) -> Architecture:
    """Tiny random models whose pattern holds at least the blocks of `needs`; inner counts are at least `least`."""
    free = draw(st.text(kinds, min_size=not needs, max_size=max_layers - len(needs)))
    pattern = "".join(draw(st.permutations(needs + free)))
    groups, keys = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    experts = draw(st.integers(2 + (least > 1), 5))
    return Architecture(
        pattern,
        vocab_size=draw(st.integers(7, 23)),
        hidden_size=draw(st.integers(3, 24)),
        intermediate_size=draw(st.integers(2, 24)),
        n_groups=groups,
        mamba_num_heads=groups * draw(st.integers(least, 4)),
        mamba_head_dim=draw(st.integers(2, 5)),
        ssm_state_size=draw(st.integers(1, 5)),
        conv_kernel=draw(st.integers(2, 5)),
        num_key_value_heads=keys,
        num_attention_heads=keys * draw(st.integers(least, 4)),
        head_dim=draw(st.integers(1, 5)),
        n_routed_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts - (least > 1))),
        moe_intermediate_size=draw(st.integers(2, 6)),
        moe_shared_expert_intermediate_size=draw(st.integers(2, 6)),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        use_bias=draw(st.booleans()),
        use_conv_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 1e-2])),
        time_step_min=draw(st.sampled_from([0.001, 0.2])),
    )


@st.composite
def submodels(
    draw: st.DrawFn,
    architecture: Architecture,
    fields: tuple[str, ...] = ("hidden_size", *OF_KIND),
    per_layer: tuple[str, ...] = (),
    layers: bool = False,
) -> Submodel:
    """Members of a family: `fields` cut to one size each, those of `per_layer` to one per layer, some layers dropped.

    A size is below the whole one wherever the axis has room.
    """
    pattern = architecture.hybrid_override_pattern
    kept = tuple(range(len(pattern)))
    if layers:
        kept = tuple(sorted(draw(st.sets(st.sampled_from(kept), min_size=1))))
    spec: dict[str, object] = {}
    for field in dict.fromkeys((*fields, *per_layer)):
        sizes = _sizes(architecture, field)
        if field in per_layer:
            count = sum(pattern[layer] == PER_LAYER[field] for layer in kept)
            spec[field] = tuple(draw(st.lists(sizes, min_size=count, max_size=count))) or None
        elif OF_KIND.get(field, pattern[0]) in pattern:
            spec[field] = draw(sizes)
    return Submodel(layers=kept if layers else None, **spec)


def _sizes(architecture: Architecture, field: str) -> st.SearchStrategy[int]:
    *outer, axis = FIELDS[field].split()
    assert axis in ELASTIC
    step = architecture.sizes()[outer[0]] if outer else 1
    whole = getattr(architecture, field) // step
    least = max(architecture.num_experts_per_tok, 2) if axis == "e" else 1
    return st.integers(least, max(whole - 1, least)).map(lambda count: count * step)


def rankings(architecture: Architecture, axes: str = "dfhpqgGncems") -> st.SearchStrategy[Ranking]:
    """Random orders of these axes, also of the fixed ones, which a real ranking leaves alone; not of v and k."""
    return st.integers(0, 2**32).map(lambda seed: ranking(architecture, seed, axes))


def ranking(architecture: Architecture, seed: int, axes: str = "dfhpqgGncems") -> Ranking:
    random, sizes = np.random.default_rng(seed), architecture.sizes()
    inside = {"h": "g", "n": "g", "q": "G", "m": "e"}  # one order per entry of the axis outside
    of_kind = {"M": "gnhp", "*": "Gqc", "-": "f", "E": "ems"}

    def order(axis: str) -> np.ndarray:
        if axis in inside:
            return np.stack([random.permutation(sizes[axis]) for _ in range(sizes[inside[axis]])])
        return random.permutation(sizes[axis])

    orders = {"d": order("d")} if "d" in axes else {}
    for layer, kind in enumerate(architecture.hybrid_override_pattern):
        orders |= {f"{axis}.{layer}": order(axis) for axis in of_kind[kind] if axis in axes}
    return Ranking(orders, tuple(random.permutation(len(architecture.hybrid_override_pattern)).tolist()))
