"""torch.compile, block by block."""

from nestling.model.nemotron_h import NemotronH


def compile_blocks(model: NemotronH) -> NemotronH:
    for block in model.layers:
        block.compile(fullgraph=True)
    return model
