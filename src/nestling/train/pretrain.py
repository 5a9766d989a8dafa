"""Train a small parent from scratch, in stock format: the model a user would otherwise bring along."""

import math
from dataclasses import dataclass

import torch

from nestling import ranks
from nestling.arch.architecture import Architecture
from nestling.data.batches import Data, Stage
from nestling.model.nemotron_h import NemotronH
from nestling.train import distributed
from nestling.train.checkpoints import Metrics, Run
from nestling.train.chunked import predicted
from nestling.train.curriculum import stage_index
from nestling.train.distributed import HERE, Layout
from nestling.train.loop import train
from nestling.train.optimize import Optimization, model_trainee
from nestling.train.teaching import micro_batches
from nestling.train.watch import Watch


@dataclass(frozen=True)
class Pretraining(Optimization):
    """How a model is trained from scratch."""

    stages: tuple[Stage, ...]


def initialize(model: NemotronH, seed: int) -> NemotronH:
    """Random weights: normal matrices of variance 1 / fan-in, log-uniform dt, A = 1 … heads, unit norms and D."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.on_disk().items():
            leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
            if leaf in ("norm", "norm_f", "D"):
                parameter.fill_(1.0)
            elif leaf == "A_log":
                parameter.copy_(torch.arange(1, len(parameter) + 1).log())
            elif leaf == "dt_bias":
                dt = torch.rand(parameter.shape, generator=generator) * math.log(100) + math.log(0.001)
                parameter.copy_(dt.exp().expm1().log())  # softplus(dt_bias) is log-uniform in 0.001 … 0.1
            elif leaf == "conv1d":
                bound = parameter.shape[-1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
            elif parameter.ndim == 1:
                parameter.zero_()
            else:
                std = parameter.shape[-1] ** -0.5 if ".layers." in name else 0.02
                parameter.normal_(std=std, generator=generator)
    return model


def pretrain(
    architecture: Architecture,
    data: Data,
    how: Pretraining,
    seed: int,
    run: Run,
    watch: Watch | None = None,
    layout: Layout = HERE,
) -> tuple[NemotronH, list[Metrics]]:
    """Train on what counts in every batch; returns the model in eval mode and its metrics."""
    model = initialize(NemotronH(architecture), seed).train()

    def compute(step: int) -> Metrics:
        given = data(stage_index(how.stages, step), step)
        total = 0.0
        for pieces in micro_batches(given, how.micro_batch, layout.device):
            for part, share in pieces:
                with how.autocast(part.inputs_BL):
                    hidden_Nd = model.hidden(part.inputs_BL, documents_BL=part.documents_BL)[part.counted_BL]
                    loss = share * predicted(hidden_Nd, model.head_weight(), part.targets_BL[part.counted_BL])
                loss.backward()
                total += loss.item()
        return {"loss": ranks.summed({"loss": total})["loss"], "tokens": given.tokens}

    def look(step: int) -> Metrics:
        return watch.look(step, steps, model, {"100%": None}) if watch else {}

    how.prepare(model)
    distributed.spread(model, how, layout, trained=True)
    steps = sum(stage.steps for stage in how.stages)
    trainee = model_trainee(dict(model.on_disk()), how.learning_rate, how.weight_decay, how.optimizer)
    rows = train(run, trainee, how.rates(steps), compute, clip=how.clip, look=look)
    return model.eval(), rows
