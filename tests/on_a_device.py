"""What a model does on a device that is not the CPU (stand_in.py); run by test_device.py in a process of its own.

Results are those of the same model on the CPU. Every test fails where a tensor was made on the wrong device.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import stand_in
import talking
from nestling.arch.cost import parameters
from nestling.arch.search import SearchSpace
from nestling.arch.submodel import Submodel
from nestling.arch.targets import Target
from nestling.bench.table import run
from nestling.bench.turns import Bench
from nestling.data.batches import Batch, Stage
from nestling.evaluate.accuracy import stock
from nestling.evaluate.held_out import perplexity
from nestling.evaluate.subject import Sampling, open_subjects
from nestling.infer.family import View, load
from nestling.infer.generate import generate, left_padded
from nestling.infer.sampling import Row
from nestling.infer.sampling import Sampling as Sampled
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard, masked
from nestling.serve.scheduler import Request, Scheduler
from nestling.train.checkpoints import Run
from nestling.train.distributed import Layout
from nestling.train.elastic import Distillation, distill
from nestling.train.expected import block_costs, expected_cost
from nestling.train.importance import Method, rank
from nestling.train.objective import Objective
from nestling.train.optimize import model_trainee
from nestling.train.router import Router, soft
from nestling.train.teaching import student_loss, teach
from relaxation import HYBRID, ORDER, SPACE

CHIP = stand_in.register()
SMALL = Submodel((0, 1, 2, 4), hidden_size=10, intermediate_size=16, mamba_num_heads=4, num_attention_heads=4)
WIDE = {"hidden_size": range(8, 12), "intermediate_size": range(4, 20)}
SHARES = {"100%": 1.0, "90%": 0.9}
SHORT = Distillation(
    stages=(Stage(4, 4),),
    learning_rate=1e-3,
    warmup=0,
    decay=0.5,
    weight_decay=0.1,
    router_steps=2,
    router_learning_rate=0.01,
    resource_weight=1.0,
    dead_zone=0.01,
    temperature=(1.0, 0.05),
    logit_scale=(1.0, 10.0),
)
PROMPTS = [[1, 2, 3, 4], [5, 6, 7], [9] * 70]


@pytest.fixture(autouse=True)
def chip() -> Iterator[None]:
    with CHIP:
        yield


def model(seed: int = 0) -> NemotronH:
    """Random numbers everywhere; steps of the scan far above their floor."""
    made, generator = NemotronH(HYBRID), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return made


def ids() -> Tensor:
    return torch.randint(HYBRID.vocab_size, (2, 150), generator=torch.Generator().manual_seed(0))


def same(compute: Callable[[str], list[Tensor]], tolerance: float = 1e-4) -> None:
    """Both devices give the same, each on its own tensors."""
    for found, expected in zip(compute("chip"), compute("cpu"), strict=True):
        assert (found.device.type, expected.device.type) == ("chip", "cpu")
        torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)


def learnt(network: NemotronH, loss: Tensor) -> list[Tensor]:
    """The loss, and the gradients of the weights that got one."""
    loss.backward()
    return [loss.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("how", "dtype"), [("hard", torch.bfloat16), ("masked", torch.float32)])
def test_forward_and_backward(how: str, dtype: torch.dtype) -> None:
    def compute(device: str) -> list[Tensor]:
        network = model().to(device, dtype)
        widths = hard(HYBRID, SMALL) if how == "hard" else masked(HYBRID, SMALL, dtype, device)
        return learnt(network, network(ids().to(device), widths).logits.float().square().mean())

    same(compute, 1e-4 if dtype == torch.float32 else 5e-2)


def test_padding_and_packed_rows() -> None:
    def compute(device: str) -> list[Tensor]:
        network, numbers = model().to(device), torch.arange(150).expand(2, -1)
        real = (numbers >= torch.tensor([[0], [60]])).to(device)
        packed = network(ids().to(device), documents_BL=(numbers // 37).to(device)).logits
        return [network(ids().to(device), None, None, real.long()).logits[real], packed]

    same(compute)


def test_documents_longer_than_a_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestling.model.context.DENSE", 100)
    same(lambda device: [model().to(device)(ids().to(device), documents_BL=(ids() // 999).to(device)).logits])


@pytest.mark.parametrize("submodel", [Submodel(), SMALL], ids=["whole", "small"])
@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "top_k": 9, "n": 2}], ids=["greedy", "drawn"]
)
def test_prefill_and_decode(submodel: Submodel, sampling: dict) -> None:
    tokens = [generate(View(model().to(d), submodel), PROMPTS, max_tokens=5, **sampling) for d in ("chip", "cpu")]
    assert tokens[0] == tokens[1]


def test_a_step_of_a_family() -> None:
    """The teacher, a loss in chunks, soft widths from a router, its resource loss, and both optimizers."""

    def compute(device: str) -> list[Tensor]:
        student, teacher, router = model().to(device), model(1).to(device), Router(SPACE, 2, seeded()).to(device)
        given = ids().to(device)
        part = Batch(given[:, :-1], given[:, 1:], given[:, 1:] > 3, torch.tensor([149, 140]).to(device))
        pi = router(1, 1.0, 10.0, seeded())
        objective, loss = Objective(chunk=100, cross_entropy=0.5, hidden=0.1), given.new_zeros((), dtype=torch.float32)
        for piece, share in part.parts(1):
            taught = teach(teacher, piece, share)
            for widths in (soft(HYBRID, ORDER, SPACE, pi), hard(HYBRID, SMALL)):
                loss = loss + share * student_loss(student, widths, teacher, objective, taught)
        costs = block_costs(HYBRID, SPACE, Target("parameters", 1000))
        expected = expected_cost(HYBRID, ORDER, SPACE, costs, pi)
        trainee = model_trainee(student.on_disk(), 1e-3, 0.1)
        (loss + 1e-6 * expected).backward()
        trainee.clip(1.0)
        trainee.step({"muon": 1.0, "adamw": 1.0})
        weights = [p.detach() for p in student.parameters()]
        return [loss.detach(), expected.detach(), *weights, *(p.grad for p in router.parameters())]

    same(compute)
    assert {"nestling::scan_backward", "nestling::conv_backward"} <= CHIP.ran


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ["loss", "view", "budgets"])
def test_rows_of_the_speed_table(row: str) -> None:
    """Each checks its results before it times them. The others pass as well, and take longer."""
    found = list(run([row], Bench("chip", rounds=1, quick=True)))
    assert len(found) > 1
    assert all(figure.error is None or figure.error < 5e-2 for figure in found)


def test_what_mixes_devices_is_refused() -> None:
    """The stand-in itself."""
    here, there = torch.ones(3, device="chip"), torch.ones(3)
    with pytest.raises(AssertionError, match="mixes chip with the CPU"):
        here + there
    with pytest.raises(AssertionError, match="generator"):
        torch.rand(3, device="chip", generator=seeded())
    assert (here + 1)[torch.tensor([0, 2])].tolist() == [2, 2]


def test_what_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and answers, of rows that are padded; what goes in and comes out is on the CPU."""
    directory = talking.family(tmp_path)
    (here,) = open_subjects(directory, [])
    monkeypatch.setattr("nestling.model.device.find_device", lambda *asked: torch.device("chip"))
    (there,) = open_subjects(directory, [])
    ids, mask = left_padded([[5, 6, 7, 8, 9], [4, 5]])
    found = there.logits(ids, mask)
    assert found.device.type == "cpu"
    torch.testing.assert_close(found[mask.bool()], here.logits(ids, mask)[mask.bool()], rtol=1e-4, atol=1e-4)
    prompts, how = [[5, 6, 7], [8]], Sampling(max_tokens=4)
    assert there.continue_(prompts, how, [1, 2]) == here.continue_(prompts, how, [1, 2])


