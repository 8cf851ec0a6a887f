"""Stored rollouts under other rewards: the run's own change nothing, others as by hand; its files stay."""

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console

import deepseek_v3
import recipes.rescore as command
from recipes.cli import main
from recipes.rescore import RescoreConfig, rescore, show
from recipes.tiny import make_tokenizer, tiny_config
from rl.config import DynamicSamplingConfig, EvaluationConfig, GRPOConfig, LossConfig, OptimConfig, SamplingConfig
from rl.record import write_rollout
from rl.rollout import punish_overlong, score, set_advantages
from rl.score import Scorer
from rl.train import train
from rl.types import Group, Prompt, Rollout
from runtime.distributed import World
from runtime.errors import UserError
from sampling.protocol import Completion

ROOT = Path(__file__).parents[2]
NAN = float("nan")


# --- runs made by hand: what was sampled is given, the run's own code scores and stores it ----------------------------


def group(texts, *, index=0, prompt="How much?", answer="7", lengths=None, cut=(), **columns):
    return Group(
        prompt=Prompt(
            index=index, epoch=0, seed=index, content=prompt, ids=[1, 2], columns={"answer": answer} | columns
        ),
        completions=[
            Completion(
                ids=[5] * (lengths[i] if lengths else 1),
                logprobs=[-0.5] * (lengths[i] if lengths else 1),
                finish_reason="length" if i in cut else "stop",
                version=0,
            )
            for i in range(len(texts))
        ],
        texts=list(texts),
    )


def box(answer):
    return rf"<think></think>\boxed{{{answer}}}"


def make_run(folder, groups, *, spare=(), rewards=None, step=1, data="nowhere.jsonl", **changes):
    """A run folder as `train` leaves it, with one step that the given rewards scored."""
    settings = dict(rewards=rewards or {"accuracy": 1.0}, data=data, sampling=SamplingConfig(max_tokens=8)) | changes
    config = GRPOConfig(**settings)
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config)))))
    everything = [*groups, *spare]
    with Scorer(config.rewards, gates=config.gates) as scorer:
        score(everything, scorer)
    if config.overlong_buffer:
        punish_overlong(everything, max_tokens=config.sampling.max_tokens, buffer=config.overlong_buffer)
    set_advantages(everything, config.loss.advantage)
    rollout = Rollout(groups=list(groups), spare=list(spare), cursor=1, metrics={})
    write_rollout(folder / "rollouts", rollout, step=step, world=World())
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stored(rescored, step=1):
    return pq.read_table(rescored.output / f"step-{step:06d}.parquet").to_pylist()


def read_summary(rescored):
    return json.loads((rescored.output / "summary.json").read_text())


def shown(rescored):
    console = Console(record=True, width=200, file=io.StringIO())
    show(rescored, console)
    return console.export_text()


def again(run, rewards=None, **settings):
    return rescore(RescoreConfig(run_dir=str(run), **settings), rewards=rewards)


def wrong():
    """Made inside a function, so that it travels to its process by value: this module can't be imported there."""

    def unlike_the_answer(completions, answer, **_):
        return [float(f"{{{gold}}}" not in text) for text, gold in zip(completions, answer, strict=True)]

    return unlike_the_answer


