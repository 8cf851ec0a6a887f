"""Whole runs of the loop in this process, on models of a few thousand parameters."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import deepseek_v3
from runtime.errors import UserError
from runtime.metrics import read_metrics
from runtime.models import load_causal_lm, load_tokenizer
from runtime.report.read import read_run
from runtime.report.rollouts import browse
from runtime.run_folder import open_run
from sft.chat import encode_conversation
from sft.config import CheckpointConfig, EvaluationConfig, LoraConfig, OptimConfig
from sft.mix import SourceConfig
from sft.train import NonFinite, Result, train

QUIET = EvaluationConfig()
"""No evaluation."""
FINAL_ONLY = CheckpointConfig(every=0)


@pytest.fixture(scope="module")
def go(config, tmp_path_factory):
    """Train with the tests' settings and these changes, in a folder of its own unless one is given."""

    def run(run_dir: Path | None = None, *, page: bool = False, **changes: Any) -> Result:
        folder = run_dir or tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            if not page:  # a third of such a run's time
                patch.setattr("sft.train.write_report", lambda folder, **_: None)
            return train(dataclasses.replace(config, run_dir=str(folder), **changes))

    return run


@pytest.fixture(scope="module")
def finished(go) -> Result:
    return go(page=True)


def lines(result: Result, key: str = "loss") -> list[dict[str, Any]]:
    return [m for m in read_metrics(result.run_dir / "metrics.jsonl") if key in m]


def losses(result: Result) -> list[float]:
    return [m["loss"] for m in lines(result)]


def weights(result: Result, name: str = "final") -> dict[str, torch.Tensor]:
    return load_file(result.run_dir / f"checkpoints/{name}/model.safetensors")


def assert_close(a: Result, b: Result, limit: float = 1e-5) -> None:
    assert losses(a) == pytest.approx(losses(b), rel=limit)
    for name, tensor in weights(a).items():
        torch.testing.assert_close(tensor, weights(b)[name], rtol=0, atol=limit, msg=name)


def messages_of(turns: tuple[str, ...]) -> list[dict[str, str]]:
    return [dict(role=("user", "assistant")[i % 2], content=content) for i, content in enumerate(turns)]


def write(path: Path, *conversations: tuple[str, ...]) -> str:
    """A JSONL source: of each conversation what user and assistant say in turn."""
    path.write_text("".join(json.dumps({"messages": messages_of(turns)}) + "\n" for turns in conversations))
    return str(path)


# Learning.


def test_two_examples_are_learnt_by_heart(go, tmp_path):
    asked = [("What is 20 - 3?", "<think>20-3=17</think>\\boxed{17}"), ("Raj has 4 pens. How many?", "\\boxed{4}")]
    answers = ("17", "4")
    rows = [{"prompt": [dict(role="user", content=q)], "answer": a} for (q, _), a in zip(asked, answers, strict=True)]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = go(
        mix=(write(tmp_path / "two.jsonl", *asked),),
        epochs=30,
        rows_per_step=1,
        row_length=96,
        optim=OptimConfig(lr=0.02, final_lr=0.002, weight_decay=0.0),
        evaluation=EvaluationConfig(problems=str(problems), every=0, max_tokens=40),
        checkpoint=FINAL_ONLY,
    )
    assert losses(result)[0] > 3 and losses(result)[-1] < 0.05
    assert result.before is not None and result.before.mean == 0
    assert result.after is not None and result.after.mean == 1
    assert [sample.text for sample in result.after.samples] == [answer for _, answer in asked]
    # What it said, before and after, is in the report.
    browser = browse(read_run(result.run_dir), wanted=[])
    assert browser.steps == [result.steps, 0]
    assert [browser.prompts[s["p"]] for s in browser.samples] == [question for question, _ in asked] * 2
    assert [s["v"] for s in browser.samples] == ["right", "right", "wrong", "wrong"]
    for shown, (_, answer), sample in zip(browser.samples[:2], asked, result.after.samples, strict=True):
        assert shown["mask"] == "held out: no part in any update" and not shown["eq"]
        assert "".join(shown["tok"]).startswith(answer) and shown["len"] == len(sample.completion.ids)
        assert shown["lp"] == pytest.approx(sample.completion.logprobs, rel=0.01)
        assert shown["chips"] == ["accuracy 1", f"format {sample.grades['format']:g}"]


