"""What a run changes and how fast: optimizers by group of parameters, their state by name, and learning rates."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from nestling import ranks
from nestling.model.compiled import compile_blocks
from nestling.model.nemotron_h import NemotronH
from nestling.train.muon import Muon

BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How weights are moved, the same for a model from scratch and for a family."""

    learning_rate: float
    warmup: int  # steps
    decay: float  # of the schedule "wsd": share of the steps in which the rate falls
    weight_decay: float  # of the matrices inside blocks
    optimizer: str = "muon"  # of these matrices; or "adamw"
    schedule: str = "wsd"  # or "linear", "cosine"
    floor: float = 0.0  # share of the learning rate that is left in the end
    clip: float = 1.0  # largest norm of the gradient of a group of parameters
    precision: str = "fp32"  # or "bf16": what is computed; weights, gradients and optimizer stay in float32
    micro_batch: int | None = None  # rows whose activations exist at a time; None is all of them
    activation_checkpointing: bool = False  # keep the input of every block only, and compute the rest again
    compile: bool = False  # the blocks, by torch.compile; each new width costs seconds at its first step

    def prepare(self, *models: NemotronH) -> None:
        """Set the models up to be run as this says. The first is the one that is trained."""
        models[0].gradient_checkpointing = self.activation_checkpointing
        for model in models if self.compile else ():
            compile_blocks(model)

    def autocast(self, like: Tensor) -> torch.autocast:
        """The context in which models are run on the device of a tensor."""
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def rates(self, steps: int) -> "Schedule":
        return Schedule(steps, self.warmup, self.decay, self.schedule, self.floor)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a fall from 1 to `floor`, which is reached one step after the last.

    wsd: flat, and linear over the last `decay` of the steps · linear, cosine: from the end of the warm-up on.
    """

    steps: int
    warmup: int
    decay: float
    shape: str = "wsd"
    floor: float = 0.0

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step, 0 … 1."""
        falling = self.steps * self.decay if self.shape == "wsd" else self.steps - self.warmup
        left = min((self.steps - step) / max(falling, 1.0), 1.0)
        fall = (1 - math.cos(math.pi * left)) / 2 if self.shape == "cosine" else left
        return min((step + 1) / max(self.warmup, 1), self.floor + (1 - self.floor) * fall)


@dataclass
class Trainee:
    """What a run changes: named parameters in groups, each with its optimizer and base learning rate."""

    parameters: dict[str, nn.Parameter]
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)

    def add(
        self, group: str, optimizer: Callable[..., Optimizer], names: Iterable[str], rate: float, **options: Any
    ) -> None:
        self.names[group], self.rates[group] = list(names), rate
        self.optimizers[group] = optimizer([self.parameters[name] for name in self.names[group]], lr=rate, **options)

    def clip(self, norm: float) -> float:
        """Scale the gradients of each group to this norm at most; returns the norm of all of them before that."""
        groups = [[self.parameters[name] for name in names] for names in self.names.values()]
        return math.hypot(*(_clip(group, norm) for group in groups))

    def step(self, factors: Mapping[str, float]) -> None:
        """One optimizer step on the gradients at hand, which are gone afterwards. factors: of each group's rate."""
        for group, optimizer in self.optimizers.items():
            for settings in optimizer.param_groups:
                settings["lr"] = self.rates[group] * factors[group]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimizer state, flat, by name."""
        flat = {f"parameter/{name}": parameter.detach() for name, parameter in self.parameters.items()}
        for group, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                flat |= {f"{group}/{self.names[group][index]}/{key}": torch.as_tensor(v) for key, v in state.items()}
        return flat

    def like(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor to be filled with what `tensors` has by a name: cut up as its parameter is, if it is as large."""
        parameter = self.parameters[name.split("/")[1]]
        return torch.empty_like(parameter.detach()) if shape == tuple(parameter.shape) else torch.empty(shape)

    def restore(self, flat: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave. Whole tensors are cut up where the parameter is."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(ranks.shard_of(flat[f"parameter/{name}"], parameter))
        for group, optimizer in self.optimizers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for index, name in enumerate(self.names[group]):
                prefix, parameter = f"{group}/{name}/", self.parameters[name]
                state[index] = {
                    key.removeprefix(prefix): ranks.shard_of(v, parameter) if v.shape == parameter.shape else v
                    for key, v in flat.items()
                    if key.startswith(prefix)
                }
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {i: s for i, s in state.items() if s}})


def _clip(parameters: list[nn.Parameter], norm: float) -> float:
    """As nn.utils.clip_grad_norm_, with the norm over all ranks where gradients are sharded."""
    total = ranks.whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    nn.utils.clip_grads_with_norm_(parameters, norm, total)
    return float(total)


def model_trainee(
    parameters: dict[str, nn.Parameter], rate: float, weight_decay: float, optimizer: str = "muon"
) -> Trainee:
    """Muon or AdamW for the matrices inside blocks; AdamW without decay for embeddings, head, convolutions, vectors."""
    trainee = Trainee(parameters)
    matrices = [name for name, p in parameters.items() if p.ndim == 2 and ".layers." in name]
    rest = [name for name in parameters if name not in set(matrices)]
    if optimizer == "muon":
        trainee.add("muon", Muon, matrices, rate, weight_decay=weight_decay)
    else:
        trainee.add("adamw-matrices", AdamW, matrices, rate, weight_decay=weight_decay, betas=BETAS)
    trainee.add("adamw", AdamW, rest, rate, weight_decay=0.0, betas=BETAS)
    return trainee
