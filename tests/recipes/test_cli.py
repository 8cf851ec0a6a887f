import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from recipes.cli import main, parse, to_dict
from runtime.errors import EXIT_DISK, UserError
from runtime.files import writing

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser."""

    lr: float = 1e-4
    """Peak learning rate, per step."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Adam's two decays."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: use a positive number")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters."""

    rank: int = 8
    """Rank of the two factors."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings."""

    model: str
    """Folder of the model."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    lora: LoraConfig | None = None
    """Adapters, or null for all weights."""
    loss: Literal["grpo", "dapo"] = "grpo"
    """Which loss."""
    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0})
    """Weight of each reward."""
    report_to: tuple[str, ...] = ()
    """Trackers."""
    resume: bool = False
    """Go on where the run folder stands."""
    max_grad_norm: float | None = 1.0
    """Clip, or null."""


def ask(*argv: str) -> Config:
    return parse(Config, argv, prog="recipes.test", description="A test.")


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line a mistake is answered with."""
    with pytest.raises(SystemExit) as stop:
        ask(*argv)
    assert stop.value.code == 2
    line, more, *rest = capsys.readouterr().err.splitlines()
    assert line.startswith("recipes.test: error: ") and more == "(--help explains every setting)" and not rest
    return line.removeprefix("recipes.test: error: ")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_and_nested_overrides() -> None:
    config = ask("--model", "m", "--optim.lr", "3e-6", "--optim.betas=[0.5, 0.6]", "--lora.rank", "4")
    assert config == Config(model="m", optim=OptimConfig(lr=3e-6, betas=(0.5, 0.6)), lora=LoraConfig(rank=4))


def test_yaml_1e_5_is_a_float(tmp_path: Path) -> None:
    config = ask("--config", write(tmp_path / "a.yaml", "model: m\noptim:\n  lr: 1e-5\n"))
    assert config.optim.lr == 1e-5 and isinstance(config.optim.lr, float)


def test_later_file_beats_earlier_and_flags_beat_files_wherever_they_stand(tmp_path: Path) -> None:
    a = write(tmp_path / "a.yaml", "model: a\nloss: dapo\noptim: {lr: 1.0, betas: [0.1, 0.2]}\n")
    b = write(tmp_path / "b.yaml", "model: b\noptim: {lr: 2.0}\n")
    config = ask("--optim.lr", "3", "--config", a, f"--config={b}")
    assert config == Config(model="b", loss="dapo", optim=OptimConfig(lr=3.0, betas=(0.1, 0.2)))


def test_bare_boolean_flag_is_true() -> None:
    assert ask("--resume", "--model", "m").resume
    assert ask("--model", "m", "--resume").resume
    assert not ask("--resume", "false", "--model", "m").resume
    assert not ask("--resume=false", "--model", "m").resume


def test_optional_values_take_null(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "model: m\nlora: {rank: 2}\n")
    assert ask("--config", file).lora == LoraConfig(rank=2)
    assert ask("--config", file, "--lora", "null", "--max_grad_norm", "null") == Config(model="m", max_grad_norm=None)
    assert ask("--config", file, "--lora", '{"rank": 3}').lora == LoraConfig(rank=3)


def test_dict_takes_json_or_dotted_entries(tmp_path: Path) -> None:
    assert ask("--model", "m", "--rewards", '{"format": 2}').rewards == {"format": 2.0}
    assert ask("--model", "m", "--rewards.format", "0.5").rewards == {"accuracy": 1.0, "format": 0.5}
    file = write(tmp_path / "a.yaml", "model: m\nrewards: {format: 2}\n")
    assert ask("--config", file).rewards == {"format": 2.0}


def test_tuple_takes_one_value_or_a_list() -> None:
    assert ask("--model", "m", "--report_to", "wandb").report_to == ("wandb",)
    assert ask("--model", "m", "--report_to", "wandb,trackio").report_to == ("wandb", "trackio")
    assert ask("--model", "m", "--report_to", "[wandb]").report_to == ("wandb",)


def test_negative_number_is_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("--model", "m", "--max_grad_norm", "-1").max_grad_norm == -1.0


def test_unknown_flag_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    expected = "optim.lrr is not a setting (flag --optim.lrr); did you mean optim.lr?"
    assert refusal(capsys, "--model", "m", "--optim.lrr", "1") == expected
    assert "did you mean optim.lr?" in refusal(capsys, "--model", "m", "--lr=1")
    assert "did you mean report_to?" in refusal(capsys, "--model", "m", "--report-to", "wandb")
    assert "did you mean lora.rank?" in refusal(capsys, "--lora", '{"rnk": 1}')
    assert refusal(capsys, "--zzz") == "zzz is not a setting (flag --zzz)"


def test_abbreviated_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "mod is not a setting" in refusal(capsys, "--mod", "m")