def test_the_loss_is_the_plain_mean_over_what_the_assistant_says_and_its_end(go, v3, tokenizer, tmp_path):
    talks = [("1+1?", "2"), ("How many cards?", "<think>20-3</think>17", "And pens?", "4"), ("Ana?", "20 cards")]
    mix = (write(tmp_path / "three.jsonl", *talks),)
    result = go(mix=mix, epochs=1, rows_per_step=9, evaluation=QUIET, checkpoint=FINAL_ONLY)
    model, total, count = load_causal_lm(v3), 0.0, 0
    said = 0
    for turns in talks:
        ids, trained = map(torch.tensor, encode_conversation(tokenizer, messages_of(turns)))
        logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        total -= float(logp.detach().gather(1, ids[1:, None])[:, 0][trained[1:]].sum())
        count += int(trained.sum())
        said += sum(len(tokenizer(turn, add_special_tokens=False)["input_ids"]) + 1 for turn in turns[1::2])
    assert count == said == lines(result)[0]["trained_tokens"]
    assert losses(result) == [pytest.approx(total / count, rel=1e-5)]


@pytest.mark.parametrize("changes", [{}, {"lora": LoraConfig(rank=2)}], ids=["all", "lora"])
def test_what_is_trained_moves_and_nothing_else(go, v3, changes):
    result = go(evaluation=QUIET, checkpoint=FINAL_ONLY, optim=OptimConfig(lr=0.01), **changes)
    before, after = load_file(v3 / "model.safetensors"), weights(result)
    moved = {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in before if not before[name].equal(after[name])}
    attention = {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert moved == attention if changes else moved > attention | {"embed_tokens", "lm_head", "norm", "down_proj"}
    assert not any("e_score_correction_bias" in name or "lora" in name for name in moved)


@pytest.mark.parametrize("together", [1, 4])
def test_rows_of_a_pass_change_nothing(finished, go, together):
    assert_close(finished, go(rows_per_pass=together, checkpoint=FINAL_ONLY))


def test_gradient_checkpointing_changes_nothing(finished, go):
    assert_close(finished, go(gradient_checkpointing=True, checkpoint=FINAL_ONLY))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"balance_loss": 0.01, "bias_update_speed": 0.01}], ids=["plain", "balanced"])
def test_compiled_it_is_the_same(go, changes):
    options = dict(evaluation=QUIET, checkpoint=FINAL_ONLY, **changes)
    assert_close(go(**options), go(compile=True, **options), limit=1e-4)  # fused kernels round otherwise


def test_bf16_computes_otherwise_and_keeps_fp32_weights(finished, go):
    result = go(precision="bf16", checkpoint=FINAL_ONLY)
    assert losses(result) != losses(finished) and losses(result) == pytest.approx(losses(finished), rel=0.03)
    assert all(tensor.dtype == torch.float32 for tensor in weights(result).values())


@pytest.mark.parametrize("changes", [{}, {"lora": LoraConfig(rank=2)}], ids=["all", "lora"])
def test_fp8_computes_otherwise_and_keeps_fp32_weights(finished, go, llama, v3, changes):
    result, plain = go(fp8=True, checkpoint=FINAL_ONLY, **changes), go(**changes) if changes else finished
    assert losses(result) != losses(plain) and losses(result) == pytest.approx(losses(plain), rel=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in weights(result).values())
    assert weights(result).keys() == load_file(v3 / "model.safetensors").keys()
    with pytest.raises(UserError, match=r"fp8=True: .*no DeepSeek-V3"):
        go(model=str(llama), fp8=True)


def test_any_causal_lm_is_trained(go, llama):
    result = go(model=str(llama), checkpoint=FINAL_ONLY)
    assert losses(result)[-1] < losses(result)[0]
    assert "lm_head.weight" not in weights(result)
    assert type(load_causal_lm(result.run_dir / "checkpoints/final")) is transformers.LlamaForCausalLM


