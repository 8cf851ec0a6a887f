"""Checkpoint-named tensors -> the model inside a live in-process vLLM engine.

On a CPU, vLLM's own in-place reload fails or silently keeps the old weights: its linear layers pack their
weights and empty the parameter. So the whole model object is built anew, loaded through vLLM's own loader,
and put in the old one's place with the old KV cache. On CUDA vLLM's `reload_weights` does the work.

Leaves out: quantised models on a CPU, tensor parallelism, engines in another process. Old and new model exist
together for a moment. vLLM is imported inside the functions; it must not load with this module.
"""

from typing import Any

import torch
from torch import nn

from sampling.attest import DivergedPolicy, WeightsMismatch
from sampling.fingerprint import observed
from sampling.protocol import Fingerprints, Weights


def load_into(llm: Any, weights: Weights) -> Fingerprints:
    """Replace the weights of `llm` (vllm.LLM, in process) and drop its prefix cache; fingerprints as sent.

    Raises WeightsMismatch naming what was refused or never filled; the engine's weights are then undefined.
    """
    from vllm.platforms import current_platform

    received: Fingerprints = {}
    last = "the first tensor"

    def stream() -> Weights:
        nonlocal last
        for name, tensor in observed(weights, received):
            last = f"{name} {list(tensor.shape)}"
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                raise DivergedPolicy(f"{name} holds NaN: lower the learning rate, or resume from before")
            yield name, tensor

    engine = llm.llm_engine
    try:
        if current_platform.is_cpu():
            _rebuild(engine.model_executor.driver_worker.worker, stream(), received)
        else:
            engine.collective_rpc("reload_weights", kwargs={"weights_iterator": stream()})
    except (WeightsMismatch, DivergedPolicy):
        raise
    except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as error:
        # vLLM's loaders assert shapes without saying whose.
        raise WeightsMismatch(f"while loading {last}: {error!r}", received=received) from error
    if not engine.reset_prefix_cache():
        raise WeightsMismatch("vLLM would not reset its prefix cache: are requests still running?")
    return received


def _rebuild(worker: Any, weights: Weights, received: Fingerprints) -> None:
    """Build, fill and swap in a new model object for `worker` (vLLM's CPU worker)."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype

    vllm_config, runner = worker.vllm_config, worker.model_runner
    model_config = vllm_config.model_config
    layers = vllm_config.compilation_config.static_forward_context  # layer name -> attention or expert layer
    moe_layers = vllm_config.compilation_config.static_all_moe_layers
    old_layers, old_moe_layers = dict(layers), list(moe_layers)
    layers.clear()  # vLLM refuses to register a layer name twice
    moe_layers.clear()
    try:
        with (
            torch.no_grad(),
            set_current_vllm_config(vllm_config),
            set_default_torch_dtype(model_config.dtype),
        ):
            model = initialize_model(vllm_config=vllm_config)
            for parameter in model.parameters():
                parameter.fill_(torch.nan)  # so that what no checkpoint tensor fills can be found
            model.load_weights(weights)
            if holes := _unfilled(model):
                raise WeightsMismatch(f"never filled in vLLM's model: {'; '.join(holes)}", received=received)
            process_weights_after_loading(model, model_config, torch.device("cpu"))
    except BaseException:
        layers.clear()
        layers.update(old_layers)
        moe_layers[:] = old_moe_layers
        raise
    for name, layer in layers.items():
        # What vLLM sets when it binds the KV cache, once in an engine's life.
        for attribute in ("kv_cache", "isa"):
            if hasattr(old_layers[name], attribute):
                setattr(layer, attribute, getattr(old_layers[name], attribute))
    runner.model = model.eval()


def _unfilled(model: nn.Module, most: int = 8) -> list[str]:
    """vLLM's parameters with elements still NaN, with the experts or rows concerned."""
    holes = []
    for name, parameter in model.named_parameters():
        empty = parameter.isnan().reshape(parameter.shape[0], -1).any(dim=1).nonzero().flatten().tolist()
        if empty:
            unit = "experts" if parameter.ndim == 3 else "rows"
            shown = str(empty) if len(empty) <= most else f"{len(empty)} of {parameter.shape[0]}, from {empty[0]}"
            holes.append(f"{name} ({unit} {shown})")
    return [*holes[:most], f"and {len(holes) - most} more"] if len(holes) > most else holes