def test_another_reward_flips_what_it_should(tmp_path):
    # Two right of four: advantages ±0.8659. The opposite reward turns every one; the second group has none to turn.
    data = write_rows(
        tmp_path / "data.jsonl", [{"prompt": "How much?", "answer": "7"}, {"prompt": "2?", "answer": "2"}]
    )
    groups = [
        group([box(7), box(1), box(7), box(2)]),
        group([box(2)] * 4, index=1, prompt="2?", answer="2"),
    ]
    rescored = again(make_run(tmp_path / "run", groups, data=data), {wrong(): 1.0})
    rows = stored(rescored)
    a = 0.5 / (math.sqrt(4 * 0.25 / 3) + 1e-4)
    assert [row["reward_old"] for row in rows] == [1, 0, 1, 0, 1, 1, 1, 1]
    assert [row["reward_new"] for row in rows] == [0, 1, 0, 1, 0, 0, 0, 0]
    assert [row["advantage_old"] for row in rows] == pytest.approx([a, -a, a, -a, 0, 0, 0, 0])
    assert [row["advantage_new"] for row in rows] == pytest.approx([-a, a, -a, a, 0, 0, 0, 0])
    assert [row["flipped"] for row in rows] == [True] * 4 + [False] * 4
    assert [row["new/unlike_the_answer"] for row in rows] == [0, 1, 0, 1, 0, 0, 0, 0]
    assert [row["old/accuracy"] for row in rows] == [1, 0, 1, 0, 1, 1, 1, 1]
    total = rescored.trained
    assert (total.completions, total.changed, total.flipped) == (8, 8, 4)
    assert (total.mean_old, total.mean_new) == (6 / 8, 2 / 8)
    assert (total.groups, total.signal_old, total.signal_new, total.gained, total.lost) == (2, 1, 1, 0, 0)


def test_groups_gain_and_lose_signal(tmp_path):
    def length(completions, **_):
        return [float(len(text)) for text in completions]

    groups = [group([box(7), box(1)]), group([box(1), box(22)], index=1)]  # one differs in accuracy, one in length
    total = again(make_run(tmp_path, groups), {length: 1.0}).trained
    assert (total.signal_old, total.signal_new, total.gained, total.lost) == (1, 1, 1, 1)
    assert total.flipped == 0  # from or to 0 is no flip


def test_spare_groups_are_counted_apart(tmp_path):
    run = make_run(tmp_path, [group([box(7), box(1)])], spare=[group([box(7), box(7)], index=1)])
    rescored = again(run, {wrong(): 1.0})
    assert (rescored.trained.completions, rescored.trained.flipped) == (2, 2)
    assert (rescored.spare.completions, rescored.spare.changed, rescored.spare.flipped) == (2, 2, 0)
    assert [row["used"] for row in stored(rescored)] == [True, True, False, False]
    assert set(rescored.steps) == {1} and rescored.steps[1] == rescored.trained
    assert "spare" in shown(rescored)


@pytest.mark.parametrize(("advantage", "expected"), [("dr_grpo", [0.5, -0.5]), ("rloo", [1.0, -1.0])])
def test_advantages_are_the_runs_own_kind_or_the_one_asked_for(tmp_path, advantage, expected):
    run = make_run(tmp_path, [group([box(7), box(1)])], loss=LossConfig(advantage=advantage))
    assert [row["advantage_new"] for row in stored(again(run))] == expected
    given = stored(again(run, advantage="grpo"))
    assert [row["advantage_new"] for row in given] == pytest.approx([0.7070, -0.7070], abs=1e-4)


def test_overlong_punishment_is_the_runs_own_or_the_one_asked_for(tmp_path):
    # max_tokens 8, buffer 4: six tokens cost a half.
    run = make_run(tmp_path, [group([box(7), box(1)], lengths=[6, 3])], overlong_buffer=4)
    own = stored(again(run))
    assert [row["reward_new"] for row in own] == [0.5, 0.0] and [row["new/overlong"] for row in own] == [-0.5, 0]
    assert not any(row["flipped"] for row in own)
    assert [row["reward_new"] for row in stored(again(run, overlong_buffer=0))] == [1.0, 0.0]
    with pytest.raises(UserError, match="overlong_buffer=8: the run's max_tokens are 8"):
        again(run, overlong_buffer=8)


