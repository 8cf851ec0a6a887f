"""What test_parallel.py has several processes do, each of them one rank on gloo: compute alone, together, compare."""

import faulthandler
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import VOCAB, ours, small
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from deepseek_v3.config import yarn
from deepseek_v3.model import DeepseekV3ForCausalLM
from deepseek_v3.moe import Experts, MoE
from deepseek_v3.parallel import ParallelExperts, Pipeline, expert_parallel, stages, sum_gradients
from runtime.distributed import World
from runtime.logprobs import token_logprobs
from runtime.packed import Packed, pack, packed_hidden
from runtime.sharding import shard, whole_state

PATIENCE = 60
"""Seconds that a rank waits for the others."""


def enter(job: str, rank: int, size: int, arguments: dict[str, Any], output: Path, limit: float) -> None:
    """The process: join the others, do the job, say to `output` what went wrong, after `limit` seconds where it is."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(limit, exit=True, file=2)
    torch.set_num_threads(1)
    place = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    os.environ.update(place)  # for accelerate
    # They meet in a file: a free port may be another's by the time it is listened on.
    meet = f"file://{output.with_name('meet')}"
    dist.init_process_group("gloo", meet, timedelta(seconds=PATIENCE), size, rank)
    getattr(sys.modules[__name__], job)(**arguments)
    dist.destroy_process_group()


def rows_of(lengths: list[list[int]], seed: int = 0) -> list[Packed]:
    """A packed row of random samples for each list of lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [pack([torch.randint(VOCAB, (n,), generator=generator).tolist() for n in row]) for row in lengths]


def loss_of(head: Any, hidden_TD: Tensor, row: Packed) -> Tensor:
    """Cross-entropy of every token of the row that has one before it in its sample, over 100 for all rows together."""
    predicted = [i for i in range(1, len(row.ids_T)) if i not in row.cu_seqlens]
    at = torch.tensor(predicted, dtype=torch.long)
    return -token_logprobs(head, hidden_TD[at - 1], row.ids_T[at], vocab_size=VOCAB)[0].sum() / 100


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """By name, whole; zero for what was not used."""
    return {n: whole(torch.zeros_like(p) if p.grad is None else p.grad) for n, p in module.named_parameters()}


