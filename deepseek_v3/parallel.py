"""A model larger than one process: experts spread over ranks, and layers in a pipeline. Neither changes the maths:
losses and gradients are those of one process that has all the tokens, to rounding.

Expert parallelism (`expert_parallel`): each rank holds E / P experts and its own tokens; a token travels to the ranks
of its experts and its results travel back (arXiv 2412.19437, 3.2.2), by torch's all-to-all. Weights are torch DTensors
sharded by expert, so torch's distributed state dicts give and take them whole.

Pipeline (`stages`, `Pipeline`): layers in 2·P runs, the rank r of P holding runs r and 2P − 1 − r, under torch's
DualPipe-V schedule (arXiv 2412.19437, 3.2.1, in the V form of DeepSeek's DualPipe repository). Rank 0 has both ends.

Gradients are sums, never means: the loss divides by counts over everything, so ranks and microbatches add up to one
large batch. Over ranks with expert parallelism alone, `sum_gradients` adds them up.

With FSDP2, on one mesh of ("pp", "dp", "ep"):
- `expert_parallel(model, mesh["ep"])` first, then, for a pipeline, `stages(model, mesh["pp"].get_group(), ...)`;
- each layer's `mlp.experts` is `fully_shard`ed over mesh["dp"], then the layer and the root (the model, or each stage)
  over the flat mesh of dp and ep, whose ranks all have tokens of their own; each with
  `set_gradient_divide_factor(1.0)`, as runtime/sharding.py does. FSDP2 then adds the gradients up, also the experts'
  (over dp; over ep tokens have done so), and `sum_gradients` isn't needed;
- `Pipeline` after that. torch's schedule gathers a stage's weights before it runs, and sums gradients at its end.

Left out: overlapping communication with computing, which DualPipe is made for: torch interleaves one microbatch's
forward with another's backward but runs them in turn unless a function for OVERLAP_F_B is registered with the schedule;
DeepEP's kernels, and sending a token once to a rank that has several of its experts; tensor parallelism; the MTP layer
and tied embeddings in a pipeline; clipping by one norm over parameters on different meshes.

Shapes: T tokens of a rank, D hidden, E experts of all P ranks, K chosen per token, S = T·K (token, expert) pairs,
R pairs received; M microbatches, N tokens that a microbatch has at most.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup, all_reduce, get_rank, get_world_size
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call

from deepseek_v3.block import Block
from deepseek_v3.model import DeepseekV3ForCausalLM
from deepseek_v3.moe import Experts, MoE
from deepseek_v3.packing import Layout
from deepseek_v3.rope import cos_sin, cos_sin_scale, inverse_frequencies

# --- experts ----------------------------------------------------------------------------------------------------------


def expert_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the routed experts of every layer over the ranks of a mesh of one dimension, in place.

    All ranks hold the same weights, or none yet (the meta device), and keep their part. From then on all of them run
    every forward and backward pass together, a rank without tokens included.
    """
    for moe in [module for module in model.modules() if isinstance(module, MoE)]:
        moe.experts = cast(Experts, ParallelExperts(moe.experts, mesh))


class ParallelExperts(nn.Module):
    """In the place of `Experts`: the same signature and names, its parameters those of this rank's experts."""

    def __init__(self, experts: nn.Module, mesh: DeviceMesh) -> None:
        """experts: any module whose parameters have the experts in dimension 0; it gives up its weights."""
        super().__init__()
        self.mesh = mesh
        for name, weight in experts.named_parameters():
            self.E = len(weight)
            if self.E % mesh.size():
                raise ValueError(f"n_routed_experts={self.E}: not divisible by the {mesh.size()} ranks of the mesh")
            part = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
            self.register_parameter(name, nn.Parameter(part, weight.requires_grad))
        self._compute = (experts.to("meta"),)  # in a tuple: no part of the model

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Σ_k gate_k · expert_k(x), the experts wherever they are. No token is dropped, whatever the load."""
        T, K = chosen_TK.shape
        P, group = self.mesh.size(), self.mesh.get_group()
        expert_S = chosen_TK.flatten()
        order_S = expert_S.argsort(stable=True)  # by expert, and so by rank
        sent_PE = torch.bincount(expert_S, minlength=self.E).view(P, -1)
        received_PE = all_to_all_single(sent_PE, None, None, group)
        sent, received = sent_PE.sum(1).tolist(), received_PE.sum(1).tolist()

        x_RD = all_to_all_single_autograd(x_TD[order_S // K], received, sent, group)
        own_R = torch.arange(self.E // P, device=x_TD.device).repeat(P).repeat_interleave(received_PE.flatten())
        weights = {name: cast(DTensor, part).to_local() for name, part in self.named_parameters()}
        # Gates are applied where the token lives, which also keeps their gradient there.
        y_RD = functional_call(self._compute[0], weights, (x_RD, own_R[:, None], gates_TK.new_ones(len(own_R), 1)))
        y_SD = all_to_all_single_autograd(y_RD, sent, received, group)

        place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(T * K, device=order_S.device))
        return (y_SD[place_S].view(T, K, y_SD.shape[1]) * gates_TK[..., None].to(y_SD.dtype)).sum(1)


def sum_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Add up, in place, gradients of what all ranks of `mesh` hold whole; those of sharded weights are complete."""
    for p in model.parameters():
        if p.requires_grad and not isinstance(p, DTensor):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            all_reduce(p.grad, group=mesh.get_group())


# --- pipeline ---------------------------------------------------------------------------------------------------------

Loss = Callable[[nn.Module, Tensor, int], Tensor]
"""The head, final hidden states (T, D) and the microbatch's number -> its share of the loss.

The backward of what it calls may run twice, for inputs and for weights: `runtime.logprobs.token_logprobs` allows that,
`summed_logprobs` doesn't.
"""


