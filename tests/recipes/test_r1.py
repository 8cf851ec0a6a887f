"""A chain of recipes: what its YAML may say, what is kept, what is run again, killed anywhere, and what it teaches."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import deepseek_v3
from recipes.chain import tiny
from recipes.chain.config import CONFIGS, ChainConfig, missing_inputs, resolve_stages
from recipes.chain.run import Chain
from recipes.cli import main, read, to_dict
from recipes.r1 import TABLE, TINY, arguments, run
from recipes.tiny import make_tokenizer
from runtime.checkpoint import save_checkpoint
from runtime.stories import stories

ROOT = Path(__file__).parents[2]
CHAINS = sorted(CONFIGS.glob("chain_*.yaml"))


def load(path: Path, *flags: str) -> ChainConfig:
    return read(ChainConfig, ["--config", str(path), *flags], prog="r1", description="")


# --- what a chain's YAML may say ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_every_shipped_chain_is_one_its_recipes_take(path: Path, tmp_path: Path) -> None:
    stages = resolve_stages(load(path), tmp_path)
    missing = missing_inputs(stages, tmp_path)
    assert all("path/to" in line for line in missing)
    assert bool(missing) == (path != TINY)
    for stage in {stage.recipe: stage for stage in stages}.values():  # what is given reads back as what was checked
        file = tmp_path / "stage.yaml"
        file.write_text(yaml.safe_dump(to_dict(stage.config)))
        assert read(type(stage.config), ["--config", str(file)], prog="", description="") == stage.config


def test_the_tiny_chain_is_r1s(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in resolve_stages(load(TINY, "--seed", "3"), tmp_path)}
    assert [stage.recipe for stage in stages.values()] == ["sft", "grpo", "distill", "sft", "grpo", "sft", "sft"]
    assert {stage.config.seed for stage in stages.values()} == {3}
    mixed = stages["mixed_sft"].config
    assert mixed.model == str(tmp_path / "01-cold_start/checkpoints/final")
    assert [source.weight for source in mixed.sources] == [600, 200]
    assert any(reward.startswith("language") for reward in stages["reasoning_rl"].config.rewards)
    assert stages["student"].needs == ("rejection",) and stages["student_baseline"].needs == ()
    assert stages["student"].config.model == stages["student_baseline"].config.model


def test_the_published_settings_are_the_papers(tmp_path: Path) -> None:
    stages = {stage.name: stage.config for stage in resolve_stages(load(CONFIGS / "chain_r1_671b.yaml"), tmp_path)}
    for name in ("cold_start", "mixed_sft"):
        config = stages[name]
        assert (config.optim.lr, config.optim.final_lr, config.row_length) == (5e-5, 5e-6, 32_768)
    assert stages["cold_start"].model == stages["mixed_sft"].model
    for name in ("reasoning_rl", "all_scenarios_rl", "preference_rl"):
        config = stages[name]
        assert (config.loss.epsilon, config.loss.beta, config.optim.lr, config.group_size) == (10, 0.001, 3e-6, 16)
    last = [stages[name] for name in ("all_scenarios_rl", "preference_rl")]
    assert [round(config.steps * config.optim.minibatches, -2) for config in last] == [1_300, 400]
    assert [config.sampling.temperature for config in last] == [0.7, 0.7]
    v3 = {stage.name: stage.config for stage in resolve_stages(load(CONFIGS / "chain_v3_671b.yaml"), tmp_path)}
    assert (v3["sft"].epochs, v3["sft"].optim.lr, v3["sft"].optim.final_lr) == (2, 5e-6, 1e-6)
    experts = {expert.domain: expert.model for expert in v3["generate"].experts if expert.domain != "writing"}
    assert experts == {d: str(tmp_path / f"{n}-{d}_rl/checkpoints/final") for d, n in (("math", "02"), ("code", "04"))}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    talk = [[{"role": "user", "content": f"{i}+{i}?"}, {"role": "assistant", "content": f"{2 * i}"}] for i in range(8)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talk))
    return path


def refuse(stages: list[dict[str, Any]], tmp_path: Path, **settings: Any) -> None:
    """Hand it to the command, which ends with 2 and starts nothing."""
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump({"stages": stages, "run_dir": str(tmp_path / "run"), **settings}))
    try:
        code = main(ChainConfig, run, prog="r1", description="", argv=["--config", str(file)])
    except SystemExit as left:
        code = int(str(left.code))
    assert code == 2 and not list((tmp_path / "run").glob("0*"))


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"settings": {"model": "${frist.model}"}}, ["stage b: model='${frist.model}'", "did you mean first?"]),
        ({"settings": {"model": "${b.model}"}}, ["no stage before it is called 'b'", "there are first"]),
        ({"settings": {"model": "${first.modle}"}}, ["a sft stage makes no 'modle'; did you mean model?"]),
        ({"settings": {"model": "${tiny.qwem}"}}, ["'qwem'; did you mean qwen?"]),
        ({"settings": {"optim": {"lrr": 1}}}, ["stage b: optim.lrr is not a setting (settings); did you mean optim."]),
        ({"settings": {"epochs": 0}}, ["stage b: epochs=0: must be at least 1"]),
        ({"settings": {"optim.lr": "fast"}}, ["stage b: optim.lr='fast' (settings): expected float"]),
        ({"settings": {"run_dir": "x"}}, ["stage b: settings.run_dir: the chain decides it"]),
        ({"preset": "sft_tyni"}, ["stage b: preset='sft_tyni': no such file; did you mean sft_tiny?"]),
        ({"settings": {"mix": ["gone.jsonl"]}}, ["stage b: mix.0.path='gone.jsonl'", "no such file"]),
        ({"settings": {"model": "./gone"}}, ["stage b: model='./gone'", "no such folder"]),
        ({"recipe": "stf"}, ["recipe"]),
        ({"name": "first"}, ["two are called 'first'"]),
        ({"name": "a b"}, ["name='a b'"]),
        ({"name": "tiny"}, ["name='tiny'"]),
        ({"setings": {"epochs": 1}}, ["'setings'", "expected a list of groups of name, recipe, preset, launch"]),
    ],
)  # fmt: skip
def test_a_mistake_is_refused_before_anything_starts(
    second: dict[str, Any], said: list[str], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {"name": "first", "recipe": "sft", "settings": {"mix": [str(rows)]}}
    refuse([first, {"name": "b", "recipe": "sft", "settings": {"mix": [str(rows)]}} | second], tmp_path)
    error = capsys.readouterr().err
    assert [part for part in said if part not in error] == [], error


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"only": "frist"}, "only='frist': no stage is called so; did you mean first?"),
        ({"from_stage": "first", "resume": True}, "begin anew by --from alone"),
        ({"from_stage": "first", "only": "first"}, "give one"),
        ({"resume": True, "run_dir": None}, "run_dir: name the chain"),
    ],
)
def test_requests_that_contradict_each_other_are_refused(
    settings: dict[str, Any], said: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse([{"name": "first", "recipe": "sft", "settings": {"mix": [str(rows)]}}], tmp_path, **settings)
    assert said in capsys.readouterr().err


def test_the_tiny_chain_is_the_default_and_from_is_short() -> None:
    assert arguments(["--seed", "1"]) == ["--config", str(TINY), "--seed", "1"]
    assert arguments(["--config=x", "--from", "a"]) == ["--config=x", "--from_stage", "a"]
    assert arguments(["--config", "x", "--from=a"]) == ["--config", "x", "--from_stage=a"]


def test_a_plan_shows_the_stages_and_what_is_missing_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = CONFIGS / "chain_distill_qwen_7b.yaml"
    argv = ["--config", str(path), "--plan", "--run_dir", str(tmp_path / "run")]
    assert main(ChainConfig, run, prog="r1", description="", argv=argv) == 0
    shown = capsys.readouterr().out
    assert (
        "rejection" in shown and "missing: stage rejection: problems.0.path='path/to/reasoning_prompts.jsonl'" in shown
    )
    assert not (tmp_path / "run").exists()


# --- what is kept, and what is run again ----------------------------------------------------------------------------

LAUNCHER = """\
# A launcher that trains in no time: copies a checkpoint to where the stage's settings say, and notes its call.
config=$4
echo "$2" "$(basename $config .yaml)" >> {folder}/calls
run=$(sed -n 's/^run_dir: //p' $config)
if [ -e {folder}/slow ]; then trap 'echo told >> {folder}/calls; exit 143' TERM; while :; do sleep 0.05; done; fi
if [ -e {folder}/fails ]; then exit 74; fi
mkdir -p $run/checkpoints && cp -r {folder}/final $run/checkpoints/
"""


class Quick:
    """A chain a -> b, with c on its own, of SFT stages whose launcher trains in no time."""

    def __init__(self, folder: Path, rows: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        save_checkpoint(folder, "final", lambda path: (path / "weights").write_text("1") and None, info={"step": 7})
        (folder / "launch.sh").write_text(LAUNCHER.format(folder=folder))
        models = {"a": "tiny", "b": "${a.model}", "c": "tiny"}
        self.stages = [self.stage(name, model, rows) for name, model in models.items()]

    def stage(self, name: str, model: str, rows: Path) -> dict[str, Any]:
        settings = {"model": model, "mix": [str(rows)], "optim": {"lr": 0.01}}
        return {"name": name, "recipe": "sft", "launch": f"sh {self.folder}/launch.sh", "settings": settings}

    @property
    def command(self) -> list[str]:
        file = self.folder / "chain.yaml"
        file.write_text(yaml.safe_dump({"stages": self.stages, "run_dir": str(self.run_dir)}))
        return ["--config", str(file)]

    def run(self, *flags: str) -> int:
        """The exit code."""
        try:
            return main(ChainConfig, run, prog="r1", description="", argv=arguments([*self.command, *flags]))
        except SystemExit as left:
            return int(str(left.code))

    @property
    def calls(self) -> list[str]:
        """Stages that were started since the last look, and what else their launcher noted."""
        file = self.folder / "calls"
        found = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line.removeprefix("recipes.sft ") for line in found]

    def lr(self, name: str, value: float) -> None:
        next(stage for stage in self.stages if stage["name"] == name)["settings"]["optim"]["lr"] = value


@pytest.fixture
def quick(tmp_path: Path, rows: Path) -> Quick:
    return Quick(tmp_path, rows)


ALL = ["01-a", "02-b", "03-c"]


def test_finished_stages_are_not_run_again(quick: Quick, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick.run() == 0 and quick.calls == ALL
    assert [row["steps"] for row in json.loads((quick.run_dir / TABLE).read_text())] == [7] * 3
    assert quick.run() == 2 and "already holds a chain; add --resume" in capsys.readouterr().err
    assert quick.run("--resume") == 0 and quick.calls == []


def test_a_stage_that_failed_ends_the_chain_with_its_exit_code_and_is_gone_on_with(quick: Quick) -> None:
    (quick.folder / "fails").touch()
    assert quick.run() == 74 and quick.calls == ["01-a"]
    assert [row["finished"] for row in json.loads((quick.run_dir / TABLE).read_text())] == [False] * 3
    (quick.folder / "fails").unlink()
    assert quick.run("--resume") == 0 and quick.calls == ALL
    assert yaml.safe_load((quick.run_dir / "01-a.yaml").read_text())["resume"] is True


def test_from_a_stage_on_all_is_run_anew_and_what_was_there_is_kept(quick: Quick) -> None:
    quick.run()
    assert quick.calls and quick.run("--from", "b") == 0
    assert quick.calls == ["02-b", "03-c"] and (quick.run_dir / "02-b~1/checkpoints/final").is_dir()
    assert quick.run("--from=c") == 0 and quick.calls == ["03-c"] and (quick.run_dir / "03-c~2").is_dir()
    assert not (quick.run_dir / "02-b~2").exists()


def test_from_needs_what_comes_before(quick: Quick, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick.run("--from", "b") == 2 and quick.calls == []
    assert "stage a is not finished" in capsys.readouterr().err


def test_only_runs_one_stage_and_then_those_made_of_it_are_refused(
    quick: Quick, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quick.run("--only", "c") == 0 and quick.calls == ["03-c"]  # it needs none of the others
    assert quick.run("--only", "b") == 2 and "stage a is not finished" in capsys.readouterr().err
    assert quick.run("--resume") == 0 and quick.calls == ALL[:2]
    shutil.rmtree(quick.folder / "final")
    save_checkpoint(quick.folder, "final", lambda path: (path / "weights").write_text("2") and None, info={"step": 8})
    assert quick.run("--only", "a") == 0 and quick.calls == ["01-a"]
    assert quick.run("--resume") == 2 and quick.calls == []
    assert "stage b was made from another a; run it again by --from b" in capsys.readouterr().err
    assert quick.run("--from", "b") == 0 and quick.calls == ALL[1:]


def test_other_settings_of_a_finished_stage_are_refused_with_the_stage_to_run_from(
    quick: Quick, capsys: pytest.CaptureFixture[str]
) -> None:
    quick.run()
    quick.lr("b", 0.02)
    assert quick.calls and quick.run("--resume") == 2 and quick.calls == []
    error = capsys.readouterr().err
    assert "stage b was finished with other settings" in error and "--from b" in error
    assert "optim.lr: 0.01 -> 0.02" in error
    assert quick.run("--from", "c") == 2 and quick.calls == []  # b is to be kept, and isn't what is asked for
    assert quick.run("--from", "b") == 0 and quick.calls == ALL[1:]


def test_a_changed_or_lost_file_of_a_finished_stage_is_refused(
    quick: Quick, capsys: pytest.CaptureFixture[str]
) -> None:
    quick.run()
    weights = quick.run_dir / "02-b/checkpoints/final/weights"
    weights.write_text("0")
    assert quick.calls and quick.run("--resume") == 2
    assert f"{weights} has changed" in (error := capsys.readouterr().err) and "--from b" in error
    weights.unlink()
    assert quick.run("--resume") == 2 and f"{weights} is missing" in capsys.readouterr().err
    weights.write_text("1")
    assert quick.run("--resume") == 0 and quick.calls == []


def test_another_whole_checkpoint_in_its_place_is_refused(quick: Quick, capsys: pytest.CaptureFixture[str]) -> None:
    quick.run()
    folder = quick.run_dir / "01-a/checkpoints"
    save_checkpoint(folder, "final", lambda path: (path / "weights").write_text("3") and None, info={"step": 7})
    assert quick.run("--resume") == 2
    assert "stage a: what it made in" in (error := capsys.readouterr().err) and "--from a" in error


def test_two_chains_in_one_folder_are_refused(quick: Quick, capsys: pytest.CaptureFixture[str]) -> None:
    quick.run()
    with contextlib.closing(Chain(load(Path(quick.command[1])), quick.run_dir, [])):
        assert quick.run("--resume") == 2 and "is in use by another chain" in capsys.readouterr().err
    assert quick.run("--resume") == 0


@pytest.mark.slow
def test_told_to_leave_it_passes_that_on_and_leaves_with_the_stages_code(quick: Quick) -> None:
    (quick.folder / "slow").touch()
    chain = subprocess.Popen([sys.executable, "-m", "recipes.r1", *quick.command], cwd=ROOT)
    while not (quick.folder / "calls").exists():
        time.sleep(0.1)
    chain.send_signal(signal.SIGTERM)
    assert chain.wait(60) == 143 and quick.calls == ["01-a", "told"]


# --- real stages ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    config = deepseek_v3.preset(
        "tiny", hidden_size=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
        intermediate_size=16, moe_intermediate_size=8, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        deepseek_v3.DeepseekV3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def real(model: Path, tmp_path: Path) -> Path:
    """A chain of three small stages: distillation of given answers, SFT on them, GRPO of the result."""
    problems = tmp_path / "problems.jsonl"
    sums = [{"prompt": f"{i}+{i}?", "answer": f"{2 * i}", "response": f"\\boxed{{{2 * i}}}"} for i in range(12)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in sums))
    given = {"domain": "math", "model": str(model), "reasoning": False}
    stages = [
        {"name": "data", "recipe": "distill", "settings": {
            "problems": [{"path": str(problems), "domain": "math"}], "experts": [given], "near_duplicates": None}},
        {"name": "sft", "recipe": "sft", "settings": {
            "model": str(model), "mix": ["${data.shards}/data-00000.parquet"], "row_length": 32, "rows_per_step": 4,
            "workers": 1, "token_cache": str(tmp_path / "tokens"), "checkpoint": {"every": 1}, "optim": {"lr": 0.01}}},
        {"name": "rl", "recipe": "grpo", "settings": {
            "model": "${sft.model}", "data": "${data.problems}", "rewards": {"length(max_tokens=8)": 1.0},
            "steps": 3, "prompts_per_step": 2, "group_size": 4, "checkpoint": {"every": 1},
            "sampling": {"backend": "native", "max_tokens": 12}}},
    ]  # fmt: skip
    evaluation = {"data": str(problems), "problems": 4, "sampling": {"backend": "native", "max_tokens": 4}}
    file = tmp_path / "chain.yaml"
    file.write_text(yaml.safe_dump({"stages": stages, "evaluation": evaluation}))
    return file


def start(file: Path, run_dir: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "recipes.r1", "--config", str(file), "--run_dir", str(run_dir), *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def weights(run_dir: Path) -> list[bytes]:
    names = ("02-sft", "03-rl")
    return [(run_dir / name / "checkpoints/final/model.safetensors").read_bytes() for name in names]


@pytest.mark.slow
def test_killed_in_the_middle_of_each_stage_it_ends_as_if_nothing_had_happened(real: Path, tmp_path: Path) -> None:
    whole = start(real, tmp_path / "whole")
    shown, _ = whole.communicate(timeout=600)
    assert whole.returncode == 0 and "held-out accuracy" in shown
    rows = json.loads((tmp_path / "whole" / TABLE).read_text())
    assert [row["stage"] for row in rows] == ["data", "sft", "rl"] and rows[0]["rows"] == 12
    assert rows[1]["problems"] == rows[2]["problems"] == 4
    run_dir = tmp_path / "killed"
    flags: list[str] = []
    for stage, place in (
        ("01-data", "distill/before-manifest"),
        ("02-sft", "sft/stepped:2"),
        ("03-rl", "step/updated:2"),
    ):
        # The stage stops itself there; then its chain is killed, and takes it along.
        chain = start(real, run_dir, *flags, FAILPOINT=place, FAILPOINT_SIGNAL="SIGSTOP")
        child = stopped_child(chain)
        chain.kill()
        assert chain.wait(60) == -signal.SIGKILL
        wait_until_gone(child)
        assert (run_dir / stage).is_dir() and not (run_dir / stage / "checkpoints/final").exists()
        flags = ["--resume"]
    last = start(real, run_dir, *flags)
    last.communicate(timeout=600)
    assert last.returncode == 0 and weights(run_dir) == weights(tmp_path / "whole")
    again = start(real, run_dir, *flags)
    again.communicate(timeout=600)
    assert again.returncode == 0
    # What was finished when the chain was killed was not run again.
    attempts = [
        json.loads((run_dir / name / "environment.json").read_text())["attempts"] for name in ("01-data", "03-rl")
    ]
    assert [len(found) for found in attempts][1] == 2


def stopped_child(chain: subprocess.Popen[str], patience: float = 300.0) -> int:
    """The chain's child that has stopped itself."""
    until = time.monotonic() + patience
    while time.monotonic() < until and chain.poll() is None:
        children = Path(f"/proc/{chain.pid}/task/{chain.pid}/children").read_text().split()
        for pid in children:
            if state(int(pid)) == "T":
                return int(pid)
        time.sleep(0.1)
    raise AssertionError(f"no stage stopped itself; the chain's exit code: {chain.poll()}")


