"""A chain as YAML -> its stages: each a recipe's own checked settings, in a folder of its own, references filled in.

A reference is `${STAGE.OUTPUT}`, anywhere in a stage's settings: `${cold_start.model}` is where that earlier stage
leaves its model. Every stage is checked by its recipe's own dataclass before the first one starts. Left out: running
them (run.py).
"""

import dataclasses
import difflib
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from distill.config import DistillConfig
from recipes.chain.tiny import MAKERS
from recipes.cli import read
from recipes.evaluate import EvaluateConfig
from recipes.reward_model import RewardModelTraining
from rl.config import GRPOConfig
from runtime.errors import UserError
from runtime.rows import kind_of
from runtime.settings import require
from sft.config import SFTConfig

CONFIGS = Path(__file__).parent.parent / "configs"
BUILT_IN = "tiny"
"""What references call the data and the student that are made on the spot, of the chain's seed (tiny.py)."""
REFERENCE = re.compile(r"\$\{([^{}]*)\}")


class Recipe(NamedTuple):
    """What a chain needs to know of a recipe."""

    config: type
    outputs: Mapping[str, str]
    """What later stages may refer to -> where it is in the stage's folder."""


RECIPES = {
    "sft": Recipe(SFTConfig, {"model": "checkpoints/final"}),
    "grpo": Recipe(GRPOConfig, {"model": "checkpoints/final"}),
    "reward_model": Recipe(RewardModelTraining, {"model": "checkpoints/final"}),
    "distill": Recipe(DistillConfig, {"shards": "shards", "problems": "shards/problems.jsonl"}),
    "evaluate": Recipe(EvaluateConfig, {"evaluation": "evaluation.json"}),
}
POLICIES = ("sft", "grpo")
"""Recipes whose model answers problems, and is evaluated on the chain's held-out ones."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage."""

    name: str
    """Names its folder, and what later stages refer to: letters, digits, _ and -."""
    recipe: Literal["sft", "grpo", "reward_model", "distill", "evaluate"]
    """The command that runs it, python -m recipes.RECIPE."""
    preset: str | None = None
    """Settings to start from: a file's name in recipes/configs without .yaml, or a path."""
    launch: str | None = None
    """What starts it on many processes, before `-m recipes.RECIPE`: torchrun --nproc-per-node 8. Unset: this Python."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The recipe's own settings, nested or dotted, with ${STAGE.OUTPUT} for what earlier stages made."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9_-]+", self.name) is not None and self.name != BUILT_IN,
            f"name={self.name!r}: use letters, digits, _ and -, and not {BUILT_IN!r}, which is built in",
        )


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """A chain of recipes."""

    stages: tuple[StageConfig, ...]
    """What is run, in this order: groups of name, recipe, preset and settings."""
    evaluation: EvaluateConfig | None = None
    """How every model that SFT or GRPO makes is measured, all on the same problems; unset: not at all."""
    seed: int = 0
    """Seed of every stage that gives none of its own, and of the built-in data."""
    run_dir: str | None = None
    """The chain's folder, with one for each stage. Unset: runs/r1-<date>-<time>."""
    resume: bool = False
    """Go on with the chain in `run_dir`: finished stages are checked and kept, a stage that was left is resumed."""
    from_stage: str | None = None
    """Run this stage and all after it anew (also --from); what they had made is set aside, not deleted."""
    only: str | None = None
    """Run this stage alone, anew; with resume, go on with it."""
    plan: bool = False
    """Check everything, print the stages and exit."""

    def __post_init__(self) -> None:
        require(bool(self.stages), "stages: name at least one")
        names = [stage.name for stage in self.stages]
        twice = [name for name in names if names.count(name) > 1]
        require(not twice, f"stages: two are called {''.join(twice[:1])!r}; rename one")
        for setting in ("from_stage", "only"):
            value = getattr(self, setting)
            hint = nearest(value or "", names)
            require(value is None or value in names, f"{setting}={value!r}: no stage is called so{hint}")
        given = [name for name in ("resume", "from_stage") if getattr(self, name)]
        require(
            len(given) < 2,
            f"resume=True with from_stage={self.from_stage!r}: begin anew by --from alone; then --resume alone",
        )
        require(
            not (self.only and self.from_stage), f"only={self.only!r} with from_stage={self.from_stage!r}: give one"
        )
        needs_folder = self.resume or self.from_stage or self.only
        require(not needs_folder or self.run_dir is not None, "run_dir: name the chain to go on with")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage with everything filled in."""

    name: str
    recipe: str
    folder: Path
    """run_dir/NN-name."""
    config: Any
    """The recipe's own dataclass."""
    launch: tuple[str, ...]
    """The words before -m recipes.RECIPE."""
    needs: tuple[str, ...]
    """Earlier stages whose outputs it uses."""
    built_in: tuple[str, ...]
    """Built-in data and models it uses."""

    @property
    def outputs(self) -> dict[str, Path]:
        """What it makes, and where."""
        return {name: self.folder / path for name, path in RECIPES[self.recipe].outputs.items()}

    @property
    def makes_policy(self) -> bool:
        """Whether its model is to be evaluated."""
        return self.recipe in POLICIES


