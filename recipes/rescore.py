"""`python -m recipes.rescore`: the rollouts a run has stored under other rewards, and whose advantages flip.

python -m recipes.rescore --run_dir runs/NAME --rewards '{"accuracy": 1, "my_rewards.brevity": 0.1}'

Nothing is sampled, and the run's own files are only read, also while it goes on. Without --rewards the run's own are
called again, which shows what a repaired reward function changes.
"""

import contextlib
import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import pairwise
from operator import add
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.text import Text

from recipes.cli import main
from rewards.compose import reward_name
from rl.flips import Change, Pair, Tally, changes, most_telling, tally
from rl.record import prompt_text
from rl.rescore import Problems, Rescoring, read_pairs, rescore_step, write_step
from rl.score import Scorer
from runtime.errors import UserError
from runtime.files import make_folder, write_durably
from runtime.progress import track_steps, visible
from runtime.run_folder import flatten

RewardFunctions = Mapping[str | Callable[..., Any], float]

LINES = 20
"""Lines of the table at most; a longer run's steps share them."""
EXCERPT = 300
"""Characters shown of a prompt or completion: its beginning and its end."""
REASONS = 50
"""Reasons for unknown rewards kept at most, the commonest: they may quote what a model said."""


@dataclass(frozen=True, kw_only=True)
class RescoreConfig:
    """Stored rollouts under other rewards."""

    run_dir: str
    """Folder of the run, finished or going on."""
    rewards: dict[str, float] | None = None
    """Reward -> weight, as for recipes.grpo. Unset: the run's own, called again."""
    gates: dict[str, str] | None = None
    """Reward -> the reward that must be 1 for it to be paid. Unset: the run's, of rewards that are still paid."""
    advantage: Literal["grpo", "dr_grpo", "rloo"] | None = None
    """How completions of a group are compared. Unset: as in the run."""
    overlong_buffer: int | None = None
    """Tokens of DAPO's soft overlong punishment; 0: off. Unset: as in the run."""
    reward_time_limit: float | None = None
    """Seconds a reward function may take for one call. Unset: as in the run."""
    data: str | None = None
    """Problems with the columns rewards read. Unset: the run's, where it is now; a prompt that is no longer in it, or
    has another answer, is scored with the stored answer alone. Given: whatever answers this has now are used."""
    examples: int = 4
    """How many of the completions with the largest changes to show."""
    output: str | None = None
    """Folder for the result. Unset: one in run_dir/rescored, named after the rewards."""

    def __post_init__(self) -> None:
        if self.rewards is not None and not any(self.rewards.values()):
            raise UserError(f"rewards={self.rewards}: at least one needs a weight other than 0")
        if self.overlong_buffer is not None and self.overlong_buffer < 0:
            raise UserError(f"overlong_buffer={self.overlong_buffer}: tokens, 0 for off")
        if self.reward_time_limit is not None and not self.reward_time_limit > 0:
            raise UserError(f"reward_time_limit={self.reward_time_limit}: give a positive number of seconds")
        if self.examples < 0:
            raise UserError(f"examples={self.examples}: use 0 for none")


@dataclass(frozen=True, kw_only=True)
class Rescored:
    """What came of it."""

    output: Path
    """Folder with a Parquet file for each step, and summary.json."""
    steps: dict[int, Tally]
    """Step -> what was trained on."""
    trained: Tally
    spare: Tally
    """Sampled, but not trained on."""
    unknown: Counter[str]
    """Why rewards couldn't judge a completion -> how many."""
    examples: list[Change]
    """The most telling changes, of as many prompts."""
    problems: Problems


def run(config: RescoreConfig) -> None:
    """Score again, write, and show."""
    show(rescore(config), Console())