def alone(model: DeepseekV3ForCausalLM, rows: list[Packed]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of all rows, in this process."""
    total = torch.zeros(())
    for row in rows:
        loss = loss_of(model.lm_head, packed_hidden(model, row), row)
        loss.backward()
        total += loss.detach()
    return total, gradients(model)


def assert_close(found: Tensor, expected: Tensor, name: str, limit: float) -> None:
    """By the norm of the difference over the norm: entries of a gradient may cancel to nothing."""
    assert found.shape == expected.shape
    error, norm = float((found - expected).norm()), float(expected.norm())
    assert error <= limit * norm, f"{name}: off by {error:.2e}, its norm is {norm:.2e}"


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 5e-6) -> None:
    """limit: fp32 is off by up to 1e-6, from adding up in another order."""
    assert found.keys() <= expected.keys() and found
    for name, tensor in found.items():
        assert_close(tensor, expected[name], name, limit)


def assert_same_loss(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, "loss", 1e-6)


# --- jobs -------------------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """A model and its loss in one forward, as FSDP2 needs them."""

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, row: Packed) -> Tensor:
        return loss_of(self.model.lm_head, packed_hidden(self.model, row), row)


def sharded() -> None:
    """FSDP2 by runtime.sharding, a row for each rank."""
    world, rows = World(), rows_of([[20, 9], [3, 11, 17]])
    loss, expected = alone(ours(), rows)
    root = Whole(ours())
    state = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    shard(root, root.model.model.layers, world)
    part = root(rows[world.rank])
    part.backward()
    assert_same_loss(world.sum(part.detach()), loss)
    assert_same({name.removeprefix("model."): g for name, g in gradients(root).items()}, expected)
    saved = whole_state(root)
    assert not world.is_main or (saved.keys() == state.keys() and all(torch.equal(saved[n], state[n]) for n in state))


def routed(T: int, K: int, choice: str) -> Tensor:
    """Experts (T, K) of 8: "any", or "hot": all tokens to experts 1 and 2, "far": only to the last ranks' experts."""
    generator = torch.Generator().manual_seed(T)
    experts = {"any": range(8), "hot": range(1, 1 + K), "far": range(8 - K, 8)}[choice]
    order = torch.rand(T, len(experts), generator=generator).argsort(-1)[:, :K]
    return torch.tensor(experts)[order]


def experts(tokens: list[int], choice: str) -> None:
    """The routed experts of one layer, each rank with so many tokens of its own; in fp64."""
    torch.set_default_dtype(torch.float64)
    rank, K, mesh = dist.get_rank(), 2, init_device_mesh("cpu", (len(tokens),))
    generator = torch.Generator().manual_seed(0)

    def layer() -> Experts:
        layer = Experts(small())
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=generator.manual_seed(p.shape[1])))
        return layer

    def inputs() -> tuple[Tensor, Tensor]:
        x_TD = torch.randn(sum(tokens), 32, generator=generator.manual_seed(1)).requires_grad_()
        return x_TD, torch.rand(sum(tokens), K, generator=generator.manual_seed(2)).requires_grad_()

    weight_TD = torch.randn(sum(tokens), 32, generator=generator.manual_seed(3))
    chosen_TK, (x_TD, gates_TK), all_experts = routed(sum(tokens), K, choice), inputs(), layer()
    y_TD = all_experts(x_TD, chosen_TK, gates_TK)
    (y_TD * weight_TD).sum().backward()

    mine = slice(sum(tokens[:rank]), sum(tokens[: rank + 1]))
    moe, given = nn.Module(), layer()
    moe.experts = ParallelExperts(given, mesh)
    assert all(p.is_meta for p in given.parameters())
    assert sum(p.to_local().numel() for p in moe.parameters()) * len(tokens) == sum(
        p.numel() for p in all_experts.parameters()
    )
    own_x, own_gates = (t.detach()[mine].requires_grad_() for t in inputs())
    own_y = moe.experts(own_x, chosen_TK[mine], own_gates)
    (own_y * weight_TD[mine]).sum().backward()
    found = {"y": own_y, "x.grad": own_x.grad, "gates.grad": own_gates.grad}
    assert_same(found, {"y": y_TD[mine], "x.grad": x_TD.grad[mine], "gates.grad": gates_TK.grad[mine]}, limit=1e-14)
    assert_same(gradients(moe.experts), gradients(all_experts), limit=1e-14)


def expert_parallel_model() -> None:
    """A whole model without weights gets those of one process. Each rank has a row of its own, of another length."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (dist.get_world_size(),))
    rows = rows_of([[20, 9], [3, 30, 17]])
    model = ours(small(num_nextn_predict_layers=1))  # which the loss leaves alone
    loss, expected = alone(model, rows)
    state = model.state_dict()
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(model.config)
    expert_parallel(model, mesh)
    assert not any(isinstance(module, Experts) for module in model.modules())
    model.to_empty(device="cpu")
    first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, {} if rank else dict(state), options=first)
    part = loss_of(model.lm_head, packed_hidden(model, rows[rank]), rows[rank])
    part.backward()
    sum_gradients(model, mesh)
    total = part.detach().clone()
    dist.all_reduce(total)
    assert_same_loss(total, loss)
    assert_same(gradients(model), expected)
    saved = whole_state(model)
    assert rank or (saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state))


def refused() -> None:
    """What can't be spread as told, or be given to a pipeline made for something else."""
    group, loss = dist.group.WORLD, loss_of
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with pytest.raises(ValueError, match=r"n_routed_experts=9: not divisible by the 2 ranks"):
        expert_parallel(ours(small(n_routed_experts=9, n_group=1, topk_group=1)), mesh)
    for field, value in {"tie_word_embeddings": True, "num_nextn_predict_layers": 1}.items():
        with pytest.raises(ValueError, match=f"{field}={value}.* set them to False and 0"):
            stages(ours(small(num_hidden_layers=4, **{field: value})), group, loss)
    with pytest.raises(ValueError, match="num_hidden_layers=3: 4 stages need a layer each"):
        stages(ours(), group, loss)
    pipeline = Pipeline(stages(ours(small(num_hidden_layers=4)), group, loss), group, microbatches=4, tokens=9)
    for lengths in ([[9]] * 3, [[9], [4, 5], [10], [9]]):
        with pytest.raises(ValueError, match="microbatches=4 of at most tokens=9"):
            pipeline.step(rows_of(lengths))


