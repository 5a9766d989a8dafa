"""Seeded mistakes: each keeps every shape, so that no loader objects, and each must be seen in logits or in counts.

What is under test here are the tests: `check` is what the rest of the suite asserts, on one model each, and a mistake
that passes it would pass the suite. A mistake is a row of the table written in another order, or an edit of the source
of one function.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nestling
import stock
from nestling.arch import cost, positions, submodel
from nestling.arch.architecture import Architecture
from nestling.arch.axes import Layout
from nestling.arch.nemotron_h import CACHES, TABLE
from nestling.arch.submodel import Submodel
from nestling.model import attention, block, experts, mamba2, nemotron_h, width
from nestling.weights import cut
from nestling.weights.ranking import Ranking
from nestling.weights.transform import permute
from strategies import ranking

HYBRID = Architecture(
    "M-M*-*",
    vocab_size=31,
    hidden_size=24,
    intermediate_size=20,
    n_groups=4,  # as many as head channels, or an order per group could not even be read in a wrong layout
    mamba_num_heads=12,
    mamba_head_dim=4,
    ssm_state_size=5,
    num_key_value_heads=4,
    num_attention_heads=12,
    head_dim=4,
    use_bias=True,
    mlp_bias=True,
)
EXPERTS = replace(
    HYBRID,
    hybrid_override_pattern="E*M",
    n_routed_experts=5,
    moe_intermediate_size=6,
    moe_shared_expert_intermediate_size=7,
    routed_scaling_factor=2.5,
)
SUBMODELS = (
    Submodel(hidden_size=16, intermediate_size=8, mamba_num_heads=8, mamba_head_dim=3, num_attention_heads=8),
    Submodel(layers=(0, 2, 3, 4), num_attention_heads=4),
)
FEWER = Submodel(
    hidden_size=16, n_routed_experts=3, moe_intermediate_size=4, moe_shared_expert_intermediate_size=5
)  # of experts
CUT = {HYBRID: SUBMODELS, EXPERTS: (FEWER,)}
RANKED = {architecture: ranking(architecture, 5, "dfhpqems") for architecture in CUT}


@dataclass(frozen=True)
class Oracle:
    """What stock transformers says of the parents: logits, counts, and logits of the best parts picked by hand."""

    directory: Path
    logits: dict[Architecture, torch.Tensor]
    best: dict[Architecture, torch.Tensor]
    counts: dict[Architecture, tuple[int, int, int]]


IDS = stock.tokens(31)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    directory, logits, counts, best = tmp_path_factory.mktemp("parents"), {}, {}, {}
    for architecture in (EXPERTS, HYBRID):
        model = stock.save(architecture, directory / architecture.hybrid_override_pattern[0], seed=1)
        logits[architecture] = stock.logits(stock.float64(model), IDS)
        counts[architecture] = count(model, architecture)
        picked = stock.picks(architecture, CUT[architecture][0], RANKED[architecture].orders)
        best[architecture] = stock.logits(stock.prune(stock.float64(model), picked), IDS)
    return Oracle(directory, logits, best, counts)


def count(model: torch.nn.Module, architecture: Architecture) -> tuple[int, int, int]:
    """Parameters, active parameters, and bytes of bf16 keys and values per token."""
    routed = [value.numel() for name, value in model.named_parameters() if ".experts." in name]
    idle = sum(routed) * (1 - architecture.num_experts_per_tok / architecture.n_routed_experts)
    with torch.no_grad():
        layers = model(IDS, use_cache=True).past_key_values.layers
    keys = sum(
        layer.keys.numel() + layer.values.numel() for layer in layers if getattr(layer, "keys", None) is not None
    )
    return stock.numel(model), round(stock.numel(model) - idle), 2 * keys // IDS.numel()


def check(oracle: Oracle, fresh: Callable[[], Path]) -> None:
    """Counts, permutation invariance, our forward, masked = viewed = sliced, ranked = picked. Raises `Differs`."""
    for architecture, expected in oracle.counts.items():
        found = cost.cost(architecture)
        ours = (cost.parameters(architecture), found.active_parameters, found.kv_bytes_per_token)
        for what, mine, theirs in zip(("parameters", "active", "KV bytes"), ours, expected, strict=True):
            if mine != theirs:
                raise stock.Differs(f"{what} of {architecture.hybrid_override_pattern}", abs(mine - theirs))
    directory = fresh()
    for architecture, expected in oracle.logits.items():
        letter = architecture.hybrid_override_pattern[0]
        permute(oracle.directory / letter, ranking(architecture, 4), directory / letter)
        permuted = stock.float64(stock.load(directory / letter))
        stock.assert_same(stock.logits(permuted, IDS), expected, what="permuted")
        family = nestling.load(oracle.directory / letter, dtype=torch.float64)
        stock.assert_same(family["100%"](IDS).logits, expected, what="whole")
        for number, spec in enumerate(CUT[architecture]):
            viewed = family[spec](IDS).logits
            masked = family.model(IDS, width.masked(architecture, spec, torch.float64)).logits
            stock.assert_same(masked, viewed, what="masked against viewed")
            nestling.slice(oracle.directory / letter, spec, directory / f"cut{letter}{number}")
            sliced = stock.float64(stock.load(directory / f"cut{letter}{number}"))
            stock.assert_same(stock.logits(sliced, IDS), viewed, what="sliced against viewed")
        permute(oracle.directory / letter, RANKED[architecture], directory / f"ranked{letter}")
        best = nestling.load(directory / f"ranked{letter}", dtype=torch.float64)[CUT[architecture][0]](IDS).logits
        stock.assert_same(best, oracle.best[architecture], what="ranked against picked by hand")


# ---- how a mistake is made

Apply = Callable[[pytest.MonkeyPatch], None]


def row(kind: str, name: str, layout: str) -> Apply:
    """A row of the table with its axes in another order."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        rows = {stored.name: stored for stored in TABLE[kind]}
        wrong = Layout.parse(layout)
        assert wrong != rows[name].layout
        assert wrong.shape(EXPERTS.sizes()) == rows[name].layout.shape(EXPERTS.sizes()), "the shape must stay"
        rows[name] = replace(rows[name], layout=wrong)
        patch.setitem(TABLE, kind, tuple(rows.values()))

    return apply


