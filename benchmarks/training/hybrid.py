"""The small hybrid whose training steps the scripts beside this one measure."""

from nestling.arch.architecture import Architecture


def hybrid(vocab_size: int = 8192) -> Architecture:
    """Ten blocks of hidden size 256, 4.5 M parameters besides the vocabulary."""
    return Architecture(
        "M-M*-M-M*-",
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=1024,
        n_groups=4,
        mamba_num_heads=16,
        mamba_head_dim=32,
        ssm_state_size=64,
        num_key_value_heads=2,
        num_attention_heads=8,
        head_dim=32,
    )
