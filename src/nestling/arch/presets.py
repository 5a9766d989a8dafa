"""Published models of the family, by name: shapes from NVIDIA's model cards and configs."""

from nestling.arch.architecture import Architecture

_V2_12B = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
_V2_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
_H = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_V3_4B = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
_V3_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def _moe(hidden_size: int, moe_intermediate_size: int) -> Architecture:
    return Architecture(
        _V3_30B,
        hidden_size=hidden_size,
        mamba_num_heads=64,
        num_key_value_heads=2,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=moe_intermediate_size,
        moe_shared_expert_intermediate_size=3712,
        routed_scaling_factor=2.5,
    )


PRESETS: dict[str, Architecture] = {
    "nemotron-nano-12b-v2": Architecture(
        _V2_12B, hidden_size=5120, intermediate_size=20480, mamba_head_dim=80, num_attention_heads=40
    ),
    "nemotron-nano-9b-v2": Architecture(
        _V2_9B, hidden_size=4480, intermediate_size=15680, mamba_head_dim=80, num_attention_heads=40
    ),
    "nemotron-h-8b": Architecture(_H, hidden_size=4096, intermediate_size=21504),
    "nemotron-h-4b": Architecture(_H, hidden_size=3072, intermediate_size=12288, mamba_num_heads=112),
    "nemotron-3-nano-4b": Architecture(
        _V3_4B,
        hidden_size=3136,
        intermediate_size=12544,
        mamba_num_heads=96,
        mamba_head_dim=80,
        num_attention_heads=40,
    ),
    "nemotron-3-nano-30b-a3b": _moe(2688, 1856),
    "star-elastic-12b-a2b": _moe(1920, 960),
}
