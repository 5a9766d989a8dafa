"""The report page: well-formed, self-contained, complete, honest about controls, and made of nothing but its input."""

import copy
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

pytest.importorskip("jinja2")

from nestling.evaluate.report import render, scatter, short, spread, terminal_table, thinned  # noqa: E402

VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}
WIDTHS = {"100%": 128, "75%": 112, "50%": 96}
OWN = {  # kind -> axis -> size per member
    "M": {"mamba_num_heads": (8, 7, 5), "mamba_head_dim": (32, 32, 28)},
    "*": {"num_attention_heads": (4, 4, 2)},
    "-": {"intermediate_size": (512, 416, 304)},
}
FULL = {"M": 81234, "*": 49152, "-": 131072}
SOLVED = {
    "parent": 968, "100%": 972, "75%": 966, "50%": 951,
    "75% untrained": 214, "50% untrained": 12, "50% uniform": 884, "50% from scratch": 612,
}  # fmt: skip
ROLES = {"untrained": "untrained", "uniform": "uniform", "scratch": "scratch", "parent": "parent"}


def layer(index: int, kind: str, member: int, dropped: bool) -> dict[str, Any]:
    sizes = {"hidden_size": list(WIDTHS.values())[member], **{axis: of[member] for axis, of in OWN[kind].items()}}
    full = {"hidden_size": 128, **{axis: of[0] for axis, of in OWN[kind].items()}}
    parameters = FULL[kind] * math.prod(sizes.values()) // math.prod(full.values())
    return {
        "index": index, "kind": kind, "kept": not dropped, "parameters": 0 if dropped else parameters,
        "of": FULL[kind], "sizes": {} if dropped else sizes,
    }  # fmt: skip


def row(name: str) -> dict[str, Any]:
    share, budget = SOLVED[name] / 1000, None if name == "parent" else name.split()[0]
    wide = 1.96 * math.sqrt(share * (1 - share) / 1000)
    parameters = {"100%": 712345, "75%": 530112, "50%": 352904}.get(budget or "", 712345)
    return {
        "name": name, "role": ROLES.get(name.split()[-1], "elastic"), "parameters": parameters, "exact_match": share,
        "correct": SOLVED[name], "problems": 1000, "interval": [share - wide, share + wide], "budget": budget,
        "tokens_per_second": round(4100 * 712345 / parameters), "bytes": 2 * parameters,
    }  # fmt: skip


def decay(start: float, end: float, steps: int = 300) -> list[list[float]]:
    return [[s, end + (start - end) * math.exp(-s / 40) * (1 + 0.06 * math.sin(s * s))] for s in range(0, steps, 2)]


def sample() -> dict[str, Any]:
    pattern = "M-M*-M-"
    members = [
        {
            "name": name, "parameters": row(name)["parameters"], "target": round(712345 * float(name[:-1]) / 100),
            "layers": [layer(i, kind, m, name == "50%" and i == 5) for i, kind in enumerate(pattern)],
            "submodel": {"layers": list(range(7)), "hidden_size": WIDTHS[name]},
        }
        for m, name in enumerate(WIDTHS)
    ]  # fmt: skip
    choices = {
        name: {axis: decay(of[0], of[m], 120) for own in OWN.values() for axis, of in own.items()}
        | {"hidden_size": decay(128, WIDTHS[name], 120), "layers": decay(7, 7.5 - m / 2, 120)}
        for m, name in enumerate(WIDTHS) if m
    }  # fmt: skip
    return {
        "title": "Nestling demo", "date": "2026-11-24", "seed": 17, "quick": False,
        "versions": {"nestling": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "machine": "AMD EPYC, 2 cores", "command": "nestling run runs/demo.toml",
        "seconds": {"parent": 150.1, "rank": 4.0, "train": 160.0, "uniform": 71.3, "scratch": 68.2, "slice": 1.0,
                    "evaluate": 60.0},
        "task": "chain_sum, 2–3 terms of 1–2 digits; 1000 held-out problems, greedy generation in stock transformers, "
                "judged by the task's own verifier",
        "rows": [row(name) for name in SOLVED],
        "family": {"pattern": pattern, "parent": {"hidden_size": 128, "parameters": 712345}, "members": members},
        "curves": {
            "parent": {"loss": decay(3.6, 0.31, 900)},
            "elastic": {"100%": decay(0.4, 0.002), "75%": decay(2.5, 0.011), "50%": decay(4.2, 0.041),
                        "stages": [[0, "stage 1: 2 terms, soft masks"], [120, "stage 2: 2–3 terms, hard prefixes"]]},
            "router": {"expected": {"75%": decay(1.33, 1.0, 120), "50%": decay(1.9, 0.99, 120)}, "choices": choices},
        },
        "tokens": {"parent": 1900000, "elastic": {"100%": 310000, "75%": 620000, "50%": 930000}, "teacher": 1860000,
                   "uniform": 930000, "scratch": 920000},
        "next": ["nestling generate out/demo/elastic --budget 50% --prompt '50+23-88=' --temperature 0",
                 "nestling slice out/demo/elastic --budget 75% --out out/demo/three-quarters"],
    }  # fmt: skip
