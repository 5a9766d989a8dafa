"""torch.compile for the whole model, one block at a time."""

from typing import Any

import torch._dynamo

from nestling.model.experts import Experts
from nestling.model.nemotron_h import NemotronH

WIDTHS = 64  # blocks of one kind at different widths, with or without documents: each is compiled at its first use


def compile_blocks(model: NemotronH, **options: Any) -> NemotronH:
    """Compile every block in place; options go to torch.compile. Parameters, names and results stay what they are.

    Blocks of one kind share what is compiled, so depth costs nothing, but every width that is run costs seconds: worth
    it for hard widths and many steps. A graph has no breaks; attention by its kernel, and the scan, the convolution or
    the kernel of what is between the projections of a Mamba-2 layer, stay one operation each. Past `WIDTHS` versions a
    block runs as if it had not been compiled, and so does a mixture of experts, whose shapes are other ones every time.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, WIDTHS)
    for block in model.layers:
        if not isinstance(block, Experts):
            block.compile(**options)
    return model
