"""nemotron_h, declared once: which tensors a checkpoint stores and which axes each one is made of.

This is THE TABLE. Permuting, slicing, views, exact counts and export names are folds over it; nothing restates a shape.

    d hidden · g SSM group · h SSM heads per group · p SSM head channels · n state · k convolution width · v vocabulary
    G KV head · q query heads per KV head · c head dim · f FFN · e expert · m, s routed and shared expert FFN
"""

from dataclasses import dataclass

from nestling.arch.axes import Layout

KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""Pattern letter -> transformers' `layers_block_type` spelling."""


@dataclass(frozen=True)
class Stored:
    """One tensor of a block (or of the model): its on-disk name, its layout, and the config flag it depends on."""

    name: str
    layout: Layout
    when: str | None = None
    buffer: bool = False  # stored, but not a parameter


def _stored(name: str, layout: str, when: str | None = None, buffer: bool = False) -> Stored:
    return Stored(name, Layout.parse(layout), when, buffer)


_NORM = _stored("norm.weight", "d")

TABLE: dict[str, tuple[Stored, ...]] = {
    "model": (
        _stored("backbone.embeddings.weight", "v, d"),
        _stored("backbone.norm_f.weight", "d"),
        _stored("lm_head.weight", "v, d", when="untied"),
    ),
    "M": (
        _NORM,
        _stored("mixer.in_proj.weight", "g h p + g h p + g n + g n + g h, d"),  # z | x | B | C | dt
        _stored("mixer.in_proj.bias", "g h p + g h p + g n + g n + g h", when="use_bias"),
        _stored("mixer.conv1d.weight", "g h p + g n + g n, 1, k"),  # x | B | C
        _stored("mixer.conv1d.bias", "g h p + g n + g n", when="use_conv_bias"),
        _stored("mixer.dt_bias", "g h"),
        _stored("mixer.A_log", "g h"),
        _stored("mixer.D", "g h"),
        _stored("mixer.norm.weight", "g h p"),
        _stored("mixer.out_proj.weight", "d, g h p"),
        _stored("mixer.out_proj.bias", "d", when="use_bias"),
    ),
    "*": (
        _NORM,
        _stored("mixer.q_proj.weight", "G q c, d"),
        _stored("mixer.k_proj.weight", "G c, d"),
        _stored("mixer.v_proj.weight", "G c, d"),
        _stored("mixer.o_proj.weight", "d, G q c"),
    ),
    "-": (
        _NORM,
        _stored("mixer.up_proj.weight", "f, d"),
        _stored("mixer.up_proj.bias", "f", when="mlp_bias"),
        _stored("mixer.down_proj.weight", "d, f"),
        _stored("mixer.down_proj.bias", "d", when="mlp_bias"),
    ),
    "E": (
        _NORM,
        _stored("mixer.gate.weight", "e, d"),
        _stored("mixer.gate.e_score_correction_bias", "e", buffer=True),
        _stored("mixer.experts.{e}.up_proj.weight", "m, d"),
        _stored("mixer.experts.{e}.down_proj.weight", "d, m"),
        _stored("mixer.shared_experts.up_proj.weight", "s, d"),
        _stored("mixer.shared_experts.up_proj.bias", "s", when="mlp_bias"),
        _stored("mixer.shared_experts.down_proj.weight", "d, s"),
        _stored("mixer.shared_experts.down_proj.bias", "d", when="mlp_bias"),
    ),
}

CACHES: dict[str, dict[str, Layout]] = {
    "M": {"conv": Layout.parse("g h p + g n + g n, k"), "ssm": Layout.parse("g h p, n")},  # one per sequence
    "*": {"key": Layout.parse("G c"), "value": Layout.parse("G c")},  # one per token
}
"""What decoding keeps between tokens, per block kind."""

FIELDS: dict[str, str] = {
    "vocab_size": "v",
    "hidden_size": "d",
    "intermediate_size": "f",
    "n_groups": "g",
    "mamba_num_heads": "g h",
    "mamba_head_dim": "p",
    "ssm_state_size": "n",
    "conv_kernel": "k",
    "num_key_value_heads": "G",
    "num_attention_heads": "G q",
    "head_dim": "c",
    "n_routed_experts": "e",
    "moe_intermediate_size": "m",
    "moe_shared_expert_intermediate_size": "s",
}
"""Config field -> the product of axes it counts. A field with two axes is the inner one times the outer one."""

OUTSIDE = {"m": "e"}
"""Axis -> the axis of its tensors' names: every entry of that one has an order of its own."""

ELASTIC = frozenset("dfhpqems")
"""Axes a sub-model may cut (besides depth). The others define what a state, a group or a key is, and stay whole."""

PER_LAYER = {"intermediate_size": "-", "num_attention_heads": "*", "mamba_num_heads": "M"}
"""Fields that a sub-model may give one value per kept layer of that kind."""


def ordered(axis: str) -> list[str]:
    """The axes an order's dims run over: an axis ranked inside each entry of another has that one first."""
    axes = next(axes.split() for axes in FIELDS.values() if axes.split()[-1] == axis)
    return [OUTSIDE[axis], *axes] if axis in OUTSIDE else axes