def test_gates_are_the_runs_own_or_those_asked_for(tmp_path):
    rewards = {"accuracy": 1.0, "format": 0.5}
    gated = {"format": "accuracy"}
    run = make_run(tmp_path, [group([box(7), box(1), "7"])], rewards=rewards, gates=gated)
    assert [row["reward_old"] for row in stored(again(run))] == [1.5, 0.0, 0.0]
    assert [row["reward_new"] for row in stored(again(run))] == [1.5, 0.0, 0.0]
    assert [row["reward_new"] for row in stored(again(run, gates={}))] == [1.5, 0.5, 0.0]
    assert [row["reward_new"] for row in stored(again(run, {"accuracy": 1.0}))] == [1.0, 0.0, 0.0]
    with pytest.raises(UserError, match="'accuracy' is not one of the rewards"):
        again(run, {"format": 1.0})
    opposite = again(run, {wrong(): 1.0, "format": 0.5}, gates={"format": "unlike_the_answer"})
    assert [row["reward_new"] for row in stored(opposite)] == [0.0, 1.5, 1.0]


def test_what_rewards_can_not_judge_is_unknown_and_counted(tmp_path):
    def picky(completions, **_):
        if any("1" in text for text in completions):
            raise RuntimeError("no ones")
        return [1.0] * len(completions)

    rescored = again(make_run(tmp_path, [group([box(7), box(1), box(3)])]), {picky: 1.0})
    rows = stored(rescored)
    assert [row["reward_new"] for row in rows] == [1.0, None, 1.0]
    assert rows[1]["advantage_new"] is None and rows[1]["unknown"] == "picky: raised RuntimeError: no ones"
    assert [row["unknown"] for row in rows if row["sample"] != 1] == [None, None]
    assert (rescored.trained.known_old, rescored.trained.known_new) == (3, 2)
    assert rescored.unknown == {"picky: raised RuntimeError: no ones": 1}
    assert "unknown  1 × picky: raised RuntimeError: no ones" in shown(rescored)
    assert read_summary(rescored)["unknown"] == {"picky: raised RuntimeError: no ones": 1}


def test_what_stays_unknown_has_not_changed(tmp_path):
    rescored = again(make_run(tmp_path, [group([box(7), box(1)], answer=""), group([box(7), box(1)], index=1)]))
    assert rescored.unknown.total() == 2  # without a gold nothing is right or wrong
    total = rescored.trained
    assert (total.completions, total.known_old, total.known_new, total.changed) == (4, 2, 2, 0)


def test_a_reward_that_hangs_is_stopped(tmp_path):
    def hang(completions, **_):
        import time

        time.sleep(60)

    rescored = again(make_run(tmp_path, [group([box(7), box(1)])]), {hang: 1.0}, reward_time_limit=0.3)
    assert rescored.unknown == {"hang: time limit 0.3 s": 2}
    assert rescored.trained.known_new == 0 and math.isnan(rescored.trained.mean_new)
    assert read_summary(rescored)["trained"]["mean_new"] is None  # JSON has no NaN


def test_rewards_see_the_step_messages_and_columns_of_the_data(tmp_path):
    def witness(prompts, completions, level, answer, trainer_state, **_):
        assert prompts[0] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How much?"}]
        assert completions[0] == [{"role": "assistant", "content": r"<think></think>\boxed{7}"}]
        assert level == [3, 3] and answer == ["7", "7"] and trainer_state.global_step == 4
        return [1.0, 0.0]

    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How much?"}]
    # The row's index in the run is 0: one before it was set aside as too long for the sampler.
    rows = [{"prompt": "long " * 50, "answer": "7", "level": 1}, {"prompt": talk, "answer": "7", "level": 3}]
    data = write_rows(tmp_path / "data.jsonl", rows)
    run = make_run(tmp_path / "run", [group([box(7), box(1)], prompt=talk)], data=data, step=5)
    rescored = again(run, {witness: 1.0})
    assert not rescored.unknown and rescored.problems.lost == 0 and rescored.problems.missing is None
    assert set(rescored.steps) == {5}


