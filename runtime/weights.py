"""A model -> the tensors its checkpoint would hold, by checkpoint name: what samplers are loaded with.

Fused experts come apart into the released per-expert names, adapters are merged on the way out, and the model itself
is never touched: merging in place and back would let the base drift by a rounding at every sync.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from runtime.packed import plain_model


def save_pretrained(folder: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a checkpoint that transformers and vLLM load as it is; adapters are merged in."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().clone() for name, tensor in checkpoint_tensors(model)}
    save_torch_state_dict(weights, folder)
    causal_lm = plain_model(model)
    causal_lm.config.architectures = [type(causal_lm).__name__]  # vLLM takes a model that names none for an encoder
    causal_lm.config.save_pretrained(folder)
    if causal_lm.generation_config is not None:
        causal_lm.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def checkpoint_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) of every weight. Without adapters these are views of the model's own storage."""
    if hasattr(model, "peft_config"):
        causal_lm = plain_model(model)
        yield from sorted(_as_checkpoint(causal_lm, _merged_state(causal_lm)).items())
    else:
        yield from checkpoint_views(model).items()


def checkpoint_views(model: nn.Module) -> dict[str, Tensor]:
    """Checkpoint name -> a view of the model's storage: writing to it changes the model.

    Which elements a name stands for is asked of transformers itself: its save-time conversion is run once over
    tensors that hold their own element numbers, and what comes out says where each element lives.
    """
    layout: dict[str, tuple] | None = model.__dict__.get("_checkpoint_layout")
    if layout is None:
        layout = model.__dict__["_checkpoint_layout"] = _layout(model)
    state = _state(model)
    return {name: state[of].as_strided(*where) for name, (of, *where) in layout.items()}


def _layout(model: nn.Module) -> dict[str, tuple]:
    """Checkpoint name -> (model's name, shape, strides, offset). One tensor at a time: the numbers are int64."""
    layout: dict[str, tuple] = {}
    for source, tensor in _state(model).items():
        if not tensor.is_contiguous():
            raise ValueError(f"{source} is not contiguous: its checkpoint tensors can't be views of it")
        numbers = torch.arange(tensor.numel())
        for name, part in _as_checkpoint(model, {source: numbers.view(tensor.shape)}).items():
            first = int(part.flatten()[0])
            strides = tuple(
                int(part.select(d, 1).flatten()[0]) - first if size > 1 else 1 for d, size in enumerate(part.shape)
            )
            if not torch.equal(numbers.as_strided(part.shape, strides, first), part):
                raise ValueError(f"{name} is not a strided part of {source}: transformers rearranges it on saving")
            layout[name] = (source, tuple(part.shape), strides, tensor.storage_offset() + first)
    return dict(sorted(layout.items()))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def _as_checkpoint(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if model.config.tie_word_embeddings:
        tied = set(getattr(model, "_tied_weights_keys", None) or {})
        state = {name: tensor for name, tensor in state.items() if name not in tied}
    return revert_weight_conversion(model, state)


@torch.no_grad()
def _merged_state(causal_lm: nn.Module) -> dict[str, Tensor]:
    """base + Σ adapters' ΔW, under the names the model has without adapters."""
    from peft.tuners.lora import LoraLayer

    deltas: dict[str, Tensor] = {}
    for name, module in causal_lm.named_modules():
        if isinstance(module, LoraLayer):
            # A module holds either its own weight (LoRA on a Linear) or one of its parent's (on fused experts).
            key = f"{name}.{getattr(module, 'parameter_name', 'weight')}".replace(".base_layer", "")
            for adapter in module.active_adapters:
                if module.use_dora.get(adapter) or module.lora_bias.get(adapter):
                    raise ValueError(f"{name}: DoRA and LoRA biases can't be merged on the way out; use plain LoRA")
                if adapter in module.r:
                    deltas[key] = deltas.get(key, 0) + module.get_delta_weight(adapter)
    state: dict[str, Tensor] = {}
    for name, tensor in _state(causal_lm).items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer", "")
        delta = deltas.pop(plain, None)
        state[plain] = tensor if delta is None else tensor + delta.to(tensor.dtype)
    if deltas:
        raise ValueError(f"adapters on {sorted(deltas)} have no base weight to be merged into")
    return state
