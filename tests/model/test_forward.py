"""Our forward against stock transformers' on the same checkpoint: whole sequences, padding, caches, the dt floor."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nestling
import stock
from nestling.arch.architecture import Architecture
from nestling.infer.family import View
from nestling.model.cache import Cache
from nestling.model.nemotron_h import NemotronH
from nestling.model.store import save_model
from strategies import architectures

Fresh = Callable[[], Path]

HYBRID = Architecture(
    "M-M*-*",
    vocab_size=31,
    hidden_size=24,
    intermediate_size=20,
    n_groups=2,
    mamba_num_heads=6,
    mamba_head_dim=4,
    ssm_state_size=5,
    conv_kernel=4,
    num_key_value_heads=2,
    num_attention_heads=6,
    head_dim=4,
)


def both(architecture: Architecture, directory: Path, seed: int = 0) -> tuple[View, torch.nn.Module]:
    """The same checkpoint in our model and in stock transformers, float64."""
    theirs = stock.save(architecture, directory, seed)
    return nestling.load(directory, dtype=torch.float64)["100%"], stock.float64(theirs)


@torch.no_grad()
def ours(view: View, ids: Tensor, pieces: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of a sequence that is fed to a cache piece by piece."""
    cache, parts = Cache(), []
    for piece, end in zip(ids.split(pieces, 1), ends(pieces), strict=True):
        parts.append(view(piece, cache=cache, attention_mask=None if mask is None else mask[:, :end]).logits)
    assert cache.length == ids.shape[1]
    return torch.cat(parts, 1)


@torch.no_grad()
def theirs(model: torch.nn.Module, ids: Tensor, pieces: list[int], mask: Tensor | None = None) -> Tensor:
    cache, parts = None, []
    for piece, end in zip(ids.split(pieces, 1), ends(pieces), strict=True):
        seen = torch.ones_like(ids[:, :end]) if mask is None else mask[:, :end]
        out = model(piece, past_key_values=cache, attention_mask=seen, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1)


def ends(pieces: list[int]) -> Iterator[int]:
    return (sum(pieces[: count + 1]) for count in range(len(pieces)))


# ---- without a cache


@given(architectures(), st.integers(0, 99), st.integers(1, 20))
def test_logits_are_stocks(fresh: Fresh, architecture: Architecture, seed: int, length: int) -> None:
    view, model = both(architecture, fresh(), seed)
    ids = stock.tokens(architecture.vocab_size, length=length, seed=seed)
    stock.assert_same(view(ids).logits, stock.logits(model, ids))


def test_logits_are_stocks_in_float32(tmp_path: Path) -> None:
    model = stock.save(HYBRID, tmp_path)
    ids = stock.tokens(31, length=40)
    stock.assert_same(nestling.load(tmp_path)["100%"](ids).logits, stock.logits(model, ids), 1e-5)


@pytest.mark.parametrize("pattern", ["M-M*-*", "ME*E"])
def test_bfloat16_is_as_close_to_the_truth_as_stock(fresh: Fresh, pattern: str) -> None:
    ids, ours, theirs = stock.tokens(31, length=40), 0.0, 0.0
    for seed in range(16):
        architecture = replace(HYBRID, hybrid_override_pattern=pattern, moe_intermediate_size=16)
        directory, model = fresh(), stock.build(architecture, seed).to(torch.bfloat16)
        model.save_pretrained(directory)
        exact = stock.logits(stock.float64(model), ids)
        with torch.no_grad():
            found = nestling.load(directory)["100%"](ids).logits
        assert found.dtype == torch.bfloat16
        ours += (found.double() - exact).norm().item()
        theirs += (stock.logits(model, ids).double() - exact).norm().item()
    assert 0 < ours < 1.1 * theirs