def rescore(config: RescoreConfig, *, rewards: RewardFunctions | None = None) -> Rescored:
    """Score a run's stored rollouts again; rewards: callables (or names) instead of `config.rewards`, for notebooks.

    Raises UserError for a run, rewards or files that can't be used.
    """
    folder = Path(config.run_dir)
    files = sorted((folder / "rollouts").glob("step-*.parquet"))
    if not files:
        raise UserError(f"run_dir={config.run_dir}: no rollouts/step-*.parquet in it (yet); name a run's folder")
    settings, data = settle(config, rewards, folder)
    first = read_pairs(files[0])
    asked = describe(config, settings, data)
    if config.rewards is None and rewards is None:
        _check_own_rewards(asked, first)
    output = Path(config.output) if config.output else folder / "rescored" / _name(asked)

    steps: dict[int, Tally] = {}
    spare = Tally()
    unknown: Counter[str] = Counter()
    examples: list[Change] = []
    with contextlib.ExitStack() as stack:
        scorer = stack.enter_context(_scorer(settings))
        _claim(output, asked)
        title = f"rescoring {folder.resolve().name}"
        tracker = stack.enter_context(track_steps(len(files), title, console=Console(stderr=True)))
        problems = Problems(data, exact=config.data is None)
        for done, file in enumerate(files, start=1):
            pairs = read_pairs(file) if done > 1 else first
            rescore_step(pairs, scorer, problems, settings)
            write_step(output / file.name, pairs)
            trained = tally([pair for pair in pairs if pair.used])
            steps[pairs[0].step] = trained
            spare += tally([pair for pair in pairs if not pair.used])
            unknown.update(reason for pair in pairs for reasons in pair.unknown for reason in reasons)
            examples = most_telling([*examples, *changes(pairs)], config.examples)
            tracker.update(done, {"reward": trained.mean_new})
    rescored = Rescored(
        output=output,
        steps=steps,
        trained=reduce(add, steps.values()),
        spare=spare,
        unknown=unknown,
        examples=examples,
        problems=problems,
    )
    write_durably(output / "summary.json", _json({"asked": asked, "complete": True, **summary(rescored)}))
    return rescored


def settle(config: RescoreConfig, rewards: RewardFunctions | None, folder: Path) -> tuple[Rescoring, str]:
    """What was asked for, the rest from the run's config.yaml; and where the problems are."""
    file = folder / "config.yaml"
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
        own = flatten(saved)
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{file} can't be read ({error}): run_dir is the folder that recipes.grpo made") from error

    def setting(name: str, given: Any = None) -> Any:
        if given is None and name not in own:
            raise UserError(f"{file} has no {name}: it isn't a GRPO run's, or of another version")
        return own[name] if given is None else given

    given = config.rewards if rewards is None else rewards
    paid: Mapping[Any, float] = saved.get("rewards") or {} if given is None else given
    gates = saved.get("gates") or {}
    if config.gates is not None:
        gates = config.gates
    elif given is not None:
        gates = {gated: gate for gated, gate in gates.items() if gated in map(reward_name, paid)}
    settings = Rescoring(
        rewards=paid,
        gates=gates,
        advantage=setting("loss.advantage", config.advantage),
        overlong_buffer=setting("overlong_buffer", config.overlong_buffer),
        max_tokens=setting("sampling.max_tokens"),
        time_limit=setting("reward_time_limit", config.reward_time_limit),
    )
    if settings.overlong_buffer >= settings.max_tokens:
        raise UserError(f"overlong_buffer={settings.overlong_buffer}: the run's max_tokens are {settings.max_tokens}")
    return settings, setting("data", config.data)


def describe(config: RescoreConfig, settings: Rescoring, data: str) -> dict[str, Any]:
    """What decides the result, as plain values."""
    return {
        "run": Path(config.run_dir).resolve().name,
        "rewards": {reward_name(reward): weight for reward, weight in settings.rewards.items()},
        "gates": dict(settings.gates),
        "advantage": settings.advantage,
        "overlong_buffer": settings.overlong_buffer,
        "data": data,
        "answers": "stored" if config.data is None else "data",
    }


# --- files ------------------------------------------------------------------------------------------------------------