def wait_until_gone(pid: int, patience: float = 30.0) -> None:
    until = time.monotonic() + patience
    while state(pid) not in ("", "Z"):
        assert time.monotonic() < until, f"{pid} outlives its chain"
        time.sleep(0.05)


def state(pid: int) -> str:
    """R, S, T (stopped), Z; "" where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


# --- the tiny chain -------------------------------------------------------------------------------------------------


def test_demonstrations_have_three_habits_and_right_answers() -> None:
    rows = tiny.demonstrations(0)[:100]
    said = [row["messages"][-1]["content"] for row in rows]
    golds = [row["answer"] for row in stories(100, split="train", seed=0)]
    assert all(text.endswith(f"</think>\\boxed{{{gold}}}") for text, gold in zip(said, golds, strict=True))
    direct = sum(text.startswith("<think></think>") for text in said)
    han = [text for text in said if tiny.HAN in text]
    assert (direct, len(han)) == (50, 10)
    assert tiny.worked(stories(1, split="train", seed=0)[0]).count("\n") == 2


def test_general_questions_are_about_stories_that_are_neither_shown_nor_held_out() -> None:
    problems = tiny.general_problems(0)
    shown = {row["messages"][0]["content"].rpartition(" How many")[0] for row in tiny.demonstrations(0)}
    held_out = {row["prompt"][0]["content"].rpartition(" How many")[0] for row in stories(400, split="heldout", seed=0)}
    told = [row["prompt"][0]["content"] for row in problems]
    assert not {text.rpartition(". ")[0] + "." for text in told} & (shown | held_out)
    assert all(row["answer"] in text for row, text in zip(problems, told, strict=True))
    assert [row["domain"] for row in tiny.scenarios(0)[:8]] == ["math", "math", "math", "general"] * 2


def test_brevity_is_paid_where_a_general_question_is_not_reasoned_about() -> None:
    said = ["<think></think>\\boxed{Ana}", "<think>Ana has</think>\\boxed{Ana}", "<think>1+1=2</think>\\boxed{2}"]
    assert tiny.brevity(said, domain=["general", "general", "math"]) == [1.0, 0.0, 1.0]


@pytest.mark.nightly
def test_the_tiny_chain_ends_above_its_first_sft_and_the_student_above_its_baseline(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "recipes.r1", "--run_dir", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    rows = {row["stage"]: row for row in json.loads((tmp_path / "run" / TABLE).read_text())}
    accuracy = {name: row["accuracy"] for name, row in rows.items() if "accuracy" in row}
    assert accuracy["all_scenarios_rl"]["low"] > accuracy["cold_start"]["high"]
    assert accuracy["student"]["low"] > accuracy["student_baseline"]["high"]
    assert rows["student"]["steps"] <= rows["student_baseline"]["steps"]
