"""A run's configuration -> its settings that are not the defaults, with who gave them; several -> where they differ."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml

from runtime.report.read import LONGEST_VALUE, Run, brief, flat

MOST = 300
"""Settings in a table."""
LONGEST = 50_000
"""Characters of a value that are compared."""
ABSENT = "(absent)"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One that is not the default."""

    name: str
    value: str
    default: str
    given: str
    """By whom, as far as the command says."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a run was started with."""

    files: Sequence[str] = ()
    """Presets: the names of --config's files."""
    flags: Sequence[str] = ()
    """Settings on the command line, by dotted name."""


def changed(run: Run, defaults: Any) -> list[Setting]:
    """The settings that differ from `defaults`, a configuration dataclass or nested plain values."""
    usual = plain(defaults)
    command = read_command(run)
    names = sorted(name for name in run.config.keys() | usual.keys() if differs(run.config, usual, name))
    return [
        Setting(
            name=brief(name, 100),
            value=shown(run.config, name),
            default=shown(usual, name),
            given=_given(name, command) if name in run.config and name in usual else "–",
        )
        for name in names[:MOST]
    ]


def plain(defaults: Any) -> dict[str, Any]:
    """Dotted name -> value, as config.yaml would have it."""
    tree = dataclasses.asdict(defaults) if dataclasses.is_dataclass(defaults) else defaults  # type: ignore[arg-type]
    return flat(yaml.safe_load(yaml.safe_dump(tree)))


def differs(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    """Whether a setting is not the same. What an absent group would hold is no difference of its own."""
    if name not in one or name not in other:
        groups = [name.rpartition(".")[0]] if "." in name else []
        return not any(group in one or group in other for group in groups)
    return shown(one, name, LONGEST) != shown(other, name, LONGEST)


def shown(config: Mapping[str, Any], name: str, most: int = LONGEST_VALUE) -> str:
    """A setting's value on a line."""
    return brief(config[name], most) if name in config else ABSENT


def read_command(run: Run) -> Command:
    """Of the first start, from environment.json; empty if that doesn't say, or it was no command."""
    attempts = run.environment.get("attempts")
    first = attempts[0] if isinstance(attempts, list) and attempts and isinstance(attempts[0], dict) else {}
    argv = first.get("argv")
    words = [word for word in argv[1:1000] if isinstance(word, str)] if isinstance(argv, list) else []
    files, flags = [], []
    for i, word in enumerate(words):
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            continue
        if name == "config":
            file = value if equals else words[i + 1] if i + 1 < len(words) else ""
            files.append(brief(PurePath(file).name, 100))
        else:
            flags.append(name.removesuffix("+"))
    return Command(files=files, flags=flags)


def _given(name: str, command: Command) -> str:
    if any(name == flag or name.startswith(f"{flag}.") or flag.startswith(f"{name}.") for flag in command.flags):
        return "command line"
    return f"preset {', '.join(command.files)}" if command.files else "recipe or program"


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) where they are not all the same."""
    names = sorted({name for run in runs for name in run.config})
    several = [name for name in names if len({shown(run.config, name, LONGEST) for run in runs}) > 1]
    return [(brief(name, 100), [shown(run.config, name) for run in runs]) for name in several[:MOST]]
