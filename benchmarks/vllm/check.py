"""Every form of export in real vLLM: greedy tokens equal the view's inside the elastic model, and transformers'.

    make check-vllm    # sets up vLLM's own environment, .venv-vllm (3.3 GB), at the first run

A small random model is cut three ways: one size for all layers, sizes per layer with code, sizes per layer padded with
zeros. Writes the result to benchmarks/vllm/DATE.md. Exit code 1 if a single token differs.
"""

import argparse
import json
import os
import platform
import random
import shutil
import sys
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Tokens = list[list[int]]  # one list per prompt

MODEL = {
    "hybrid_override_pattern": "M-M*-M*-M-",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "n_groups": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's attention on the CPU takes
    "chunk_size": 16,
}
ONE_SIZE = {"hidden_size": 96, "intermediate_size": 192, "mamba_num_heads": 6, "num_attention_heads": 4}
PER_LAYER = ONE_SIZE | {"intermediate_size": [256, 64, 128, 160], "num_attention_heads": [8, 4]}
FORMS = {"homogeneous": ONE_SIZE, "code": PER_LAYER, "pad": PER_LAYER}


@dataclass(frozen=True)
class Checked:
    """Greedy tokens of one form from all three; `margins` are between the two largest logits, in transformers."""

    form: str
    parameters: int
    bytes: int
    view: Tokens
    transformers: Tokens
    vllm: Tokens
    margins: list[list[float]]

    @property
    def same(self) -> bool:
        return self.view == self.transformers == self.vllm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, default=Path(".venv-vllm/bin/python"), help="the Python that has vLLM")
    parser.add_argument("--out", type=Path, default=Path("out/vllm"))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--seed", type=int, default=4, help="4 was chosen: no two logits come closer than 4e-4")
    given = parser.parse_args()
    if not given.vllm.exists():
        sys.exit(f"{given.vllm} is not there; `make check-vllm` sets it up")
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    os.environ |= {"HF_MODULES_CACHE": str((given.out / "modules").resolve()), "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    write_parent(given.out / "parent", given.seed)
    draw = random.Random(given.seed)
    prompts = [[draw.randrange(MODEL["vocab_size"]) for _ in range(1 + 2 * i)] for i in range(given.prompts)]
    versions, checked = {}, []
    for form in FORMS:
        result, versions = check(form, given, prompts)
        checked.append(result)
        print(f"{form}: {'the same tokens' if result.same else 'DIFFERENT TOKENS'}", flush=True)
    result = report(checked, prompts, versions)
    (HERE / f"{date.today()}.md").write_text(result)
    print(result)
    sys.exit(0 if all(c.same for c in checked) else 1)


def write_parent(directory: Path, seed: int) -> None:
    """Random weights with logits of order 1, time steps far above stock's clamp of them, no value left at 0 or 1."""
    import torch
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(seed)
    model = NemotronHForCausalLM(NemotronHConfig(**MODEL))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("norm.weight", "norm_f.weight", ".D")):
                value.normal_(1, 0.2)
            elif name.endswith("A_log"):
                value.normal_(-1, 0.5)
            else:
                value.normal_(0, 0.5 if value.ndim == 1 else value.shape[-1] ** -0.5)
    model.save_pretrained(directory)


def check(form: str, given: argparse.Namespace, prompts: Tokens) -> tuple[Checked, dict[str, str]]:
    import nestling

    parent, out = given.out / "parent", given.out / form
    nestling.slice(parent, FORMS[form], out, hetero="auto" if form == "homogeneous" else form)
    in_view, parameters = from_view(parent, FORMS[form], prompts, given.max_tokens)
    job = {"prompts": prompts, "max_tokens": given.max_tokens, "trust_remote_code": form == "code"}
    in_transformers, margins = from_transformers(out, **job)
    in_vllm, versions = from_vllm(given.vllm, out, job)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return Checked(form, parameters, size, in_view, in_transformers, in_vllm, margins), versions