def pipelined(layers: int, lengths: list[list[int]]) -> None:
    """Two stages for each rank, a microbatch for each row, and two steps."""
    group = dist.group.WORLD
    rows = rows_of(lengths)
    # V3's own mscale would scale cos and sin by 1, which they are anyway.
    config = small(num_hidden_layers=layers, rope_parameters=yarn(factor=4, original=32) | {"mscale_all_dim": 0.5})
    loss, expected = alone(ours(config), rows)

    def loss_at(head: nn.Module, hidden_TD: Tensor, number: int) -> Tensor:
        return loss_of(head, hidden_TD, rows[number])

    own = stages(ours(config), group, loss_at)
    pipeline = Pipeline(own, group, microbatches=len(rows), tokens=max(len(row.ids_T) for row in rows))
    for step in (1, 2):
        found = pipeline.step(rows)
        assert (found is not None) == (dist.get_rank() == 0)
        if found is not None:
            assert_same_loss(found, loss)
        for stage in own:
            assert_same({name: g / step for name, g in gradients(stage).items()}, expected)
    names = [None] * dist.get_world_size()
    dist.all_gather_object(names, [name for stage in own for name in stage.state_dict()])
    assert sorted(name for part in names for name in part) == sorted(ours(config).state_dict())


def together(pp: int, dp: int, ep: int) -> None:
    """Pipeline, FSDP2 and expert parallelism at once, put together as deepseek_v3/parallel.py says."""
    mesh = init_device_mesh("cpu", (pp, dp, ep), mesh_dim_names=("pp", "dp", "ep"))
    config = small(num_hidden_layers=2 * pp)
    pipelines, microbatches = dp * ep, 2 * pp
    lengths = [[3 + i, 20 - i, 7] for i in range(pipelines * microbatches)]
    rows = rows_of(lengths)
    loss, expected = alone(ours(config), rows)

    fed = mesh["dp", "ep"]._flatten()
    mine = rows[fed.get_local_rank() :: pipelines]
    model = ours(config)
    expert_parallel(model, mesh["ep"])
    own = stages(model, mesh["pp"].get_group(), lambda head, hidden_TD, number: loss_of(head, hidden_TD, mine[number]))
    for stage in own:
        for block in stage.blocks:
            if isinstance(block.mlp, MoE):
                fully_shard(block.mlp.experts, mesh=mesh["dp"])
            fully_shard(block, mesh=fed)
        fully_shard(stage, mesh=fed)
        for module in stage.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    pipeline = Pipeline(own, mesh["pp"].get_group(), microbatches=microbatches, tokens=30)
    for step in (1, 2):
        found = pipeline.step(mine)
        assert (found is not None) == (mesh.get_local_rank("pp") == 0)
        if found is not None:
            dist.all_reduce(found, group=fed.get_group())
            assert_same_loss(found, loss)
        for stage in own:
            assert_same({name: g / step for name, g in gradients(stage).items()}, expected)


def fails() -> None:
    """In the last rank."""
    if dist.get_rank():
        raise KeyError("rank 1")


def hangs() -> None:
    """In all of them."""
    time.sleep(PATIENCE)
