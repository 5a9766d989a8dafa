"""The oracle: stock transformers. Random checkpoints made by it, checkpoints of ours loaded into it, pruning by hand.

Nothing here uses the table: where a tensor has to be cut, it is cut by plain lists of row and column numbers.
"""

import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.nemotron_h import modeling_nemotron_h

from nestling.arch.architecture import Architecture
from nestling.arch.submodel import Submodel

# ---- models and checkpoints

EXPERTS = "eager"  # torch's grouped product knows neither float64 nor odd sizes


TINY = Architecture(
    "M*-",
    vocab_size=16,
    hidden_size=16,
    intermediate_size=24,
    n_groups=2,
    mamba_num_heads=4,
    mamba_head_dim=4,
    ssm_state_size=4,
    num_key_value_heads=1,
    num_attention_heads=2,
    head_dim=8,
)
"""The smallest model that has every kind of block, groups, and heads to cut."""

HYBRID = Architecture(
    "M-M*-*",
    vocab_size=31,
    hidden_size=24,
    intermediate_size=20,
    n_groups=2,
    mamba_num_heads=8,
    mamba_head_dim=4,
    ssm_state_size=5,
    num_key_value_heads=2,
    num_attention_heads=8,
    head_dim=4,
    use_bias=True,
    mlp_bias=True,
)
"""Two of every kind of block, several heads per group, and biases."""

LONG = Architecture(
    "M-M*-M-*",
    vocab_size=40,
    hidden_size=128,
    intermediate_size=512,
    n_groups=2,
    mamba_num_heads=16,
    mamba_head_dim=16,
    ssm_state_size=8,
    num_key_value_heads=2,
    num_attention_heads=8,
    head_dim=8,
)
"""Every kind of block several times, and much to cut on every axis: for searches, never run."""

SPOKEN = Architecture(
    "M-*M-",
    vocab_size=23,
    hidden_size=24,
    intermediate_size=32,
    n_groups=2,
    mamba_num_heads=8,
    mamba_head_dim=4,
    ssm_state_size=6,
    num_key_value_heads=2,
    num_attention_heads=4,
    head_dim=6,
    time_step_min=1e-6,  # stock floors dt only where it scans a sequence
)
"""Small and quick to generate with; it generates the same with a cache and without."""


