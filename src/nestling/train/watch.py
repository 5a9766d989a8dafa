"""What every size is worth while it is trained: rows that are held out, predicted every so many steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from nestling.data.batches import Batch
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import Widths
from nestling.train.checkpoints import Metrics

ROWS = 125  # predicted at a time


@dataclass(frozen=True)
class Watch:
    """Held-out rows, how often they are looked at, and the sizes that are."""

    held_out: Batch
    every: int  # steps; and after the last one
    sizes: tuple[str, ...] = ("100%",)

    def look(self, step: int, steps: int, model: NemotronH, sizes: Mapping[str, Widths | None]) -> Metrics:
        """{"held_out": {size: `measure`}} after a step where that is due, else nothing."""
        if step % self.every and step != steps:
            return {}
        return {"held_out": {name: self.measure(model, widths) for name, widths in sizes.items()}}

    @cached_property
    def parts(self) -> list[Batch]:
        """Rows of like length together, each part cut to its longest."""
        order = self.held_out.real_BL.sum(1).argsort(stable=True)
        return [self.held_out.cut(int(self.held_out.real_BL[rows].sum(1).max()), rows) for rows in order.split(ROWS)]

    @torch.no_grad()
    def measure(self, model: NemotronH, widths: Widths | None) -> dict[str, float]:
        """Of a size: `exact`, `token` and `loss`, all with the right tokens before each (teacher-forced).

        exact: share of rows whose every counted token is the most probable one, which is when greedy decoding writes
        the row's solution out. token: share of counted tokens that are. loss: nats per counted token.
        """
        rows = right = counted = 0
        loss = 0.0
        device = next(model.parameters()).device
        for part in (each.to(device) for each in self.parts):
            logits_BLv = model(part.inputs_BL, widths, documents_BL=part.documents_BL).logits
            hit_BL = logits_BLv.argmax(-1) == part.targets_BL
            rows += int((hit_BL | ~part.counted_BL).all(1).sum())
            right += int(hit_BL[part.counted_BL].sum())
            counted += int(part.counted_BL.sum())
            log_p_Nv = torch.log_softmax(logits_BLv[part.counted_BL].float(), -1)
            loss -= float(log_p_Nv.gather(-1, part.targets_BL[part.counted_BL][:, None]).sum())
        total = sum(len(part.inputs_BL) for part in self.parts)
        return {"exact": round(rows / total, 6), "token": round(right / counted, 6), "loss": round(loss / counted, 6)}