def flag(kind: str, name: str, **changed: Any) -> Apply:
    """A row of the table with another flag."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        rows = {stored.name: stored for stored in TABLE[kind]}
        rows[name] = replace(rows[name], **changed)
        patch.setitem(TABLE, kind, tuple(rows.values()))

    return apply


def edit(owner: Any, name: str, *changes: tuple[str, str]) -> Apply:
    """A function of a module, or a method of a class, with its source edited."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
        for old, new in changes:
            assert source.count(old) == 1, f"{name}: {old!r} is there {source.count(old)} times; follow the new source"
            source = source.replace(old, new)
        module = inspect.getmodule(owner)
        found: dict[str, Any] = {}
        exec(compile(source, f"<{name}, mutated>", "exec", flags=0, dont_inherit=True), module.__dict__, found)
        patch.setattr(owner, name, found[name])

    return apply


def cache_row(kind: str, name: str, layout: str) -> Apply:
    return lambda patch: patch.setitem(CACHES[kind], name, Layout.parse(layout))


def heads_across_groups(patch: pytest.MonkeyPatch) -> None:
    """A global prefix of heads, blind to the groups, wherever tensors are cut in files."""
    true = positions.segment_positions

    def wrong(segment: positions.Segment, sizes: positions.Sizes, keep: positions.Keep) -> Any:
        if segment[:2] not in (("g", "h"), ("G", "q")) or segment[1] not in keep:
            return true(segment, sizes, keep)
        heads = sizes[segment[0]] * keep[segment[1]].shape[-1]
        merged = {axis: kept for axis, kept in keep.items() if axis not in segment[:2]}
        every = sizes | {"head": sizes[segment[0]] * sizes[segment[1]]}
        return true(("head", *segment[2:]), every, merged | {"head": positions.np.arange(heads)})

    patch.setattr(positions, "segment_positions", wrong)


def views_across_groups(patch: pytest.MonkeyPatch) -> None:
    """The same, wherever weights are viewed."""
    true = width._prefix_segment

    def wrong(part: torch.Tensor, place: int, segment: tuple[str, ...], narrow: width.Width) -> torch.Tensor:
        if segment[:2] not in (("g", "h"), ("G", "q")):
            return true(part, place, segment, narrow)
        merged = [{"head": s[segment[0]] * s[segment[1]], **s} for s in (narrow.full, narrow.kept)]
        return true(part, place, ("head", *segment[2:]), width.Width(*merged))

    patch.setattr(width, "_prefix_segment", wrong)


M, E, BLOCK, MODEL = mamba2.Mamba2, experts.Experts, block.Block, nemotron_h.NemotronH
MASKED_SSM = 'width.mask(y_BLghp, "h", "p")'
WHOLE_WIDTH = "Width(width.full, width.full)"

