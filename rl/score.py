"""Completions -> weighted rewards, by part, with unknown kept apart from wrong.

Every reward function runs in its own killable process, all of them at once, with a time limit. A function
that raises, hangs, crashes or miscounts makes only the guilty rows unknown (NaN), and says why. Left out:
what unknown rows mean for their group (rl/advantage.py); safety (this bounds time and crashes, no more).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rewards import resolve
from rewards.compose import check_gates, named, reward_name, weighted_sum
from rewards.process import RewardProcess, WorkerError

# What the trainer passes by these names; the first three TRL drops from the columns as well.
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")
_RESERVED = ("prompts", "completions", "trainer_state", "log_metric", "log_extra")


@dataclass(frozen=True, kw_only=True)
class Unknown:
    """One row that one reward could not judge."""

    row: int
    reward: str
    reason: str
    """For people, such as "time limit 10 s" or "raised ValueError: ..."."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The rewards of one batch of N completions."""

    parts: dict[str, list[float]]
    """Reward name -> N values, unweighted; NaN = unknown."""
    total: list[float]
    """N weighted sums; NaN if a part that counts is unknown."""
    unknown: list[Unknown]
    """Every unknown value with its reason, those of weight 0 too."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What reward functions gave to `log_metric`, averaged over their calls."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """What they gave to `log_extra`: N values per column, None for rows without one."""


@dataclass
class _Part:
    """One reward of one batch, being filled."""

    values: list[float]
    unknown: list[Unknown]
    metrics: dict[str, list[float]]
    columns: dict[str, list[Any]]


class Scorer:
    """Scores batches with several weighted reward functions; a context manager that owns their processes."""

    def __init__(
        self,
        rewards: Mapping[str | Callable[..., Any], float],
        *,
        gates: Mapping[str, str] | None = None,
        time_limit: float = 10.0,
        max_failures: int = 8,
        start_limit: float = 120.0,
    ) -> None:
        """Nothing is started yet: see `start`.

        rewards: built-in name, dotted name or callable -> weight. At weight 0 it is measured, not paid.
        gates: reward -> the reward that must be 1 for it to count in the total (rewards/compose.py), both by name.
        time_limit: seconds per call of one function, for a batch or for one row of a batch that failed.
        max_failures: after so many failed rows of a batch, or so many time limits spent on going row by row,
            the rest of it is unknown to that reward.
        start_limit: seconds to start a process and import the function.
        """
        if not time_limit > 0:
            raise ValueError(f"time_limit={time_limit}: give a positive number of seconds")
        if max_failures < 1:
            raise ValueError(f"max_failures={max_failures}: use 1 or more")
        self.time_limit, self.max_failures = time_limit, max_failures
        self.weights, self.gates = named(rewards), dict(gates or {})
        check_gates(self.gates, self.weights)
        self._processes: dict[str, RewardProcess] = {}
        for reward in rewards:
            name = reward_name(reward)
            if isinstance(reward, str) and not {".", ":"} & set(reward.partition("(")[0]):
                resolve(reward)  # an unknown built-in name fails here; dotted ones import in their process
            self._processes[name] = RewardProcess(reward, name=name, start_limit=start_limit)
        # One thread each, for good: a process dies with the thread that started it.
        self._threads = {name: ThreadPoolExecutor(1, thread_name_prefix=name) for name in self.weights}
        self._closed = False

    def start(self) -> None:
        """Start every process now, not at the first `score`; ValueError for one that can't be loaded."""
        self._on_threads(lambda name: self._processes[name].start())

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
        *,
        step: int = 0,
    ) -> Scores:
        """Score N completions with every reward function, called as TRL's trainer calls it.

        prompts: N strings or lists of messages. completions: N strings, or lists of one assistant message.
        columns: the other columns of the data, N values each. step: `trainer_state.global_step`.
        Raises ValueError for lengths that differ and for a function that can't be loaded or sent its columns;
        what a function does wrong makes rows unknown.
        differs: TRL sums the known parts of a partly unknown row.
        """
        arguments = self._arguments(prompts, completions, completion_ids, columns or {})
        n = len(completions)
        parts = self._on_threads(lambda name: self._score_part(name, arguments, n, step)) if n else {}
        values = {name: parts[name].values if n else [] for name in self.weights}
        logged: dict[str, list[float]] = {}
        extra: dict[str, list[Any]] = {}
        for part in parts.values():
            for metric, numbers in part.metrics.items():
                logged.setdefault(metric, []).extend(numbers)
            extra.update(part.columns)
        return Scores(
            parts=values,
            total=weighted_sum(values, self.weights, self.gates),
            unknown=sorted(
                (unknown for part in parts.values() for unknown in part.unknown),
                key=lambda u: (u.row, u.reward),
            ),
            metrics={metric: math.fsum(numbers) / len(numbers) for metric, numbers in logged.items()},
            columns=extra,
        )

    def close(self) -> None:
        """Kill and reap every process, also in the middle of a call. The scorer can't be used again."""
        self._closed = True
        for process in self._processes.values():
            process.interrupt()
        for name, thread in self._threads.items():
            thread.shutdown(wait=True, cancel_futures=True)
            self._processes[name].kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _arguments(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
    ) -> dict[str, list[Any]]:
        if taken := [name for name in columns if name in _RESERVED]:
            raise ValueError(f"columns: {taken[0]!r} is the trainer's own argument; rename the data column")
        arguments = {name: list(column) for name, column in columns.items() if name not in _NOT_COLUMNS}
        arguments |= {
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": [list(ids) for ids in completion_ids],
        }
        for name, values in arguments.items():
            if len(values) != len(completions):
                raise ValueError(f"{name}: {len(values)} values for {len(completions)} completions")
        return arguments

    def _on_threads(self, work: Callable[[str], Any]) -> dict[str, Any]:
        """Do the work for every reward on its own thread, all at once; the first error after all end."""
        if self._closed:
            raise ValueError("this Scorer is closed; make a new one")
        futures: dict[str, Future[Any]] = {name: thread.submit(work, name) for name, thread in self._threads.items()}
        wait(futures.values())
        return {name: future.result() for name, future in futures.items()}

    def _score_part(self, name: str, arguments: Mapping[str, list[Any]], n: int, step: int) -> _Part:
        """One reward on the whole batch; if that fails, row by row, so only the guilty rows are unknown."""
        part = _Part(values=[math.nan] * n, unknown=[], metrics={}, columns={})
        try:
            self._fill(part, name, range(n), arguments, step)
            return part
        except WorkerError as error:
            if n == 1:
                part.unknown.append(Unknown(row=0, reward=name, reason=str(error)))
                return part
        failures, budget = 0, self.max_failures * self.time_limit
        deadline = time.monotonic() + budget
        stopped = ""
        for row in range(n):
            if failures >= self.max_failures:
                stopped = f"not tried: {failures} rows of this batch failed before it"
            elif time.monotonic() > deadline:
                stopped = f"not tried: row by row, this batch took over {budget:g} s"
            try:
                if stopped:
                    raise WorkerError(stopped)
                one = {key: [values[row]] for key, values in arguments.items()}
                self._fill(part, name, range(row, row + 1), one, step)
            except WorkerError as error:
                failures += not stopped
                part.unknown.append(Unknown(row=row, reward=name, reason=str(error)))
        return part

    def _fill(self, part: _Part, name: str, rows: range, arguments: Mapping[str, list[Any]], step: int) -> None:
        """Call one reward on these rows and put what it returned in its place."""
        process = self._processes[name]
        reply = process.call(arguments, rows=len(rows), step=step, time_limit=self.time_limit)
        for row, value in zip(rows, reply["values"], strict=True):
            if isinstance(value, str):
                part.unknown.append(Unknown(row=row, reward=name, reason=value))
            else:
                part.values[row] = value
        for metric, numbers in reply["metrics"].items():
            part.metrics.setdefault(metric, []).extend(numbers)
        for column, values in reply["columns"].items():
            part.columns.setdefault(column, [None] * len(part.values))[rows.start : rows.stop] = values
