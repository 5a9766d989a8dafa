"""Mixture of experts: a gate sends every token through a few of many MLPs, and one more MLP takes all tokens.

B batch · L length · N tokens · d hidden · e expert · k experts of a token · m, s FFN of routed and of shared experts.
The gate is Nemotron 3's: sigmoid scores, chosen with a correction bias that the weights do not have (DeepSeek-V3, arXiv
2412.19437, section 2.1.2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nestling.model.block import Block
from nestling.model.context import Context
from nestling.model.pointwise import squared_relu
from nestling.model.width import Width


class Experts(Block):
    def mix(self, x_BLd: Tensor, width: Width, context: Context, cache: dict[str, Tensor] | None) -> Tensor:
        x_Nd = x_BLd.flatten(0, 1)
        chosen_Nk, weights_Nk = self.route(x_Nd, width)
        hidden_BLs = squared_relu(self.linear(x_BLd, "mixer.shared_experts.up_proj", width))
        self.show(context, "shared", hidden_BLs)
        shared_BLd = self.linear(width.mask(hidden_BLs, "s"), "mixer.shared_experts.down_proj", width)
        return shared_BLd + self._routed(x_BLd, chosen_Nk, weights_Nk, width, context)

    def route(self, x_Nd: Tensor, width: Width) -> tuple[Tensor, Tensor]:
        """The experts of each token, and the weight of each, [N, k] both. Scores are in float32 or better.

        An expert that is partly there is chosen by its score and the logarithm of its mask, so never where that is
        zero, and weighs its part.
        """
        precise = torch.promote_types(x_Nd.dtype, torch.float32)
        with torch.autocast(x_Nd.device.type, enabled=False):
            gate_ed = self.part("mixer.gate.weight", width).to(precise)
            scores_Ne = F.linear(x_Nd.to(precise), gate_ed).sigmoid()
        wanted_Ne = scores_Ne.detach() + self.part("mixer.gate.e_score_correction_bias", width).detach()
        if (mask_e := width.masks.get("e")) is not None:
            wanted_Ne = wanted_Ne + mask_e.detach().log()
            scores_Ne = scores_Ne * mask_e
        chosen_Nk = wanted_Ne.topk(self.architecture.num_experts_per_tok, sorted=False).indices
        weights_Nk = scores_Ne.gather(1, chosen_Nk)
        if self.architecture.norm_topk_prob:
            weights_Nk = weights_Nk / (weights_Nk.sum(1, keepdim=True) + 1e-20)
        return chosen_Nk, weights_Nk * self.architecture.routed_scaling_factor

    def _routed(self, x_BLd: Tensor, chosen_Nk: Tensor, weights_Nk: Tensor, width: Width, context: Context) -> Tensor:
        """The weighted sum of what each token's experts make of it, one expert after the other, with all its tokens."""
        x_Nd, experts = x_BLd.flatten(0, 1), width.kept["e"]
        chosen, order = chosen_Nk.flatten().sort(stable=True)
        token = order // chosen_Nk.shape[1]
        if context.watch is not None:
            chosen_Ne = chosen_Nk.new_zeros(len(x_Nd), experts, dtype=torch.bool).scatter(1, chosen_Nk, True)
            self.show(context, "chosen", chosen_Ne.view(*x_BLd.shape[:2], experts))
        parts = x_Nd[token].split(_counted(chosen, experts))
        found = [  # while learning, one without tokens has zeros as its gradient, so that ranks have the same ones
            self._expert(expert, x_nd, width, context)
            for expert, x_nd in enumerate(parts)
            if len(x_nd) or torch.is_grad_enabled()
        ]
        weighted = torch.cat(found) * weights_Nk.flatten()[order][:, None]
        if context.watch is not None:
            norms_Ne = weighted.new_full((len(x_Nd), experts), -1)
            norms_Ne[token, chosen] = weighted.norm(dim=-1)
            self.show(context, "routed", norms_Ne.view(*x_BLd.shape[:2], experts))
        summed_Nd = weighted.new_zeros(x_Nd.shape).index_add(0, token, weighted)  # in the precision of the weights
        return summed_Nd.to(x_BLd.dtype).view_as(x_BLd)

    def _expert(self, expert: int, x_nd: Tensor, width: Width, context: Context) -> Tensor:
        hidden_nm = squared_relu(self.linear(x_nd, f"mixer.experts.{expert}.up_proj", width))
        if len(x_nd):
            self.show(context, f"expert.{expert}", hidden_nm)
        return self.linear(width.mask(hidden_nm, "m"), f"mixer.experts.{expert}.down_proj", width)


def _counted(chosen: Tensor, experts: int) -> list[int]:
    """How many tokens each expert has; all of them as many where there are no values to tell."""
    if isinstance(chosen, FakeTensor):
        return [len(chosen) // experts + (expert < len(chosen) % experts) for expert in range(experts)]
    return chosen.bincount(minlength=experts).tolist()
