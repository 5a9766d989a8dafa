"""nemotron_h's forward: Mamba-2, attention and MLP blocks on one residual stream, at any width.

B batch · L length · S keys seen · d hidden · v vocabulary · f FFN · g h p n Mamba groups, heads, channels, state
G q c KV heads, query heads, head channels. Parameters carry their on-disk names; their layouts come from the table.
A `Widths` says per layer what runs (model/width.py); nothing in the model remembers one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestling.arch.architecture import Architecture, block_tensors
from nestling.arch.axes import Layout
from nestling.arch.submodel import Tensor as Stored
from nestling.arch.submodel import tensors
from nestling.errors import NestlingError
from nestling.model.cache import Cache, extend
from nestling.model.native import product as native
from nestling.model.native.layer import TAPS, WIDEST, Bound
from nestling.model.native.product import Kept
from nestling.model.pointwise import normalized, squared_relu
from nestling.model.ssd import causal_conv, ssd, ssd_step
from nestling.model.width import Width, Widths, hard, prefix, prefix_linear, product

Watch = Callable[[int | None, str, Tensor], None]
"""Is shown (layer, site, activation) as a forward pass goes by; it cannot change anything. Sites: `norm` [B, L, d] the
input of every mixer and of the head, `x` and `gated` [B, L, g h p] before the convolution and before the output
projection, `up` and `hidden` [B, L, f] before and after the non-linearity, `heads` [B, L, G q c] before the output
projection."""

DENSE = 2048
"""Positions of a packed row up to which a mask is made, 4 MiB, for one product instead of one a document."""


@dataclass(frozen=True)
class Output:
    logits: Tensor  # [B, L, v]
    cache: Cache | None = None


class Part(nn.Module):
    """A module that holds some stored tensors under their on-disk names, and multiplies by their prefixes."""

    def __init__(self, rows: dict[str, tuple[Layout, tuple[int, ...]]], **factory: Any) -> None:
        super().__init__()
        self.layouts = {name: layout for name, (layout, _) in rows.items()}
        for name, (_, shape) in rows.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for step in path:
                if step not in dict(owner.named_children()):
                    owner.add_module(step, nn.Module())
                owner = owner.get_submodule(step)
            owner.register_parameter(leaf, nn.Parameter(torch.empty(shape, **factory)))

    def stored(self, name: str) -> Tensor | None:
        return self.get_parameter(name) if name in self.layouts else None

    def part(self, name: str, width: Width) -> Tensor:
        """The kept prefix of a stored tensor."""
        held = width.held.get(name)
        return prefix(self.get_parameter(name), self.layouts[name], width) if held is None else held

    def derived(self, width: Width) -> dict[str, Tensor]:
        """What a layer computes from its vectors alone, in float32 or better."""
        return {}

    def bound(self, width: Width) -> Bound | None:
        """The layer at a width whose prefixes were looked up, as one kernel for a few tokens, if there is one."""
        return None

    def _matrix(self, name: str, width: Width) -> tuple[Tensor | Kept, Tensor | None]:
        """A matrix that was looked up, and its bias."""
        weight = width.held.get(f"{name}.weight")
        return width.pieces[f"{name}.weight"] if weight is None else weight, width.held.get(f"{name}.bias")

    def linear(self, x: Tensor, name: str, width: Width) -> Tensor:
        bias = width.held.get(f"{name}.bias")
        if (held := width.held.get(f"{name}.weight")) is not None:
            return product(x, held, bias)
        kept = width.pieces.get(f"{name}.weight")
        if kept is not None and (kernel := native.kernel(x, kept.weight, pieces=True)):
            return native.product(kernel, x, kept, bias)
        weight = self.get_parameter(f"{name}.weight")
        return prefix_linear(x, weight, self.stored(f"{name}.bias"), self.layouts[f"{name}.weight"], width)


class NemotronH(nn.Module):
    """The whole model; `model(ids, widths)` runs any member of its family."""

    def __init__(self, architecture: Architecture, **factory: Any) -> None:
        super().__init__()
        if "E" in architecture.hybrid_override_pattern:
            raise NestlingError("mixture-of-experts blocks (E) cannot be run yet; supported blocks: M, *, -")
        self.architecture = architecture
        self.gradient_checkpointing = (
            False  # as transformers spells it: keep only the input of every block for backward
        )
        full = architecture.sizes()
        self.ends = Part(_rows(architecture, "model", full), **factory)
        self.layers = nn.ModuleList(
            BLOCKS[kind](architecture, layer, _rows(architecture, kind, full), **factory)
            for layer, kind in enumerate(architecture.hybrid_override_pattern)
        )

    def forward(
        self,
        input_ids_BL: Tensor,
        widths: Widths | None = None,
        cache: Cache | None = None,
        attention_mask_BS: Tensor | None = None,
        watch: Watch | None = None,
        documents_BL: Tensor | None = None,
    ) -> Output:
        """Logits of every position.

        cache: continue from it, and extend it in place. attention_mask_BS: 1 for real tokens, 0 for padding, over the
        cached tokens and these; padding must be on the left. documents_BL: several documents in one row, an integer
        that is constant inside a document and changes at each boundary; every document is computed as if it were alone
        (state, convolution window and attention begin anew), and padding, wherever it is, is a document like any other.
        Not with a cache, which continues one document.
        """
        hidden_BLd = self.hidden(input_ids_BL, widths, cache, attention_mask_BS, watch, documents_BL)
        return Output(F.linear(hidden_BLd, self.head_weight(widths)), cache)

    def hidden(
        self,
        input_ids_BL: Tensor,
        widths: Widths | None = None,
        cache: Cache | None = None,
        attention_mask_BS: Tensor | None = None,
        watch: Watch | None = None,
        documents_BL: Tensor | None = None,
    ) -> Tensor:
        """What the output head multiplies, [B, L, d]: the residual stream after its last norm."""
        widths = widths or hard(self.architecture)
        x_BLd = self.embed(input_ids_BL, widths)
        context = Context.of(x_BLd, cache, attention_mask_BS, watch, documents_BL)
        for layer, width in widths.layers:
            state = None if cache is None else cache.layers.setdefault(layer, {})
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BLd = checkpoint(self.layers[layer], x_BLd, width, context, state, use_reentrant=False)
            else:
                x_BLd = self.layers[layer](x_BLd, width, context, state)
        if cache is not None:
            cache.advance(input_ids_BL.shape[1])
        x_BLd = rms_norm(x_BLd, self.ends.part("backbone.norm_f.weight", widths.ends), widths.ends, self.eps)
        if watch is not None:
            watch(None, "norm", x_BLd)
        return x_BLd

    def embed(self, input_ids_BL: Tensor, widths: Widths) -> Tensor:
        embedded = F.embedding(input_ids_BL, self.ends.part("backbone.embeddings.weight", widths.ends))
        return widths.ends.mask(embedded, "d")

    def head_weight(self, widths: Widths | None = None) -> Tensor:
        """The output head [v, d]: a prefix view of the stored one, or of the embeddings that it is tied to."""
        name = "lm_head" if self.architecture.untied else "backbone.embeddings"
        return self.ends.part(f"{name}.weight", (widths or hard(self.architecture)).ends)

    @property
    def eps(self) -> float:
        return self.architecture.layer_norm_epsilon

    def on_disk(self) -> dict[str, nn.Parameter]:
        """The parameters under their checkpoint names, in checkpoint order."""
        return {tensor.name: self._parameter(tensor) for tensor in tensors(self.architecture)}

    def _parameter(self, tensor: Stored) -> nn.Parameter:
        if tensor.layer is None:
            return self.ends.get_parameter(tensor.name)
        return self.layers[tensor.layer].get_parameter(tensor.name.split(".", 3)[-1])


def _rows(architecture: Architecture, kind: str, full: dict[str, int]) -> dict[str, tuple[Layout, tuple[int, ...]]]:
    return {row.name: (row.layout, row.layout.shape(full)) for row in block_tensors(architecture, kind)}


@dataclass(frozen=True)
class Context:
    """What every layer needs to know besides its input: the real tokens here, who may attend to whom, who watches."""

    real_BL1: Tensor | None  # 1 for real tokens; None when all are
    attend_B1LS: Tensor | None  # None: causal, no padding, nothing cached
    watch: Watch | None = None
    documents_BL: Tensor | None = None  # counted from 0 in every row; None: one document a row
    past: int = 0  # columns of cached keys in use
    at_B: Tensor | None = None  # the column of each row's next key, where rows differ
    apart: tuple[tuple[int, ...], ...] | None = None  # lengths of every row's documents, each attended to by itself

    @staticmethod
    def of(
        x_BLd: Tensor,
        cache: Cache | None,
        attention_mask_BS: Tensor | None,
        watch: Watch | None = None,
        documents_BL: Tensor | None = None,
    ) -> "Context":
        length, past = x_BLd.shape[1], cache.length if cache is not None else 0
        if documents_BL is not None:
            return Context._packed(x_BLd, cache, attention_mask_BS, watch, documents_BL)
        if cache is not None and cache.lengths is not None:
            assert length == 1, "rows of different lengths go on one token at a time"
            at_B = torch.tensor(cache.lengths, device=x_BLd.device)
            attend = torch.arange(past + 1, device=x_BLd.device) <= at_B[:, None]
            return Context(None, attend[:, None, None], watch, past=past, at_B=at_B)
        if attention_mask_BS is None and (past == 0 or length == 1):
            return Context(None, None, watch, past=past)
        query = torch.arange(past, past + length, device=x_BLd.device)[:, None]
        key = torch.arange(past + length, device=x_BLd.device)
        attend = (key <= query)[None, None]
        if attention_mask_BS is None:
            return Context(None, attend, watch, past=past)
        real = attention_mask_BS.bool()
        attend = attend & real[:, None, None, :] | (key == query)  # padding sees itself: a softmax over nothing is NaN
        return Context(real[:, past:, None].to(x_BLd.dtype), attend, watch, past=past)

    @staticmethod
    def _packed(
        x_BLd: Tensor, cache: Cache | None, attention_mask_BS: Tensor | None, watch: Watch | None, documents_BL: Tensor
    ) -> "Context":
        """Several documents a row. Padding begins a document of its own, so that nothing more need be said of it.

        Who may attend to whom is a dense mask, L² bytes a row; in rows longer than DENSE documents are attended to one
        after the other instead, so that memory grows with L.
        """
        if cache is not None:
            raise NestlingError("documents_BL is for packed rows; a cache continues one document: give one of the two")
        if documents_BL.shape != x_BLd.shape[:2]:
            raise NestlingError(
                f"documents_BL is {list(documents_BL.shape)}, the input ids are {list(x_BLd.shape[:2])}: give every "
                "input the number of its document"
            )
        begins = documents_BL.diff(dim=1) != 0
        if attention_mask_BS is not None:
            begins = begins | attention_mask_BS.bool().diff(dim=1)
        counted = F.pad(begins.cumsum(1), (1, 0))
        if x_BLd.shape[1] > DENSE:
            lengths = (row.unique_consecutive(return_counts=True)[1].tolist() for row in counted)
            return Context(None, None, watch, counted, apart=tuple(map(tuple, lengths)))
        causal = torch.ones(x_BLd.shape[1], x_BLd.shape[1], dtype=torch.bool, device=x_BLd.device).tril()
        attend = causal & (counted[:, :, None] == counted[:, None, :])
        return Context(None, attend[:, None], watch, counted)

    @property
    def plain(self) -> bool:
        """All tokens are real, and nobody watches."""
        return self.real_BL1 is None and self.watch is None

    def real(self, x_BLc: Tensor) -> Tensor:
        """Zero at padding: what the convolution and the state must not see."""
        return x_BLc if self.real_BL1 is None else x_BLc * self.real_BL1


class Block(Part):
    """norm, mixer, residual write. Subclasses are the mixers."""

    def __init__(self, architecture: Architecture, layer: int, rows: Any, **factory: Any) -> None:
        super().__init__(rows, **factory)
        self.architecture, self.layer = architecture, layer

    def forward(self, x_BLd: Tensor, width: Width, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        if width.bound is not None and context.plain and width.bound.suits(x_BLd):
            found = self.few(x_BLd, width.bound, width, context, cache)
            if found is not None:
                return found
        normed = rms_norm(x_BLd, self.part("norm.weight", width), width, self.architecture.layer_norm_epsilon)
        self.show(context, "norm", normed)
        written = width.mask(self.mix(normed, width, context, cache), "d")
        if isinstance(width.gate, Tensor):
            return x_BLd + written * width.gate
        return torch.add(x_BLd, written, alpha=width.gate)

    def few(
        self, x_BLd: Tensor, bound: Bound, width: Width, context: Context, cache: dict[str, Tensor] | None
    ) -> Tensor | None:
        """The layer as one kernel; None where it is not for these tokens."""
        return bound(x_BLd)

    def _bound(self, kernel: str, width: Width, matrices: Sequence[str], *more: Tensor | float) -> Bound | None:
        known = {*width.held, *width.pieces}
        if width.masks or width.gate != 1 or not known.issuperset(f"{name}.weight" for name in matrices):
            return None
        norm, eps = width.held["norm.weight"], self.architecture.layer_norm_epsilon
        return Bound.of(kernel, norm, eps, [self._matrix(name, width) for name in matrices], *more)

    def show(self, context: Context, site: str, activation: Tensor) -> None:
        if context.watch is not None:
            context.watch(self.layer, site, activation)

    def mix(self, x_BLd: Tensor, width: Width, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        raise NotImplementedError


class MLP(Block):
    def bound(self, width: Width) -> Bound | None:
        return self._bound("mlp", width, ("mixer.up_proj", "mixer.down_proj"))

    def mix(self, x_BLd: Tensor, width: Width, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        up_BLf = self.linear(x_BLd, "mixer.up_proj", width)
        hidden_BLf = squared_relu(up_BLf)
        self.show(context, "up", up_BLf)
        self.show(context, "hidden", hidden_BLf)
        return self.linear(width.mask(hidden_BLf, "f"), "mixer.down_proj", width)


class Attention(Block):
    def mix(self, x_BLd: Tensor, width: Width, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        channels = self.architecture.head_dim
        query, key, value = (
            self.linear(x_BLd, f"mixer.{name}_proj", width).unflatten(-1, (-1, channels)).transpose(1, 2)
            for name in "qkv"
        )
        if cache is not None:
            key = extend(cache, "key", key, context.past, context.at_B)
            value = extend(cache, "value", value, context.past, context.at_B)
        if context.apart is None:
            heads = _attend(query, key, value, context.attend_B1LS)
        else:
            heads = _attend_apart(query, key, value, context.apart)
        heads_BLGqc = heads.transpose(1, 2).unflatten(2, (self.architecture.num_key_value_heads, -1))
        self.show(context, "heads", heads_BLGqc.flatten(2))
        return self.linear(width.mask(heads_BLGqc, "q", "c").flatten(2), "mixer.o_proj", width)


def _attend(query_BHLc: Tensor, key_BGSc: Tensor, value_BGSc: Tensor, attend_B1LS: Tensor | None) -> Tensor:
    """Attention; for a single query the heads that share a key stand where queries would, and nothing is repeated."""
    if query_BHLc.shape[2] == 1:
        query_BGqc = query_BHLc.unflatten(1, (key_BGSc.shape[1], -1))[:, :, :, 0]
        return F.scaled_dot_product_attention(query_BGqc, key_BGSc, value_BGSc, attend_B1LS).flatten(1, 2)[:, :, None]
    causal = attend_B1LS is None
    return F.scaled_dot_product_attention(
        query_BHLc, key_BGSc, value_BGSc, attend_B1LS, is_causal=causal, enable_gqa=True
    )


def _attend_apart(
    query_BHLc: Tensor, key_BGLc: Tensor, value_BGLc: Tensor, apart: tuple[tuple[int, ...], ...]
) -> Tensor:
    """Causal attention within each of a row's documents, given their lengths."""
    rows = zip(query_BHLc.split(1), key_BGLc.split(1), value_BGLc.split(1), apart, strict=True)
    found = []
    for query, key, value, lengths in rows:
        documents = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
        found.append(torch.cat([_attend(*document, None) for document in documents], 2))
    return torch.cat(found)


