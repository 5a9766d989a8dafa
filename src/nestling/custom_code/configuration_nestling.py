"""A nemotron_h config whose layers may have sizes of their own. Needs transformers 5.15 or newer."""

from typing import Any

from transformers import NemotronHConfig, PreTrainedConfig


class NestlingConfig(NemotronHConfig):
    """nemotron_h with transformers' `per_layer_config`; a size given at the top is the widest layer's."""

    allow_global_per_layer_attribute_access = True  # vLLM sizes its attention buffers by the widest layer

    def get_nemotron_h_config_for_layer(self, layer_idx: int) -> PreTrainedConfig:
        """The config of one layer, under the name that vLLM looks for."""
        return self.per_layer_config[layer_idx]

    def to_dict(self) -> dict[str, Any]:
        """As transformers saves it, but under the architecture name by which vLLM finds its own implementation."""
        return super().to_dict() | {"architectures": ["NemotronHForCausalLM"]}