MISTAKES: dict[str, Apply] = {
    # the table
    "in_proj: dt by head, then group": row("M", "mixer.in_proj.weight", "g h p + g h p + g n + g n + h g, d"),
    "in_proj: z by channel, then head": row("M", "mixer.in_proj.weight", "g p h + g h p + g n + g n + g h, d"),
    "in_proj: x by head, then group": row("M", "mixer.in_proj.weight", "g h p + h g p + g n + g n + g h, d"),
    "in_proj: B by state, then group": row("M", "mixer.in_proj.weight", "g h p + g h p + n g + g n + g h, d"),
    "in_proj: z B C x dt": row("M", "mixer.in_proj.weight", "g h p + g n + g n + g h p + g h, d"),
    "in_proj: dt first": row("M", "mixer.in_proj.weight", "g h + g h p + g h p + g n + g n, d"),
    "in_proj bias: z B C x dt": row("M", "mixer.in_proj.bias", "g h p + g n + g n + g h p + g h"),
    "conv: B C x": row("M", "mixer.conv1d.weight", "g n + g n + g h p, 1, k"),
    "conv: B x C": row("M", "mixer.conv1d.weight", "g n + g h p + g n, 1, k"),
    "conv bias: B C x": row("M", "mixer.conv1d.bias", "g n + g n + g h p"),
    "conv bias: C by state, then group": row("M", "mixer.conv1d.bias", "g h p + g n + n g"),
    "dt_bias by head, then group": row("M", "mixer.dt_bias", "h g"),
    "A_log by head, then group": row("M", "mixer.A_log", "h g"),
    "D by head, then group": row("M", "mixer.D", "h g"),
    "gated norm by head, then group": row("M", "mixer.norm.weight", "h g p"),
    "gated norm by channel, then head": row("M", "mixer.norm.weight", "g p h"),
    "out_proj by channel, then head": row("M", "mixer.out_proj.weight", "d, g p h"),
    "out_proj by head, then group": row("M", "mixer.out_proj.weight", "d, h g p"),
    "out_proj bias does not follow the hidden channels": row("M", "mixer.out_proj.bias", "24"),
    "q_proj by query, then key head": row("*", "mixer.q_proj.weight", "q G c, d"),
    "q_proj by channel, then query": row("*", "mixer.q_proj.weight", "G c q, d"),
    "k_proj by channel, then head": row("*", "mixer.k_proj.weight", "c G, d"),
    "v_proj by channel, then head": row("*", "mixer.v_proj.weight", "c G, d"),
    "o_proj by query, then key head": row("*", "mixer.o_proj.weight", "d, q G c"),
    "o_proj by channel, then query": row("*", "mixer.o_proj.weight", "d, G c q"),
    "block norm does not follow the hidden channels": row("-", "norm.weight", "24"),
    "final norm does not follow the hidden channels": row("model", "backbone.norm_f.weight", "24"),
    "lm_head does not follow the hidden channels": row("model", "lm_head.weight", "v, 24"),
    "up_proj bias does not follow the neurons": row("-", "mixer.up_proj.bias", "20"),
    "router does not follow the experts": row("E", "mixer.gate.weight", "5, d"),
    "correction bias does not follow the experts": row("E", "mixer.gate.e_score_correction_bias", "5"),
    # counts
    "correction bias counted": flag("E", "mixer.gate.e_score_correction_bias", buffer=False),
    "conv bias not counted": flag("M", "mixer.conv1d.bias", when=None, buffer=True),
    "all experts active": edit(cost, "block_active", ("_routed(row)", "False")),
    "keys cached per query head": cache_row("*", "key", "G q c"),
    # the algebra
    "heads ranked across groups": heads_across_groups,
    "heads viewed across groups": views_across_groups,
    "the first group's order in every group": edit(positions, "segment_positions", ("kept[outer]", "kept[0 * outer]")),
    "slices keep the last, not the first": edit(cut, "prefixes", ("[..., : kept[axis]]", "[..., -kept[axis] :]")),
    "segments not offset": edit(positions, "dim_positions", ("start + segment_positions", "segment_positions")),
    "the order of the first layer everywhere": edit(
        cut.Output, "positions", ("ranking.keep(tensor.layer, ", "ranking.keep(tensor.layer and 0, ")
    ),
    "experts stay where they are": edit(cut, "_source", ("tensor.expert is None or", "True or")),
    "neurons in the order of another expert": edit(Ranking, "keep", ('own["e"][expert] if "e" in own else', "")),
    "neurons in the order of the first expert": edit(
        Ranking, "keep", ('own["e"][expert] if "e" in own else expert', "0")
    ),
    # the forward
    "z and x swapped": edit(
        M,
        "_sequence",
        (
            "xBC = context.real(",
            "z, xBC = xBC[..., :inner], torch.cat([z, xBC[..., inner:]], -1); xBC = context.real(",
        ),
    ),
    "B and C swapped": edit(M, "_sequence", ("x, B, C = xBC", "x, C, B = xBC")),
    "convolved B C x": edit(
        M, "_sequence", ("x, B, C = xBC.split([inner, state, state]", "B, C, x = xBC.split([state, state, inner]")
    ),
    "B read by state, then group": edit(
        M, "_sequence", ("B.view(*shape, group, -1)", "B.view(*shape, -1, group).transpose(-1, -2)")
    ),
    "one gated norm over all groups": edit(
        M,
        "_sequence",
        ("y.unflatten(-1, (group, -1)), z.unflatten(-1, (group, -1))", "y[:, :, None], z[:, :, None]"),
        ('vectors["norm"]', 'vectors["norm"].view(1, -1)'),
        ('width.active("h", "p")', 'width.active("g", "h", "p")'),
    ),
    "gated norm: width forgotten": edit(M, "_sequence", ('width.active("h", "p")', "y_BLgi.shape[-1]")),
    "residual norm: width forgotten": edit(
        BLOCK, "forward", ('self.part("norm.weight", width), width', f'self.part("norm.weight", width), {WHOLE_WIDTH}')
    ),
    "final norm: width forgotten": edit(
        MODEL,
        "hidden",
        ("widths.ends), widths.ends, self.eps", "widths.ends), type(widths.ends)(*[widths.ends.full] * 2), self.eps"),
    ),
    "gated norm before the gate": edit(
        M,
        "_sequence",
        (", gate=z_BLgi", ""),
        ("normed_BLgi.flatten(2)", "normed_BLgi.flatten(2) * F.silu(z)"),
    ),
    "SSM mask after the gated norm": edit(
        M,
        "_sequence",
        (MASKED_SSM, "y_BLghp"),
        ("normed_BLgi.flatten(2)", 'width.mask(normed_BLgi.view_as(y_BLghp), "h", "p").flatten(2)'),
    ),
    "SSM mask dropped": edit(M, "_sequence", (MASKED_SSM, "y_BLghp")),
    "MLP mask dropped": edit(block.MLP, "mix", ('width.mask(hidden_BLf, "f")', "hidden_BLf")),
    "attention mask dropped": edit(attention.Attention, "mix", ('width.mask(heads_BLGqc, "q", "c")', "heads_BLGqc")),
    "attention mask on the wrong heads": edit(
        attention.Attention,
        "mix",
        ('width.mask(heads_BLGqc, "q", "c")', 'width.mask(heads_BLGqc.flip(3), "q", "c").flip(3)'),
    ),
    "the correction bias weighs": edit(E, "route", ("scores_Ne.gather(1", "wanted_Ne.gather(1")),
    "the correction bias decides nothing": edit(
        E, "route", (' + self.part("mixer.gate.e_score_correction_bias", width).detach()', "")
    ),
    "weights not normalized": edit(E, "route", ("/ (weights_Nk.sum(1, keepdim=True) + 1e-20)", "")),
    "weights not scaled": edit(E, "route", (" * self.architecture.routed_scaling_factor", "")),
    "dropped experts are chosen": edit(E, "route", ("wanted_Ne + mask_e.detach().log()", "wanted_Ne")),
    "weights in the order of tokens": edit(E, "_routed", ("weights_Nk.flatten()[order]", "weights_Nk.flatten()")),
    "expert mask dropped": edit(E, "_expert", ('width.mask(hidden_nm, "m")', "hidden_nm")),
    "shared expert mask dropped": edit(E, "mix", ('width.mask(hidden_BLs, "s")', "hidden_BLs")),
    "layer gate forgotten": edit(BLOCK, "forward", (", alpha=width.gate", "")),
    "embedding mask forgotten": edit(MODEL, "embed", ('widths.ends.mask(embedded, "d")', "embedded")),
    "hidden mask on the read, not on the write": edit(
        BLOCK,
        "forward",
        (
            'width.mask(self.mix(normed, width, context, cache), "d")',
            'self.mix(width.mask(normed, "d"), width, context, cache)',
        ),
    ),
    "masks keep the last, not the first": edit(width, "masked", ("< kept)", ">= width.full[axis] - kept)")),
}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Drop what was computed from the table before and after."""
    caches = (submodel.tensors, submodel.complete, width.hard, cut._unranked)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_without_a_mistake_all_agree(oracle: Oracle, fresh: Callable[[], Path]) -> None:
    check(oracle, fresh)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(
    oracle: Oracle, fresh: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    MISTAKES[mistake](monkeypatch)
    with torch.no_grad(), pytest.raises(stock.Differs) as caught:
        check(oracle, fresh)
    assert caught.value.difference > 1e-3, str(caught.value)