def test_each_process_is_scored_in_a_call_of_its_own(tmp_path):
    def together(completions, **_):
        return [float(len(completions))] * len(completions)

    run = make_run(
        tmp_path,
        [
            group([box(7), box(1)]),
            group(
                [
                    box(7),
                    box(1),
                ],
                index=1,
            ),
        ],
    )
    file = run / "rollouts/step-000001.parquet"
    table = pq.read_table(file)
    processes = pa.array([0, 0, 1, 1])
    pq.write_table(table.set_column(table.schema.get_field_index("process"), "process", processes), file)
    rescored = again(run, {together: 1.0})
    assert [row["reward_new"] for row in stored(rescored)] == [2.0] * 4
    assert [(row["process"], row["group"]) for row in stored(rescored)] == [(0, 0), (0, 0), (1, 1), (1, 1)]


def test_equal_prompts_are_told_apart_by_their_place_and_answer(tmp_path):
    def level(level, **_):
        return [float(x) for x in level]

    rows = [{"prompt": "How much?", "answer": answer, "level": i} for i, answer in enumerate(["7", "8", "7", "8"])]
    data = write_rows(tmp_path / "data.jsonl", rows)
    groups = [group([box(7)] * 2, index=2), group([box(7)] * 2, index=3, answer="8"), group([box(7)] * 2, index=0)]
    run = make_run(tmp_path / "run", groups, data=data)
    assert [row["reward_new"] for row in stored(again(run, {level: 1.0}))] == [2, 2, 3, 3, 0, 0]


def test_missing_data_leaves_the_stored_answer_and_says_so(tmp_path):
    run = make_run(tmp_path, [group([box(7), box(1)])], data="gone.jsonl")
    rescored = again(run)
    assert [row["reward_new"] for row in stored(rescored)] == [1.0, 0.0]
    text = shown(rescored)
    assert "all 1 prompts are scored with their stored text and answer" in text and "gone.jsonl" in text
    assert read_summary(rescored)["prompts"]["not_in_data"] == 1


def test_changed_data_is_not_taken_for_the_runs(tmp_path):
    def level(level, **_):
        return [None if x is None else float(x) for x in level]

    rows = [
        {"prompt": "How much?", "answer": "7", "level": 1},
        {"prompt": "How many?", "answer": "9", "level": 2},  # the run's answer was 7
        {"prompt": "Another text", "answer": "7", "level": 3},
    ]
    data = write_rows(tmp_path / "data.jsonl", rows)
    groups = [group([box(7), box(1)], index=i, prompt=p) for i, p in enumerate(["How much?", "How many?", "How so?"])]
    run = make_run(tmp_path / "run", groups, data=data)
    rescored = again(run, {level: 1.0, "accuracy": 1.0})
    assert [row["new/level"] for row in stored(rescored)] == [1, 1, None, None, None, None]
    assert [row["new/accuracy"] for row in stored(rescored)] == [1, 0] * 3
    assert rescored.problems.lost == 2
    assert "data.jsonl has changed: 2 of 3 prompts aren't in it as they were" in shown(rescored)


def test_given_data_brings_its_own_answers(tmp_path):
    data = write_rows(
        tmp_path / "mended.jsonl", [{"prompt": "x", "answer": "1"}, {"prompt": "How much?", "answer": "1"}]
    )
    rescored = again(make_run(tmp_path / "run", [group([box(7), box(1)])]), data=data)
    assert [row["reward_new"] for row in stored(rescored)] == [0.0, 1.0]
    assert rescored.trained.flipped == 2 and "1 of 1 prompts have another answer than in the run" in shown(rescored)


def test_the_largest_changes_are_shown_one_a_prompt(tmp_path):
    def half(completions, **_):
        return [0.5 if "9" in text else float("1" in text) for text in completions]

    groups = [group([box(7), box(1), box(1), box(1)], index=0), group([box(9)] * 4, index=1, prompt="Same?")]
    rescored = again(make_run(tmp_path, groups), {half: 1.0})
    (example,) = rescored.examples  # the second group changed no advantage
    assert (example.pair.old.prompt.index, example.sample, example.flipped) == (0, 0, True)
    assert "flipped: step 1, prompt 0, completion 0: reward 1 → 0, advantage +1.5 → -1.5" in shown(rescored)
    assert again(tmp_path, {half: 1.0}, examples=0).examples == []


