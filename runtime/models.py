"""A checkpoint folder or hub name -> a causal LM ready for packed training, and its tokenizer.

DeepSeek-V3 checkpoints load into our own definition, any other architecture into transformers'. No remote code runs.
"""

import hashlib
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.config import extended
from runtime.errors import UserError
from runtime.packed import plain_model  # which also registers the "packed" attention

log = logging.getLogger(__name__)


def load_causal_lm(
    path: str | Path, *, dtype: torch.dtype = torch.float32, context: int | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load weights and definition. Raises `UserError` naming the path when there is no checkpoint.

    context: tokens a DeepSeek-V3 is extended to, as `deepseek_v3.config.extended` does.
    """
    config = _from_path(AutoConfig.from_pretrained, path)
    if context is not None:
        if config.model_type != "deepseek_v3":
            raise UserError(
                f"context={context}: only for a DeepSeek-V3, and model={str(path)!r} is {config.model_type}"
            )
        kwargs |= extended(config, context)
    if config.model_type == "deepseek_v3":
        load = DeepseekV3ForCausalLM.from_pretrained
        model, info = _from_path(load, path, dtype=dtype, output_loading_info=True, **kwargs)
        _leave_out_empty_mtp(model, info["missing_keys"])
        return model
    return _from_path(AutoModelForCausalLM.from_pretrained, path, dtype=dtype, attn_implementation="packed", **kwargs)


def mtp_layer(model: nn.Module) -> nn.Module | None:
    """The layer that predicts the token after the next, of a DeepSeek-V3 that has one."""
    return getattr(plain_model(model).base_model, "mtp", None)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a checkpoint."""
    return _from_path(AutoTokenizer.from_pretrained, path)


def end_token_ids(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a turn: the tokenizer's, and what the checkpoint's generation settings add to it."""
    try:
        ends = _from_path(GenerationConfig.from_pretrained, path).eos_token_id
    except UserError:
        ends = None
    listed = ends if isinstance(ends, list) else [ends]
    return sorted({end for end in (tokenizer.eos_token_id, *listed) if end is not None})


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides which tokens a prompt becomes and which one ends a completion."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _leave_out_empty_mtp(model: DeepseekV3ForCausalLM, missing: Collection[str]) -> None:
    """transformers writes num_nextn_predict_layers=1 and none of the layer: without this it would be random weights."""
    if (mtp := model.model.mtp) is None:
        return
    last = model.config.num_hidden_layers
    if {f"model.layers.{last}.{name}" for name, _ in mtp.named_parameters()} <= set(missing):
        log.warning("config.json names an MTP layer that the checkpoint doesn't hold: left out")
        del model.model.layers[last]
        model.config.num_nextn_predict_layers = 0


def _from_path(load: Any, path: str | Path, **kwargs: Any) -> Any:
    if "/" in str(path) and str(path).startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise UserError(f"model={str(path)!r}: no such folder; pass a checkpoint folder or a hub name")
    # Its bars for every load of a few megabytes would drown what a run has to say.
    hf_logging.disable_progress_bar()
    try:
        return load(str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else str(path), **kwargs)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"model={str(path)!r}: can't be loaded: {first}") from error