def randomize(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fresh values everywhere, also where models start at 0 or 1 (norms, biases, D), so that no mistake can hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                value.copy_(1 + 0.3 * noise)
            elif name.endswith(("A_log", "dt_bias", "bias")):
                value.copy_(0.5 * noise)
            else:
                value.copy_(noise / max(value.shape[-1], 4) ** 0.5)
    return model.eval()


def config(architecture: Architecture, **changed: Any) -> Any:
    from transformers import NemotronHConfig

    written = architecture.to_config({"chunk_size": 8, "tie_word_embeddings": False, **changed})
    written.pop("num_hidden_layers")
    return NemotronHConfig(**written, experts_implementation=EXPERTS)


def build(architecture: Architecture, seed: int = 0, **changed: Any) -> torch.nn.Module:
    """A randomised stock model of this architecture."""
    from transformers import NemotronHForCausalLM

    return randomize(NemotronHForCausalLM(config(architecture, **changed)), seed)


def on_disk(model: torch.nn.Module) -> dict[str, Tensor]:
    """Its parameters, and what else it saves, under their names in a checkpoint; experts one by one."""
    named: dict[str, Tensor] = {}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        name = name.replace("model.", "backbone.", 1)
        if name.endswith(("experts.up_proj", "experts.down_proj")):
            before, _, kind = name.rpartition(".")
            named |= {f"{before}.{number}.{kind}.weight": own for number, own in enumerate(value)}
        else:
            named[name] = value
    return named


def on_meta(architecture: Architecture) -> torch.nn.Module:
    """The stock model of this architecture without storage: any size."""
    from transformers import NemotronHForCausalLM

    with torch.device("meta"):
        return NemotronHForCausalLM(config(architecture))


def save(architecture: Architecture, directory: Path, seed: int = 0, **changed: Any) -> torch.nn.Module:
    """A randomised stock model, saved by stock transformers."""
    model = build(architecture, seed, **changed)
    model.save_pretrained(directory)
    return model


def load(directory: Path) -> torch.nn.Module:
    """A checkpoint in stock transformers, every weight of the file in its place and none left to chance."""
    from transformers import AutoModelForCausalLM

    given = {"output_loading_info": True, "dtype": "auto", "experts_implementation": EXPERTS}
    model, info = AutoModelForCausalLM.from_pretrained(directory, **given)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a one-file checkpoint, read by the safetensors library."""
    return load_file(directory / "model.safetensors")


def write(directory: Path, written: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Path:
    """A checkpoint made by hand: this config.json, these tensors under these names."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(written))
    save_file(dict(stored), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


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


# ---- running and comparing


def tokens(vocab_size: int, batch: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: torch.nn.Module, input_ids: Tensor, **given: Any) -> Tensor:
    return model(input_ids, use_cache=False, **given).logits


class Differs(AssertionError):
    """Two results that must be equal are not."""

    def __init__(self, what: str, difference: float) -> None:
        super().__init__(f"{what}: differ by {difference:.2e}")
        self.difference = difference


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9, what: str = "logits") -> None:
    """Equal to `tolerance` of the largest value (the default is for float64)."""
    assert ours.shape == theirs.shape, f"{what}: {list(ours.shape)} against {list(theirs.shape)}"
    assert ours.isfinite().all(), f"{what}: not finite"
    assert theirs.isfinite().all(), f"{what}: not finite"
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not difference <= tolerance:
        raise Differs(what, difference)


# ---- pruning by hand

Picks = dict[int, dict[str, Any]]  # layer -> axis -> kept positions: a list, or for h and q one list per group


def picks(architecture: Architecture, submodel: Submodel, orders: Mapping[str, Any] | None = None) -> Picks:
    """What a sub-model keeps of each of its layers: the first of each order (of `Ranking.orders`), or of all."""
    a, orders = architecture, orders or {}
    layers = range(len(a.hybrid_override_pattern)) if submodel.layers is None else submodel.layers
    seen: Counter[str] = Counter()
    kept: Picks = {}
    for layer in layers:
        kind = a.hybrid_override_pattern[layer]

        def size(field: str, nth: int = seen[kind]) -> int:
            value = getattr(submodel, field)
            value = value[nth] if isinstance(value, tuple) else value
            return getattr(a, field) if value is None else value

        def first(axis: str, count: int, whole: int, own: str = f".{layer}") -> list[int]:
            return list(orders.get(axis if axis == "d" else axis + own, range(whole)))[:count]

        def inside(axis: str, count: int, whole: int, groups: int, own: str = f".{layer}") -> list[list[int]]:
            order = orders.get(axis + own, [range(whole)] * groups)
            return [list(order[group])[:count] for group in range(groups)]

        kept[layer] = {"d": first("d", size("hidden_size"), a.hidden_size)}
        if kind == "M":
            heads = [value // a.n_groups for value in (size("mamba_num_heads"), a.mamba_num_heads)]
            kept[layer] |= {"h": inside("h", *heads, a.n_groups)}
            kept[layer] |= {"p": first("p", size("mamba_head_dim"), a.mamba_head_dim)}
        elif kind == "*":
            heads = [value // a.num_key_value_heads for value in (size("num_attention_heads"), a.num_attention_heads)]
            kept[layer] |= {"q": inside("q", *heads, a.num_key_value_heads)}
        elif kind == "-":
            kept[layer] |= {"f": first("f", size("intermediate_size"), a.intermediate_size)}
        else:
            kept[layer] |= {"e": first("e", size("n_routed_experts"), a.n_routed_experts)}
            neurons = inside("m", size("moe_intermediate_size"), a.moe_intermediate_size, a.n_routed_experts)
            kept[layer] |= {"m": [neurons[expert] for expert in kept[layer]["e"]]}
            shared = "moe_shared_expert_intermediate_size"
            kept[layer] |= {"s": first("s", size(shared), getattr(a, shared))}
        seen[kind] += 1
    return kept


def prune(model: torch.nn.Module, kept: Picks) -> torch.nn.Module:
    """A stock model made of the kept parts. Its layers may have different sizes: each is a stock block of its own."""
    module = sys.modules[type(model).__module__]
    stored = {name.removeprefix("model."): value for name, value in model.state_dict().items()}
    whole, hidden, dtype = model.config, next(iter(kept.values()))["d"], model.lm_head.weight.dtype
    types = [whole.layers_block_type[layer] for layer in kept]
    ends = module.NemotronHForCausalLM(_resized(whole, types, hidden_size=len(hidden))).to(dtype)
    blocks = []
    for new, (old, pick) in enumerate(kept.items()):
        own = {name.removeprefix(f"layers.{old}."): value for name, value in stored.items() if f"layers.{old}." in name}
        changed, rows = _CUTS[types[new]](whole, pick)
        block = module.NemotronHBlock(_resized(whole, types, hidden_size=len(hidden), **changed), layer_idx=new).to(
            dtype
        )
        block.load_state_dict({name: _cut(value, *rows[name]) for name, value in own.items()})
        blocks.append(block)
    ends.model.layers = torch.nn.ModuleList(blocks)
    ends.model.embeddings.load_state_dict({"weight": stored["embeddings.weight"][:, hidden]})
    ends.model.norm_f.load_state_dict({"weight": stored["norm_f.weight"][hidden]})
    ends.lm_head.load_state_dict({"weight": stored["lm_head.weight"][:, hidden]})
    return ends.eval()


def _resized(whole: Any, types: list[str], **changed: Any) -> Any:
    written = whole.to_dict() | {"layers_block_type": types} | changed
    written.pop("layer_types", None)
    written.pop("num_hidden_layers", None)
    return type(whole)(**written, attn_implementation=whole._attn_implementation, experts_implementation=EXPERTS)


def _cut(value: Tensor, *positions: Any) -> Tensor:
    """Kept positions of each dim: a list, or a list for each entry of the first."""
    for dim, wanted in enumerate(positions):
        if wanted is not None and isinstance(wanted[0], list):
            value = torch.stack([_cut(own, *[None] * (dim - 1), one) for own, one in zip(value, wanted, strict=True)])
        elif wanted is not None:
            value = value.index_select(dim, torch.tensor(wanted))
    return value


def _mamba(c: Any, pick: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    per_group = c.mamba_num_heads // c.n_groups
    heads = [group * per_group + head for group, chosen in enumerate(pick["h"]) for head in chosen]
    inner = [head * c.mamba_head_dim + channel for head in heads for channel in pick["p"]]
    width, states = c.mamba_num_heads * c.mamba_head_dim, 2 * c.n_groups * c.ssm_state_size
    z_x = inner + [width + row for row in inner]
    B_C = [2 * width + row for row in range(states)]
    projected = z_x + B_C + [2 * width + states + head for head in heads]
    convolved = inner + [width + row for row in range(states)]
    rows = {
        "norm.weight": (pick["d"],),
        "mixer.in_proj.weight": (projected, pick["d"]),
        "mixer.in_proj.bias": (projected,),
        "mixer.conv1d.weight": (convolved,),
        "mixer.conv1d.bias": (convolved,),
        "mixer.norm.weight": (inner,),
        "mixer.out_proj.weight": (pick["d"], inner),
        "mixer.out_proj.bias": (pick["d"],),
    } | {f"mixer.{name}": (heads,) for name in ("dt_bias", "A_log", "D")}
    return {"mamba_num_heads": len(heads), "mamba_head_dim": len(pick["p"])}, rows


def _attention(c: Any, pick: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    per_key = c.num_attention_heads // c.num_key_value_heads
    heads = [key * per_key + head for key, chosen in enumerate(pick["q"]) for head in chosen]
    inner = [head * c.head_dim + channel for head in heads for channel in range(c.head_dim)]
    rows = {
        "norm.weight": (pick["d"],),
        "mixer.q_proj.weight": (inner, pick["d"]),
        "mixer.k_proj.weight": (None, pick["d"]),
        "mixer.v_proj.weight": (None, pick["d"]),
        "mixer.o_proj.weight": (pick["d"], inner),
    }
    return {"num_attention_heads": len(heads)}, rows


def _mlp(c: Any, pick: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    return {"intermediate_size": len(pick["f"])}, {"norm.weight": (pick["d"],)} | _feed_forward("mixer.", pick, "f")


def _feed_forward(prefix: str, pick: Mapping[str, Any], axis: str) -> dict[str, Any]:
    return {
        f"{prefix}up_proj.weight": (pick[axis], pick["d"]),
        f"{prefix}up_proj.bias": (pick[axis],),
        f"{prefix}down_proj.weight": (pick["d"], pick[axis]),
        f"{prefix}down_proj.bias": (pick["d"],),
    }


def _moe(c: Any, pick: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    rows = {
        "norm.weight": (pick["d"],),
        "mixer.gate.weight": (pick["e"], pick["d"]),
        "mixer.gate.e_score_correction_bias": (pick["e"],),
        "mixer.experts.up_proj": (pick["e"], pick["m"], pick["d"]),
        "mixer.experts.down_proj": (pick["e"], pick["d"], pick["m"]),
    } | _feed_forward("mixer.shared_experts.", pick, "s")
    sizes = {"n_routed_experts": "e", "moe_intermediate_size": "m", "moe_shared_expert_intermediate_size": "s"}
    counts = {axis: len(pick[axis]) for axis in "es"} | {"m": len(pick["m"][0])}
    return {field: counts[axis] for field, axis in sizes.items()}, rows


_CUTS = {"linear_attention": _mamba, "full_attention": _attention, "mlp": _mlp, "moe": _moe}