def resolve_stages(config: ChainConfig, run_dir: Path) -> list[Stage]:
    """All stages, checked. Raises UserError naming stage, setting, value and remedy."""
    stages: list[Stage] = []
    for number, given in enumerate(config.stages, start=1):
        folder = run_dir / f"{number:02d}-{given.name}"
        references = _References(stages, run_dir)
        try:
            filled = references.fill(given.settings, "settings")
            stages.append(
                Stage(
                    name=given.name,
                    recipe=given.recipe,
                    folder=folder,
                    config=_checked(given, filled, folder=folder, seed=config.seed),
                    launch=tuple(shlex.split(given.launch)) if given.launch else (sys.executable,),
                    needs=tuple(dict.fromkeys(references.needs)),
                    built_in=tuple(dict.fromkeys(references.built_in)),
                )
            )
        except UserError as error:
            raise UserError(f"stage {given.name}: {error}") from error
    return stages


def built_in_path(run_dir: Path, name: str) -> Path:
    """Where the chain keeps a built-in file or checkpoint."""
    return run_dir / f"00-{BUILT_IN}" / (name if name == "qwen" else f"{name}.jsonl")


def missing_inputs(stages: Sequence[Stage], run_dir: Path) -> list[str]:
    """What stages name, that no stage makes, and that isn't there: one line each, with stage, setting and value."""
    missing = []
    for stage in stages:
        for setting, value in _inputs(stage):
            if Path(value).is_relative_to(run_dir):
                continue
            try:
                if setting.rpartition(".")[2] == "model":
                    a_path = value.startswith((".", "/", "~")) or value.count("/") > 1  # a hub name has one at most
                    absent = a_path and not Path(value).expanduser().is_dir()
                    require(not absent, "no such folder; give a checkpoint's folder or a hub name")
                else:
                    kind_of(value)
            except UserError as error:
                missing.append(f"stage {stage.name}: {setting}={value!r}: {error}")
    return missing


def nearest(name: str, known: Sequence[str]) -> str:
    """ "; did you mean X?", or what there is."""
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]}?" if match else f"; there are {', '.join(known) or 'none'}"


class _References:
    """Fills in ${STAGE.OUTPUT}, and remembers what was asked for."""

    def __init__(self, before: Sequence[Stage], run_dir: Path) -> None:
        self.before = {stage.name: stage for stage in before}
        self.run_dir = run_dir
        self.needs: list[str] = []
        self.built_in: list[str] = []

    def fill(self, value: Any, where: str) -> Any:
        if isinstance(value, str):
            return REFERENCE.sub(lambda found: self._path(found[1], f"{where}={value!r}"), value)
        if isinstance(value, Mapping):
            return {
                self.fill(key, where): self.fill(item, f"{where}.{key}" if where != "settings" else str(key))
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.fill(item, f"{where}.{number}") for number, item in enumerate(value)]
        return value

    def _path(self, reference: str, where: str) -> str:
        name, _, output = reference.partition(".")
        if name == BUILT_IN:
            require(output in MAKERS, f"{where}: nothing built in is called {output!r}{nearest(output, list(MAKERS))}")
            self.built_in.append(output)
            return str(built_in_path(self.run_dir, output))
        if (stage := self.before.get(name)) is None:
            raise UserError(f"{where}: no stage before it is called {name!r}{nearest(name, list(self.before))}")
        if output not in stage.outputs:
            raise UserError(
                f"{where}: a {stage.recipe} stage makes no {output!r}{nearest(output, list(stage.outputs))}"
            )
        self.needs.append(name)
        return str(stage.outputs[output])


def _checked(given: StageConfig, filled: Mapping[str, Any], *, folder: Path, seed: int) -> Any:
    """The recipe's dataclass of preset and settings, and what the chain decides: the folder, and mostly the seed."""
    config_class = RECIPES[given.recipe].config
    own = {f.name for f in dataclasses.fields(config_class)}
    place = "output" if given.recipe == "evaluate" else "run_dir"
    for name in ("run_dir", "output", "resume"):
        require(name not in filled, f"settings.{name}: the chain decides it; leave it out")
    files = []
    if given.preset is not None:
        path = Path(given.preset) if given.preset.endswith(".yaml") else CONFIGS / f"{given.preset}.yaml"
        known = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
        require(path.is_file(), f"preset={given.preset!r}: no such file{nearest(given.preset, known)}")
        files.append(str(path))
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(dict(filled), file, allow_unicode=True)
        file.flush()
        arguments = [part for name in (*files, file.name) for part in ("--config", name)]
        if "seed" in own and "seed" not in filled:
            arguments += ["--seed", str(seed)]
        arguments += [f"--{place}", str(folder)]
        try:
            return read(config_class, arguments, prog=given.recipe, description="")
        except UserError as error:
            raise UserError(
                str(error).replace(f"--config {file.name}", "settings").replace(file.name, "settings")
            ) from error


def _inputs(stage: Stage) -> Iterator[tuple[str, str]]:
    """(setting, value) of every model and source of data of a stage."""
    config = stage.config
    if stage.recipe == "sft":
        yield from ((f"mix.{i}.path", source.path) for i, source in enumerate(config.sources))
        yield from ((f"evaluation.mix.{i}.path", s.path) for i, s in enumerate(config.evaluation.sources))
        if config.evaluation.problems:
            yield "evaluation.problems", config.evaluation.problems
    elif stage.recipe == "distill":
        yield from ((f"problems.{i}.path", source.path) for i, source in enumerate(config.sources))
        yield from ((f"benchmarks.{i}", name) for i, name in enumerate(config.benchmarks))
        local = [expert for expert in config.experts if expert.endpoint is None]
        yield from ((f"experts.{expert.name}.model", expert.model) for expert in local)
        return
    else:
        yield "data", config.data
        if stage.recipe == "grpo" and config.evaluation.data:
            yield "evaluation.data", config.evaluation.data
    yield "model", config.model