def test_losses_and_weights_are_those_of_trls_trainer(go, llama, tmp_path):
    """Of the same batches, at a constant rate: it steps its own schedule."""
    import datasets
    from trl import SFTConfig as TrlConfig
    from trl import SFTTrainer

    talks = [("1+1?", "2"), ("How many cards?", "<think>20-3</think>17"), ("Ana?", "20 cards")]
    rate = dict(lr=0.01, final_lr=0.01)
    ours = go(
        model=str(llama),
        mix=(write(tmp_path / "three.jsonl", *talks),),
        epochs=4,
        rows_per_step=1,
        row_length=64,
        optim=OptimConfig(**rate),
        evaluation=QUIET,
        checkpoint=FINAL_ONLY,
    )
    assert len(losses(ours)) == 4 and {m["epoch"] for m in lines(ours)} == {1, 2, 3, 4}
    rows = []
    for turns in talks:
        ids, trained = encode_conversation(load_tokenizer(llama), messages_of(turns))
        rows.append({"input_ids": ids, "completion_mask": [int(t) for t in trained]})
    trainer = SFTTrainer(
        model=transformers.LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32),
        args=TrlConfig(
            output_dir=str(tmp_path / "trl"), num_train_epochs=4, per_device_train_batch_size=3, logging_steps=1,
            learning_rate=0.01, lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.95, weight_decay=0.1,
            max_grad_norm=1.0, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
            gradient_checkpointing=False, completion_only_loss=True, max_length=None, logging_nan_inf_filter=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=load_tokenizer(llama),
    )  # fmt: skip
    trainer.train()
    theirs = [m for m in trainer.state.log_history if "loss" in m]
    assert losses(ours) == pytest.approx([m["loss"] for m in theirs], rel=1e-4)  # it logs rounded numbers
    assert [m["grad_norm"] for m in lines(ours)] == pytest.approx([float(m["grad_norm"]) for m in theirs], rel=1e-3)
    weight = trainer.model.model.embed_tokens.weight.detach()
    differs = (weights(ours)["model.embed_tokens.weight"] - weight).abs()
    # AdamW makes whole steps of gradients that are nothing but rounding.
    assert differs.median() < 1e-6 and differs.max() < 0.01 * rate["lr"]


# Balancing.


def test_the_bias_moves_only_when_asked_and_the_loss_is_not_the_balance_loss(finished, go):
    def biases(result: Result) -> torch.Tensor:
        return torch.cat([t for name, t in weights(result).items() if "e_score_correction_bias" in name])

    on = go(bias_update_speed=0.125, evaluation=QUIET, checkpoint=FINAL_ONLY)
    with_loss = go(balance_loss=0.5, evaluation=QUIET, checkpoint=FINAL_ONLY)
    assert not biases(finished).any() and not biases(with_loss).any() and "router/max_load" not in lines(finished)[0]
    assert biases(on).abs().max() > 0 and set((biases(on) / 0.125 % 1).tolist()) == {0.0}
    assert all(m["router/max_load"] >= 1 for m in lines(on))
    assert losses(on)[0] == losses(with_loss)[0] == losses(finished)[0]  # the tokens' alone
    assert losses(with_loss)[1] != losses(finished)[1]


def test_the_balance_loss_is_a_mean_over_sequences_whatever_the_passes(go):
    options = dict(balance_loss=0.5, bias_update_speed=0.125, evaluation=QUIET, checkpoint=FINAL_ONLY)
    assert_close(go(rows_per_pass=1, **options), go(rows_per_pass=4, **options))


def test_balancing_a_model_without_routers_is_refused(go, llama):
    with pytest.raises(UserError, match="no DeepSeek-V3 routers"):
        go(model=str(llama), bias_update_speed=0.1)


# What a run leaves.


def test_the_run_folder_holds_its_settings_its_metrics_and_a_page(finished, config):
    run_dir = finished.run_dir
    assert (run_dir / "report.html").stat().st_size > 0 and (run_dir / "environment.json").stat().st_size > 0
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["optim"]["lr"] == config.optim.lr
    steps = lines(finished)
    assert [m["step"] for m in steps] == list(range(1, finished.steps + 1))
    wanted = {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "trained_tokens", "tokens_per_second"}
    assert all(set(m) >= wanted | {"step_time"} for m in steps)
    assert steps[0]["learning_rate"] == config.optim.lr and steps[-1]["learning_rate"] == config.optim.final_lr
    assert steps[-1]["epoch"] == config.epochs
    kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert kept == ["best", "final", "latest", "step-000002", "step-000003"]