def test_hostile_text_is_spelled_out(tmp_path):
    def first(completions, **_):
        if "\x07" in completions[0]:
            raise ValueError("\x1b[2J\u202e[bold]")
        return [float("red" in text) for text in completions]

    evil = "\x1b[31m\u202e[red]ok[/red]\x00\r\nnext \\nabla"
    run = make_run(tmp_path, [group([evil, "\x07", "<think>"], prompt="\x1b]0;title\x07[b]?[/b]")])
    text = shown(again(run, {first: 1.0}))
    assert "[red]ok[/red]" in text and "[b]?[/b]" in text and "⏎ next \\nabla" in text
    assert not {"\x1b", "\x07", "\x00", "\r", "\u202e"} & set(text)


def test_the_runs_own_files_stay_as_they_were_and_again_is_the_same(tmp_path):
    run = make_run(tmp_path, [group([box(7), box(1)])])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first = again(run, {wrong(): 1.0})
    made = {path: path.read_bytes() for path in first.output.iterdir()}
    second = again(run, {wrong(): 1.0})
    assert second.output == first.output and first.output.parent == run / "rescored"
    assert {path: path.read_bytes() for path in first.output.iterdir()} == made
    assert {path: path.read_bytes() for path in before} == before
    assert {path for path in run.rglob("*") if path.is_file()} == before.keys() | made.keys()
    assert again(run, {wrong(): 2.0}).output != first.output  # another question, another folder


def test_an_answer_to_another_question_is_not_written_over(tmp_path):
    run = make_run(tmp_path / "run", [group([box(7), box(1)])])
    output = str(tmp_path / "out")
    again(run, {wrong(): 1.0}, output=output)
    with pytest.raises(UserError, match="holds something else than this rescoring; give another --output"):
        again(run, {wrong(): 2.0}, output=output)
    with pytest.raises(UserError, match="holds something else"):
        again(run, {wrong(): 1.0}, output=str(run))


def test_a_file_being_written_is_not_read(tmp_path):
    run = make_run(tmp_path, [group([box(7), box(1)])])
    (run / "rollouts/.step-000002.parquet.tmp").write_bytes(b"PAR1 half of")
    assert set(again(run).steps) == {1}


def test_files_that_are_no_rollouts_are_named(tmp_path):
    run = make_run(tmp_path, [group([box(7), box(1)])])
    file = run / "rollouts/step-000002.parquet"
    pq.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(UserError, match=r"step-000002\.parquet is not a step's rollout .*column 'step' is missing"):
        again(run)
    table = pq.read_table(run / "rollouts/step-000001.parquet")
    pq.write_table(table.drop_columns(["used"]), file)  # as it was before dynamic sampling
    with pytest.raises(UserError, match=r"column 'used' is missing.*another version"):
        again(run)
    pq.write_table(table.set_column(table.schema.get_field_index("reward"), "reward", pa.array(["1", "0"])), file)
    with pytest.raises(UserError, match="column 'reward' is of another type"):
        again(run)
    file.write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"step-000002\.parquet is damaged or no Parquet file"):
        again(run)


