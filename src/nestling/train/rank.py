"""`nestling rank`: from a model and calibration data to an elastic checkpoint, resumable until that is written."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import nestling
from nestling import ranks
from nestling.console import console
from nestling.data.lines import sha256
from nestling.model.store import load_model
from nestling.train.calibration import Texts
from nestling.train.importance import Method, rank
from nestling.train.partial import Partial
from nestling.weights.elastic import Elastic
from nestling.weights.output import check_output
from nestling.weights.ranking import Ranking
from nestling.weights.transform import permute


@dataclass(frozen=True)
class Job:
    """What is ranked, on what, how, and where to."""

    elastic: Elastic
    texts: Texts
    method: Method
    out: Path
    device: torch.device = torch.device("cpu")

    def inputs(self) -> dict[str, Any]:
        """Everything the ranking depends on: the same inputs give the same ranking."""
        path = self.elastic.checkpoint.path
        files = {entry.file for entry in self.elastic.checkpoint.entries.values()}
        source = {file.name: sha256(file) for file in sorted([*files, path / "config.json"])}
        method = self.method.to_json(self.elastic.architecture)
        return {"parent": str(path), "source": source, **self.texts.to_json(), "batch": self.texts.batch, **method}

    @property
    def state(self) -> Path:
        """Where the sums so far are kept until the checkpoint is written."""
        return self.out.resolve().with_name(f".{self.out.resolve().name}.rank-state")


def run(job: Job, *, overwrite: bool = False) -> Ranking:
    """Rank and write the elastic checkpoint. Stopped, the same command with the same inputs goes on where it was.

    Several processes share out the batches, and the first of them writes.
    """
    check_output(job.out, overwrite=overwrite)
    began, inputs = time.monotonic(), job.inputs()
    partial = ranks.of_first(lambda: Partial.resume(job.state, _fingerprint(inputs)))
    try:
        ranking = rank(load_model(job.elastic).to(job.device), job.texts, job.method, partial)
    except KeyboardInterrupt:
        if job.state.exists():
            console.print("rank: stopped; the same command goes on where its sums were last saved")
        raise
    made = {**inputs, "seconds": round(time.monotonic() - began, 1)}
    if ranks.first():
        permute(job.elastic.checkpoint.path, ranking, job.out, provenance=made, overwrite=overwrite)
    partial.discard()
    return ranking


def _fingerprint(inputs: dict[str, Any]) -> str:
    text = json.dumps([nestling.__version__, inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
