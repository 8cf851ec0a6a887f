"""The models that samplers in processes and behind HTTP are compared with the sampler itself on."""

import torch
from transformers import PreTrainedModel

import deepseek_v3
from deepseek_v3.config import yarn

VOCAB = 50


def v3(seed: int) -> PreTrainedModel:
    sizes = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=4,
        max_position_embeddings=2048,
        rope_parameters=yarn(factor=4, original=512),
    )
    return randomize(deepseek_v3.DeepseekV3ForCausalLM(deepseek_v3.preset("tiny", **sizes)).eval(), seed)


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int, std: float = 0.15) -> PreTrainedModel:
    """Weights that matter: at the usual std of 0.02 most faults stay invisible."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        if "inv_freq" not in name:
            tensor.copy_((1.0 if "norm" in name else 0.0) + std * torch.randn(tensor.shape, generator=generator))
    return model
