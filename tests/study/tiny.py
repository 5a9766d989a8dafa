"""runs/reproduce.toml with a far smaller quick form, and results that were never run."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestling.study.tokens import Results

REPRODUCE = (Path(__file__).parents[2] / "runs" / "reproduce.toml").read_text()
ARMS = re.findall(r"^\[study\.arms\.(.*)\]$", REPRODUCE, re.MULTILINE)
ARCHITECTURE = """
[quick.parent.architecture]
hidden_size = 32
intermediate_size = 96
mamba_head_dim = 8
ssm_state_size = 8
head_dim = 8

[quick.train.search_space]
hidden_size = [12, 16, 20, 24, 28]
intermediate_size = [16, 32, 40, 48, 56, 64, 72, 80, 88]
mamba_head_dim = [4, 6]

[quick.controls.uniform]
"60%" = { hidden_size = 24, intermediate_size = 64 }
"40%" = { hidden_size = 16, intermediate_size = 56 }

[quick.rank]
"""


SHORTER = {
    "[quick.parent]\nsteps = 20\nbatch = 16": "[quick.parent]\nsteps = 3\nbatch = 4",
    "steps = 8, batch = 8": "steps = 4, batch = 4",
    "steps = 16, batch = 8": "steps = 8, batch = 4",
    "candidate_steps = 4": "candidate_steps = 2",
    "every = 4\nrows = 20": "every = 2\nrows = 6",
    "[quick.rank]\nbatches = 1\nbatch = 16": '[quick.rank]\nbatches = 1\nbatch = 4\ndepth = "one-shot"',
    "router_steps = 4": "router_steps = 2",
    "router_steps = 8": "router_steps = 4",
}


def recipe(file: Path, *changes: tuple[str, str], only: Sequence[str] = ()) -> Path:
    """The study's recipe, tiny with --quick; only: arms to be kept. changes: of its text."""
    assert REPRODUCE.count("\n[quick.rank]\n") == 1
    text = REPRODUCE.replace("\n[quick.rank]\n", ARCHITECTURE)
    for old, new in SHORTER.items():
        assert old in text, old
        text = text.replace(old, new)
    head, *parts = text.replace("\n[quick", "\0[quick").replace("\n[study.arms.", "\0[study.arms.").split("\0")
    kept = [part for part in parts if not only or "study.arms." not in part.splitlines()[0] or _name(part) in only]
    text = "\n".join([head, *kept])
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text)
    return file


def _name(part: str) -> str:
    return part.splitlines()[0].split("study.arms.")[1].split("]")[0]


def result(
    arm: str,
    seed: int,
    curves: Mapping[str, Sequence[float]],
    parent: float = 1.0,
    each: int = 100,
    seen: str = "exact",
    **more: Any,
) -> dict[str, Any]:
    """A result whose sizes were seen to have these values after every `each` tokens, all sizes on every token."""
    points = [
        {
            "step": number,
            "tokens": number * each,
            "student": dict.fromkeys(curves, number * each),
            "teacher": number * each,
            "sizes": {size: {seen: curve[number - 1]} for size, curve in curves.items()},
        }
        for number in range(1, len(next(iter(curves.values()))) + 1)
    ]
    family = {size: {"parameters": 10, "bytes": 20, "submodel": {}} for size in curves}
    made = {"versions": {"python": "3"}, "machine": "a machine", "seconds": 1.0, "family": family}
    return {
        "arm": arm,
        "seed": seed,
        "parent": {seen: parent, "bytes": 40, "parameters": 20},
        "points": points,
        **made,
        **more,
    }


def planted(arms: Mapping[str, str], sizes: Mapping[str, Sequence[str]], *rows: dict[str, Any]) -> Results:
    """arms: name -> role. sizes: of each arm."""
    about = {
        "title": "planted",
        "command": "nestling run planted.toml",
        "quick": False,
        "task": "sums",
        "rows": 100,
        "measure": "exact",
        "architecture": {},
        "seeds": [0, 1, 2],
        "reach": [0.9],
        "arms": {
            name: {"role": role, "about": "", "sizes": list(sizes[name]), "train": {}} for name, role in arms.items()
        },
    }
    return Results(about, {(row["arm"], row["seed"]): row for row in rows})