def test_every_epoch_trains_on_each_example_as_often_as_the_mix_says(finished, tokenizer, data):
    """Seven sums once and five names one and a half times, twice: counted in tokens."""
    tokens = sum(m["num_tokens"] for m in lines(finished))
    sums = sum(
        len(encode_conversation(tokenizer, json.loads(row)["messages"])[0])
        for row in (data / "sums.jsonl").read_text().splitlines()
    )
    names = [json.loads(row) for row in (data / "names.jsonl").read_text().splitlines()]
    lengths = [len(tokenizer(n["prompt"] + n["completion"])["input_ids"]) + 1 for n in names]
    fewest, most = sum(sorted(lengths)[:3]), sum(sorted(lengths)[-3:])  # 8 of 5 an epoch: three of them a second time
    assert 2 * (sums + sum(lengths) + fewest) <= tokens <= 2 * (sums + sum(lengths) + most)


def test_held_out_loss_is_measured_before_during_and_after(finished, config):
    evaluations = lines(finished, "eval/loss")
    assert [m["step"] for m in evaluations] == [0, 2, 3] and evaluations[-1]["final"]
    name = config.evaluation.mix[0]
    assert all(m[f"eval/{name}/loss"] == m["eval/loss"] and m["eval/problems"] == 2 for m in evaluations)


def test_the_logged_held_out_loss_is_the_final_checkpoints_own(finished, config, tokenizer):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        finished.run_dir / "checkpoints/final", dtype=torch.float32
    )
    total, count = 0.0, 0
    for row in Path(config.evaluation.mix[0]).read_text().splitlines():
        ids, trained = map(torch.tensor, encode_conversation(tokenizer, json.loads(row)["messages"]))
        logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        total -= float(logp.detach().gather(1, ids[1:, None])[:, 0][trained[1:]].sum())
        count += int(trained.sum())
    assert lines(finished, "final")[0]["eval/loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss(go, data, tmp_path):
    """A held-out example that is trained first, and then unlearnt at a high rate."""
    options = dict(
        mix=(write(tmp_path / "a.jsonl", ("1+1?", "2")),),
        epochs=10,
        rows_per_step=1,
        optim=OptimConfig(lr=0.05, final_lr=0.05),
        evaluation=EvaluationConfig(mix=(str(data / "held.jsonl"),), every=1),
        checkpoint=CheckpointConfig(every=1, keep=9),
    )
    result = go(**options)
    held_out = {m["step"]: m["eval/loss"] for m in lines(result, "eval/loss") if m["step"]}
    best = min(held_out, key=held_out.__getitem__)
    assert best not in (1, result.steps), held_out
    go(result.run_dir, resume=True, **options)  # evaluates the last step again: still not the best
    step, kept = weights(result, f"step-{best:06d}"), weights(result, "best")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in step.items())
    assert (result.run_dir / "checkpoints/best/README.md").read_text().count(f"| step | {best} |") == 1