def from_view(parent: Path, spec: dict[str, Any], prompts: Tokens, max_tokens: int) -> tuple[Tokens, int]:
    import nestling
    from nestling.infer.generate import generate

    view = nestling.load(parent)[spec]
    return generate(view, prompts, max_tokens=max_tokens), view.parameters


def from_transformers(
    model: Path, prompts: Tokens, max_tokens: int, trust_remote_code: bool
) -> tuple[Tokens, list[list[float]]]:
    """One prompt at a time, so that nothing is padded; the mask, because token 0 would be taken for padding."""
    import torch
    from transformers import AutoModelForCausalLM

    how = {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    loaded, info = AutoModelForCausalLM.from_pretrained(model, **how)
    assert not any(info.values()), info
    greedy = {"max_new_tokens": max_tokens, "do_sample": False, "eos_token_id": None}
    tokens, margins = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        told = greedy | {"attention_mask": torch.ones_like(ids)}
        out = loaded.generate(ids, **told, return_dict_in_generate=True, output_logits=True)
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        first, second = torch.cat(out.logits).topk(2).values.unbind(-1)
        margins.append((first - second).tolist())
    return tokens, margins


def from_vllm(python: Path, model: Path, job: dict[str, Any]) -> tuple[Tokens, dict[str, str]]:
    from nestling.bench.vllm import started

    options = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": len(job["prompts"])}
    with started(python, model, options | {"trust_remote_code": job["trust_remote_code"]}) as (generate, versions):
        return generate(job["prompts"], job["max_tokens"]), versions


# ---- what was found


def report(checked: list[Checked], prompts: Tokens, vllm: dict[str, str]) -> str:
    ours = {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}
    lengths = [len(prompt) for prompt in prompts]
    lines = [
        f"# Exports in real vLLM, {date.today()}",
        "",
        f"`make check-vllm` · {machine()} · view and transformers: {listed(ours)} · vLLM: {listed(vllm)}",
        "",
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} random tokens, {len(checked[0].vllm[0])} greedy "
        "tokens each, float32. The model: "
        + ", ".join(f"{key} {value}" for key, value in MODEL.items())
        + f"; random weights. One size for all layers: `{json.dumps(ONE_SIZE)}`; per layer: `{json.dumps(PER_LAYER)}`.",
        "",
        "| form | parameters | bytes on disk | tokens compared | view = transformers | vLLM = transformers "
        "| smallest logit margin | distinct tokens |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *map(row, checked),
        "",
        "A margin is the distance between the two largest logits, the one that greedy decoding decides by.",
    ]
    differing = [line for c in checked for line in differences(c)]
    return "\n".join([*lines, *(["", "First differences:", *differing] if differing else [])]) + "\n"


def row(c: Checked) -> str:
    made = [token for tokens in c.transformers for token in tokens]
    cells = [
        c.form,
        f"{c.parameters:,}",
        f"{c.bytes:,}",
        f"{len(made):,}",
        agreement(c.view, c.transformers),
        agreement(c.vllm, c.transformers),
        f"{min(margin for margins in c.margins for margin in margins):.1e}",
        str(len(set(made))),
    ]
    return "| " + " | ".join(cells) + " |"


def agreement(one: Tokens, other: Tokens) -> str:
    return f"{sum(a == b for a, b in zip(one, other, strict=True))} of {len(one)} prompts"


def differences(c: Checked) -> list[str]:
    """Per prompt and tool, the first token that is not transformers', and how narrow its choice was there."""
    lines = []
    for tool, tokens in (("view", c.view), ("vLLM", c.vllm)):
        for prompt, (found, wanted) in enumerate(zip(tokens, c.transformers, strict=True)):
            if found != wanted:
                at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(found))
                lines.append(f"- {c.form}, {tool}, prompt {prompt}, token {at}: margin {c.margins[prompt][at]:.1e}")
    return lines


def listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def machine() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(':')[2].strip() if names else platform.machine()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