class Stage(nn.Module):
    """A run of blocks, the first with the embedding before it, the last with the final norm, the head and the loss.

    Parameters and their names are the model's own: the stages' state dicts together are the model's.
    """

    def __init__(self, model: DeepseekV3ForCausalLM, index: int, of: int, loss: Loss) -> None:
        super().__init__()
        self.config, self.index, self.loss = model.config, index, loss
        self.first, self.last = index == 0, index == of - 1
        self.layouts: Sequence[Layout] = ()
        self.model = nn.Module()
        blocks = spread(self.config.num_hidden_layers, of)[index]
        self.model.layers = nn.ModuleDict({str(i): model.model.layers[i] for i in blocks})
        if self.first:
            self.model.embed_tokens = model.model.embed_tokens
        if self.last:
            self.model.norm, self.lm_head = model.model.norm, model.lm_head

    @property
    def blocks(self) -> Iterator[Block]:
        """Its layers."""
        return cast(Iterator[Block], iter(cast(nn.ModuleDict, self.model.layers).values()))

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        """Ids (1, N), in the first stage, or states (N, D) of microbatch `number` (1,) -> states (N, D), or the loss.

        torch sends tensors of one size, so rows travel filled up to N; only their T tokens are computed.
        """
        layout = self.layouts[int(number)]
        T = layout.cu_seqlens[-1]
        x_TD = cast(nn.Module, self.model.embed_tokens)(x[0, :T]) if self.first else x[:T]
        frequencies = inverse_frequencies(self.config).to(x.device)
        cos, sin = cos_sin(layout.positions(x.device), frequencies, cos_sin_scale(self.config), dtype=x_TD.dtype)
        for block in self.blocks:
            x_TD = block(x_TD, cos, sin, layout)
        if not self.last:
            return F.pad(x_TD, (0, 0, 0, x.shape[0 if x.is_floating_point() else 1] - T))
        return self.loss(self.lm_head, cast(nn.Module, self.model.norm)(x_TD), int(number))


def stages(model: DeepseekV3ForCausalLM, group: ProcessGroup, loss: Loss) -> list[Stage]:
    """This rank's two stages of the model, which is taken apart, not copied; drop it to free the others' weights."""
    if model.config.tie_word_embeddings or model.model.mtp is not None:
        raise ValueError(
            f"tie_word_embeddings={model.config.tie_word_embeddings}, "
            f"num_nextn_predict_layers={model.config.num_nextn_predict_layers}: a pipeline's last stage has no "
            "embedding; set them to False and 0"
        )
    rank, of = get_rank(group), 2 * get_world_size(group)
    return [Stage(model, index, of, loss) for index in (rank, of - 1 - rank)]


def spread(layers: int, over: int) -> list[range]:
    """Layers of each stage; where they don't come out even, stages in the middle get one more: those at the ends have
    embedding or head besides."""
    if layers < over:
        raise ValueError(f"num_hidden_layers={layers}: {over} stages need a layer each; use fewer ranks")
    each, more = divmod(layers, over)
    first = (over - more) // 2
    sizes = [each + (first <= i < first + more) for i in range(over)]
    starts = [sum(sizes[:i]) for i in range(over)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


class Pipeline:
    """This rank's stages under the DualPipe-V schedule."""

    def __init__(self, own: Sequence[Stage], group: ProcessGroup, *, microbatches: int, tokens: int) -> None:
        """tokens: that a microbatch has at most. microbatches: of each step; at least as many as there are stages."""
        self.own, self.microbatches, self.tokens = own, microbatches, tokens
        for module in (module for stage in own for module in stage.modules()):
            if isinstance(module, FSDPModule):
                # torch looks for a stage's weights before the backward for inputs: one that FSDP2 let go of after the
                # forward would get no gradient, and nothing would say so.
                module.set_reshard_after_forward(False, recurse=False)
        weight = next(own[0].parameters())
        self.device = weight.device
        # Given all shapes, torch needs no trial run, which would show the routers' hooks a row twice.
        ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
        states = torch.empty(tokens, own[0].config.hidden_size, dtype=weight.dtype, device="meta", requires_grad=True)
        loss = torch.empty((), device="meta", requires_grad=True)
        places: list[_PipelineStageBase] = [
            PipelineStage(
                stage,
                stage.index,
                2 * get_world_size(group),
                self.device,
                input_args=ids if stage.first else states,
                output_args=loss if stage.last else states,
                group=group,
            )
            for stage in own
        ]
        self.schedule = ScheduleDualPipeV(places, microbatches, loss_fn=lambda loss, _: loss, scale_grads=False)

    def step(self, rows: Sequence[tuple[Tensor, Layout]]) -> Tensor | None:
        """Forward and backward of all microbatches, (ids (T,), layout) each, the same on all ranks; gradients add up.

        Returns the sum of their losses on the rank that has the last stage, the first rank; None on the others.
        """
        if len(rows) != self.microbatches or max(len(ids) for ids, _ in rows) > self.tokens:
            raise ValueError(
                f"{len(rows)} rows of up to {max(len(ids) for ids, _ in rows)} tokens: the pipeline was made for "
                f"microbatches={self.microbatches} of at most tokens={self.tokens}"
            )
        for stage in self.own:
            stage.layouts = [layout for _, layout in rows]
        ids_MN = torch.stack([F.pad(ids, (0, self.tokens - len(ids))) for ids, _ in rows]).to(self.device)
        number_M = torch.arange(len(rows))
        losses: list[Tensor] = []
        self.schedule.step(ids_MN, number=number_M, target=number_M, losses=losses, return_outputs=False)
        return torch.stack(losses).sum() if losses else None
