"""DeepSeek-V3: the model definition, on transformers' config and checkpoint names.

config = deepseek_v3.preset("tiny")
model = deepseek_v3.DeepseekV3ForCausalLM(config)
"""

from deepseek_v3.config import PRESETS, preset
from deepseek_v3.model import DeepseekV3ForCausalLM, DeepseekV3Model

__all__ = ["PRESETS", "DeepseekV3ForCausalLM", "DeepseekV3Model", "preset"]
