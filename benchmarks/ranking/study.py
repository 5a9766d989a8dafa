"""Which metric ranks best: zero-shot slices of the demo's parents, every metric against random and magnitude.

    OMP_NUM_THREADS=1 python benchmarks/ranking/study.py --out out/ranking > benchmarks/ranking/DATE.md

Per seed: the parent of runs/demo.toml (trained if it is not there), ranked on 1024 training problems by every metric,
and cut with no further training. A slice is judged on 1000 held-out problems, all solution tokens at once
(teacher-forced): KL from the parent and cross-entropy in nats per token, and the share of problems whose every token is
the most probable one, which is the share greedy decoding would write out as the task's own worked solution. Every
figure is appended to OUT/seed-S/figures.jsonl, and what is there is not measured again.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nestling
from nestling.arch.submodel import Submodel
from nestling.data.batches import batch, padded
from nestling.model.nemotron_h import Output
from nestling.model.store import load_model
from nestling.recipe import read_recipe
from nestling.tasks import distinct, problems
from nestling.tokenizer import EOS, read_tokenizer
from nestling.train.importance import Method, rank, spearman
from nestling.train.metrics import AXES
from nestling.weights.elastic import open_elastic
from nestling.weights.ranking import Ranking
from nestling.weights.transform import permute

sys.path.insert(0, str(Path(__file__).parent))
from tables import report

RECIPE = "runs/demo.toml"
DRAWS = 10  # random orders per seed
SETS: dict[str, dict[str, str]] = {
    "contribution": dict.fromkeys(AXES, "contribution"),
    "sum": dict.fromkeys(AXES, "sum") | {"ffn": "post"},
    "l2": dict.fromkeys(AXES, "l2") | {"ffn": "post-l2"},
    "published": dict.fromkeys(AXES, "sum") | {"ffn": "pre", "mamba_heads": "signed", "mamba_channels": "signed"},
    "pre-l2": {"ffn": "pre-l2"},
    "ablation": {"mamba_heads": "ablation", "attention_heads": "ablation"},
    "magnitude": dict.fromkeys(AXES, "magnitude"),
}
CUTS: dict[str, dict[str, dict[str, int]]] = {  # 4 heads per group have no 90 %
    "hidden": {"90 %": {"hidden_size": 116}, "75 %": {"hidden_size": 96}, "50 %": {"hidden_size": 64}},
    "ffn": {"90 %": {"intermediate_size": 344}, "75 %": {"intermediate_size": 288}, "50 %": {"intermediate_size": 192}},
    "mamba_heads": {"75 %": {"mamba_num_heads": 6}, "50 %": {"mamba_num_heads": 4}},
    "mamba_heads of one layer": {
        f"75 %, layer {layer}": {"mamba_num_heads": [6 if other == layer else 8 for other in (0, 2, 5)]}
        for layer in (0, 2, 5)
    },
    "mamba_channels": {"90 %": {"mamba_head_dim": 29}, "75 %": {"mamba_head_dim": 24}, "50 %": {"mamba_head_dim": 16}},
    "attention_heads": {"75 %": {"num_attention_heads": 6}, "50 %": {"num_attention_heads": 4}},
}
JOINT = {  # every axis at once
    share: {key: size for axis in CUTS for key, size in CUTS[axis].get(share, {}).items()}
    for share in ("90 %", "75 %", "50 %")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/ranking"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given = parser.parse_args()
    rows = [row for seed in given.seeds for row in Study(given.out / f"seed-{seed}", seed).run()]
    print(report(rows, " ".join(sys.argv[1:])))


class Study:
    """One seed: its parent, its data, and the figures measured so far."""

    def __init__(self, out: Path, seed: int) -> None:
        command = [sys.executable, "-m", "nestling", "pretrain", RECIPE, "--seed", str(seed), "--out", str(out)]
        subprocess.run(command, check=True)
        self.parent, self.figures, self.seed = out / "parent", out / "figures.jsonl", seed
        self.task = read_recipe(RECIPE).task.task
        self.tokenizer = read_tokenizer(self.parent)
        self.model = load_model(open_elastic(self.parent))
        lines = self.figures.read_text().splitlines() if self.figures.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.held_out = self._held_out(1000)

    def run(self) -> list[dict[str, Any]]:
        with torch.no_grad():
            self.log_p = torch.log_softmax(self.model(self.held_out[0]).logits, -1)
            self._record(self.figure(self.model, None), kind="parent", metric="parent")
            self._record(self.figure(_uniform, None), kind="parent", metric="uniform guess")
            for name in [*SETS, *(f"random {draw}" for draw in range(DRAWS))]:
                self.widths(name)
            self.layers()
            self.samples()
        return self.rows

    # --- what is measured

    def widths(self, name: str) -> None:
        """Every slice of one set of metrics, alone and jointly; a metric that two sets share is measured once."""
        chosen = SETS.get(name, dict.fromkeys(AXES, "random"))
        method = Method.of(chosen, "cosine", seed=int(name.split()[-1]) if name.startswith("random") else 0)
        named = dict(zip(AXES, (method.metrics[letter] for letter in AXES.values()), strict=True))
        label = {axis: name if metric == "random" else metric for axis, metric in named.items()}
        wanted = [
            (axis, share, cut, label[axis.split()[0]]) for axis, cuts in CUTS.items() for share, cut in cuts.items()
        ]
        wanted += [("all axes", share, cut, name) for share, cut in JOINT.items() if name != "pre-l2"]
        missing = [w for w in wanted if not self._has(kind="width", axis=w[0], share=w[1], metric=w[3])]
        if not missing:
            return
        with self._permuted(rank(self.model, self.calibration(), method)) as family:
            for axis, share, cut, metric in missing:
                found = self.figure(family.model, family[Submodel(**cut)].widths)
                self._record(found, kind="width", axis=axis, share=share, metric=metric)

    def layers(self) -> None:
        """Layers left out by every method, at random, and by trying every set of them on the held-out problems."""
        count = len(self.model.layers)
        orders = {f"random {draw}": np.random.default_rng(draw).permutation(count).tolist() for draw in range(DRAWS)}
        for method in ("one-shot", "iterative", "cosine"):
            if not self._has(kind="depth", metric=method, dropped=3):
                orders[method] = rank(self.model, self.calibration(), Method.of({}, method)).layers
        sets = [(m, tuple(sorted(o[: count - n]))) for m, o in orders.items() for n in (1, 2, 3)]
        sets += [("every set", kept) for n in (1, 2, 3) for kept in itertools.combinations(range(count), count - n)]
        family = nestling.load(self.parent)
        for metric, kept in sets:
            what = {"kind": "depth", "metric": metric, "layers": list(kept), "dropped": count - len(kept)}
            if not self._has(**what):
                self._record(self.figure(family.model, family[Submodel(layers=kept)].widths), **what)

    def samples(self) -> None:
        """Spearman of scores from few samples with those from 4096 others, and what the order from few costs."""
        reference: Ranking | None = None
        for size in (16, 32, 64, 128, 256, 512, 1024):
            for draw in range(3):
                if self._has(kind="samples", samples=size, draw=draw):
                    continue
                reference = reference or rank(self.model, self.calibration(32, 100), Method.of({}, "one-shot"))
                few = self.calibration(max(size // 128, 1), 200 + 8 * draw, min(size, 128))
                found = rank(self.model, few, Method.of({}, "one-shot"))
                alike = {k: spearman(score, found.scores[k]) for k, score in reference.scores.items()}
                with self._permuted(found) as family:
                    figure = self.figure(family.model, family[Submodel(**JOINT["90 %"])].widths)
                self._record(figure, kind="samples", samples=size, draw=draw, spearman=alike)

    # --- how

    def calibration(self, batches: int = 8, start: int = 0, size: int = 128) -> list[tuple[torch.Tensor, torch.Tensor]]:
        drawn = (batch(self.task, self.tokenizer, self.seed + 1, step, size) for step in range(start, start + batches))
        return [(b.inputs_BL, b.real_BL) for b in drawn]

    def _held_out(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(inputs, targets, 1 where a target is part of a solution), [count, L]."""
        asked = distinct(problems(self.task, self.seed, held_out=True), count)
        prompts = [self.tokenizer.encode(problem.prompt).ids for problem in asked]
        end = [self.tokenizer.token_to_id(EOS)]
        solutions = [self.tokenizer.encode(problem.solution).ids + end for problem in asked]
        ids, real = padded([p + s for p, s in zip(prompts, solutions, strict=True)])
        counted = (torch.arange(ids.shape[1]) >= torch.tensor([[len(p)] for p in prompts])) & real
        return ids[:, :-1], ids[:, 1:], counted[:, 1:]

    def figure(self, model: Any, widths: Any) -> dict[str, float]:
        inputs, targets, counted = self.held_out
        log_q = torch.cat([torch.log_softmax(model(rows, widths).logits, -1) for rows in inputs.split(250)])
        log_p = getattr(self, "log_p", log_q)[:, : inputs.shape[1]]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)[counted].mean()
        ce = -log_q.gather(-1, targets[..., None])[..., 0][counted].mean()
        right = ((log_q.argmax(-1) == targets) | ~counted).all(1).float().mean()
        return {"kl": float(kl), "ce": float(ce), "exact": float(right)}

    def _permuted(self, ranking: Ranking) -> "Permuted":
        return Permuted(self.parent, ranking)

    def _has(self, **what: Any) -> bool:
        return any(all(row.get(key) == value for key, value in what.items()) for row in self.rows)

    def _record(self, figure: dict[str, float], **what: Any) -> None:
        row = {"seed": self.seed, **what, **figure}
        if not self._has(**{"seed": self.seed, **what}):
            self.rows.append(row)
            with open(self.figures, "a") as file:
                file.write(json.dumps(row) + "\n")


def _uniform(ids: torch.Tensor, widths: Any) -> Output:
    """A model that knows nothing: whatever is further from the parent than this is worse than a guess."""
    return Output(torch.zeros(*ids.shape, 16))


class Permuted:
    """A ranked copy of a checkpoint, for as long as it is looked at."""

    def __init__(self, parent: Path, ranking: Ranking) -> None:
        self.folder = tempfile.TemporaryDirectory()
        permute(parent, ranking, Path(self.folder.name) / "ranked")

    def __enter__(self) -> Any:
        return nestling.load(Path(self.folder.name) / "ranked")

    def __exit__(self, *_: object) -> None:
        self.folder.cleanup()


if __name__ == "__main__":
    main()
