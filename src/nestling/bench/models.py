"""Models with random weights, ours and stock transformers' with the same ones."""

from typing import Any

import torch
from torch import Tensor

from nestling.arch.architecture import Architecture
from nestling.arch.submodel import Submodel, standalone
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import Width, Widths, prefix

VOCABULARY = 8192
CHUNKS = (32, 64, 128, 256)  # of transformers' scan; 128 is its default
DEFAULT = 128


def shape(hidden: int, pattern: str = "M-M*-M-M*-", **changed: Any) -> Architecture:
    """Head sizes of the published models, few layers."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "n_groups": 2,
        "mamba_num_heads": hidden // 32,
        "mamba_head_dim": 64,
        "ssm_state_size": 64,
        "num_key_value_heads": 1,
        "num_attention_heads": hidden // 64,
        "head_dim": 64,
    }
    return Architecture(pattern, **sizes | changed)


TINY = shape(
    64,
    "M*-",
    vocab_size=64,
    mamba_num_heads=4,
    mamba_head_dim=16,
    ssm_state_size=16,
    num_attention_heads=4,
    head_dim=16,
)
"""For the quick form."""


def random_model(architecture: Architecture, seed: int = 0, **factory: Any) -> NemotronH:
    model = NemotronH(architecture, **factory)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.02, generator=generator).add_(1.0 if "norm" in name else 0.0)
    return model


def tokens(architecture: Architecture, batch: int, length: int, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(architecture.vocab_size, (batch, length), generator=generator).to(device)


def cut(model: NemotronH, submodel: Submodel, widths: Widths) -> NemotronH:
    """The sub-model with weights of its own, contiguous: what a slice is."""
    width = dict(widths.layers)
    like = next(model.parameters())
    own = NemotronH(standalone(model.architecture, submodel), device=like.device, dtype=like.dtype)
    parts: list[tuple[Any, Any, Width]] = [(own.ends, model.ends, widths.ends)]
    parts += [(mine, model.layers[layer], width[layer]) for mine, layer in zip(own.layers, width, strict=True)]
    with torch.no_grad():
        for mine, whole, kept in parts:
            for name, layout in mine.layouts.items():
                mine.get_parameter(name).copy_(prefix(whole.get_parameter(name), layout, kept))
    return own


def stock(model: NemotronH) -> Any:
    """The same weights in transformers, in its fastest attention."""
    from transformers import NemotronHConfig, NemotronHForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # that its kernels are missing is known
    logging.disable_progress_bar()
    written = model.architecture.to_config({"tie_word_embeddings": False})
    written.pop("num_hidden_layers")
    written["attn_implementation"] = "sdpa"
    theirs: Any = NemotronHForCausalLM(NemotronHConfig(**written))
    stored = model.on_disk()
    first = next(iter(stored.values()))
    theirs.to(first.dtype)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(stored[name.replace("model.", "backbone.", 1)])
    return theirs.to(first.device)


def set_chunk(theirs: Any, chunk: int) -> None:
    for module in theirs.modules():
        if hasattr(module, "chunk_size"):
            module.chunk_size = chunk
