"""A whole training step of a hybrid, forward and backward, against stock transformers on the same weights and tokens.

    OMP_NUM_THREADS=2 python benchmarks/model/step.py [--views] [--compile] [--json] [--device cuda --dtype bf16]

The rival is NemotronHForCausalLM in eager mode with SDPA, at its default chunk (128) and at 64. Cross-entropy over all
positions, no optimizer. `products` is the time of the step's own matrix products alone: x W, dy W and dyᵀ x of every
linear layer and of the head. A round runs everything once, in turn; ratios are of one round: min / median / max.
`--compile` adds our step with compiled blocks. `--views` compares a sub-model as a prefix with a model of its own size.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from measure import Run, circumstances, in_turn, report
from torch import Tensor

from nestling.arch.architecture import Architecture
from nestling.arch.submodel import Submodel, standalone
from nestling.model.compiled import compile_blocks
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import Widths, hard

VOCABULARY = 8192
TOKENS = {192: (4, 256), 512: (2, 512)}


def shape(hidden: int) -> Architecture:
    return Architecture(
        "M-M*-M-M*-",
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        n_groups=2,
        mamba_num_heads=hidden // 32,
        mamba_head_dim=64,
        ssm_state_size=64,
        num_key_value_heads=1,
        num_attention_heads=hidden // 64,
        head_dim=64,
    )


def random_model(architecture: Architecture, device: str) -> NemotronH:
    model = NemotronH(architecture)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.02, generator=generator).add_(1.0 if "norm" in name else 0.0)
    return model.to(device)


def stock(model: NemotronH) -> torch.nn.Module:
    """The same weights in transformers."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    written = model.architecture.to_config({"tie_word_embeddings": False})
    written.pop("num_hidden_layers")
    theirs = NemotronHForCausalLM(NemotronHConfig(**written))
    stored = model.on_disk()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(stored[name.replace("model.", "backbone.", 1)])
    return theirs.to(next(model.parameters()).device).train()


def learn(model: torch.nn.Module, ids_BL: Tensor, bf16: bool, widths: Widths | None = None, chunk: int = 128) -> Run:
    """Forward and backward; `widths` of ours, `chunk` of theirs."""

    def run() -> None:
        with torch.autocast(ids_BL.device.type, torch.bfloat16, enabled=bf16):
            if isinstance(model, NemotronH):
                logits = model(ids_BL, widths).logits
            else:
                for module in model.modules():
                    if hasattr(module, "chunk_size"):
                        module.chunk_size = chunk
                logits = model(ids_BL, use_cache=False).logits
        F.cross_entropy(logits.float().flatten(0, 1), ids_BL.flatten()).backward()
        model.zero_grad(set_to_none=True)

    return run


def products(model: NemotronH, tokens: int, bf16: bool) -> Run:
    """The matrix products of a step and nothing else."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    weights = [
        value.detach().to(dtype) for name, value in model.on_disk().items() if "proj" in name or "lm_head" in name
    ]
    device = weights[0].device
    pairs = [
        (torch.randn(tokens, w.shape[1], dtype=dtype, device=device), torch.randn(tokens, w.shape[0], device=device))
        for w in weights
    ]

    def run() -> None:
        for (x, dy), weight in zip(pairs, weights, strict=True):
            F.linear(x, weight)
            dy.to(dtype) @ weight
            dy.to(dtype).mT @ x

    return run


def case(hidden: int, given: argparse.Namespace) -> dict[str, object]:
    model, bf16 = random_model(shape(hidden), given.device), given.dtype == "bf16"
    rival = stock(model)
    batch, length = TOKENS.get(hidden, (2, 512))
    ids = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0)).to(given.device)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, rival(ids, use_cache=False).logits, rtol=1e-3, atol=1e-4)
    runs = {
        "ours": learn(model, ids, bf16),
        "stock 128": learn(rival, ids, bf16),
        "stock 64": learn(rival, ids, bf16, chunk=64),
        "products": products(model, batch * length, bf16),
    }
    if given.compile:
        runs["compiled"] = learn(compile_blocks(copy.deepcopy(model)), ids, bf16)
    times = in_turn(runs, given.rounds, given.device)
    row: dict[str, object] = {"hidden": hidden, "B L": f"{batch} {length}", "ours, ms": times.median("ours") * 1e3}
    row |= {f"{name} ÷ ours": times.ratio(name, "ours") for name in ("stock 128", "stock 64")}
    row["ours ÷ products"] = times.ratio("ours", "products")
    if given.compile:
        row["stock 128 ÷ compiled"] = times.ratio("stock 128", "compiled")
    return row


def views(hidden: int, given: argparse.Namespace) -> dict[str, object]:
    """A plain prefix, one inside groups and a whole sub-model, against models whose weights are contiguous."""
    model = random_model(shape(hidden), given.device)
    ids = torch.randint(VOCABULARY, TOKENS.get(hidden, (2, 512)), generator=torch.Generator().manual_seed(0))
    heads = shape(hidden).mamba_num_heads
    cuts = {
        "FFN": Submodel(intermediate_size=2 * hidden),
        "Mamba heads": Submodel(mamba_num_heads=heads - 2),
        "all": Submodel(hidden_size=hidden // 2, intermediate_size=2 * hidden, mamba_num_heads=heads - 2),
    }
    row: dict[str, object] = {"hidden": hidden}
    for name, cut in cuts.items():
        own = random_model(standalone(shape(hidden), cut), given.device)
        runs = {
            "view": learn(model, ids.to(given.device), False, hard(model.architecture, cut)),
            "own": learn(own, ids.to(given.device), False),
        }
        row[f"{name}: view ÷ own"] = in_turn(runs, given.rounds, given.device).ratio("view", "own")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--views", action="store_true", help="prefix views against contiguous weights instead")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="bf16 is autocast, for both")
    given = parser.parse_args()
    rows = [(views if given.views else case)(hidden, given) for hidden in given.hidden]
    report(rows, circumstances(given.device) | {"dtype": given.dtype}, given.json)


if __name__ == "__main__":
    main()
