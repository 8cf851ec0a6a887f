"""Answers in; right, wrong or unknown, with the reason, and why they are hard to read, out.

Maths and code are graded by `rewards` in its worker processes, other domains by a reward function in a process of its
own, all while the next answers are sampled. What hangs or dies makes its own rows unknown and no other. Left out: which
answers are kept (choose.py).
"""

import json
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from distill.config import DistillConfig, ExpertConfig
from distill.readability import complaints
from distill.types import Finding, Key, Problem, Sample
from rewards.process import RewardProcess, WorkerError
from rewards.rows import grade_lines
from runtime.errors import UserError

RULES = ("math", "code")
NOT_GRADED, TEACHER_FAULT, GRADER_FAULT = "not-graded", "teacher-fault", "grader-fault"
MAX_FAILURES = 8
"""Rows of a batch on which a reward function may fail before the rest is unknown to it."""


class Answer(NamedTuple):
    """Something to judge."""

    problem: Problem
    sample: Sample


class Verifier:
    """All graders of a run, and the one thread they are used from: processes die with the thread that started them."""

    def __init__(self, config: DistillConfig) -> None:
        """Starts the processes of reward functions. Raises UserError for one that can't be loaded."""
        self.config = config
        names = {expert.grader for expert in config.experts} - {*RULES, "none"}
        names |= {config.scorer} if config.scorer else set()
        self._functions = {name: RewardProcess(name, name=name) for name in sorted(names)}
        self._lines: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._verdicts = grade_lines(iter(self._lines.get, None), workers=config.workers)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verify")
        try:
            list(self._thread.map(RewardProcess.start, self._functions.values()))
        except ValueError as error:
            self.close()
            raise UserError(f"grader or scorer: {error}; besides there are math, code and none") from error

    def submit(self, expert: ExpertConfig, answers: Sequence[Answer]) -> Future[dict[Key, Finding]]:
        """Findings for a domain's answers, to come."""
        return self._thread.submit(self._judge, expert, answers)

    def close(self) -> None:
        """Let what is being graded end, then end every process."""
        for process in self._functions.values():
            process.interrupt()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._lines.put(None)
        self._verdicts.close()
        for process in self._functions.values():
            process.kill()

    def _judge(self, expert: ExpertConfig, answers: Sequence[Answer]) -> dict[Key, Finding]:
        given = [answer for answer in answers if answer.sample.finish_reason != "error"]
        graded = dict(zip((a.sample.key for a in given), self._graded(expert, given), strict=True))
        unread = {
            a.sample.key: complaints(a.sample.text, self.config.readability, finished=a.sample.finish_reason == "stop")
            for a in given
        }
        fit = [a for a in given if eligible(*graded[a.sample.key][:2]) and not unread[a.sample.key]]
        values = self._values(self.config.scorer, fit, expert.time_limit) if self.config.scorer else []
        scores = {a.sample.key: value for a, value in zip(fit, values, strict=False) if isinstance(value, float)}
        findings = {}
        for answer in answers:
            key = answer.sample.key
            outcome, reason, found, detail = graded.get(key, ("unknown", TEACHER_FAULT, None, answer.sample.error))
            findings[key] = Finding(
                outcome=outcome,
                reason=reason,
                answer=found,
                complaints=unread.get(key, ()),
                score=scores.get(key),
                detail=detail,
            )
        return findings

    def _graded(self, expert: ExpertConfig, answers: Sequence[Answer]) -> Iterator[tuple[Any, str, str | None, str]]:
        """Outcome, reason, what was taken for the answer, and more for people, for each."""
        if expert.grader == "none":
            yield from (("unknown", NOT_GRADED, None, "") for _ in answers)
        elif expert.grader in RULES:
            for verdict in self._by_rule(expert.grader, answers):
                yield verdict["outcome"], verdict["reason"], verdict.get("answer"), verdict.get("error", "")
        else:
            for value in self._values(expert.grader, answers, expert.time_limit):
                if isinstance(value, str):
                    yield "unknown", GRADER_FAULT, None, value
                else:
                    yield "right" if value >= 1 else "wrong", "reward", None, f"{value:g}"

    def _by_rule(self, rule: str, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        for number, (problem, sample) in enumerate(answers):
            row: dict[str, Any] = {"kind": rule, "response": sample.text, "gold": problem.answer}
            if rule == "code":
                row["tests"] = problem.columns.get("tests")
            self._lines.put((number, json.dumps(row).encode()))
        verdicts: list[dict[str, Any]] = []
        while len(verdicts) < len(answers):
            verdicts += next(self._verdicts)
        return verdicts

    def _values(self, name: str, answers: Sequence[Answer], time_limit: float) -> list[float | str]:
        """A reward function's values, or why there is none: for all at once, and if that fails one by one."""
        if not answers:
            return []
        try:
            return self._call(name, answers, time_limit)
        except WorkerError as error:
            if len(answers) == 1:
                return [str(error)]
        values: list[float | str] = []
        failures = 0
        for answer in answers:
            if failures >= MAX_FAILURES:
                values.append(f"not tried: it failed on {failures} answers before")
                continue
            try:
                values += self._call(name, [answer], time_limit)
            except WorkerError as error:
                failures += 1
                values.append(str(error))
        return values

    def _call(self, name: str, answers: Sequence[Answer], time_limit: float) -> list[float | str]:
        columns = sorted({column for answer in answers for column in answer.problem.columns})
        arguments: dict[str, list[Any]] = {c: [a.problem.columns.get(c) for a in answers] for c in columns}
        arguments |= {
            "prompts": [a.problem.prompt for a in answers],
            "completions": [[{"role": "assistant", "content": a.sample.text}] for a in answers],
            "completion_ids": [[] for _ in answers],
            "answer": [a.problem.answer for a in answers],
        }
        for reserved in ("trainer_state", "log_metric", "log_extra"):
            arguments.pop(reserved, None)
        reply = self._functions[name].call(arguments, rows=len(answers), step=0, time_limit=time_limit)
        return list(reply["values"])


def eligible(outcome: str, reason: str) -> bool:
    """Whether an answer may be kept: it is right, or people are to say whether it is."""
    return outcome == "right" or reason == NOT_GRADED
