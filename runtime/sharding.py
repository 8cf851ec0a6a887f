"""One model over several processes: whole in each of them, or a part in each (FSDP2) that can be gathered again.

torch's `fully_shard` itself: accelerate's FSDP plugin is silently ignored on a CPU. Gradients are summed over the
processes, not averaged, since losses here divide by counts over all of them. Left out: tensor and expert parallelism.
"""

import copy
from collections.abc import Callable, Iterable
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
from runtime.packed import decoder_layers
from runtime.weights import checkpoint_views

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_WHOLE_EVERYWHERE = StateDictOptions(full_state_dict=True)
_FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


class DistributedModel(nn.Module):
    """A causal LM, with or without adapters, of which every process has all weights or, once sharded, a part.

    Its forward is any computation with the model: as the root of FSDP2 it has the weights of no layer, such as the
    head's, whole in there and nowhere else.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__()
        self.model, self.world = model, world
        self._skeleton: tuple[nn.Module, ...] = ()  # in a tuple: no part of what is sharded

    def shard(self) -> None:
        """Keep a part of every weight, on this process's device. The model may be on the CPU until now."""
        skeleton = _without_weights(self.model)
        if not hasattr(skeleton, "peft_config"):
            checkpoint_views(skeleton)  # finds out once, for all whole copies, where a checkpoint's tensors lie
        self._skeleton = (skeleton,)
        shard(self, decoder_layers(self.model), self.world)

    @property
    def is_sharded(self) -> bool:
        """Whether every process has but a part."""
        return bool(self._skeleton)

    def forward(self, compute: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """compute(model, *args, **options); tensors with gradients are to be in what it returns, bare or in tuples."""
        return compute(self.model, *args, **options)

    def whole(self, *, everywhere: bool = False) -> nn.Module | None:
        """The model with whole weights: itself, or if it is sharded a copy, on the CPU of the first process and None in
        the others, or `everywhere` on the devices. All must call it."""
        if not self.is_sharded:
            return self.model
        state = whole_state(self, everywhere=everywhere)
        if not state:
            return None
        model = copy.deepcopy(self._skeleton[0])
        model.load_state_dict({name.removeprefix("model."): t for name, t in state.items()}, strict=True, assign=True)
        return model.to(self.world.device) if everywhere else model

    def release(self) -> None:
        """Before weights are written to other than by an optimizer: let go of whole copies that a forward has left."""
        if self.is_sharded:
            self.reshard()  # type: ignore[operator]

    def sum_gradients(self) -> None:
        """Over all processes; FSDP2 has done it already."""
        if not self.is_sharded:
            self.world.sum_gradients(self)


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters have no memory; buffers that no state dict holds (RoPE's) are as they were."""
    parts: dict[int, object] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    parts |= {id(b): b.cpu() for b in model.buffers()}
    return copy.deepcopy(model, memo=parts)


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


def whole_state(module: nn.Module, *, everywhere: bool = False) -> dict[str, Tensor]:
    """State dict with whole tensors on the CPU, in the first process; empty in the others. All must call it.

    everywhere: in all of them, on their devices.
    """
    options = _WHOLE_EVERYWHERE if everywhere else _WHOLE
    return dict(get_model_state_dict(module, options=options))  # type: ignore[arg-type]


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
    options = _FROM_FIRST if isinstance(module, FSDPModule) else StateDictOptions(full_state_dict=True)
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    set_optimizer_state_dict(module, optimizer, state, options=options)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # what was sent from process to process has lists for tuples


def norm_of_gradients(parameters: list[nn.Parameter], max_norm: float) -> float:
    """Clip the gradients to a global norm; returns the norm before, over all processes' shards."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
