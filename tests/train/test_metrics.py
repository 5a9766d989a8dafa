"""Every metric equals its formula on what stock transformers' own modules see, and finds what was planted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stock
from calibrated import HYBRID, calibration, opened, texts
from nestling.errors import NestlingError
from nestling.train import metrics
from nestling.train.importance import DEFAULTS, Method, rank, width_scores
from nestling.train.metrics import ABLATED, AXES, DATA_FREE, METRICS, parse
from nestling.train.partial import Partial
from nestling.weights.ranking import Ranking

NAMES = sorted({name for named in METRICS.values() for name in named})
READERS = {"M": ["in_proj"], "*": ["q_proj", "k_proj", "v_proj"], "-": ["up_proj"]}
WRITERS = {"M": "out_proj", "*": "o_proj", "-": "down_proj"}


def method(metric: str) -> Method:
    """This metric on every axis that has it."""
    has = [axis for axis in METRICS if metric in (*METRICS[axis], *DATA_FREE, *(["ablation"] * (axis in ABLATED)))]
    return Method(tuple((axis, metric) for axis in has), depth="cosine")


# ---- against hooks on stock transformers


def recorded(model: torch.nn.Module) -> dict[str, list[np.ndarray]]:
    """What goes into and comes out of stock's own modules, one array [L, channels] per text."""
    seen: dict[str, list[np.ndarray]] = {}

    def keep(name: str, value: Tensor) -> None:
        seen.setdefault(name, []).append(value[0].numpy())

    def watch(module: torch.nn.Module, name: str) -> list[Any]:
        return [
            module.register_forward_pre_hook(lambda module, args: keep(f"into {name}", args[0])),
            module.register_forward_hook(lambda module, args, out: keep(f"out of {name}", out)),
        ]

    handles = watch(model.lm_head, "lm_head")
    for layer, block in enumerate(model.model.layers):
        for name, module in block.mixer.named_children():
            handles += watch(module, f"{name} {layer}") if isinstance(module, torch.nn.Linear) else []
    for row in texts():
        stock.logits(model, row[None])
    for handle in handles:
        handle.remove()
    return seen


SUMS: dict[str, Callable[[list[np.ndarray]], np.ndarray]] = {
    "sum": lambda rows: sum(np.abs(row).sum(0) for row in rows),
    "signed": lambda rows: np.abs(sum(row.sum(0) for row in rows)),
    "l2": lambda rows: np.sqrt(sum(np.abs(row).mean(0) ** 2 for row in rows)),
}
SUMS |= {"post": SUMS["sum"], "pre": SUMS["sum"], "post-l2": SUMS["l2"], "pre-l2": SUMS["l2"]}


def share(rows: list[np.ndarray], weights: list[Tensor]) -> np.ndarray:
    """Per channel, the energy it alone adds to the outputs of some matrices, over that of all channels."""
    added = [np.einsum("lc,oc->loc", row, w.detach().numpy()) ** 2 for row in rows for w in weights]
    energy = sum(part.sum((0, 1)) for part in added)
    return energy / energy.sum()


def expected(model: torch.nn.Module, metric: str) -> dict[str, np.ndarray]:
    """Scores by one metric of the axes that have it, written out from the formulas."""
    seen, found, hidden = recorded(model), {}, []
    total = SUMS.get(metric)
    for layer, kind in enumerate(HYBRID.hybrid_override_pattern):
        mixer, written = model.model.layers[layer].mixer, seen[f"into {WRITERS[kind]} {layer}"]
        adds = share(written, [getattr(mixer, WRITERS[kind]).weight])
        read = seen[f"into {READERS[kind][0]} {layer}"]
        hidden.append(total(read) if total else share(read, [getattr(mixer, n).weight for n in READERS[kind]]) ** 0.5)
        if kind == "-":
            own = seen[f"out of up_proj {layer}"] if metric.startswith("pre") else written
            found[f"f.{layer}"] = total(own) if total else adds**0.5
        elif kind == "*" and metric == "sum":
            found[f"q.{layer}"] = sum(np.linalg.norm(row.reshape(-1, 2, 4, 4), axis=-1).sum(0) for row in written)
        elif kind == "*":
            own = total(written) if total else adds**0.5
            found[f"q.{layer}"] = np.linalg.norm(own.reshape(2, 4, 4), axis=-1)
        else:  # in_proj's rows: z is 0 … 31, x is 32 … 63, of 2 groups of 4 heads of 4 channels
            own = total([row[:, 32:64] for row in seen[f"out of in_proj {layer}"]]) if total else adds**0.5
            found[f"h.{layer}"] = np.linalg.norm(own.reshape(2, 4, 4), axis=-1)
            found[f"p.{layer}"] = np.linalg.norm(own.reshape(8, 4), axis=0)
    last = seen["into lm_head"]
    found["d"] = sum(hidden) + (total(last) if total else share(last, [model.lm_head.weight]) ** 0.5)
    return {key: score for key, score in found.items() if metric in METRICS[key[0]]}


