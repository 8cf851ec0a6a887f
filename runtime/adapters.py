"""A model -> the same model with low-rank adapters to train (arXiv 2106.09685)."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from runtime.errors import UserError
from runtime.models import mtp_layer
from runtime.settings import LoraConfig

ADAPTER = "adapter"
"""Folder of a checkpoint that peft loads."""

ATTENTION_PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
)


def add_adapters(base: PreTrainedModel, lora: LoraConfig, seed: int) -> nn.Module:
    """LoRA on the named modules; the base is frozen. Adapters start as zero, so π is unchanged.

    None in an MTP layer: π doesn't go through it.
    """
    import peft

    base.requires_grad_(False)
    targets = list(lora.target_modules)
    if lora.target_modules == "attention":
        present = {name.rsplit(".", 1)[-1] for name, _ in base.named_modules()}
        targets = [name for name in ATTENTION_PROJECTIONS if name in present]
        if not targets:
            raise UserError(
                "lora.target_modules='attention': the model has none of "
                f"{', '.join(ATTENTION_PROJECTIONS)}; name its modules instead"
            )
    excluded = None if mtp_layer(base) is None else rf"model\.layers\.{base.config.num_hidden_layers}\..*"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, exclude_modules=excluded)
        return peft.get_peft_model(base, config)


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Give adapters the weights that `save_pretrained` of a model with such adapters wrote."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder)))
