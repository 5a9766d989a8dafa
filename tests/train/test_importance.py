"""Importance finds what was planted, and equals what hooks on stock transformers measure."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import nestling
import stock
from nestling.arch.submodel import Architecture, Submodel
from nestling.errors import NestlingError
from nestling.model.nemotron_h import NemotronH
from nestling.train.depth import rank_layers
from nestling.train.importance import Method, rank, width_scores
from nestling.train.metrics import AXES
from nestling.train.partial import Partial
from nestling.weights.ranking import Ranking
from nestling.weights.transform import permute

HYBRID = Architecture(
    "M-*M*-",
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    n_groups=2,
    mamba_num_heads=8,
    mamba_head_dim=4,
    ssm_state_size=4,
    num_key_value_heads=2,
    num_attention_heads=8,
    head_dim=4,
    use_bias=True,
    mlp_bias=True,
)
LENGTHS = [(9, 5, 7), (12, 12), (3,)]


def texts() -> Iterator[Tensor]:
    """Rows of tokens without padding."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(29, (length,), generator=generator) for batch in LENGTHS for length in batch)


def calibration(padding: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The same rows in padded batches."""
    rows, batches = list(texts()), []
    for lengths in LENGTHS:
        chosen, rows = rows[: len(lengths)], rows[len(lengths) :]
        ids = torch.full((len(lengths), max(lengths)), padding)
        for row, text in zip(ids, chosen, strict=True):
            row[: len(text)] = text
        batches.append((ids, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]))
    return batches


def opened(directory: Path, dtype: torch.dtype | None = torch.float64) -> NemotronH:
    return nestling.load(directory, dtype=dtype).model


# ---- against hooks on stock transformers


def hooked(model: torch.nn.Module, run: Callable[[], Any]) -> dict[str, np.ndarray]:
    """Scores from the inputs and outputs of stock's own modules, by the paper's formulas."""
    sums: dict[str, Any] = {}

    def add(key: str, value: Tensor) -> None:
        sums[key] = sums.get(key, 0) + value.detach().numpy()

    def norm(module: Any, args: Any, out: Tensor) -> None:
        add("d", out.abs().sum((0, 1)))

    def into_down(layer: int) -> Callable:
        return lambda module, args: add(f"f.{layer}", args[0].abs().sum((0, 1)))

    def into_o(layer: int) -> Callable:  # 2 KV heads, 4 query heads each, 4 channels
        return lambda module, args: add(f"q.{layer}", args[0][0].view(-1, 2, 4, 4).pow(2).sum(-1).sqrt().sum(0))

    def out_of_in(layer: int) -> Callable:  # z is rows 0 … 31, x is rows 32 … 63: 2 groups of 4 heads of 4 channels
        return lambda module, args, out: add(f"x.{layer}", out[0, :, 32:64].abs().sum(0).view(2, 4, 4))

    handles = [model.model.norm_f.register_forward_hook(norm)]
    for index, block in enumerate(model.model.layers):
        handles.append(block.norm.register_forward_hook(norm))
        kind = HYBRID.hybrid_override_pattern[index]
        if kind == "M":
            handles.append(block.mixer.in_proj.register_forward_hook(out_of_in(index)))
        elif kind == "*":
            handles.append(block.mixer.o_proj.register_forward_pre_hook(into_o(index)))
        else:
            handles.append(block.mixer.down_proj.register_forward_pre_hook(into_down(index)))
    run()
    for handle in handles:
        handle.remove()
    for layer in (0, 3):
        s = sums.pop(f"x.{layer}")
        sums[f"h.{layer}"] = np.sqrt((s**2).sum(2))
        sums[f"p.{layer}"] = np.sqrt((s**2).sum((0, 1)))
    return sums


def test_width_scores_are_what_hooks_on_stock_modules_measure(tmp_path: Path) -> None:
    model = stock.float64(stock.save(HYBRID, tmp_path / "m"))
    wanted = hooked(model, lambda: [stock.logits(model, row[None]) for row in texts()])
    with torch.no_grad():
        found, _ = width_scores(opened(tmp_path / "m"), calibration(), Method(), Partial())
    assert found.keys() == wanted.keys()
    for key, score in wanted.items():
        assert found[key].shape == score.shape, key
        np.testing.assert_allclose(found[key], score, rtol=1e-9, err_msg=key)


def test_depth_scores_are_those_of_stock_models_with_one_layer_deleted(tmp_path: Path) -> None:
    model = stock.float64(stock.save(HYBRID, tmp_path / "m"))
    full = [stock.logits(model, row[None]) for row in texts()]
    wanted = []
    for layer in range(6):
        rest = Submodel(layers=tuple(other for other in range(6) if other != layer))
        pruned = stock.prune(model, stock.picks(HYBRID, rest))
        error = sum(
            (stock.logits(pruned, row[None]) - all_).pow(2).sum() for row, all_ in zip(texts(), full, strict=True)
        )
        wanted.append(float(error / sum(all_.pow(2).sum() for all_ in full)))
    with torch.no_grad():
        found = rank_layers(opened(tmp_path / "m"), calibration(), 1, Partial()).scores
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_padding_does_not_count(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    one, other = (rank(opened(tmp_path / "m"), calibration(padding)) for padding in (0, 17))
    for key, score in one.scores.items():
        np.testing.assert_allclose(score, other.scores[key], rtol=1e-12, err_msg=key)


def test_watching_changes_nothing(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    model, seen = opened(tmp_path / "m"), []
    ids = stock.tokens(29)
    watched = model(ids, watch=lambda layer, site, x: seen.append((layer, site, tuple(x.shape)))).logits
    assert torch.equal(watched, model(ids).logits)
    assert {site for _, site, _ in seen} == {"norm", "x", "up", "hidden", "heads"}
    assert (None, "norm", (2, 11, 16)) in seen


# ---- planted truths


def planted(directory: Path, seed: int, change: Callable[[dict[str, Tensor], np.random.Generator], Any]) -> Any:
    """A random model that was changed; returns its ranking and what the change says it planted."""
    model = stock.build(HYBRID, seed)
    named = {name.replace("model.", "", 1): parameter.data for name, parameter in model.named_parameters()}
    truth = change(named, np.random.default_rng(seed))
    model.save_pretrained(directory)
    return rank(opened(directory, None), calibration()), truth


def check(order: np.ndarray, dead: list[int], loud: list[int]) -> None:
    assert sorted(order.tolist()) == list(range(len(order)))
    assert set(order[-len(dead) :].tolist()) == set(dead)
    assert set(order[: len(loud)].tolist()) == set(loud)


@pytest.mark.parametrize("seed", range(3))
def test_ffn_neurons(tmp_path: Path, seed: int) -> None:
    def change(w: dict[str, Tensor], random: np.random.Generator) -> dict[int, Any]:
        truth = {}
        for layer in (1, 5):
            chosen = random.permutation(24)
            truth[layer] = dead, loud = chosen[:3].tolist(), chosen[3:6].tolist()
            w[f"layers.{layer}.mixer.up_proj.bias"].fill_(4.0)  # every neuron fires now and then
            for name in ("weight", "bias"):
                w[f"layers.{layer}.mixer.up_proj.{name}"][dead] = 0
                w[f"layers.{layer}.mixer.up_proj.{name}"][loud] *= 20
        return truth

    ranking, truth = planted(tmp_path, seed, change)
    for layer, (dead, loud) in truth.items():
        check(ranking.orders[f"f.{layer}"], dead, loud)


@pytest.mark.parametrize("seed", range(3))
def test_mamba_heads_inside_their_groups_and_channels(tmp_path: Path, seed: int) -> None:
    def change(w: dict[str, Tensor], random: np.random.Generator) -> dict[int, Any]:
        truth = {}
        for layer in (0, 3):
            heads = [random.permutation(4).tolist() for _ in range(2)]
            channels = random.permutation(4).tolist()
            truth[layer] = heads, channels
            for name in ("weight", "bias"):
                x = w[f"layers.{layer}.mixer.in_proj.{name}"][32:64].view(2, 4, 4, -1)
                x[:, :, channels[0]] *= 30
                for group, (loud, dead, *_) in enumerate(heads):
                    x[group, loud] *= 30 ** (group + 1)  # a loud group does not take another group's place
                    x[group, dead] = 0
                x[:, :, channels[1]] = 0
        return truth

    ranking, truth = planted(tmp_path, seed, change)
    for layer, (heads, (loud, dead, *_)) in truth.items():
        check(ranking.orders[f"p.{layer}"], [dead], [loud])
        assert ranking.orders[f"h.{layer}"].shape == (2, 4)
        for order, (loud_head, dead_head, *_) in zip(ranking.orders[f"h.{layer}"], heads, strict=True):
            check(order, [dead_head], [loud_head])


@pytest.mark.parametrize("seed", range(3))
def test_attention_heads_inside_their_groups(tmp_path: Path, seed: int) -> None:
    def change(w: dict[str, Tensor], random: np.random.Generator) -> list[tuple[int, ...]]:
        """A head with an even mean of all values, which cancel in it, against heads that take one value whole."""
        truth = []
        for layer, place, queries in ((2, -1, (100, 0)), (4, 0, (0, 100))):
            for group, head in enumerate(random.integers(4, size=2).tolist()):
                own = w[f"layers.{layer}.mixer.q_proj.weight"].view(2, 4, 4, -1)[group]
                own *= torch.tensor([queries[other == head] for other in range(4)]).view(4, 1, 1)
                truth.append((layer, place, group, head))
        return truth

    ranking, truth = planted(tmp_path, seed, change)
    for layer, place, group, head in truth:
        assert ranking.orders[f"q.{layer}"].shape == (2, 4)
        assert ranking.orders[f"q.{layer}"][group, place] == head
        assert sorted(ranking.orders[f"q.{layer}"][group].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(3))
def test_hidden_channels(tmp_path: Path, seed: int) -> None:
    def change(w: dict[str, Tensor], random: np.random.Generator) -> Any:
        chosen = random.permutation(16)
        dead, loud = chosen[:3].tolist(), chosen[3:6].tolist()
        for name in [*(f"layers.{layer}.norm.weight" for layer in range(6)), "norm_f.weight"]:
            w[name][dead] = 0
            w[name][loud] *= 20
        return dead, loud

    ranking, (dead, loud) = planted(tmp_path, seed, change)
    check(ranking.orders["d"], dead, loud)


@pytest.mark.parametrize("seed", range(3))
def test_layers(tmp_path: Path, seed: int) -> None:
    out = {"M": "out_proj", "*": "o_proj", "-": "down_proj"}

    def change(w: dict[str, Tensor], random: np.random.Generator) -> Any:
        dead, loud, *_ = random.permutation(6).tolist()
        for layer in range(6):
            factor = {dead: 0, loud: 3}.get(layer, 0.02)
            projection = f"layers.{layer}.mixer.{out[HYBRID.hybrid_override_pattern[layer]]}"
            for name in (f"{projection}.weight", f"{projection}.bias"):
                if name in w:
                    w[name] *= factor
        return dead, loud

    ranking, (dead, loud) = planted(tmp_path, seed, change)
    check(np.array(ranking.layers), [dead], [loud])
    assert ranking.scores["layers"][dead] == 0


def test_an_order_is_its_scores_descending(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    ranking = rank(opened(tmp_path / "m"), calibration())
    assert ranking.orders.keys() == {"d", "f.1", "f.5", "h.0", "h.3", "p.0", "p.3", "q.2", "q.4"}
    for key, order in ranking.orders.items():
        assert (np.diff(np.take_along_axis(ranking.scores[key], order, -1), axis=-1) <= 0).all(), key
    assert (np.diff(ranking.scores["layers"][list(ranking.layers)]) <= 0).all()


# ---- what a ranking is for


@pytest.mark.parametrize("seed", range(3))
def test_a_ranked_checkpoint_is_the_parents_function_in_stock_transformers(tmp_path: Path, seed: int) -> None:
    parent = stock.save(HYBRID, tmp_path / "parent", seed)
    ranking = rank(opened(tmp_path / "parent", None), calibration())
    permute(tmp_path / "parent", ranking, tmp_path / "elastic")
    ids = stock.tokens(29, 3, 12, seed)
    ranked = stock.load(tmp_path / "elastic")
    stock.assert_same(stock.logits(ranked, ids), stock.logits(parent, ids), 1e-5)
    moved = stock.tensors(tmp_path / "parent")["backbone.norm_f.weight"][ranking.orders["d"]]
    assert torch.equal(stock.tensors(tmp_path / "elastic")["backbone.norm_f.weight"], moved)
    again = rank(opened(tmp_path / "elastic", None), calibration())
    assert all((order == np.arange(order.shape[-1])).all() for order in again.orders.values())  # ranked: in order
    assert again.layers == ranking.layers


def test_the_model_of_one_layer_has_an_order_too(tmp_path: Path) -> None:
    model = stock.randomize(NemotronH(Architecture("-", vocab_size=29, hidden_size=8, intermediate_size=8)), 0)
    assert rank(model, calibration()).layers == (0,)


def test_without_data_or_with_a_broken_model_there_is_no_ranking(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    model = opened(tmp_path / "m")
    with pytest.raises(NestlingError, match="needs calibration data"):
        rank(model, [])
    model.on_disk()["backbone.layers.1.mixer.up_proj.weight"][4] = float("nan")
    with pytest.raises(NestlingError, match=r"the input of backbone.layers.1.mixer.down_proj is not finite"):
        rank(model, calibration())
    with pytest.raises(NestlingError, match=r"the output of backbone.layers.1.mixer.up_proj is not finite"):
        rank(model, calibration(), Method.of({"ffn": "pre"}))
    unseen = Method.of(dict.fromkeys(AXES, "random"))
    with pytest.raises(NestlingError, match="layer 0: the logits of the model without it are not finite"):
        rank(model, calibration(), unseen)


def test_a_ranking_needs_no_gradients(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    model = opened(tmp_path / "m").requires_grad_(True)
    assert isinstance(rank(model, calibration()), Ranking)
    assert all(parameter.grad is None for parameter in model.parameters())
