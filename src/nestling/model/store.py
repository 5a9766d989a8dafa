"""Between a checkpoint directory and a model's parameters."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from nestling import ranks
from nestling.errors import NestlingError
from nestling.model.nemotron_h import NemotronH
from nestling.weights.elastic import FILE, Elastic
from nestling.weights.files import write_json
from nestling.weights.ranking import Ranking, save_ranking
from nestling.weights.transform import copy_companions
from nestling.weights.writing import HASH, Planned, write_weights, writing_order

PRECISE = "e_score_correction_bias"
"""Of the experts' gate: stays in float32, as in transformers, since it decides between scores that are close."""
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def load_model(elastic: Elastic, dtype: torch.dtype | None = None) -> NemotronH:
    """The whole model over memory-mapped weights, in eval mode and without gradients; another dtype makes a copy."""
    if not elastic.uniform:
        path = elastic.checkpoint.path
        raise NestlingError(
            f"{path} has sizes of its own per layer: load it in transformers with trust_remote_code=True, or take the "
            "size as a view of the family that it was cut from"
        )
    model = NemotronH(elastic.architecture, device="meta")
    entries = elastic.checkpoint.entries
    owners = {id(p): (module, leaf) for module in model.modules() for leaf, p in module._parameters.items()}
    for name, parameter in model.on_disk().items():
        with safe_open(entries[name].file, framework="pt") as shard:
            loaded = shard.get_tensor(name)
        owner, leaf = owners[id(parameter)]
        owner._parameters[leaf] = nn.Parameter(loaded.to(_dtype(name, loaded, dtype)), requires_grad=False)
    return model.eval()


def _dtype(name: str, tensor: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """What a tensor becomes in a model of a dtype; without one it stays as it is."""
    if wanted is None:
        return tensor.dtype
    return torch.promote_types(wanted, torch.float32) if name.endswith(PRECISE) else wanted


def save_model(model: NemotronH, directory: Path, dtype: torch.dtype | None = None) -> dict[str, str]:
    """Write the parameters as model.safetensors under their on-disk names; returns its hash by name.

    dtype: of the file, if it is not the parameters' own. Of several processes the first one writes, and all give it
    their shards, one tensor after the other.
    """
    stored = model.on_disk()
    dtypes = {name: _dtype(name, tensor, dtype) for name, tensor in stored.items()}
    planned = [Planned(name, _DTYPES[dtypes[name]], tuple(tensor.shape)) for name, tensor in stored.items()]
    if not ranks.first():
        for tensor in writing_order(planned):
            ranks.whole(stored[tensor.name].detach())
        return {}
    return write_weights(directory, planned, lambda name: _bytes(ranks.whole(stored[name].detach()), dtypes[name]))


def save_elastic(
    model: NemotronH,
    like: Elastic,
    ranking: Ranking,
    sidecar: Mapping[str, Any],
    directory: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a trained elastic checkpoint: new weights in the shape, order and company of the one it started from."""
    digests = save_model(model, directory, dtype)
    if not ranks.first():
        return
    write_json(directory / "config.json", like.checkpoint.config)
    write_json(directory / FILE, {**sidecar, HASH: digests})
    save_ranking(ranking, directory)
    copy_companions(like.checkpoint.path, directory)


def _bytes(tensor: Tensor, dtype: torch.dtype) -> Iterable[memoryview]:
    yield tensor.to(dtype).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
