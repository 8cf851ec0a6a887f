"""Pairs in, a reward model out: what rows may look like, what is refused, and that the built-in run learns."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import deepseek_v3
from recipes.cli import main, parse, to_dict
from recipes.reward_model import (
    RewardModelTraining,
    accuracy,
    encode_pairs,
    load_pairs,
    normalise,
    read_pairs,
    run,
    story_pairs,
)
from recipes.tiny import make_tokenizer, tiny_config
from rewards.model_based.scalar import RewardModel, RewardModelConfig, encode
from rl.score import Scorer
from runtime.errors import UserError
from runtime.metrics import read_metrics
from runtime.report.read import read_run
from runtime.report.rollouts import browse
from runtime.rows import BadRow

ROOT = Path(__file__).parents[2]
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    deepseek_v3.DeepseekV3ForCausalLM(tiny_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "2+2?"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER]),
        ({"prompt": [USER], "chosen": "4", "rejected": "5"}, [USER]),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER]),
    ],
)
def test_every_preference_format_of_trl_is_read(row, prompt):
    assert normalise(row) == {
        "prompt": prompt, "chosen": "4", "rejected": "5", "chosen_judgement": None, "rejected_judgement": None,
    }  # fmt: skip


def test_shared_prompt_of_two_texts_ends_before_a_word():
    row = normalise({"chosen": "Human: 2+2? Assistant: 42 is it", "rejected": "Human: 2+2? Assistant: 43 is it"})
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Human: 2+2? Assistant:", " 42 is it", " 43 is it")
    assert normalise({"chosen": "yes", "rejected": "yeah"})["prompt"] == ""


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([], "not an object"),
        ({"prompt": "q", "chosen": "a"}, "chosen or rejected is neither"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt is neither"),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}, "chosen or rejected is neither"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "chosen or rejected is neither"),
        ({"chosen": [USER, GOOD], "rejected": [GOOD, BAD]}, "differ before their last message"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "differ before their last message"),
        ({"chosen": "a", "rejected": [BAD]}, "no chosen and rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_judgement": "good"}, "one judgement of two"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_judgement": "x", "rejected_judgement": " "},
            "one judgement",
        ),
    ],
)
def test_what_is_no_pair_says_why(row, reason):
    with pytest.raises(BadRow, match=reason):
        normalise(row)


def test_pairs_that_differ_in_reasoning_only_teach_nothing_about_answers():
    row = {"prompt": "q", "chosen": "<think>a</think>4", "rejected": "<think>b</think>4"}
    assert normalise(row)["chosen"] == "<think>a</think>4"
    with pytest.raises(BadRow, match="are the same"):
        normalise(row, part="answer")


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(n, **more):
    return [{"prompt": f"{i}+1?", "chosen": f"{i + 1}", "rejected": f"{i}", **more} for i in range(n)]


def test_bad_rows_are_set_aside_and_many_are_refused(tmp_path):
    rows = read_pairs(
        write(tmp_path / "a.jsonl", [*pairs(20), "{broken\n", {"prompt": "q", "chosen": "a", "rejected": "a"}])
    )
    assert len(rows) == 20 and rows.lines == list(range(1, 21)) and [r.line for r in rows.rejects] == [21, 22]
    assert "1 set aside: broken JSON; 1 set aside: chosen and rejected are the same" in rows.summary()
    with pytest.raises(UserError, match=r"1 of 3 rows are no pairs:\n  line 3: broken JSON"):
        read_pairs(write(tmp_path / "b.jsonl", [*pairs(2), "{broken\n"]))


def test_held_out_pairs_share_no_prompt_with_the_others(tmp_path):
    data = write(tmp_path / "a.jsonl", pairs(40) + pairs(40, chosen="other"))
    train, held_out = load_pairs(RewardModelTraining(data=data, held_out=5))
    assert len(train) == 70 and len(held_out) == 10
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert load_pairs(RewardModelTraining(data=data, held_out=5))[1] == held_out
    other = write(tmp_path / "b.jsonl", pairs(3))
    train, held_out = load_pairs(RewardModelTraining(data=data, eval_data=other))
    assert len(train) == 74 and len(held_out) == 3
    with pytest.raises(UserError, match="3 pairs are too few"):
        load_pairs(RewardModelTraining(data=other))


def test_built_in_pairs_are_right_and_wrong():
    for row in story_pairs(50, split="train"):
        for side, lines in (("chosen", 3), ("rejected", 2)):
            work = row[side].removeprefix("<think>").partition("</think>")[0].split("\n")
            totals = []
            for line in work:
                total, change, result = (int(n) for n in _numbers(line))
                assert total + change == result and (not totals or total == totals[-1])
                totals.append(result)
            assert len(work) == lines and row[side].endswith(f"\\boxed{{{totals[-1]}}}")
        assert row["rejected_judgement"].endswith("is left out") and "left out" not in row["chosen_judgement"]


def _numbers(line):
    sum_, _, result = line.partition("=")
    at = max(sum_.rfind("+"), sum_.rfind("-"))
    return sum_[:at], sum_[at:], result


def test_share_of_the_judged_pairs_is_shown_plain(checkpoint):
    tokenizer = make_tokenizer()
    rows = list(story_pairs(10, split="train"))
    shown = list(encode_pairs(rows, tokenizer, RewardModelTraining(plain_share=0.3)))
    plain = [
        pair["chosen_ids"] == encode(tokenizer, row["prompt"], row["chosen"])
        for pair, row in zip(shown, rows, strict=True)
    ]
    assert sum(plain) == 3 and plain[3]
    judged = plain.index(False)
    row = rows[judged]
    assert shown[judged] == {
        f"{side}_ids": encode(tokenizer, row["prompt"], row[side], row[f"{side}_judgement"])
        for side in ("chosen", "rejected")
    }
    short = RewardModelTraining(max_length=len(shown[0]["chosen_ids"]))
    assert 0 < len(list(encode_pairs(rows, tokenizer, short))) < 10


def test_a_run_learns_saves_and_pays(checkpoint, tmp_path, capsys):
    """A preference that random weights learn in seconds, from a file, end to end."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "chosen": f"yes {i % 7}", "rejected": f"no {i % 5}"}
        for i in range(400)
    ]
    data = write(tmp_path / "pairs.jsonl", rows)
    config = RewardModelTraining(
        model=checkpoint, data=data, run_dir=str(tmp_path / "run"), lr=1e-2, batch_size=16, warmup_steps=2, held_out=80
    )
    run(config)
    shown = capsys.readouterr().out
    assert "held-out pairs put right" in shown and "80 pairs never trained on" in shown and "judgements" not in shown
    written = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert written["before"]["plain"]["mean"] < 0.9 < written["after"]["plain"]["mean"] and written["pairs"] == 80
    metrics = list(read_metrics(tmp_path / "run/metrics.jsonl"))
    assert {"loss", "accuracy", "margin", "learning_rate", "grad_norm"} <= set(metrics[0])
    assert metrics[-1]["loss"] < metrics[0]["loss"] and metrics[-1]["step"] == 20
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == to_dict(config)
    # Its report shows held-out pairs as they were scored: as many are right as the estimate says.
    assert browse(read_run(tmp_path / "run"), wanted=[]).steps == [20, 0]
    for step, when in ((0, "before"), (20, "after")):
        scored = pq.read_table(tmp_path / f"run/held_out/step-{step:06d}.parquet").to_pylist()
        pairs = list(zip(scored[::2], scored[1::2], strict=True))
        assert [(c["answer"], r["answer"]) for c, r in pairs] == [("chosen", "rejected")] * 80
        right = [c["reward"] > r["reward"] for c, r in pairs]
        assert [c["rewards/accuracy"] == r["rewards/accuracy"] == 1 for c, r in pairs] == right
        assert sum(right) / 80 == pytest.approx(written[when]["plain"]["mean"])
    final = tmp_path / "run/checkpoints/final"
    assert json.loads((final / "reading.json").read_text()) == {
        "part": "whole",
        "judgements": False,
        "max_length": 1024,
    }
    assert not list(final.glob("*.bin")) and (final / "model.safetensors").exists()
    prompt = [{"role": "user", "content": "900?"}]
    name = f"rewards.model_based.scalar:reward(source={final})"
    assert f"pay by it: --rewards '{{\"{name}\": 1}}'\n" in shown
    with Scorer({name: 1.0}) as scorer:  # as a run pays: in a process of its own
        scorer.start()
        yes, no = scorer.score(
            [prompt] * 2, [[{"role": "assistant", "content": f"{w} 3"}] for w in ("yes", "no")], [[1]] * 2
        ).total
    assert yes > no
    with pytest.raises(UserError, match="already holds a run; give another --run_dir"):
        run(config)