@given(architectures(), st.integers(0, 99), st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_left_padding_changes_nothing(fresh: Fresh, architecture: Architecture, seed: int, padding: list[int]) -> None:
    view, model = both(architecture, fresh(), seed)
    ids = stock.tokens(architecture.vocab_size, len(padding), 9, seed)
    mask = (torch.arange(9) >= torch.tensor(padding)[:, None]).long()
    found, expected = view(ids, attention_mask=mask).logits, stock.logits(model, ids, attention_mask=mask)
    for row, pad in enumerate(padding):
        stock.assert_same(found[row, pad:], expected[row, pad:], what="padded against stock")
        if not architecture.use_bias:  # stock's convolution sees that bias at padding, and so does ours
            stock.assert_same(found[row, pad:], view(ids[row : row + 1, pad:]).logits[0], what="padded against alone")


# ---- with a cache


@st.composite
def split(draw: st.DrawFn, length: int = 13) -> list[int]:
    """Ways to feed a sequence: prefill and decode, chunked prefill, anything between."""
    pieces = []
    while (left := length - sum(pieces)) > 0:
        pieces.append(draw(st.integers(1, min(left, 6))))
    return pieces


@given(architectures(needs="*"), st.integers(0, 99), split())
def test_cached_logits_are_stocks(fresh: Fresh, architecture: Architecture, seed: int, pieces: list[int]) -> None:
    view, model = both(architecture, fresh(), seed)
    ids = stock.tokens(architecture.vocab_size, 2, 13, seed)
    stock.assert_same(ours(view, ids, pieces), theirs(model, ids, pieces))


@given(architectures(), st.integers(0, 99), split())
def test_cached_is_uncached(fresh: Fresh, architecture: Architecture, seed: int, pieces: list[int]) -> None:
    view, _ = both(replace(architecture, time_step_min=1e-9), fresh(), seed)  # the floor differs by design, see below
    ids = stock.tokens(architecture.vocab_size, 2, 13, seed)
    stock.assert_same(ours(view, ids, pieces), view(ids).logits)


@given(architectures(needs="M*"), st.integers(0, 99), split(), st.integers(1, 6))
def test_padded_and_cached_is_stocks(
    fresh: Fresh, architecture: Architecture, seed: int, pieces: list[int], pad: int
) -> None:
    view, model = both(architecture, fresh(), seed)
    ids = stock.tokens(architecture.vocab_size, 2, 13, seed)
    mask = torch.ones_like(ids)
    pieces = [pad + pieces[0], *pieces[1:]]  # stock takes a piece of one token for a real one
    ids, mask = (torch.cat([t.new_full((2, pad), fill), t], 1) for t, fill in ((ids, 3), (mask, 1)))
    mask[0, :pad] = 0
    found, expected = ours(view, ids, pieces, mask), theirs(model, ids, pieces, mask)
    stock.assert_same(found[0, pad:], expected[0, pad:], what="padded row")
    stock.assert_same(found[1], expected[1], what="full row")


@pytest.mark.parametrize("seed", range(3))
def test_greedy_decoding_is_stocks(tmp_path: Path, seed: int) -> None:
    view, model = both(HYBRID, tmp_path, seed)
    ids = stock.tokens(31, 3, 5, seed)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    cache, step = Cache(), ids
    with torch.no_grad():
        for _ in range(12):
            step = view(step, cache=cache).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, step], 1)
    assert len(set(ids[:, 5:].flatten().tolist())) > 3  # not a constant
    assert ids.tolist() == expected.tolist()


# ---- the floor of dt: in stock's chunked path, not in its one-token path


def tiny_steps(directory: Path, model: torch.nn.Module, least: float) -> tuple[View, torch.nn.Module]:
    """A checkpoint whose dt is near 1e-5, far below a floor of `least`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.copy_(parameter - 12)
    model.config.time_step_min = least
    model.save_pretrained(directory)
    return nestling.load(directory, dtype=torch.float64)["100%"], stock.float64(model)


def test_dt_has_a_floor_in_the_chunked_path_only(fresh: Fresh) -> None:
    ids, one_by_one = stock.tokens(31, 2, 12), [4] + [1] * 8
    floored = tiny_steps(fresh(), stock.build(HYBRID), 0.1)
    free = tiny_steps(fresh(), stock.build(HYBRID), 1e-12)
    stock.assert_same(floored[0](ids).logits, stock.logits(floored[1], ids), what="chunked")
    mixed = ours(floored[0], ids, one_by_one)
    stock.assert_same(mixed, theirs(floored[1], ids, one_by_one), what="prefill and one by one")
    stock.assert_same(ours(free[0], ids, one_by_one), theirs(free[1], ids, one_by_one), what="no floor to speak of")
    # The two wrong forwards, floor everywhere and floor nowhere, are both far from that: the test above can fail.
    everywhere, nowhere = floored[0](ids).logits, ours(free[0], ids, one_by_one)
    for wrong in (everywhere, nowhere):
        with pytest.raises(stock.Differs) as caught:
            stock.assert_same(wrong[:, 4:], mixed[:, 4:])
        assert caught.value.difference > 1e-3


def test_one_first_token_has_the_floor(fresh: Fresh) -> None:
    view, model = tiny_steps(fresh(), stock.build(HYBRID), 0.1)
    ids, one_by_one = stock.tokens(31, 2, 3), [1, 1, 1]
    stock.assert_same(ours(view, ids, one_by_one), theirs(model, ids, one_by_one))


# ---- watching


@given(architectures(needs="M*-", max_layers=5), st.integers(0, 99))
@settings(max_examples=5)
def test_a_watcher_sees_what_stock_computes_and_changes_nothing(
    fresh: Fresh, architecture: Architecture, seed: int
) -> None:
    view, model = both(architecture, fresh(), seed)
    ids, seen = stock.tokens(architecture.vocab_size, seed=seed), {}
    expected: dict[tuple[int | None, str], Tensor] = {}

    def keep(layer: int | None, site: str, part: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            expected[layer, site] = given[0] if part == "in" else out

        return hook

    model.model.norm_f.register_forward_hook(keep(None, "norm", "out"))
    inner = architecture.mamba_num_heads * architecture.mamba_head_dim
    for layer, (kind, block) in enumerate(zip(architecture.hybrid_override_pattern, model.model.layers, strict=True)):
        block.norm.register_forward_hook(keep(layer, "norm", "out"))
        if kind == "M":
            block.mixer.in_proj.register_forward_hook(keep(layer, "x", "out"))
            block.mixer.out_proj.register_forward_hook(keep(layer, "gated", "in"))
        elif kind == "*":
            block.mixer.o_proj.register_forward_hook(keep(layer, "heads", "in"))
        elif kind == "-":
            block.mixer.up_proj.register_forward_hook(keep(layer, "up", "out"))
            block.mixer.down_proj.register_forward_hook(keep(layer, "hidden", "in"))
        else:
            block.mixer.shared_experts.down_proj.register_forward_hook(keep(layer, "shared", "in"))
            block.mixer.experts.register_forward_hook(partial(by_expert, expected, layer))
    stock.logits(model, ids)
    expected = {key: x[..., inner : 2 * inner] if key[1] == "x" else x for key, x in expected.items()}
    found = view.model(ids, watch=lambda layer, site, x: seen.__setitem__((layer, site), x.clone())).logits
    stock.assert_same(found, view(ids).logits)
    seen = {key: x.double() if key[1] == "chosen" else x for key, x in seen.items()}
    assert seen.keys() == expected.keys()
    for key, activation in seen.items():
        stock.assert_same(activation, expected[key], what=str(key))


def by_expert(
    expected: dict[tuple[int, str], Tensor], layer: int, module: torch.nn.Module, given: tuple[Tensor, ...], _: Tensor
) -> None:
    """What a mixture of experts shows, token by token, from what stock's experts are given."""
    x_Nd, chosen_Nk, weights_Nk = given
    count = module.num_experts
    chosen, routed = torch.zeros(len(x_Nd), count).double(), torch.full((len(x_Nd), count), -1.0).double()
    inside: dict[int, list[Tensor]] = {}
    for token, x in enumerate(x_Nd):
        for number, weight in zip(chosen_Nk[token].tolist(), weights_Nk[token], strict=True):
            hidden = (module.up_proj[number] @ x).relu().square()
            inside.setdefault(number, []).append(hidden)
            chosen[token, number] = 1
            routed[token, number] = weight * (module.down_proj[number] @ hidden).norm()
    rows = x_Nd.shape[0] // 11
    expected[layer, "chosen"], expected[layer, "routed"] = (each.view(rows, 11, count) for each in (chosen, routed))
    for number, hidden in inside.items():
        expected[layer, f"expert.{number}"] = torch.stack(hidden)


