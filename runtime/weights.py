"""A model -> the tensors its checkpoint would hold, by checkpoint name: what samplers are loaded with.

Fused experts come apart into the released per-expert names, adapters are merged on the way out, and the model itself
is never touched: merging in place and back would let the base drift by a rounding at every sync.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from runtime.packed import plain_model


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
    state = _state(model)
    starts: dict[int, str] = {}
    numbered: dict[str, Tensor] = {}
    total = 0
    for name, tensor in state.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: its checkpoint tensors can't be views of it")
        starts[total] = name
        numbered[name] = torch.arange(total, total + tensor.numel()).view(tensor.shape)
        total += tensor.numel()
    boundaries = torch.tensor([*starts])
    layout = {}
    for name, numbers in sorted(_as_checkpoint(model, numbered).items()):
        first = int(numbers.flatten()[0])
        start = int(boundaries[torch.searchsorted(boundaries, first, right=True) - 1])
        strides = tuple(
            int(numbers.select(d, 1).flatten()[0]) - first if size > 1 else 1 for d, size in enumerate(numbers.shape)
        )
        offset = first - start
        rebuilt = torch.arange(start, start + state[starts[start]].numel()).as_strided(numbers.shape, strides, offset)
        if not torch.equal(rebuilt, numbers):
            raise ValueError(f"{name} is not a strided part of {starts[start]}: transformers rearranges it on saving")
        base = state[starts[start]].storage_offset()
        layout[name] = (starts[start], tuple(numbers.shape), strides, base + offset)
    return layout


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
    from peft.tuners.tuners_utils import BaseTunerLayer

    deltas: dict[str, Tensor] = {}
    for name, module in causal_lm.named_modules():
        if isinstance(module, BaseTunerLayer):
            # A module holds either its own weight (LoRA on a Linear) or one of its parent's (on fused experts).
            key = f"{name}.{getattr(module, 'parameter_name', 'weight')}".replace(".base_layer", "")
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
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