def summary(rescored: Rescored) -> dict[str, Any]:
    """Everything that is shown, as plain values; unknown is null."""
    problems = rescored.problems
    return {
        "steps": {step: _plain(counts) for step, counts in rescored.steps.items()},
        "trained": _plain(rescored.trained),
        "spare": _plain(rescored.spare),
        "unknown": dict(rescored.unknown.most_common(REASONS)),
        "prompts": {
            "asked": len(problems.asked),
            "not_in_data": problems.lost,
            "other_answer": len(problems.other_answer),
            "data_missing": problems.missing,
        },
        "examples": [
            {
                "step": change.pair.step,
                "prompt_index": change.pair.old.prompt.index,
                "sample": change.sample,
                "used": change.pair.used,
                "flipped": change.flipped,
                "reward": [_or_none(value) for value in change.rewards],
                "advantage": [_or_none(value) for value in change.advantages],
                "unknown": change.pair.unknown[change.sample],
                "prompt": change.pair.new.prompt.content,
                "completion": change.pair.old.texts[change.sample],
            }
            for change in rescored.examples
        ],
    }


def _claim(output: Path, asked: Mapping[str, Any]) -> None:
    """Make the folder, or take one that the same question has been answered in; no other is written over."""
    file = output / "summary.json"
    if output.exists() and any(output.iterdir()):
        try:
            before = json.loads(file.read_text(encoding="utf-8"))["asked"]
        except (OSError, ValueError, KeyError, TypeError):
            before = None
        if before != asked:
            raise UserError(f"output={output}: holds something else than this rescoring; give another --output")
    try:
        make_folder(output)
        # Until the end it says that what is beside it may be of two times.
        write_durably(file, _json({"asked": asked, "complete": False}))
    except PermissionError as error:
        raise UserError(f"output={output} can't be written ({error.strerror}); give another --output") from error


def _name(asked: Mapping[str, Any]) -> str:
    rewards = "+".join(f"{name}-{weight:g}" for name, weight in asked["rewards"].items())
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return re.sub(r"[^\w.+-]", "_", rewards)[:60] + "-" + digest[:8]


def _check_own_rewards(asked: Mapping[str, Any], pairs: Sequence[Pair]) -> None:
    """A notebook may pay by functions that config.yaml can't name: then there is nothing of the run's own to call."""
    stored, named = set(pairs[0].old.parts) - {"overlong"}, set(asked["rewards"])
    if stored != named:
        raise UserError(
            f"rewards: {asked['run']} was paid by {', '.join(sorted(stored))}, and its config.yaml names "
            f"{', '.join(sorted(named)) or 'none'}; give --rewards"
        )


@contextlib.contextmanager
def _scorer(settings: Rescoring) -> Iterator[Scorer]:
    """Its processes have started: a reward that doesn't exist or can't be imported is the user's to mend."""
    with contextlib.ExitStack() as stack:
        try:
            scorer = stack.enter_context(Scorer(settings.rewards, gates=settings.gates, time_limit=settings.time_limit))
            scorer.start()
        except ValueError as error:
            raise UserError(str(error)) from error
        yield scorer


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _plain(counts: Tally) -> dict[str, Any]:
    means = {"mean_old": _or_none(counts.mean_old), "mean_new": _or_none(counts.mean_new)}
    return asdict(counts) | means


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


# --- on the terminal --------------------------------------------------------------------------------------------------