def test_trl_gets_the_texts_that_are_scored_later(checkpoint, tmp_path):
    """TRL's own loss on the trainer's batch is the one from our scorer's numbers: same ids, same pooling."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    tokenizer = make_tokenizer()
    rows = list(story_pairs(6, split="train"))
    tokenized = Dataset.from_list(list(encode_pairs(rows, tokenizer, RewardModelTraining(plain_share=1))))
    options = {
        "output_dir": str(tmp_path),
        "report_to": [],
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
    }
    arguments = RewardConfig(max_length=None, per_device_eval_batch_size=6, **options)
    trainer = RewardTrainer(
        model=checkpoint, args=arguments, train_dataset=tokenized, eval_dataset=tokenized, processing_class=tokenizer
    )
    loss = trainer.evaluate()["eval_loss"]
    model = RewardModel(trainer.model, tokenizer)
    sides = [
        model.score([row["prompt"] for row in rows], [row[side] for row in rows]) for side in ("chosen", "rejected")
    ]
    margins = torch.tensor(sides[0]) - torch.tensor(sides[1])
    assert loss == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), abs=1e-5)
    assert accuracy(model, rows).plain.mean == pytest.approx((margins > 0).float().mean().item())


def test_settings_that_can_not_work_are_refused():
    for wrong in ({"lr": 0.0}, {"batch_size": 0}, {"warmup_steps": -1}, {"plain_share": 0.0}, {"max_length": 0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}="):
            RewardModelTraining(**wrong)


def test_r1s_settings_are_the_papers():
    file = ROOT / "recipes/configs/reward_model_r1.yaml"
    config = parse(RewardModelTraining, ["--config", str(file)], prog="reward_model", description="")
    assert (config.batch_size, config.lr, config.max_length, config.epochs, config.part) == (
        256,
        6e-6,
        8192,
        1,
        "answer",
    )


def test_bad_input_ends_with_2_and_one_line(tmp_path, capsys):
    arguments = ["--data", str(tmp_path / "none.jsonl"), "--model", str(tmp_path), "--run_dir", str(tmp_path / "run")]
    assert main(RewardModelTraining, run, prog="reward_model", description="", argv=arguments) == 2
    said = capsys.readouterr().err
    assert "none.jsonl" in said and "no such file" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_built_in_run_learns_and_reads_judgements(tmp_path):
    command = [sys.executable, "-m", "recipes.reward_model", "--run_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "run/evaluation.json").read_text())
    for how in ("plain", "judged"):
        assert written["after"][how]["low"] > 0.9 and written["before"][how]["high"] < 0.8
    model = RewardModel.load(RewardModelConfig(model=str(tmp_path / "run/checkpoints/final")))
    assert model.reading.judgements
