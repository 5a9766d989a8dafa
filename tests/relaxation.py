"""The router's one relaxation, written out from its equations in float64 over a tiny hybrid: no code of the model."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nestling.arch.architecture import Architecture
from nestling.arch.search import SearchSpace

HYBRID = Architecture(
    "M-*-M",
    vocab_size=13,
    hidden_size=12,
    intermediate_size=20,
    n_groups=2,
    mamba_num_heads=6,
    mamba_head_dim=4,
    ssm_state_size=3,
    num_key_value_heads=2,
    num_attention_heads=6,
    head_dim=4,
    layer_norm_epsilon=1e-2,
)
CANDIDATES = {
    "hidden_size": [6, 7, 10],
    "intermediate_size": [8, 16],
    "mamba_num_heads": [2, 4],
    "mamba_head_dim": [1, 3],
    "num_attention_heads": [2, 4],
    "layers": [2, 4],
}
SPACE = SearchSpace.of(HYBRID, CANDIDATES)
OWN = SearchSpace.of(HYBRID, CANDIDATES, per_layer=["intermediate_size", "num_attention_heads", "mamba_num_heads"])
ORDER = (2, 4, 0, 3, 1)


def random_pi(space: SearchSpace, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = {axis: torch.randn(len(space[axis]), generator=generator, dtype=torch.double) for axis in space.axes}
    return {axis: values.softmax(0) for axis, values in draw.items()}


def covered(pi: Tensor, sizes: Sequence[int], whole: int, per: int = 1) -> Tensor:
    """[whole]: Σ_c π_c · [position < c], one position after the other."""
    return torch.stack([sum(p for p, size in zip(pi, sizes, strict=True) if i < size // per) for i in range(whole)])


def oracle(weights: Mapping[str, Tensor], pi: Mapping[str, Tensor], ids: Tensor, space: SearchSpace = SPACE) -> Tensor:
    """The relaxed forward of HYBRID, [B, L, v]: weights by name, one token after the other in the scan.

    x ← embedding · m_d; x ← x + γ_j m_d mixer(x / sqrt(Σ x² / Σ m_d + ε) · w) for each layer j, with
    MLP: W₂ (m_f relu(W₁ x)²); attention: W_o (m_q heads); Mamba: W_out gated-norm(m_h m_p y), which divides each
    group's Σ (m y silu(z))² by Σ m_h · Σ m_p. The m and γ are the probability of candidates that include a position.
    """
    a, w = HYBRID, weights

    def mask(field: str, layer: int, whole: int, per: int = 1) -> Tensor:
        key = field if field in pi else f"{field}@{layer}"
        return covered(pi[key], space[key], whole, per)

    m_d = covered(pi["hidden_size"], space["hidden_size"], 12)
    m_p = covered(pi["mamba_head_dim"], space["mamba_head_dim"], 4)
    gates = dict(zip(ORDER, covered(pi["layers"], space["layers"], 5), strict=True))

    def norm(x: Tensor, weight: Tensor, count: Tensor) -> Tensor:
        return x / (x.pow(2).sum(-1, keepdim=True) / count + a.layer_norm_epsilon).sqrt() * weight

    def mlp(x: Tensor, p: str, layer: int) -> Tensor:
        hidden = (x @ w[f"{p}up_proj.weight"].T).clamp(min=0) ** 2
        return (hidden * mask("intermediate_size", layer, 20)) @ w[f"{p}down_proj.weight"].T

    def attention(x: Tensor, p: str, layer: int) -> Tensor:
        query = (x @ w[f"{p}q_proj.weight"].T).view(*x.shape[:2], 6, 4)
        key, value = (
            (x @ w[f"{p}{n}_proj.weight"].T).view(*x.shape[:2], 2, 4).repeat_interleave(3, 2) for n in ("k", "v")
        )
        scores = torch.einsum("bthc,bshc->bhts", query, key) / 2
        future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        heads = torch.einsum("bhts,bshc->bthc", scores.masked_fill(future, -math.inf).softmax(-1), value)
        m_q = mask("num_attention_heads", layer, 3, per=2)
        return (heads * m_q.repeat(2)[:, None]).flatten(2) @ w[f"{p}o_proj.weight"].T

    def mamba(x: Tensor, p: str, layer: int) -> Tensor:
        m_h = mask("mamba_num_heads", layer, 3, per=2)
        z, xBC, dt = (x @ w[f"{p}in_proj.weight"].T).split([24, 24 + 12, 6], -1)
        past = torch.cat([xBC.new_zeros(x.shape[0], 3, 36), xBC], 1)
        kernel = w[f"{p}conv1d.weight"][:, 0]
        xBC = sum(past[:, k : k + x.shape[1]] * kernel[:, k] for k in range(4)) + w[f"{p}conv1d.bias"]
        inner, B, C = torch.nn.functional.silu(xBC).split([24, 6, 6], -1)
        inner = inner.view(*x.shape[:2], 6, 4)
        B, C = (t.view(*x.shape[:2], 2, 3).repeat_interleave(3, 2) for t in (B, C))
        dt = (1 + (dt + w[f"{p}dt_bias"]).exp()).log().clamp(min=a.time_step_min)
        state, outs = x.new_zeros(x.shape[0], 6, 4, 3), []
        for t in range(x.shape[1]):
            fed = dt[:, t, :, None, None] * inner[:, t, :, :, None] * B[:, t, :, None, :]
            state = (-dt[:, t] * w[f"{p}A_log"].exp()).exp()[..., None, None] * state + fed
            outs.append((state * C[:, t, :, None, :]).sum(-1) + w[f"{p}D"][:, None] * inner[:, t])
        y = torch.stack(outs, 1) * m_h.repeat(2)[:, None] * m_p
        gated = (y.flatten(2) * z / (1 + (-z).exp())).unflatten(-1, (2, 12))
        normed = norm(gated, w[f"{p}norm.weight"].view(2, 12), m_h.sum() * m_p.sum())
        return normed.flatten(2) @ w[f"{p}out_proj.weight"].T

    x = w["backbone.embeddings.weight"][ids] * m_d
    for layer, kind in enumerate("M-*-M"):
        name = f"backbone.layers.{layer}."
        mixer = {"M": mamba, "*": attention, "-": mlp}[kind]
        x = x + gates[layer] * m_d * mixer(norm(x, w[f"{name}norm.weight"], m_d.sum()), f"{name}mixer.", layer)
    return norm(x, w["backbone.norm_f.weight"], m_d.sum()) @ w["lm_head.weight"].T
