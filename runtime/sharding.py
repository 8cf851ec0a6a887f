"""One model over several processes (FSDP2): spread its weights, gather them whole again.

torch's `fully_shard` itself: accelerate's FSDP plugin is silently ignored on a CPU. Gradients are summed over the
processes, not averaged, since losses here divide by counts over all of them. Left out: tensor and expert parallelism.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from runtime.distributed import World

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def shard(root: nn.Module, layers: Iterable[nn.Module], world: World) -> None:
    """Spread every weight of `root` over all processes; each of `layers` is made whole only while it runs.

    What is in no layer (embeddings, head) is whole during the root's forward and backward.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(module, FSDPModule)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """State dict with whole tensors on the CPU, in the first process; empty in the others. All must call it."""
    return dict(get_model_state_dict(module, options=_WHOLE))  # type: ignore[arg-type]


def whole_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name, whole, in the first process; empty in the others. All must call it.

    The same from one process and from several, so a run may go on with another number of them. Empty before a first
    step: torch would take one, of zeros, to have a state to give.
    """
    if not optimizer.state:
        return {}
    return get_optimizer_state_dict(module, optimizer, options=_WHOLE)


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put back what `whole_optimizer_state` gave, each process its part; `state` is looked at in the first one."""
    if not state:
        return
    options = _FROM_FIRST if is_sharded(module) else StateDictOptions(full_state_dict=True)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    set_optimizer_state_dict(module, optimizer, state, options=options)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # what was sent from process to process has lists for tuples


def norm_of_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Clip the gradients to a global norm; returns the norm before, over all processes' shards."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
