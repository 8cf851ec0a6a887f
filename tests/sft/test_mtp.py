"""SFT with the loss of the MTP layer: its own mean, one gradient however divided, and no trace where it is off."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deepseek_v3
from runtime.distributed import World
from runtime.errors import UserError
from runtime.metrics import read_metrics
from runtime.models import load_causal_lm
from runtime.packed import Targets, logprobs_to_sum, pack
from sft.balance import Balance
from sft.batch import load_batch
from sft.config import CheckpointConfig, EvaluationConfig, LoraConfig, OptimConfig
from sft.data import load_data
from sft.mix import SourceConfig
from sft.train import Result, train

QUIET: dict[str, Any] = dict(evaluation=EvaluationConfig(), checkpoint=CheckpointConfig(every=0))


@pytest.fixture(scope="module")
def mtp(v3, tokenizer, tmp_path_factory) -> Path:
    """The tests' V3 with a layer more."""
    folder = tmp_path_factory.mktemp("mtp")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(v3, num_nextn_predict_layers=1)
        fresh = deepseek_v3.DeepseekV3ForCausalLM(model.config)
    model.model.mtp.load_state_dict(fresh.model.mtp.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def go(config, mtp, tmp_path_factory):
    def run(**changes: Any) -> Result:
        folder = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sft.train.write_report", lambda folder, **_: None)
            return train(dataclasses.replace(config, **{"model": str(mtp), **QUIET, **changes}, run_dir=str(folder)))

    return run


@pytest.fixture(scope="module")
def trained(go) -> Result:
    return go(mtp_loss=0.3)


def series(run_dir: Path, key: str) -> list[float]:
    return [m[key] for m in read_metrics(run_dir / "metrics.jsonl") if key in m]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints/final/model.safetensors")


def of_the_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.2.")}


def assert_same(a: Path, b: Path, limit: float = 1e-5) -> None:
    for key in ("loss", "mtp_loss"):
        assert series(a, key) == pytest.approx(series(b, key), rel=limit)
    for name, tensor in weights(a).items():
        torch.testing.assert_close(tensor, weights(b)[name], rtol=0, atol=limit, msg=name)


def test_the_first_steps_losses_are_means_over_trained_tokens_one_and_two_ahead(
    go, mtp, config, tokenizer, tmp_path
) -> None:
    """Of one unpacked example at a time, from logits. A prompt of one token has a target that is only one ahead."""
    short = tmp_path / "short.jsonl"
    short.write_text(json.dumps({"prompt": "a", "completion": "bcdefg"}) + "\n")
    config = dataclasses.replace(config, mix=(*config.mix, SourceConfig(path=str(short), epochs=3)))
    once: dict[str, Any] = dict(rows_per_step=1000, epochs=1, optim=OptimConfig(lr=1e-9, final_lr=1e-9))
    result = go(mtp_loss=0.3, mix=config.mix, **once)
    model: Any = load_causal_lm(mtp).requires_grad_(False)
    data = load_data(config, tokenizer, World())
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for number in data.epoch_examples(0):
        ids, trained = (torch.from_numpy(x) for x in data.train[int(number)])
        outputs = model.model(ids[None].long(), output_mtp=True)
        for ahead, hidden in ((1, outputs.last_hidden_state), (2, outputs.mtp_hidden_state)):
            logp = model.lm_head(hidden[0]).double().log_softmax(-1)
            for t in range(ahead, len(ids)):
                if trained[t]:
                    sums[ahead - 1] += torch.tensor([-float(logp[t - ahead, ids[t]]), 1.0], dtype=torch.float64)
    assert sums[0, 1] - sums[1, 1] == 3
    means = sums[:, 0] / sums[:, 1]
    assert series(result.run_dir, "loss") == pytest.approx([float(means[0])], rel=1e-5)
    assert series(result.run_dir, "mtp_loss") == pytest.approx([float(means[1])], rel=1e-5)


def test_both_are_learnt_and_the_main_model_feels_it(trained, go) -> None:
    losses = series(trained.run_dir, "mtp_loss")
    assert len(losses) == trained.steps == 3 and losses[-1] < losses[0] - 0.3
    off = go()
    assert not series(off.run_dir, "mtp_loss") and series(off.run_dir, "loss")[0] == series(trained.run_dir, "loss")[0]
    moved, plain = weights(trained.run_dir), weights(off.run_dir)
    assert not torch.equal(moved["model.layers.0.mlp.up_proj.weight"], plain["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("changes", [{}, {"lora": LoraConfig(rank=2)}], ids=["full", "adapters"])
def test_off_it_stays_as_it_was_to_the_bit(go, mtp, changes) -> None:
    after = of_the_layer(weights(go(**changes).run_dir))
    before = of_the_layer(load_file(mtp / "model.safetensors"))
    assert after.keys() == before.keys() and len(before) > 20
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_off_it_stays_as_it_was_where_processes_add_up_gradients_themselves(commands, mtp, tmp_path) -> None:
    """They give a weight without a gradient zeros, and weight decay would move it."""
    ended = commands.sft(tmp_path / "run", f"--model={mtp}", "--shard=false", "--evaluation.every=0", processes=2)
    assert ended.codes == [0, 0], ended.output
    after, before = (
        of_the_layer(tensors) for tensors in (weights(tmp_path / "run"), load_file(mtp / "model.safetensors"))
    )
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("changes", [{"rows_per_pass": 1}, {"rows_per_pass": 3}, {"gradient_checkpointing": True}])
def test_passes_and_activations_computed_again_change_nothing(trained, go, changes) -> None:
    assert_same(go(mtp_loss=0.3, **changes).run_dir, trained.run_dir)


def test_two_sharded_processes_come_to_what_one_does(commands, mtp, tmp_path) -> None:
    flags = (f"--model={mtp}", "--mtp_loss=0.3", "--evaluation.every=0", "--rows_per_step=7", "--rows_per_pass=1")
    for processes in (1, 2):
        ended = commands.sft(tmp_path / str(processes), *flags, processes=processes)
        assert ended.codes == [0] * processes, ended.output
    assert_same(tmp_path / "1", tmp_path / "2")


def test_no_target_is_in_another_example_or_at_its_beginning(data, config, tokenizer) -> None:
    examples = load_data(config, tokenizer, World()).train
    numbers = list(range(6))
    batch = load_batch(examples, numbers)
    example_T = torch.arange(6).repeat_interleave(torch.tensor(batch.packed.layout.lengths))
    states = batch.further.states_C
    assert torch.equal(example_T[states], example_T[states + 2])
    assert torch.equal(batch.packed.ids_T[states + 2], batch.further.ids_C)
    trained = torch.cat([torch.from_numpy(examples[n][1]) for n in numbers])
    assert bool(trained[states + 2].all()) and len(states) > 20


def test_a_model_without_the_layer_and_adapters_are_refused(go, v3, llama) -> None:
    for model in (v3, llama):
        with pytest.raises(UserError, match=r"mtp_loss=0.3: model=.* has no MTP layer.*set mtp_loss to 0"):
            go(model=str(model), mtp_loss=0.3)
    with pytest.raises(UserError, match="no adapters in the MTP layer"):
        go(mtp_loss=0.3, lora=LoraConfig(rank=2))


@torch.no_grad()
def test_the_layers_router_is_balanced_where_it_ran_and_left_alone_where_not(mtp) -> None:
    model: Any = load_causal_lm(mtp)
    packed = pack([list(range(5, 25)), list(range(30, 43))])
    last = Targets(torch.tensor([3]), torch.tensor([7]))
    losses, moved = [], []
    for further in (None, last):
        balance = Balance(model)
        with balance.watching():
            logprobs_to_sum(model, packed, last, further)
            losses.append(float(balance.loss(packed.layout)))
        balance.update(0.25, World())
        moved.append([bool(router.e_score_correction_bias.any()) for router in balance.routers])
    assert moved == [[True, False], [True, True]]
    assert losses[1] - losses[0] >= 0.5 * len(packed.layout.lengths)  # one more layer's share, about 1 a sequence