def show(rescored: Rescored, console: Console) -> None:
    """What changed, by step and in all; why rewards are unknown; the most telling completions."""

    def say(line: str = "", style: str = "") -> None:
        console.print(Text(visible(line, keep=""), style=style), soft_wrap=True)

    say()
    say(f"{'steps':>11}  {'mean reward':^15}  {'changed':>7}  {'flipped':>7}  {'signal':^20}  {'unknown':^11}", "bold")
    for name, counts in by_lines(rescored.steps):
        say(_line(name, counts))
    say(_line("trained on", rescored.trained), "bold")
    if rescored.spare.completions:
        say(_line("spare", rescored.spare))
    say("(before → now; flipped: completions whose advantage changed sign; signal: groups whose rewards differ)", "dim")
    for line in warnings(rescored.problems):
        say(line, "yellow")
    for reason, count in rescored.unknown.most_common(5):
        say(f"unknown  {count} × {reason[:200]}", "yellow")
    if (kinds := len(rescored.unknown)) > 5:
        say(f"unknown  for {kinds - 5} more reasons: see summary.json", "yellow")
    for change in rescored.examples:
        show_example(change, say)
    say()
    say(f"written to {rescored.output}  (summary.json, and a Parquet file for each step)")


def warnings(problems: Problems) -> list[str]:
    """What of the data isn't as the run had it."""
    asked = len(problems.asked)
    alone = "scored with their stored text and answer, without other columns"
    if problems.missing:
        return [
            f"data     can't be read, so all {asked} prompts are {alone}; --data says where it is",
            problems.missing,
        ]
    lines = []
    if problems.lost:
        lines.append(
            f"data     {problems.source} has changed: {problems.lost} of {asked} prompts aren't in it as they were,"
        )
        lines.append(f"         and are {alone}")
    if problems.other_answer:
        lines.append(f"data     {len(problems.other_answer)} of {asked} prompts have another answer than in the run")
    return lines


def by_lines(steps: Mapping[int, Tally], most: int = LINES) -> list[tuple[str, Tally]]:
    """Steps, neighbours added up where there are more than `most`."""
    numbers = sorted(steps)
    lines = min(most, len(numbers))
    bounds = [len(numbers) * i // lines for i in range(lines + 1)]
    parts = [numbers[a:b] for a, b in pairwise(bounds)]
    return [
        (f"{part[0]}" if len(part) == 1 else f"{part[0]}–{part[-1]}", reduce(add, (steps[n] for n in part)))
        for part in parts
    ]


def show_example(change: Change, say: Callable[..., None]) -> None:
    """A completion with its prompt, then and now. Both are hostile: `say` spells out what could act on a terminal."""
    pair, i = change.pair, change.sample
    say()
    kind = "flipped" if change.flipped else "changed"
    spare = "" if pair.used else ", spare"
    say(
        f"{kind}: step {pair.step}, prompt {pair.old.prompt.index}, completion {i}{spare}: "
        f"reward {_change(change.rewards)}, advantage {_change(change.advantages, '+')}",
        "bold",
    )
    for reason in pair.unknown[i]:
        say(f"  unknown: {reason[:200]}", "yellow")
    say(f"  {_excerpt(prompt_text(pair.old.prompt.content))}", "dim")
    say(f"  {_excerpt(pair.old.texts[i])}")


def _line(name: str, counts: Tally) -> str:
    n = max(counts.completions, 1)
    unknown = (counts.completions - counts.known_old, counts.completions - counts.known_new)
    moved = f"(+{counts.gained} -{counts.lost})" if counts.gained or counts.lost else ""
    return (
        f"{name:>11}  {counts.mean_old:6.3f} → {counts.mean_new:6.3f}  {counts.changed / n:7.1%}  "
        f"{counts.flipped / n:7.1%}  {counts.signal_old:>4} → {counts.signal_new:<4}{moved:<9}  "
        f"{unknown[0]:>4} → {unknown[1]}"
    )


def _change(values: tuple[float, float], sign: str = "") -> str:
    return " → ".join("unknown" if math.isnan(value) else f"{value:{sign}.3g}" for value in values)


def _excerpt(text: str) -> str:
    line = text.strip().replace("\n", " ⏎ ")
    return line if len(line) <= EXCERPT else f"{line[: EXCERPT // 2]} … {line[-EXCERPT // 2 :]}"


if __name__ == "__main__":
    sys.exit(main(RescoreConfig, run, prog="python -m recipes.rescore", description=__doc__))