def test_unknown_key_names_its_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good = write(tmp_path / "good.yaml", "model: m\n")
    bad = write(tmp_path / "bad.yaml", "optim: {lrr: 1}\n")
    said = refusal(capsys, "--config", good, "--config", bad)
    assert said == f"optim.lrr is not a setting ({bad}); did you mean optim.lr?"


def test_wrong_type_names_field_value_and_expected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "model: m\nlora: {rank: many}\n")
    assert refusal(capsys, "--config", file) == f"lora.rank='many' ({file}): expected int"
    assert refusal(capsys, "--optim.lr", "x") == "optim.lr='x' (flag --optim.lr): expected float"
    assert refusal(capsys, "--loss", "x") == "loss='x' (flag --loss): expected one of grpo, dapo"
    assert refusal(capsys, "--max_grad_norm", "x").endswith("expected float or null")
    assert refusal(capsys, "--rewards.format", "x") == "rewards.format='x' (flag --rewards.format): expected float"
    assert refusal(capsys, "--optim.betas", "[1]").endswith("expected tuple[float, float]")
    assert "expected settings of its own: rank" in refusal(capsys, "--model", "m", "--lora", "8")


def test_missing_setting_file_and_value_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "model" in refusal(capsys)
    assert refusal(capsys, "--config", "no.yaml") == "--config no.yaml: No such file or directory"
    assert "is not YAML" in refusal(capsys, "--config", write(tmp_path / "a.yaml", "a: [\n"))
    assert "found a list" in refusal(capsys, "--config", write(tmp_path / "b.yaml", "- a\n"))
    assert refusal(capsys, "--model") == "--model needs a value"
    assert "'m' stands alone" in refusal(capsys, "m")


def test_a_configs_own_check_is_one_line_with_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "--model", "m", "--optim.lr", "0") == "optim.lr=0.0: use a positive number"


def test_configuration_cannot_name_code(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "model: m\nlora: {class_path: os.system}\n")
    assert "lora.class_path is not a setting" in refusal(capsys, "--config", file)


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        ask("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "Peak learning rate, per step. (type: float, default: 0.0001)" in text
    assert "Rank of the two factors. (type: int, default: 8)" in text  # of a group that is off by default


def test_printed_config_reads_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        ask("--model", "m", "--optim.lr", "1e-6", "--lora.rank", "3", "--print_config")
    file = write(tmp_path / "a.yaml", capsys.readouterr().out)
    assert ask("--config", file) == Config(model="m", optim=OptimConfig(lr=1e-6), lora=LoraConfig(rank=3))


def test_to_dict_is_plain_and_reads_back(tmp_path: Path) -> None:
    config = Config(model="m", report_to=("wandb",), lora=LoraConfig())
    plain = to_dict(config)
    assert plain["optim"] == {"lr": 1e-4, "betas": [0.9, 0.99]} and plain["report_to"] == ["wandb"]
    assert ask("--config", write(tmp_path / "a.yaml", yaml.safe_dump(plain))) == config


def run_main(run: Any) -> int:
    return main(Config, run, prog="recipes.test", description="A test.", argv=["--model", "m"])


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def user_error(config: Config) -> None:
        raise UserError("data=x: no such file")

    def interrupted(config: Config) -> None:
        raise KeyboardInterrupt

    def broken(config: Config) -> None:
        raise ValueError("a bug")

    assert run_main(lambda config: None) == 0
    assert run_main(lambda config: 143) == 143
    assert run_main(user_error) == 2
    assert capsys.readouterr().err == "recipes.test: error: data=x: no such file\n"
    assert run_main(interrupted) == 130
    with pytest.raises(ValueError, match="a bug"):  # Python itself shows the traceback and exits with 1
        run_main(broken)


def test_disk_fault_is_one_line_and_a_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def full_disk(config: Any) -> None:
        with writing(Path("runs/x/metrics.jsonl")), Path("/dev/full").open("w") as f:
            f.write("x")

    said = "recipes.test: error: runs/x/metrics.jsonl: No space left on device; free space, then the same command"
    assert run_main(full_disk) == EXIT_DISK == 74
    assert capsys.readouterr().err == f"{said} with --resume\n"
    # A command that can't be resumed isn't told to.
    assert main(OptimConfig, full_disk, prog="recipes.test", description="A test.", argv=[]) == 74
    assert capsys.readouterr().err == f"{said}\n"


def test_command_prints_no_traceback_for_a_mistake() -> None:
    code = (
        "import sys\nfrom dataclasses import dataclass\nfrom recipes.cli import main\n"
        "@dataclass(frozen=True, kw_only=True)\nclass C:\n    steps: int = 1\n"
        "sys.exit(main(C, print, prog='recipes.x', description='d'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--step", "3"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "did you mean steps?" in done.stderr and "Traceback" not in done.stderr