class Mamba2(Block):
    def derived(self, width: Width) -> dict[str, Tensor]:
        """A, D, dt_bias [g, h], the norm's weight [g, h p], the taps [k, c] and bias of the convolution."""
        group, head = width.kept["g"], width.kept["h"]
        by_head = {
            name: wide(self.part(f"mixer.{name}", width)).view(group, head) for name in ("A_log", "D", "dt_bias")
        }
        found = by_head | {
            "A": -by_head["A_log"].exp(),
            "norm": wide(self.part("mixer.norm.weight", width)).view(group, -1),
            "taps": wide(self.part("mixer.conv1d.weight", width))[:, 0].mT.contiguous(),
        }
        if "mixer.conv1d.bias" in self.layouts:
            found["bias"] = wide(self.part("mixer.conv1d.bias", width))
        return found

    def bound(self, width: Width) -> Bound | None:
        vectors, sizes = width.derived, [width.kept[axis] for axis in "ghpn"]
        taps = vectors["taps"]
        if taps.dtype != torch.float32 or len(taps) not in TAPS or taps.shape[1] < WIDEST:
            return None
        bias = vectors["bias"] if "bias" in vectors else taps.new_zeros(taps.shape[1])
        floor = float(self.architecture.time_step_min)
        values = [taps, bias, *(vectors[name] for name in ("dt_bias", "A", "D", "norm"))]
        return self._bound("mamba", width, ("mixer.in_proj", "mixer.out_proj"), *sizes, len(taps), floor, *values)

    def few(
        self, x_BLd: Tensor, bound: Bound, width: Width, context: Context, cache: dict[str, Tensor] | None
    ) -> Tensor | None:
        if cache is None or context.documents_BL is not None or (cache and not cache["ssm"].is_contiguous()):
            return None
        batch, length, _ = x_BLd.shape
        floored = length > 1 or not cache  # as in stock transformers, not one token at a time
        if not cache:
            cache |= self._empty(batch, width, x_BLd)
        window = wide(cache["conv"])
        found = bound(x_BLd, length, floored, window, window.stride(0), window.stride(1), cache["ssm"])
        cache["conv"] = window.to(x_BLd.dtype)
        return found

    def _empty(self, batch: int, width: Width, like: Tensor) -> dict[str, Tensor]:
        """The cache of a layer before its first token."""
        group, head, channel, state = (width.kept[axis] for axis in "ghpn")
        channels = group * head * channel + 2 * group * state
        window = like.new_zeros(batch, self.architecture.conv_kernel - 1, channels)
        return {"conv": window, "ssm": like.new_zeros(batch, group, head, channel, state, dtype=torch.float32)}

    def mix(self, x_BLd: Tensor, width: Width, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        projected = self.linear(context.real(x_BLd), "mixer.in_proj", width)
        vectors = width.derived or self.derived(width)
        normed = self._sequence(projected, vectors, width, context, cache).to(x_BLd.dtype)
        self.show(context, "gated", normed)
        return self.linear(normed, "mixer.out_proj", width)

    def _sequence(
        self,
        projected: Tensor,
        vectors: Mapping[str, Tensor],
        width: Width,
        context: Context,
        cache: dict[str, Tensor] | None,
    ) -> Tensor:
        """Between the projections: the convolution, the recurrence and the gated norm [B, L, g h p]."""
        kept, shape = width.kept, projected.shape[:2]
        group, head, channel = kept["g"], kept["h"], kept["p"]
        inner, state = group * head * channel, group * kept["n"]
        z, xBC, dt = projected.split([inner, inner + 2 * state, group * head], -1)
        self.show(context, "x", xBC[..., :inner])
        xBC = wide(context.real(self._convolve(xBC, vectors, context, cache)))
        x, B, C = xBC.split([inner, state, state], -1)
        x_BLghp, dt_BLgh = x.view(*shape, group, head, channel), dt.view(*shape, group, head)
        B_BLgn, C_BLgn = B.view(*shape, group, -1), C.view(*shape, group, -1)
        with torch.autocast(projected.device.type, enabled=False):  # in less than float32 the state drifts
            y_BLghp = self._scan(x_BLghp, dt_BLgh, B_BLgn, C_BLgn, vectors, context, cache)
        y, z = width.mask(y_BLghp, "h", "p").flatten(2), wide(z)
        y_BLgi, z_BLgi = y.unflatten(-1, (group, -1)), z.unflatten(-1, (group, -1))
        eps = self.architecture.layer_norm_epsilon
        normed_BLgi = normalized(y_BLgi, vectors["norm"], width.active("h", "p"), eps, gate=z_BLgi)
        return normed_BLgi.flatten(2)

    def _convolve(
        self, xBC: Tensor, vectors: Mapping[str, Tensor], context: Context, cache: dict[str, Tensor] | None
    ) -> Tensor:
        """The causal convolution and its silu, continuing from the cached window of inputs [B, k - 1, channels]."""
        window = None if cache is None else cache.get("conv")
        if window is None:
            window = xBC.new_zeros(xBC.shape[0], self.architecture.conv_kernel - 1, xBC.shape[-1])
        out, window = causal_conv(xBC, vectors["taps"], vectors.get("bias"), window, context.documents_BL)
        if cache is not None:
            cache["conv"] = window
        return out

    def _scan(
        self,
        x_BLghp: Tensor,
        dt_BLgh: Tensor,
        B_BLgn: Tensor,
        C_BLgn: Tensor,
        vectors: Mapping[str, Tensor],
        context: Context,
        cache: dict[str, Tensor] | None,
    ) -> Tensor:
        """The recurrence, in float32 or better. As in stock transformers, dt has a floor except one token at a time."""
        A, D = vectors["A"], vectors["D"]
        dt_BLgh = F.softplus(wide(dt_BLgh) + vectors["dt_bias"])
        state = None if cache is None else cache.get("ssm")
        if state is not None and x_BLghp.shape[1] == 1:
            y_Bghp, state = ssd_step(x_BLghp[:, 0], dt_BLgh[:, 0], A, B_BLgn[:, 0], C_BLgn[:, 0], D, state)
            y_BLghp = y_Bghp[:, None]
        else:
            dt_BLgh = dt_BLgh.clamp(min=self.architecture.time_step_min)
            y_BLghp, state = ssd(x_BLghp, dt_BLgh, A, B_BLgn, C_BLgn, D, state, documents_BL=context.documents_BL)
        if cache is not None:
            cache["ssm"] = state
        return y_BLghp


BLOCKS: dict[str, type[Block]] = {"M": Mamba2, "*": Attention, "-": MLP}


def wide(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rms_norm(x: Tensor, weight: Tensor, width: Width, eps: float) -> Tensor:
    """x / sqrt(Σ x² / active width + eps) · weight, over the hidden channels (masked ones are zero in x)."""
    return normalized(wide(x), wide(weight), width.active("d"), eps).to(x.dtype)
