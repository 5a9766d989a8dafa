"""The oracle: stock transformers. Random checkpoints made by it, and checkpoints of ours loaded into it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers.models.nemotron_h import modeling_nemotron_h

from nestling.arch.submodel import Architecture


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fresh values everywhere, also where models start at 0 or 1 (norms, biases, D), so that no mistake can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith(("A_log", "dt_bias", "bias")):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / max(parameter.shape[-1], 4) ** 0.5)
    return model.eval()


def build(architecture: Architecture, seed: int = 0, **config: Any) -> torch.nn.Module:
    """A randomised stock model of this architecture."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    written = architecture.to_config({"chunk_size": 8, "tie_word_embeddings": False, **config})
    written.pop("num_hidden_layers")
    return randomize(NemotronHForCausalLM(NemotronHConfig(**written)), seed)


def save(architecture: Architecture, directory: Path, seed: int = 0, **config: Any) -> torch.nn.Module:
    """A randomised stock model, saved by stock transformers."""
    model = build(architecture, seed, **config)
    model.save_pretrained(directory)
    return model


def load(directory: Path) -> torch.nn.Module:
    """A checkpoint in stock transformers, every weight of the file in its place and none left to chance."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def numel(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def float64(model: torch.nn.Module) -> torch.nn.Module:
    """The same stock model in true float64: its source casts to float32 inside, which a copy of the module does not."""
    copy = _float64_module().NemotronHForCausalLM(model.config).double()
    copy.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return copy.eval()


def _float64_module() -> ModuleType:
    name = "transformers.models.nemotron_h.modeling_nemotron_h_float64"
    if name not in sys.modules:
        source = Path(modeling_nemotron_h.__file__).read_text()
        source = source.replace("torch.float32", "torch.float64").replace(".float()", ".double()")
        spec = importlib.util.spec_from_loader(name, loader=None)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        module.__file__ = modeling_nemotron_h.__file__
        sys.modules[name] = module
        exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    return sys.modules[name]
