"""The Mamba-2 mixer: a convolution, the recurrence and a gated norm between two projections.

B batch · L length · d hidden · g h p n groups, heads, channels, state · k taps · c channels of the convolution
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.model.block import Block
from nestling.model.context import Context
from nestling.model.native import sequence
from nestling.model.native.layer import Bound
from nestling.model.native.library import opaque
from nestling.model.pointwise import normalized, wide
from nestling.model.ssd import causal_conv, ssd, ssd_step
from nestling.model.width import Width

VECTORS = "taps", "bias", "dt_bias", "A", "D", "norm"
"""What kernels are given of `Mamba2.derived`, in their order."""


class Mamba2(Block):
    def derived(self, width: Width) -> dict[str, Tensor]:
        """A, D, dt_bias [g, h], the norm's weight [g, h p], the taps [k, c] and bias of the convolution."""
        group, head = width.kept["g"], width.kept["h"]
        by_head = {
            name: wide(self.part(f"mixer.{name}", width)).view(group, head) for name in ("A_log", "D", "dt_bias")
        }
        taps = wide(self.part("mixer.conv1d.weight", width))[:, 0].mT.contiguous()
        biased = "mixer.conv1d.bias" in self.layouts
        return by_head | {
            "A": -by_head["A_log"].exp(),
            "norm": wide(self.part("mixer.norm.weight", width)).view(group, -1),
            "taps": taps,
            "bias": wide(self.part("mixer.conv1d.bias", width)) if biased else taps.new_zeros(taps.shape[1]),
        }

    def bound(self, width: Width) -> Bound | None:
        vectors, sizes = width.derived, [width.kept[axis] for axis in "ghpn"]
        taps = vectors["taps"]
        if taps.dtype != torch.float32 or not _suits(vectors, taps):
            return None
        floor, values = float(self.architecture.time_step_min), [vectors[name] for name in VECTORS]
        return self._bound("mamba", width, ("mixer.in_proj", "mixer.out_proj"), *sizes, len(taps), floor, *values)

    def few(
        self, x_BLd: Tensor, bound: Bound, width: Width, context: Context, cache: dict[str, Tensor] | None
    ) -> Tensor | None:
        if cache is None or context.documents_BL is not None or (cache and not cache["ssm"].is_contiguous()):
            return None
        batch, length, _ = x_BLd.shape
        floored = length > 1 or not cache  # as in stock transformers, not one token at a time
        window, state = self._carried(x_BLd, width, cache)
        found = bound(x_BLd, length, floored, window, window.stride(0), window.stride(1), state)
        cache["conv"] = window.to(x_BLd.dtype)
        return found

    def _carried(self, like: Tensor, width: Width, cache: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The window and the state of a cache, as wide as a kernel changes them; zeros before the first token."""
        if not cache:
            cache |= self._empty(len(like), width, like)
        return wide(cache["conv"]), cache["ssm"]

    def _empty(self, batch: int, width: Width, like: Tensor) -> dict[str, Tensor]:
        """The cache of a layer before its first token."""
        group, head, channel, state = (width.kept[axis] for axis in "ghpn")
        channels = group * head * channel + 2 * group * state
        window = like.new_zeros(batch, self.architecture.conv_kernel - 1, channels)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return {"conv": window, "ssm": like.new_zeros(batch, group, head, channel, state, dtype=dtype)}

    def mix(self, x_BLd: Tensor, width: Width, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        projected = self.linear(context.real(x_BLd), "mixer.in_proj", width)
        vectors = width.derived or self.derived(width)
        whole = context.plain and not width.masked  # nothing is masked or looked at between the steps of `_sequence`
        if whole and self._reaches(cache) and _suits(vectors, projected, cache):
            normed = self._at_once(projected, vectors, width, context, cache)
        else:
            normed = self._sequence(projected, vectors, width, context, cache).to(x_BLd.dtype)
        self.show(context, "gated", normed)
        return self.linear(normed, "mixer.out_proj", width)

    def _reaches(self, cache: dict[str, Tensor] | None) -> bool:
        """Whether a kernel may change a cache, which has no gradient then."""
        return cache is None or (not opaque() and (not cache or cache["ssm"].is_contiguous()))

    def _at_once(
        self,
        projected: Tensor,
        vectors: Mapping[str, Tensor],
        width: Width,
        context: Context,
        cache: dict[str, Tensor] | None,
    ) -> Tensor:
        """`_sequence` by a kernel."""
        taps, bias, dt_bias, A, D, norm = (vectors[name] for name in VECTORS)
        following = bool(cache) and projected.shape[1] == 1  # one token at a time dt has no floor
        floor, eps = 0.0 if following else float(self.architecture.time_step_min), self.architecture.layer_norm_epsilon
        carried = None if cache is None else self._carried(projected, width, cache)
        documents = context.documents_BL
        normed = sequence.between(projected, taps, bias, dt_bias, A, D, norm, documents, floor, eps, carried)
        if cache is not None and carried is not None:
            cache["conv"] = carried[0].to(projected.dtype)
        return normed

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
        xBC = context.real(self._convolve(xBC, vectors, context, cache))
        x, B, C = xBC.split([inner, state, state], -1)
        x_BLghp, dt_BLgh = x.view(*shape, group, head, channel), dt.view(*shape, group, head)
        B_BLgn, C_BLgn = B.view(*shape, group, -1), C.view(*shape, group, -1)
        with torch.autocast(projected.device.type, enabled=False):  # in less than float32 the state drifts
            y_BLghp = self._scan(x_BLghp, dt_BLgh, B_BLgn, C_BLgn, vectors, context, cache, projected.dtype)
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
        out, window = causal_conv(xBC, vectors["taps"], vectors["bias"], window, context.documents_BL)
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
        precision: torch.dtype,
    ) -> Tensor:
        """The recurrence, in float32 or better. As in stock transformers, dt has a floor except one token at a time."""
        A, D = vectors["A"], vectors["D"]
        dt_BLgh = F.softplus(wide(dt_BLgh) + vectors["dt_bias"])
        state = None if cache is None else cache.get("ssm")
        if state is not None and x_BLghp.shape[1] == 1:
            x_Bghp, B_Bgn, C_Bgn = (wide(t[:, 0]) for t in (x_BLghp, B_BLgn, C_BLgn))
            y_Bghp, state = ssd_step(x_Bghp, dt_BLgh[:, 0], A, B_Bgn, C_Bgn, D, state)
            y_BLghp = y_Bghp[:, None]
        else:
            dt_BLgh = dt_BLgh.clamp(min=self.architecture.time_step_min)
            given = x_BLghp, dt_BLgh, A, B_BLgn, C_BLgn, D, state
            y_BLghp, state = ssd(*given, documents_BL=context.documents_BL, precision=precision)
        if cache is not None:
            cache["ssm"] = state
        return y_BLghp


def _suits(vectors: Mapping[str, Tensor], projected: Tensor, cache: dict[str, Tensor] | None = None) -> bool:
    others = [vectors[name] for name in VECTORS] + ([wide(cache["conv"]), cache["ssm"]] if cache else [])
    return sequence.suits(projected, vectors["taps"], vectors["norm"], *others)
