"""The files for many machines (docs/cluster.md): each parses by what will read it, and so does every command in it."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from distill.config import DistillConfig
from recipes.cli import read
from rl.config import GRPOConfig
from sampling import serve
from sft.config import SFTConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes/configs/cluster"
RECIPES: dict[str, type] = {"sft": SFTConfig, "grpo": GRPOConfig, "distill": DistillConfig}
SETTINGS = sorted(path for path in FOLDER.glob("*_*.yaml"))
SCRIPTS = sorted([*FOLDER.glob("*.sbatch"), *FOLDER.glob("*.sky.yaml")])
SKY_KEYS = {"name", "num_nodes", "workdir", "resources", "envs", "secrets", "setup", "run"}
VARIABLES = {"server_urls": '["http://a:1","http://b:1"]', "GPUS_PER_NODE": "8", "MODEL": "org/model"}
"""What stands for a script's variables where their value matters to a parser."""


def script(path: Path) -> str:
    """What a node runs."""
    return yaml.safe_load(path.read_text())["run"] if path.suffix == ".yaml" else path.read_text()


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(module, arguments) of every `-m module ...`, also in comments; variables are given a value."""
    text = re.sub(r"\\\n#?\s*", " ", text)
    text = re.sub(r'"\[\$\{?URLS[^"]*\]"', f"'{VARIABLES['server_urls']}'", text)
    text = re.sub(r"\$\{?\w*GPUS_PER_NODE\}?", "8", text).replace("$MODEL", "org/model")
    found = []
    for line in text.splitlines():
        if match := re.search(r"-m ((?:recipes|sampling)\.\w+)(.*)", line):
            words = [word for word in shlex.split(match[2].rstrip(" &"), comments=True) if word != "..."]
            found.append((match[1], words))
    return found


def check(module: str, arguments: list[str]) -> Any:
    if module == "sampling.serve":
        return serve.read(arguments)
    return read(RECIPES[module.removeprefix("recipes.")], arguments, prog=module, description="")


def test_nothing_is_left_out() -> None:
    assert {*SETTINGS, *SCRIPTS, FOLDER / "accelerate.yaml"} == set(FOLDER.iterdir())
    assert len(SETTINGS) == 4 and len(SCRIPTS) == 4


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.name)
def test_settings_parse(path: Path) -> None:
    config = check(f"recipes.{path.name.split('_')[0]}", ["--config", str(path)])
    if isinstance(config, GRPOConfig):
        assert config.sampling.backend == "server"
    elif isinstance(config, SFTConfig):
        assert config.shard
    else:
        assert config.ray is not None


@pytest.mark.parametrize("path", [*SETTINGS, *SCRIPTS, FOLDER / "accelerate.yaml"], ids=lambda path: path.name)
def test_every_command_is_one_its_program_takes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SAMPLING_API_KEY", "key")
    text = path.read_text()
    told = commands(text)
    assert told
    for module, arguments in told:
        check(module, arguments)
    for name in re.findall(r"recipes/configs/\S+?\.(?:sky\.yaml|yaml|sbatch)", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell_and_name_no_variable_that_nothing_sets(path: Path) -> None:
    text = script(path)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    used = set(re.findall(r"\$\{?([A-Z]\w+)", "\n".join(lines)))
    made = set(re.findall(r"(?:^|\s)([A-Z]\w+)=", "\n".join(lines)))
    made |= set(re.findall(r"for ([A-Z]\w+) in", text)) | set(re.findall(r"mapfile -t (\w+)", text))
    if path.suffix == ".yaml":
        task = yaml.safe_load(path.read_text())
        assert set(task) <= SKY_KEYS
        given = {*task["envs"], *task.get("secrets", {})}
        assert all(name in used | {"SAMPLING_API_KEY"} for name in given)
    else:
        given = set(re.findall(r"([A-Z]+)=", next(line for line in path.read_text().splitlines() if "sbatch " in line)))
    assert {name for name in used - made - given if not name.startswith(("SLURM_", "SKYPILOT_"))} == set()


def test_accelerate_takes_its_file() -> None:
    config = load_config_from_file(str(FOLDER / "accelerate.yaml"))
    assert (config.num_processes, config.num_machines, config.distributed_type.value) == (32, 4, "MULTI_GPU")
    assert not config.fsdp_config


def test_servers_have_room_for_the_longest_sample() -> None:
    config = check("recipes.grpo", ["--config", str(FOLDER / "grpo_servers.yaml")])
    longest = config.sampling.max_prompt_tokens + config.sampling.max_tokens
    for path in FOLDER.glob("grpo*"):
        assert all(int(room) == longest for room in re.findall(r"--max_model_len (\d+)", path.read_text()))
