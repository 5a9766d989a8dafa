"""Between the choices the soft forward is its equation, and no mistake in it goes unseen."""

import pytest
import torch

import stock
from nestling.arch.search import SearchSpace
from nestling.model import attention, block, mamba2, nemotron_h, width
from nestling.model.nemotron_h import NemotronH
from nestling.model.width import hard
from nestling.train import router
from relaxation import HYBRID, ORDER, OWN, SPACE, oracle, random_pi
from test_mutations import Apply, edit


def difference(seed: int, space: SearchSpace = SPACE) -> float:
    """Between the soft forward and its equation, over the largest logit."""
    model = stock.randomize(NemotronH(HYBRID), seed).double().requires_grad_(False)
    pi, ids = random_pi(space, seed), stock.tokens(13, seed=seed)
    relaxed = model(ids, router.soft(HYBRID, ORDER, space, pi)).logits
    wanted = oracle(model.on_disk(), pi, ids, space)
    assert (wanted - model(ids, hard(HYBRID)).logits).abs().max() > 1e-2  # not one of its ends
    return float((relaxed - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("space", [SPACE, OWN], ids=["one size", "sizes per layer"])
@pytest.mark.parametrize("seed", range(5))
def test_between_the_choices_the_forward_is_its_equation(seed: int, space: SearchSpace) -> None:
    assert difference(seed, space) < 1e-11


def test_layers_that_share_a_size_are_told_from_layers_with_their_own() -> None:
    assert len(SPACE.axes) == 6
    assert len(OWN.axes) == 3 + 2 + 1 + 2
    made = router.Router(OWN, 2, torch.Generator().manual_seed(0))
    assert set(made(1, 1.0, 1.0)) == {*OWN.axes}
    masks = dict(router.soft(HYBRID, ORDER, OWN, random_pi(OWN)).layers)
    for axis, (one, other) in {"f": (1, 3), "h": (0, 4)}.items():
        assert not torch.equal(masks[one].masks[axis], masks[other].masks[axis])


M, BLOCK, MODEL, MLP, ATTENTION = (
    mamba2.Mamba2,
    block.Block,
    nemotron_h.NemotronH,
    block.MLP,
    attention.Attention,
)
WHOLE = "Width(width.full, width.full)"
SSM, HEADS = 'width.mask(y_BLghp, "h", "p")', 'width.mask(heads_BLGqc, "q", "c")'
READ = 'normed = rms_norm(x_BLd, self.part("norm.weight", width), width, self.architecture.layer_norm_epsilon)'
GATED = "written * width.gate"
COUNTED = "self.masks[axis].sum() if axis in self.masks"

MISTAKES: dict[str, Apply] = {
    # the norms' active width
    "active width: the whole": edit(width.Width, "active", (COUNTED, "len(self.masks[axis]) if axis in self.masks")),
    "active width: what is not quite zero": edit(
        width.Width, "active", (COUNTED, "(self.masks[axis] > 0).sum() if axis in self.masks")
    ),
    "active width: rounded": edit(
        width.Width, "active", (COUNTED, "self.masks[axis].sum().round() if axis in self.masks")
    ),
    "active width: the sum of squares": edit(
        width.Width, "active", (COUNTED, "self.masks[axis].square().sum() if axis in self.masks")
    ),
    "residual norm: the whole width": edit(
        BLOCK, "forward", ('"norm.weight", width), width', f'"norm.weight", width), {WHOLE}')
    ),
    "final norm: the whole width": edit(
        MODEL,
        "hidden",
        ("widths.ends), widths.ends, self.eps", "widths.ends), type(widths.ends)(*[widths.ends.full] * 2), self.eps"),
    ),
    "gated norm: the whole width": edit(M, "_sequence", ('width.active("h", "p")', "y_BLgi.shape[-1]")),
    "gated norm: over all groups": edit(M, "_sequence", ('width.active("h", "p")', 'width.active("g", "h", "p")')),
    "gated norm: heads without their channels": edit(
        M, "_sequence", ('width.active("h", "p")', 'width.active("h") * width.kept["p"]')
    ),
    # the gate of a layer
    "gate before the norm": edit(
        BLOCK, "forward", (READ, READ.replace("x_BLd,", "x_BLd * width.gate,")), (GATED, "written")
    ),
    "gate after the norm": edit(
        BLOCK, "forward", ("self.mix(normed,", "self.mix(normed * width.gate,"), (GATED, "written")
    ),
    "gate on the whole stream": edit(BLOCK, "forward", ("return x_BLd +", "return x_BLd * width.gate +")),
    "gate squared": edit(BLOCK, "forward", (GATED, "written * width.gate * width.gate")),
    "gates in the order of the layers": edit(router, "soft", ("zip(order, ", "zip(sorted(order), ")),
    "no gates": edit(router, "soft", ("width(layer, gate))", "width(layer))")),
    # where the masks sit
    "MLP mask before the non-linearity": edit(
        MLP,
        "mix",
        ("squared_relu(up_BLf)", 'squared_relu(width.mask(up_BLf, "f"))'),
        ('width.mask(hidden_BLf, "f")', "hidden_BLf"),
    ),
    "MLP mask dropped": edit(MLP, "mix", ('width.mask(hidden_BLf, "f")', "hidden_BLf")),
    "attention mask on the queries": edit(
        ATTENTION,
        "mix",
        (HEADS, "heads_BLGqc"),
        (
            "_attend(query, key,",
            '_attend(width.mask(query.transpose(1, 2).unflatten(2, (key.shape[1], -1)), "q", "c")'
            ".flatten(2, 3).transpose(1, 2), key,",
        ),
    ),
    "attention mask dropped": edit(ATTENTION, "mix", (HEADS, "heads_BLGqc")),
    "attention heads across groups": edit(
        ATTENTION,
        "mix",
        (
            HEADS,
            'width.mask(heads_BLGqc.flatten(2, 3).unflatten(2, (-1, heads_BLGqc.shape[2])).transpose(2, 3), "q", "c")'
            ".transpose(2, 3)",
        ),
    ),
    "SSM heads across groups": edit(
        M,
        "_sequence",
        (
            SSM,
            'width.mask(y_BLghp.flatten(2, 3).unflatten(2, (-1, kept["g"])).transpose(2, 3), "h", "p").transpose(2, 3)',
        ),
    ),
    "SSM mask before the convolution": edit(
        M,
        "_sequence",
        (SSM, "y_BLghp"),
        (
            'self.show(context, "x", xBC[..., :inner])',
            'ghp = xBC[..., :inner].unflatten(-1, (kept["g"], kept["h"], kept["p"])); '
            'xBC = torch.cat([width.mask(ghp, "h", "p").flatten(2), xBC[..., inner:]], -1)',
        ),
    ),
    "SSM mask after the gated norm": edit(
        M,
        "_sequence",
        (SSM, "y_BLghp"),
        ("normed_BLgi.flatten(2)", 'width.mask(normed_BLgi.view_as(y_BLghp), "h", "p").flatten(2)'),
    ),
    "SSM mask dropped": edit(M, "_sequence", (SSM, "y_BLghp")),
    "SSM heads alone": edit(M, "_sequence", (SSM, 'width.mask(y_BLghp, "h", "_p")')),
    "embedding mask forgotten": edit(MODEL, "embed", ('widths.ends.mask(embedded, "d")', "embedded")),
    "residual write unmasked": edit(
        BLOCK,
        "forward",
        ('width.mask(self.mix(normed, width, context, cache), "d")', "self.mix(normed, width, context, cache)"),
    ),
    "hidden mask on the read too": edit(BLOCK, "forward", ("self.mix(normed,", 'self.mix(width.mask(normed, "d"),')),
    # what the masks are made of
    "every layer with the sizes of the first": edit(
        router, "soft", ("space.axis(field, layer)", "space.axis(field, min(dict(space.own).get(field, [0])))")
    ),
    "candidates include one position more": edit(router, "_covered", ("<", "<=")),
    "the last positions, not the first": edit(
        router,
        "_covered",
        ("torch.arange(size, device=weight.device)[:, None]", "torch.arange(size - 1, -1, -1)[:, None]"),
    ),
    "heads counted over all groups": edit(router, "_mask", ("full[outer[0]] if outer else 1", "1")),
    "the ends are whole": edit(router, "soft", ("Widths(width(None)", "Widths(Width(full, full)")),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    MISTAKES[mistake](monkeypatch)
    assert max(difference(seed, space) for seed in range(2) for space in (SPACE, OWN)) > 1e-4
