"""How well a model predicts text that it was not trained on, in stock transformers."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestling.evaluate.estimates import ratio_interval
from nestling.evaluate.likelihood import first_token, scores, windows
from nestling.evaluate.subject import open_subjects
from nestling.progress import progress

LOGITS = 2**25
"""Logits of a batch: 128 MiB in float32."""


def perplexity(
    directory: Path, documents: Sequence[Sequence[int]], window: int, title: str, device: str = "cpu"
) -> dict[str, Any]:
    """exp of the mean of -log p over all tokens, each scored once after at least half a window of its document.

    documents: token ids. The 95 % interval is that of the mean over documents.
    """
    (subject,) = open_subjects(directory, [], "transformers", device)
    start, began, parts = first_token(subject), time.monotonic(), []
    batch = max(LOGITS // (window * subject.vocabulary), 1)
    with progress(title, len(documents), "documents") as show:
        for ids in documents:
            passages = windows(ids, start, window, max(window // 2, 1))
            parts.append((-sum(score.total for score in scores(subject, passages, batch)), len(ids)))
            show(len(parts))
    totals, sizes = zip(*parts, strict=True)
    interval, mean = ratio_interval(totals, sizes), sum(totals) / sum(sizes)
    return {
        "task": "held-out text",
        "backend": "transformers",
        "perplexity": math.exp(mean),
        "interval": None if interval is None else [math.exp(end) for end in interval],
        "nll_per_token": mean,
        "documents": len(documents),
        "tokens": sum(sizes),
        "window": window,
        "tokens_per_second": sum(sizes) / (time.monotonic() - began),
    }
