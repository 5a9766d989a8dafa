"""A tiny family in float64 and what stock transformers says to a few prompts, one at a time."""

from functools import cache

import torch

import stock
from nestling.arch.submodel import WHOLE, Submodel
from nestling.infer.family import View
from nestling.infer.sampling import Row, Sampling
from nestling.model.nemotron_h import NemotronH
from nestling.serve.scheduler import Request, Scheduler

HYBRID = stock.SPOKEN
SIZES = {
    "large": WHOLE,
    "middle": Submodel(hidden_size=16, mamba_head_dim=3, num_attention_heads=2),
    "small": Submodel((0, 1, 2, 4), 16, 20, mamba_num_heads=4, mamba_head_dim=3, num_attention_heads=2),
}
LENGTHS = (1, 2, 5, 9, 17, 26, 40)
PROMPTS = [stock.tokens(23, 1, length, seed=length)[0].tolist() for length in LENGTHS]
COUNT = 10


@cache
def oracle() -> torch.nn.Module:
    return stock.float64(stock.build(HYBRID))


@cache
def views() -> dict[str, View]:
    model = NemotronH(HYBRID, dtype=torch.float64)
    stored = dict(oracle().named_parameters())
    for name, parameter in model.on_disk().items():
        parameter.data.copy_(stored[name.replace("backbone.", "model.")])
    model.requires_grad_(False)
    return {name: View(model.eval(), submodel).held() for name, submodel in SIZES.items()}


@cache
def stocks(size: str, prompt: int) -> list[int]:
    """Stock's greedy tokens, of a model pruned by hand."""
    model = stock.prune(oracle(), stock.picks(HYBRID, SIZES[size]))
    ids = torch.tensor([PROMPTS[prompt]])
    return model.generate(ids, max_new_tokens=COUNT, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()


def request(size: str, prompt: int, limit: int = COUNT, temperature: float = 0.0, client: str = "") -> Request:
    row = Row(PROMPTS[prompt], limit, Sampling(temperature), seed=f"{size} {prompt}")
    return Request(views()[size], row, client)


def finish(scheduler: Scheduler) -> int:
    """Steps until nobody is left."""
    steps = 0
    while not scheduler.idle:
        scheduler.step()
        steps += 1
        assert steps < 1000
    return steps
