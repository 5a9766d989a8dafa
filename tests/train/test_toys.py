"""Toys whose whole function sits in one place: a router that is trained by `distill` keeps it and cuts the rest.

Student and teacher are the same random model with parts of it silenced; the weights stand still, so that what the
router finds is the toy's own doing. The budget leaves room for what carries, and not for much else.
"""

from pathlib import Path

import pytest
import torch

import stock
from nestling.arch.architecture import Architecture
from nestling.arch.cost import parameters
from nestling.arch.search import SearchSpace
from nestling.arch.submodel import Submodel, complete
from nestling.arch.targets import Target
from nestling.data.batches import Batch, Stage
from nestling.model.nemotron_h import NemotronH
from nestling.train.checkpoints import Run
from nestling.train.elastic import Distillation, distill

TOY = Architecture(
    "M-*-",
    vocab_size=32,
    hidden_size=32,
    intermediate_size=64,
    n_groups=2,
    mamba_num_heads=8,
    mamba_head_dim=8,
    ssm_state_size=4,
    num_key_value_heads=2,
    num_attention_heads=8,
    head_dim=8,
)
CANDIDATES = {
    "hidden_size": [8, 16, 24],
    "intermediate_size": [8, 24, 40],
    "mamba_num_heads": [2, 4, 6],
    "num_attention_heads": [2, 4, 6],
}
STEPS = 60
HOW = Distillation(
    stages=(Stage(STEPS + 1, 8),),
    learning_rate=1e-9,
    warmup=0,
    decay=0.0,
    weight_decay=0.0,
    router_steps=STEPS,
    router_learning_rate=0.01,
    resource_weight=1.0,
    dead_zone=0.01,
    temperature=(1.0, 0.3),
    logit_scale=(1.0, 10.0),
)


def random_tokens(stage: int, step: int) -> Batch:
    ids = torch.randint(TOY.vocab_size, (8, 13), generator=torch.Generator().manual_seed(step))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(8, 12, dtype=torch.bool))


def silence(model: NemotronH, *names: str) -> NemotronH:
    """Set the tensors whose name ends like this to zero."""
    with torch.no_grad():
        for name, value in model.on_disk().items():
            if name.endswith(names):
                value.zero_()
    return model


def toy(seed: int, *silent: str, loud: float = 12.0) -> NemotronH:
    """A random model with some tensors at zero. Its logits are far apart, so that what is missing is missed."""
    model = stock.randomize(NemotronH(TOY), seed)
    with torch.no_grad():
        model.on_disk()["lm_head.weight"].mul_(loud)
    return silence(model, *silent)


def found(
    directory: Path,
    model: NemotronH,
    within: Submodel,
    seed: int,
    space: SearchSpace,
    ranked: tuple[int, ...] = (0, 1, 2, 3),
) -> Submodel:
    """What the router chooses for a budget of as many parameters as `within`."""
    targets = {"100%": Target("parameters", parameters(TOY)), "small": Target("parameters", parameters(TOY, within))}
    teacher = NemotronH(TOY)
    teacher.load_state_dict(model.state_dict())
    run = Run(directory / "s", "toy", "toy", every=999)
    trained = distill(model, teacher, random_tokens, HOW, targets, seed, run, space=space, ranked_layers=ranked)
    assert all(row["kl"]["small"] < 0.01 for row in trained.rows[-3:]), "not yet the teacher's function"
    return trained.family["small"]


MLPS, HEADS, MAMBA = "mixer.down_proj.weight", "mixer.o_proj.weight", "mixer.out_proj.weight"
CARRIES = {
    "mamba_num_heads": (MLPS, HEADS),
    "num_attention_heads": (MLPS, MAMBA),
    "intermediate_size": (HEADS, MAMBA),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("carries", CARRIES)
def test_the_axis_that_carries_is_kept_and_the_others_are_cut(tmp_path: Path, carries: str, seed: int) -> None:
    inner = {field: sizes for field, sizes in CANDIDATES.items() if field != "hidden_size"}
    least = {field: sizes[0] for field, sizes in inner.items() if field != carries}
    small = found(tmp_path, toy(seed, *CARRIES[carries]), Submodel(**least), seed, SearchSpace.of(TOY, inner))
    assert getattr(small, carries) >= 0.9 * getattr(TOY, carries)
    assert all(getattr(small, field) < 0.5 * getattr(TOY, field) for field in least)


@pytest.mark.parametrize("seed", range(3))
def test_hidden_channels_that_nothing_reads_are_cut(tmp_path: Path, seed: int) -> None:
    """Only the first quarter is read. The others repeat it, so that the norms are those of the quarter."""
    model = toy(seed)
    with torch.no_grad():
        for name, value in model.on_disk().items():
            if name.endswith("embeddings.weight"):
                value.copy_(value[:, :8].repeat(1, 4))
            elif name.endswith((MLPS, HEADS, MAMBA)):
                value.copy_(value[:8].repeat(4, 1))
            elif value.shape[-1] == 32 and value.dim() == 2:
                value[:, 8:] = 0
    small = found(
        tmp_path, model, Submodel(hidden_size=8), seed, SearchSpace.of(TOY, CANDIDATES | {"hidden_size": [8, 20]})
    )
    assert small == complete(TOY, Submodel(hidden_size=8))


@pytest.mark.parametrize("seed", range(3))
def test_layers_that_do_nothing_are_dropped_and_widths_are_kept(tmp_path: Path, seed: int) -> None:
    model = silence(toy(seed), f"layers.0.{MAMBA}", f"layers.3.{MLPS}")
    space = SearchSpace.of(TOY, CANDIDATES | {"layers": [2]})
    small = found(tmp_path, model, Submodel(layers=(1, 2)), seed, space, (2, 1, 0, 3))
    kept = ("layers", "hidden_size", "intermediate_size", "num_attention_heads")  # no Mamba layer is left
    assert {field: getattr(small, field) for field in kept} == dict(zip(kept, ((1, 2), 32, 64, 8), strict=True))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("carries", [1, 3])
def test_the_layer_that_carries_keeps_its_width(tmp_path: Path, carries: int, seed: int) -> None:
    """All function is in one MLP; sizes are chosen per layer, and the budget has room for one of the two."""
    other = 4 - carries
    model = silence(toy(seed, HEADS, MAMBA), f"layers.{other}.{MLPS}")
    space = SearchSpace.of(TOY, {"intermediate_size": CANDIDATES["intermediate_size"]}, per_layer=["intermediate_size"])
    sizes = (64, 8) if carries == 1 else (8, 64)
    small = found(tmp_path, model, Submodel(intermediate_size=sizes), seed, space)
    assert small == complete(TOY, Submodel(intermediate_size=sizes))