def test_a_run_or_reward_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no rollouts/step-\*\.parquet in it"):
        again(tmp_path)
    run = make_run(tmp_path, [group([box(7), box(1)])])
    with pytest.raises(UserError, match="did you mean 'accuracy'"):
        rescore(RescoreConfig(run_dir=str(run), rewards={"acuracy": 1.0}))
    with pytest.raises(UserError, match=r"can't be loaded in its own process.*no_such_module"):
        rescore(RescoreConfig(run_dir=str(run), rewards={"no_such_module.reward": 1.0}))
    assert not (run / "rescored").exists()  # a mistake leaves nothing behind
    with pytest.raises(UserError, match="at least one needs a weight other than 0"):
        RescoreConfig(run_dir=str(run), rewards={"accuracy": 0.0})
    (run / "config.yaml").write_text("model: m\n")
    with pytest.raises(UserError, match=r"config\.yaml has no loss\.advantage"):
        again(run)
    (run / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml can't be read"):
        again(run)


# --- a real run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    return write_rows(path, [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(12)])


@pytest.fixture(scope="module")
def config(problems, tmp_path_factory):
    folder = tmp_path_factory.mktemp("v3")
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = deepseek_v3.DeepseekV3ForCausalLM(tiny_config(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return GRPOConfig(
        model=str(folder),
        data=problems,
        steps=2,
        prompts_per_step=2,
        group_size=4,
        overlong_buffer=4,
        sampling=SamplingConfig(backend="native", max_tokens=8),
        dynamic_sampling=DynamicSamplingConfig(max_rounds=2),
        optim=OptimConfig(lr=1e-3),
        evaluation=EvaluationConfig(data=problems, problems=2, every=0),
    )


def rare():
    """A reward that differs within some groups only, so that dynamic sampling leaves spare ones."""

    def vowels(completions, answer, **_):
        counts = [sum(c in "aeiou" for c in completion[0]["content"]) for completion in completions]
        return [0.1 * (n // 3) + 0.7 * (int(gold) > 8) for n, gold in zip(counts, answer, strict=True)]

    return vowels


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return train(
        dataclasses.replace(config, run_dir=str(tmp_path_factory.mktemp("runs") / "run")), rewards={rare(): 1.3}
    )


def test_a_runs_own_rewards_reproduce_it_exactly(finished):
    rescored = again(finished.run_dir, {rare(): 1.3})
    assert rescored.problems.missing is None and rescored.problems.lost == 0 and not rescored.unknown
    total = rescored.trained + rescored.spare
    assert total.completions >= 16 and total.signal_old > 0
    assert (total.changed, total.flipped, total.gained, total.lost) == (0, 0, 0, 0)
    assert rescored.examples == []
    for step in (1, 2):
        rows = stored(rescored, step)
        original = pq.read_table(finished.run_dir / f"rollouts/step-{step:06d}.parquet").to_pylist()
        for column in ("reward", "advantage"):
            assert [row[f"{column}_new"] for row in rows] == [row[column] for row in original]
        for key in ("step", "process", "group", "sample", "prompt_index", "used"):
            assert [row[key] for row in rows] == [row[key] for row in original]
        assert [row["new/vowels"] for row in rows] == [row["rewards/vowels"] for row in original]


def test_own_rewards_that_no_name_leads_to_must_be_given(finished):
    with pytest.raises(
        UserError, match=r"was paid by vowels, and its config\.yaml names accuracy, format; give --rewards"
    ):
        again(finished.run_dir)


def test_the_command(finished, tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "def brevity(completions, completion_ids, **_):\n    return [-len(ids) / 8 for ids in completion_ids]\n"
    )

    rewards = '{"format": 1, "my_rewards.brevity": 0.5}'
    done = subprocess.run(
        [sys.executable, "-m", "recipes.rescore", "--run_dir", str(finished.run_dir), "--rewards", rewards],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "trained on" in done.stdout and "flipped" in done.stdout and "step 2/2" in done.stderr
    (folder,) = [path for path in (finished.run_dir / "rescored").iterdir() if path.name.startswith("format-1+my_rew")]
    assert sorted(path.name for path in folder.iterdir()) == [
        "step-000001.parquet", "step-000002.parquet", "summary.json",
    ]  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["complete"] and summary["asked"]["rewards"] == {"format": 1.0, "my_rewards.brevity": 0.5}
    assert set(summary["steps"]) == {"1", "2"}


def test_a_mistake_is_one_line_and_2(finished, capsys):
    argv = ["--run_dir", str(finished.run_dir), "--rewards", '{"acuracy": 1}']
    assert main(RescoreConfig, command.run, prog="recipes.rescore", description="", argv=argv) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("recipes.rescore: error: reward 'acuracy' is unknown")
    assert len(shown.err.splitlines()) == 1