def test_what_judges_in_stock_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = talking.family(tmp_path)
    texts = {device: stock(directory, 4, device)(["1+2=", "30-4="]) for device in ("cpu", "chip")}
    assert texts["chip"] == texts["cpu"]
    documents = [[5, 6, 7, 8, 9, 4], [4, 5, 6]]
    here = perplexity(directory, documents, 4, "here", "cpu")["perplexity"]
    monkeypatch.setattr("nestling.model.device.find_device", lambda *asked: torch.device("chip"))
    assert perplexity(directory, documents, 4, "there", "cuda")["perplexity"] == pytest.approx(here, rel=1e-4)


def test_what_is_served(tmp_path: Path) -> None:
    """Several sizes at a time, short and long prompts, draws, log-probabilities, rows that come and go."""
    directory = talking.family(tmp_path)
    heard: dict[str, list] = {}
    for device in ("cpu", "chip"):
        family = load(directory, device=device)
        assert family["50%"].generate(["1+2=", "3"], max_tokens=3) == load(directory)["50%"].generate(
            ["1+2=", "3"], max_tokens=3
        )
        scheduler, asked = Scheduler(cache_bytes=2**24, chunk=16), []
        for place, (size, length) in enumerate([("100%", 3), ("50%", 40), ("100%", 5), ("50%", 2), ("50%", 7)]):
            row = Row([4 + place] * length, 3 + place, Sampled(0.5 * (place % 2)), seed=str(place))
            asked.append(Request(family[size].held(), row, top=2 if place == 0 else None))
            scheduler.submit(asked[-1])
            scheduler.step()
        while not scheduler.idle:
            scheduler.step()
        heard[device] = [request.row.tokens for request in asked]
    assert heard["chip"] == heard["cpu"]