def test_final_is_what_transformers_and_vllm_load(finished):
    final = finished.run_dir / "checkpoints/final"
    ids = torch.arange(20)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    assert type(theirs) is transformers.DeepseekV3ForCausalLM
    ours = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(final)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-5)
    config = json.loads((final / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["model_type"] == "deepseek_v3"
    assert config["topk_method"] == "noaux_tc" and config["scoring_func"] == "sigmoid"
    names = set(load_file(final / "model.safetensors"))
    assert {"model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias"} < names
    assert transformers.AutoTokenizer.from_pretrained(final).chat_template
    assert not list(final.glob("optimizer*")) and not list(final.glob("trainer*"))


def test_adapters_load_in_peft_and_are_merged_in_final(go, v3):
    import peft

    result = go(lora=LoraConfig(rank=2), evaluation=QUIET)
    final, ids = result.run_dir / "checkpoints/final", torch.arange(20)[None]
    adapted = peft.PeftModel.from_pretrained(load_causal_lm(v3), str(final / "adapter")).eval()
    merged = load_causal_lm(final)
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(load_causal_lm(v3)(ids).logits, merged(ids).logits, atol=1e-2)
    newest = result.run_dir / f"checkpoints/step-{result.steps:06d}"
    assert (newest / "adapter").is_dir() and not (newest / "model.safetensors").exists()


def test_the_model_card_says_what_was_trained_on_and_how(finished, config, data):
    card = (finished.run_dir / "checkpoints/final/README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == config.model
    rows = [line for line in body.splitlines() if ".jsonl" in line]
    assert [row.split(" | ")[1:3] for row in rows] == [["1 ×", "7"], ["1.5 ×", "5"]]
    assert f"`{data}/names.jsonl`" in rows[1]
    hashes = {row.rsplit("`", 2)[1] for row in rows}
    assert len(hashes) == 2 and all((Path(config.token_cache) / name).is_dir() for name in hashes)
    for setting in (
        "| epochs | 2 |",
        "| row_length | 48 |",
        "| learning rate | 0.01 to 0.001, cosine |",
        "| seed | 0 |",
    ):
        assert setting in body


def test_a_hostile_name_of_a_source_stays_one_cell_of_code(go, tmp_path):
    folder = tmp_path / "a|b`<script>\n# Best\n\x1b[31m"
    folder.mkdir()
    result = go(mix=(write(folder / "x.jsonl", ("1+1?", "2")),), epochs=1, evaluation=QUIET, checkpoint=FINAL_ONLY)
    card = (result.run_dir / "checkpoints/final/README.md").read_text()
    assert "\x1b" not in card and "\n# Best" not in card
    (row,) = [line for line in card.splitlines() if "x.jsonl" in line]
    cell = row.split("`")[1]
    assert row.startswith("| `") and "<script>" in cell and cell.endswith("x.jsonl") and r"a\|b" in cell


# Gradients that are not finite.


@pytest.fixture
def poisoned(v3, tokenizer, tmp_path) -> Path:
    """The model with an embedding that is not a number, for a token that only some examples hold."""
    model = load_causal_lm(v3)
    (token,) = tokenizer("+", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = math.nan
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    return tmp_path / "poisoned"


def test_a_bad_gradient_is_no_step_and_its_examples_are_named(go, poisoned, tmp_path):
    path = write(tmp_path / "some.jsonl", ("Ana?", "20 cards"), ("1+1?", "2"), ("Raj?", "4 pens"))
    result = go(
        model=str(poisoned),
        mix=(path,),
        epochs=3,
        row_length=16,
        rows_per_step=1,
        bias_update_speed=0.125,
        evaluation=QUIET,
        checkpoint=CheckpointConfig(every=1, keep=20),
    )
    files = sorted(result.run_dir.glob("skipped-*.json"))
    skipped = [json.loads(file.read_text()) for file in files]
    assert skipped and [f"skipped-{s['step']:06d}.json" for s in skipped] == [file.name for file in files]
    for dump in skipped:
        assert [path, 2] in dump["examples"] and dump["grad_norm"] == "nan"
        before = weights(result, f"step-{dump['step'] - 1:06d}") if dump["step"] > 1 else load_file(
            poisoned / "model.safetensors"
        )  # fmt: skip
        after = weights(result, f"step-{dump['step']:06d}")
        assert all(torch.equal(t.nan_to_num(), after[name].nan_to_num()) for name, t in before.items())
    bad = {dump["step"] for dump in skipped}
    assert 0 < len(bad) < result.steps
    assert {m["step"] for m in lines(result) if m["grad_norm"] is None} == bad
    assert all(torch.isfinite(t).all() for name, t in weights(result).items() if "embed" not in name)


def test_three_bad_gradients_in_a_row_stop_the_run(go, poisoned, tmp_path):
    path = write(tmp_path / "all.jsonl", ("1+1?", "2"), ("2+2?", "4"), ("3+3?", "6"), ("4+4?", "8"))
    with pytest.raises(NonFinite, match=r"nan in 3 steps in a row: lower optim\.lr"):
        go(tmp_path / "run", model=str(poisoned), mix=(path,), row_length=16, rows_per_step=1, evaluation=QUIET)
    assert len(list((tmp_path / "run").glob("skipped-*.json"))) == 3
    assert not (tmp_path / "run/checkpoints/final").exists()


# Folders and settings.


def test_a_used_folder_is_refused_without_resume_and_with_other_settings(finished, go, config):
    with pytest.raises(UserError, match="--resume"):
        go(finished.run_dir)
    for changes in ({"seed": 1}, {"row_length": 64}, {"optim": OptimConfig(lr=0.02)}):
        with pytest.raises(UserError, match=r"seed|row_length|optim"):
            go(finished.run_dir, resume=True, **changes)


def test_two_runs_never_share_a_folder(go, config, tmp_path):
    with open_run(tmp_path / "run", config={}, resume=False):
        with pytest.raises(UserError, match="in use by another run"):
            go(tmp_path / "run", resume=True)
        assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_finished_run_resumed_with_other_passes_does_nothing_again(finished, go, outcome, tmp_path):
    shutil.copytree(finished.run_dir, tmp_path / "run")
    before = outcome(tmp_path / "run")
    result = go(tmp_path / "run", resume=True, rows_per_pass=1)
    assert result.steps == finished.steps
    assert {name: found for name, found in outcome(tmp_path / "run").items() if found != before[name]} == {}


def test_a_run_folder_is_made_where_none_is_named(go, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(dataclasses.replace(config, epochs=1, evaluation=QUIET, checkpoint=FINAL_ONLY))
    assert result.run_dir.resolve().parent == tmp_path / "runs" and result.run_dir.name.startswith("sft-")


def test_a_model_may_be_named_and_is_made_on_demand(config, v3, tmp_path):
    made = []

    def make() -> Path:
        made.append(1)
        return v3

    options = dict(model="mine", epochs=1, evaluation=QUIET, checkpoint=FINAL_ONLY, run_dir=str(tmp_path / "run"))
    result = train(dataclasses.replace(config, **options), named_models={"mine": make, "other": make})
    assert made == [1] and result.exit_code == 0


def test_sources_are_tokenised_once(finished, go, config):
    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in Path(config.token_cache).rglob("*.arrow")}

    before = stamps()
    go(evaluation=QUIET, checkpoint=FINAL_ONLY)
    go(finished.run_dir, resume=True)  # whose tokenizer comes from its checkpoint
    assert before and stamps() == before


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(go, v3, tmp_path):
    tokenizer = load_tokenizer(v3)
    tokenizer.add_tokens([f"<{i}>" for i in range(513 - len(tokenizer))])
    load_causal_lm(v3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="its tokenizer has ids up to 512, its vocab_size is 512"):
        go(model=str(tmp_path / "model"))


def test_examples_beyond_the_models_positions_are_said(go, v3, tokenizer, tmp_path, caplog):
    short = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(v3)
    short.config.max_position_embeddings = 10
    short.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with caplog.at_level("WARNING"):
        go(model=str(tmp_path / "model"), evaluation=QUIET, checkpoint=FINAL_ONLY)
    assert "the model was made for 10 positions" in caplog.text


def test_a_mix_of_weights_is_trained_too(go, data):
    mix = tuple(SourceConfig(path=str(data / f"{name}.jsonl"), weight=1.0) for name in ("sums", "names"))
    result = go(mix=mix, evaluation=QUIET, checkpoint=FINAL_ONLY)
    assert losses(result)[-1] < losses(result)[0]
    assert "weight 1" in (result.run_dir / "checkpoints/final/README.md").read_text()


def test_a_longer_context_is_kept_by_the_checkpoint(go, v3, llama):
    """V3's own YaRN reaches 4,096 here, from 1,024 pre-trained."""
    before = deepseek_v3.DeepseekV3ForCausalLM.from_pretrained(v3).config.rope_parameters
    result = go(context=8192, checkpoint=FINAL_ONLY)
    config = load_causal_lm(result.run_dir / "checkpoints/final").config
    assert config.max_position_embeddings == 8192
    assert config.rope_parameters == before | {"factor": 8.0}
    within = go(context=3000, checkpoint=FINAL_ONLY)
    assert load_causal_lm(within.run_dir / "checkpoints/final").config.rope_parameters == before
    with pytest.raises(UserError, match=r"context=8192: only for a DeepSeek-V3, and model=.* is llama"):
        go(model=str(llama), context=8192)