# ---- gradients, saving, refusals


@given(architectures(max_layers=4), st.integers(0, 99))
@settings(max_examples=10)
def test_gradients_are_stocks(fresh: Fresh, architecture: Architecture, seed: int) -> None:
    view, model = both(architecture, fresh(), seed)
    view.model.requires_grad_(True)
    ids = stock.tokens(architecture.vocab_size, seed=seed)
    weight = stock.logits(model, ids)  # any will do
    (view(ids).logits * weight).sum().backward()
    (model(ids, use_cache=False).logits * weight).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)  # under whose names the experts' are known
    theirs, found = stock.on_disk(model), view.model.on_disk()
    assert found.keys() == theirs.keys()
    for name, parameter in found.items():
        if parameter.grad is None:  # of an expert that nobody chose, and of what only decides who is chosen
            assert ".experts." in name or name.endswith("e_score_correction_bias")
            assert name.endswith("bias") or not theirs[name].any()
        elif theirs[name].abs().max() > 1e-12:
            stock.assert_same(parameter.grad, theirs[name], what=name)
        else:  # few neurons of few tokens may all be off; the one expert of a token always weighs 1
            assert "experts." in name or "gate" in name
            assert parameter.grad.abs().max() < 1e-12


def test_a_saved_model_is_read_back_by_stock(tmp_path: Path) -> None:
    model = NemotronH(HYBRID)
    stock.randomize(model, seed=3)
    save_model(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HYBRID.to_config({})))
    ids = stock.tokens(31)
    with torch.no_grad():
        stock.assert_same(model(ids).logits, stock.logits(stock.load(tmp_path), ids), 1e-5)


@given(architectures(needs="E"), st.integers(0, 99))
def test_a_correction_bias_is_never_rounded(fresh: Fresh, architecture: Architecture, seed: int) -> None:
    directory = fresh()
    stock.save(architecture, directory, seed)
    loaded = nestling.load(directory, dtype=torch.bfloat16).model.on_disk()
    (directory / "saved").mkdir()
    save_model(nestling.load(directory).model, directory / "saved", torch.bfloat16)
    saved = stock.tensors(directory / "saved")
    for name, stored in stock.tensors(directory).items():
        wanted = stored if name.endswith("e_score_correction_bias") else stored.bfloat16()
        for found in (loaded, saved):
            assert found[name].dtype == wanted.dtype
            assert torch.equal(found[name], wanted)