@pytest.mark.parametrize("depth", ["iterative", "cosine"])
def test_a_ranking(depth: str) -> None:
    """Sums, reading weights, layers and heads left out; the batches are on the CPU."""
    generator = torch.Generator().manual_seed(7)
    batches = [(torch.randint(HYBRID.vocab_size, (3, 20), generator=generator), torch.ones(3, 20)) for _ in range(2)]
    batches[1][1][0, 12:] = 0
    chosen = {"attention_heads": "ablation", "ffn": "magnitude"}
    scores = {}
    for device in ("cpu", "chip"):
        found = rank(model().to(device), batches, Method.of(chosen, depth))
        scores[device] = found.scores
    assert scores["cpu"].keys() == scores["chip"].keys()
    for name, values in scores["cpu"].items():
        np.testing.assert_allclose(scores["chip"][name], values, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("offload", [False, True], ids=["here", "teacher away"])
def test_a_training(tmp_path: Path, offload: bool) -> None:
    """Soft steps, then hard ones, a checkpoint, and batches that are made on the CPU."""

    def data(stage: int, step: int) -> Batch:
        drawn = torch.randint(HYBRID.vocab_size, (4, 20), generator=torch.Generator().manual_seed(step))
        return Batch(drawn[:, :-1], drawn[:, 1:], drawn[:, 1:] > 3, torch.tensor([19, 12, 19, 8]))

    def compute(device: str) -> list[Tensor]:
        layout = Layout(torch.device(device), offload_teacher=offload)
        targets = {name: Target("parameters", int(parameters(HYBRID) * share)) for name, share in SHARES.items()}
        space, run = SearchSpace.of(HYBRID, WIDE), Run(tmp_path / device, "", device)
        student, teacher = model(), model(1)
        before = [weight.clone() for weight in teacher.parameters()]
        made = distill(student, teacher, data, SHORT, targets, 3, run, space=space, layout=layout)
        kept = [weight.detach().cpu() for weight in teacher.parameters()]
        assert all(torch.equal(one, other) for one, other in zip(before, kept, strict=True))
        assert offload == any(weight.device.type == "cpu" for weight in teacher.parameters()) or device == "cpu"
        losses = torch.tensor([row["loss"] for row in made.rows], device=device)
        return [losses, *(weight.detach() for weight in made.model.parameters())]

    same(compute, 1e-3)
