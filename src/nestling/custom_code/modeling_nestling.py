"""nemotron_h whose blocks are built one by one, each from its own entry of `per_layer_config`."""

from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.nemotron_h import modeling_nemotron_h as stock

from .configuration_nestling import NestlingConfig


class NestlingModel(stock.NemotronHModel):
    config_class = NestlingConfig

    def __init__(self, config: NestlingConfig) -> None:
        stock.NemotronHPreTrainedModel.__init__(self, config)  # stock's own __init__ would build the widest blocks
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(stock.NemotronHBlock(own, i) for i, own in enumerate(config.per_layer_config))
        self.norm_f = stock.NemotronHRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()


class NestlingForCausalLM(stock.NemotronHForCausalLM):
    config_class = NestlingConfig

    def __init__(self, config: NestlingConfig) -> None:
        stock.NemotronHPreTrainedModel.__init__(self, config)
        self.model = NestlingModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# Classes from outside transformers do not get the names on disk (`backbone.*`) translated to those in memory
# (`model.*`); without this line every weight would be left at random, with no more than a warning.
for model in (NestlingModel, NestlingForCausalLM):
    register_checkpoint_conversion_mapping(
        model.__name__, get_checkpoint_conversion_mapping("nemotron_h"), overwrite=True
    )