@pytest.mark.parametrize("metric", NAMES)
def test_scores_are_what_hooks_on_stock_modules_measure(
    tmp_path: Path, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = expected(stock.float64(stock.save(HYBRID, tmp_path / "m")), metric)
    monkeypatch.setattr(metrics, "PIECE", 70)  # several pieces along samples and tokens
    with torch.no_grad():
        found, _ = width_scores(opened(tmp_path / "m"), calibration(), method(metric), Partial())
    assert wanted.keys() <= found.keys() == {"d", "f.1", "f.5", "h.0", "h.3", "p.0", "p.3", "q.2", "q.4"}
    for key, score in wanted.items():
        np.testing.assert_allclose(found[key], score, rtol=1e-9, err_msg=key)


def test_the_halves_are_the_scores_of_every_other_batch(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    model, batches = opened(tmp_path / "m"), calibration()
    with torch.no_grad():
        _, halves = width_scores(model, batches, Method(), Partial())
        for half, own in enumerate((batches[::2], batches[1::2])):
            alone, _ = width_scores(model, own, Method(), Partial())
            for key, score in alone.items():
                np.testing.assert_allclose(halves[key][half], score, rtol=1e-12, err_msg=key)


def test_magnitude_is_the_norm_of_everything_stored_for_a_position(tmp_path: Path) -> None:
    model = stock.save(HYBRID, tmp_path / "m")
    with torch.no_grad():
        found, halves = width_scores(opened(tmp_path / "m"), [], method("magnitude"), Partial())
    assert halves == {}
    squares = {n.removeprefix("model."): p.detach().double().numpy() ** 2 for n, p in model.named_parameters()}
    of = {name.removeprefix("layers.3.mixer."): value for name, value in squares.items() if "layers.3." in name}
    inner = of["in_proj.weight"][:64].sum(1).reshape(2, 32).sum(0) + of["in_proj.bias"][:64].reshape(2, 32).sum(0)
    inner += of["conv1d.weight"][:32].sum((1, 2)) + of["conv1d.bias"][:32] + of["norm.weight"]
    inner = (inner + of["out_proj.weight"].sum(0)).reshape(2, 4, 4)
    heads = of["in_proj.weight"][-8:].sum(1) + of["in_proj.bias"][-8:] + of["A_log"] + of["D"] + of["dt_bias"]
    np.testing.assert_allclose(found["h.3"] ** 2, inner.sum(2) + heads.reshape(2, 4), rtol=1e-6)
    np.testing.assert_allclose(found["p.3"] ** 2, inner.sum((0, 1)), rtol=1e-6)
    mlp = squares["layers.1.mixer.up_proj.weight"].sum(1) + squares["layers.1.mixer.up_proj.bias"]
    np.testing.assert_allclose(found["f.1"] ** 2, mlp + squares["layers.1.mixer.down_proj.weight"].sum(0), rtol=1e-6)
    query, output = (squares[f"layers.2.mixer.{name}_proj.weight"] for name in "qo")
    np.testing.assert_allclose(found["q.2"] ** 2, (query.sum(1) + output.sum(0)).reshape(2, 4, 4).sum(2), rtol=1e-6)
    hidden = sum(value.reshape(-1, 16).sum(0) for name, value in squares.items() if value.shape[-1] == 16)
    for layer, kind in enumerate(HYBRID.hybrid_override_pattern):
        hidden = hidden + squares[f"layers.{layer}.mixer.{WRITERS[kind]}.weight"].sum(1)
    np.testing.assert_allclose(found["d"] ** 2, hidden, rtol=1e-6)


def test_random_is_a_function_of_the_seed_alone(tmp_path: Path) -> None:
    stock.save(HYBRID, tmp_path / "m")
    model, everywhere = opened(tmp_path / "m", None), dict.fromkeys(AXES, "random")

    def drawn(seed: int) -> Ranking:
        return rank(model, calibration(), Method.of(everywhere, "cosine", seed=seed))

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all((first.orders[key] == again.orders[key]).all() for key in first.orders)
    assert any((first.orders[key] != other.orders[key]).any() for key in first.orders)
    assert (first.orders["f.1"] != first.orders["f.5"]).any()
    assert list(first.stability) == ["layers"]  # nothing else looked at the data


# ---- planted truths


def planted(
    directory: Path, seed: int, metric: str, change: Callable[[dict[str, Tensor], np.random.Generator], Any]
) -> Any:
    """A random model that was changed; returns its ranking by a metric and what the change says it planted."""
    model = stock.build(HYBRID, seed)
    named = {name.replace("model.", "", 1): parameter.data for name, parameter in model.named_parameters()}
    truth = change(named, np.random.default_rng(seed))
    model.save_pretrained(directory)
    return rank(opened(directory, None), calibration(), method(metric)), truth


def check(order: np.ndarray, dead: list[int], loud: list[int]) -> None:
    assert sorted(order.tolist()) == list(range(len(order)))
    assert set(order[-len(dead) :].tolist()) == set(dead)
    assert set(order[: len(loud)].tolist()) == set(loud)


def cases(axis: str, *more: str) -> Any:
    return pytest.mark.parametrize("metric", [*METRICS[axis], "magnitude", *more])


@cases("f")
def test_ffn_neurons(tmp_path: Path, metric: str) -> None:
    def change(w: dict[str, Tensor], random: np.random.Generator) -> dict[int, Any]:
        truth = {}
        for layer in (1, 5):
            chosen = random.permutation(24)
            truth[layer] = dead, loud = chosen[:3].tolist(), chosen[3:6].tolist()
            w[f"layers.{layer}.mixer.up_proj.bias"].fill_(4.0)  # every neuron fires now and then
            w[f"layers.{layer}.mixer.down_proj.weight"][:, dead] = 0
            for name in ("weight", "bias"):
                w[f"layers.{layer}.mixer.up_proj.{name}"][dead] = 0
                w[f"layers.{layer}.mixer.up_proj.{name}"][loud] *= 20
        return truth

    ranking, truth = planted(tmp_path, 0, metric, change)
    for layer, (dead, loud) in truth.items():
        check(ranking.orders[f"f.{layer}"], dead, loud)


def plant_heads_and_channels(w: dict[str, Tensor], random: np.random.Generator) -> dict[int, Any]:
    """Per layer and group a loud and a dead head, and per layer a loud and a dead channel, in x and all that is its."""
    truth = {}
    for layer in (0, 3):
        heads, channels = [random.permutation(4).tolist() for _ in range(2)], random.permutation(4).tolist()
        truth[layer] = heads, channels
        own = {name.split("mixer.")[-1]: value for name, value in w.items() if f"layers.{layer}." in name}
        own["conv1d.weight"][:32].abs_()
        x = [own["in_proj.weight"][32:64], own["in_proj.bias"][32:64, None], own["out_proj.weight"].T]
        own["in_proj.bias"][32:64] += 2  # so that the sums with signs have something to see
        every = [*x, own["in_proj.weight"][:32], own["in_proj.bias"][:32, None], own["conv1d.weight"][:32, 0],
                 own["conv1d.bias"][:32, None], own["norm.weight"][:, None]]  # fmt: skip
        for part in every:
            blocks = part.view(2, 4, 4, -1) if part.is_contiguous() else part.unflatten(0, (2, 4, 4))
            blocks[:, :, channels[1]] = 0
            for group, (loud, dead, *_) in enumerate(heads):
                blocks[group, dead] = 0
                if any(part is one for one in x):
                    blocks[group, loud] *= 10 ** (group + 1)  # a loud group does not take another group's place
        for part in x:
            part.unflatten(0, (2, 4, 4))[:, :, channels[0]].mul_(10)
        for name in ("A_log", "D", "dt_bias"):
            own[name].mul_(0.1)
    return truth


def found_heads(ranking: Ranking, truth: dict[int, Any]) -> None:
    for layer, (heads, _) in truth.items():
        assert ranking.orders[f"h.{layer}"].shape == (2, 4)
        for order, (loud, dead, *_) in zip(ranking.orders[f"h.{layer}"], heads, strict=True):
            check(order, [dead], [loud])


@cases("h")
def test_mamba_heads_inside_their_groups_and_channels(tmp_path: Path, metric: str) -> None:
    ranking, truth = planted(tmp_path, 1, metric, plant_heads_and_channels)
    found_heads(ranking, truth)
    for layer, (_, (loud, dead, *_)) in truth.items():
        check(ranking.orders[f"p.{layer}"], [dead], [loud])


@cases("h")
def test_heads_ranked_without_their_groups_are_not_found(tmp_path: Path, metric: str) -> None:
    ranking, truth = planted(tmp_path, 1, metric, plant_heads_and_channels)
    over_all = {key: np.argsort(-ranking.scores[key], axis=None) for key in ("h.0", "h.3")}
    pooled = {key: order.reshape(2, 4) % 4 for key, order in over_all.items()}
    with pytest.raises(AssertionError):
        found_heads(Ranking({**ranking.orders, **pooled}, ranking.layers), truth)


@cases("q", "ablation")
def test_attention_heads_inside_their_groups(tmp_path: Path, metric: str) -> None:
    def change(w: dict[str, Tensor], random: np.random.Generator) -> list[tuple[int, ...]]:
        """A head with an even mean of all values, which cancel in it, against heads that take one value whole."""
        truth = []
        for layer, place, queries, output in ((2, -1, (100, 0), 0.1), (4, 0, (0, 100), 3)):
            for group, head in enumerate(random.integers(4, size=2).tolist()):
                own = w[f"layers.{layer}.mixer.q_proj.weight"].view(2, 4, 4, -1)[group]
                own *= torch.tensor([queries[other == head] for other in range(4)]).view(4, 1, 1)
                w[f"layers.{layer}.mixer.o_proj.weight"].view(-1, 2, 4, 4)[:, group, head] *= output
                truth.append((layer, place, group, head))
        return truth

    ranking, truth = planted(tmp_path, 0, metric, change)
    for layer, place, group, head in truth:
        assert ranking.orders[f"q.{layer}"].shape == (2, 4)
        assert ranking.orders[f"q.{layer}"][group, place] == head
        assert sorted(ranking.orders[f"q.{layer}"][group].tolist()) == [0, 1, 2, 3]


@cases("d")
def test_hidden_channels(tmp_path: Path, metric: str) -> None:
    def change(w: dict[str, Tensor], random: np.random.Generator) -> Any:
        chosen = random.permutation(16)
        dead, loud = chosen[:3].tolist(), chosen[3:6].tolist()
        for name, value in w.items():
            if 16 in (value.shape[0], value.shape[-1]):
                value.index_fill_(-1 if value.shape[-1] == 16 else 0, torch.tensor(dead), 0)
            if (name.endswith("norm.weight") and len(value) == 16) or name in ("norm_f.weight", "lm_head.weight"):
                value[..., loud] *= 20
        return dead, loud

    ranking, (dead, loud) = planted(tmp_path, 3, metric, change)
    check(ranking.orders["d"], dead, loud)


# ---- names


@pytest.mark.parametrize(
    ("axis", "metric", "words"),
    [
        ("hiden", "sum", "unknown axis 'hiden'; did you mean 'hidden'?"),
        ("ffn", "prae", "unknown metric 'prae' of axis ffn; did you mean 'pre'?"),
        ("hidden", "signed", "unknown metric 'signed' of axis hidden"),
        ("n_groups", "sum", "axis 'n_groups' is fixed and cannot be ranked: the heads of a group share"),
        ("G", "sum", "axis 'G' is fixed and cannot be ranked: KV heads define the cache"),
        ("experts", "contribution", "unknown metric 'contribution' of axis experts; allowed: reap, magnitude, random"),
    ],
)
def test_names_that_are_not_there_and_axes_that_are_fixed_are_refused(axis: str, metric: str, words: str) -> None:
    with pytest.raises(NestlingError) as caught:
        parse(axis, metric)
    assert words in str(caught.value)


def test_every_fixed_axis_has_its_reason_and_every_ranked_one_its_names() -> None:
    for axis in "gnGckv":
        with pytest.raises(NestlingError, match=f"axis '{axis}' is fixed and cannot be ranked: .{{20}}"):
            parse(axis, "sum")
    assert parse("intermediate_size", "pre") == parse("ffn", "pre") == parse("f", "pre") == ("f", "pre")
    assert set(AXES.values()) == set(METRICS) == set(DEFAULTS) == set("dfhpqems")
    with pytest.raises(NestlingError, match="unknown depth method 'itertive'; did you mean 'iterative'"):
        Method.of({}, "itertive")
