"""The generator's loop: a batch of problems is sampled and committed, and graded while the next is sampled; then the
choice among its answers is made.

What is still to do is read off the ledger, before every batch. Left out: opening a run, and what is made of a finished
one (generate.py).
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import NamedTuple

from rich.console import Console

from distill.choose import Graded, choose
from distill.config import DistillConfig, ExpertConfig
from distill.duplicates import words
from distill.ledger import Ledger, Place
from distill.teacher import Models, Request, Respondent, open_teacher
from distill.types import Choice, Finding, Key, Sample, Teacher
from distill.verify import Answer, Verifier, eligible
from runtime.errors import UserError
from runtime.interrupt import Interrupt
from runtime.metrics import MetricsLog
from runtime.progress import StepTracker, track_steps

SOURCE = Teacher(id="source", model="source", weights_hash=None, settings={})
"""The teacher of answers that came with their problems."""


class Batch(NamedTuple):
    """Problems that are asked together, of one domain's expert."""

    expert: ExpertConfig
    positions: Sequence[int]


Grading = tuple[Batch, Future[dict[Key, Finding]]]


def plan(config: DistillConfig, places: Sequence[Place]) -> Iterator[Batch]:
    """All problems in batches, one expert after the other, so that one model is in memory at a time."""
    for expert in config.experts:
        own = [place.position for place in places if config.expert(place.domain) == expert]
        for start in range(0, len(own), config.batch):
            yield Batch(expert, own[start : start + config.batch])


def unfinished(config: DistillConfig, places: Sequence[Place], settled: Mapping[int, int]) -> set[int]:
    """Positions of problems some of whose answers haven't been chosen among."""

    def wanted(place: Place) -> int:
        expert = config.expert(place.domain)
        return len(list(expert.wanted(answered=place.answered))) if expert else 0

    return {place.position for place in places if settled.get(place.position, 0) < wanted(place)}


def missing(ledger: Ledger, batch: Batch) -> list[Request]:
    """Answers that the ledger lacks."""
    held = ledger.samples(batch.positions)
    return [
        Request(problem, kind, index)
        for problem in ledger.problems(batch.positions)
        for kind, index in batch.expert.wanted(answered=problem.response is not None)
        if (problem.position, kind, index) not in held
    ]


def ungraded(ledger: Ledger, batch: Batch) -> list[Answer]:
    """Answers that no grader has seen."""
    problems = {problem.position: problem for problem in ledger.problems(batch.positions)}
    graded = ledger.findings(batch.positions)
    samples = ledger.samples(batch.positions).values()
    return [Answer(problems[sample.problem], sample) for sample in samples if sample.key not in graded]


def decide(config: DistillConfig, ledger: Ledger, batch: Batch) -> dict[Key, Choice]:
    """Which of the batch's answers are kept, each kind of each problem by itself; only what isn't decided yet."""
    samples, findings = ledger.samples(batch.positions), ledger.findings(batch.positions)
    decided = ledger.choices(batch.positions)
    choices: dict[Key, Choice] = {}
    for _, group in groupby((key for key in samples if key not in decided), key=lambda key: key[:2]):
        graded = {key: _graded(samples[key], findings[key]) for key in group}
        kept = choose(list(graded.values()), config.policy, keep=config.keep)
        for key, answer in graded.items():
            reason = "kept" if answer.index in kept else "not chosen"
            if answer.outcome != "right":
                reason = answer.outcome
            elif answer.complaints:
                reason = answer.complaints[0]
            choices[key] = Choice(kept=answer.index in kept, reason=reason)
    return choices


def _graded(sample: Sample, finding: Finding) -> Graded:
    return Graded(
        index=sample.index,
        text=sample.text,
        tokens=sample.tokens,
        outcome="right" if eligible(finding.outcome, finding.reason) else finding.outcome,
        complaints=finding.complaints,
        score=finding.score,
    )


class Run:
    """A run and everything it holds."""

    def __init__(
        self, config: DistillConfig, ledger: Ledger, metrics: MetricsLog, interrupt: Interrupt, named_models: Models
    ) -> None:
        self.config, self.ledger, self.metrics = config, ledger, metrics
        self.interrupt, self.named_models = interrupt, named_models
        places = ledger.places()
        self.total = len(places)
        self.left = unfinished(config, places, ledger.settled())
        """Positions of the problems that are still to be answered."""
        self.batches = [batch for batch in plan(config, places) if not self.left.isdisjoint(batch.positions)]
        self.last = time.perf_counter()
        """When the last batch was done."""
        metrics.truncate_after(self.total - len(self.left))
        self._verifier: Verifier | None = None
        self._teacher: tuple[ExpertConfig, Respondent] | None = None

    def run(self) -> None:
        """Batch after batch: sampled, graded while the next is sampled, chosen from."""
        with self.tracked() as tracker:
            grading: Grading | None = None
            for batch in self.batches:
                with tracker.phase(f"asking {batch.expert.name}"):
                    whole = self.sample(batch)
                if grading is not None:
                    self.settle(grading[0], grading[1].result(), tracker)
                grading = (batch, self.verifier.submit(batch.expert, ungraded(self.ledger, batch))) if whole else None
                if self.interrupt.requested:
                    break
            if grading is not None:
                with tracker.phase("grading"):
                    self.settle(grading[0], grading[1].result(), tracker)

    def tracked(self) -> contextlib.AbstractContextManager[StepTracker]:
        """The progress of the run, by problems."""
        done, console = self.total - len(self.left), Console(stderr=True)
        return track_steps(self.total, "distilling", start=done, unit="problem", console=console)

    def sample(self, batch: Batch) -> bool:
        """Ask for what is missing and commit it as it comes; whether all of it came."""
        if asked := self.to_ask(batch):
            for samples in self.teacher(batch).answer(asked, stop=lambda: self.interrupt.requested):
                self.ledger.add_samples(samples)
        return not missing(self.ledger, batch)

    def to_ask(self, batch: Batch) -> list[Request]:
        """What is missing and must be asked for; what came with the problems is committed at once."""
        wanted = missing(self.ledger, batch)
        if batch.expert.original == "source" and (given := [r for r in wanted if r.kind == "original"]):
            self.ledger.add_teacher(SOURCE)
            self.ledger.add_samples([_from_source(request) for request in given])
            wanted = [request for request in wanted if request.kind != "original"]
        return wanted

    def settle(self, batch: Batch, found: Mapping[Key, Finding], tracker: StepTracker) -> None:
        """Commit what graders found, and then the choice among the batch's answers."""
        if found:
            self.ledger.add_findings(found)
        choices = decide(self.config, self.ledger, batch)
        self.ledger.add_choices(choices)
        self.left -= set(batch.positions)
        done = self.total - len(self.left)
        now = time.perf_counter()
        numbers = self.count(batch, choices, now - self.last)
        self.last = now
        self.metrics.log(done, numbers)
        tracker.update(done, numbers)

    def count(self, batch: Batch, choices: Mapping[Key, Choice], seconds: float) -> dict[str, float]:
        """A batch in numbers."""
        samples, findings = self.ledger.samples(batch.positions), self.ledger.findings(batch.positions)
        outcomes = Counter(finding.outcome for finding in findings.values())
        tokens = sum(sample.tokens for sample in samples.values())
        graded = outcomes["right"] + outcomes["wrong"]
        return {
            **({f"rewards/{batch.expert.name}/mean": outcomes["right"] / graded} if graded else {}),
            "accepted": sum(choice.kept for choice in choices.values()) / max(len(choices), 1),
            "unknown": outcomes["unknown"] / max(len(findings), 1),
            "tokens": tokens,
            "rows_per_second": len(samples) / seconds,
            "tokens_per_second": tokens / seconds,
            "step_time": seconds,
        }

    def teacher(self, batch: Batch) -> Respondent:
        """The batch's expert, loaded if it isn't the last batch's."""
        if self._teacher is None or self._teacher[0] != batch.expert:
            self._free_teacher()
            problems = self.ledger.problems(batch.positions)
            teacher = open_teacher(
                batch.expert, seed=self.config.seed, problems=problems, named_models=self.named_models
            )
            self._teacher = batch.expert, teacher
            check_teacher(self.ledger, batch.expert, teacher.record)
            self.ledger.add_teacher(teacher.record)
        return self._teacher[1]

    @property
    def verifier(self) -> Verifier:
        """The graders, started when first asked for."""
        if self._verifier is None:
            self._verifier = Verifier(self.config)
        return self._verifier

    def _free_teacher(self) -> None:
        if self._teacher is not None:
            self._teacher[1].close()
        self._teacher = None

    def close(self) -> None:
        """End every process and free the teacher."""
        if self._verifier is not None:
            self._verifier.close()
        self._free_teacher()


def check_teacher(ledger: Ledger, expert: ExpertConfig, teacher: Teacher) -> None:
    """UserError if another one answered this domain's problems before."""
    for before in ledger.teachers().values():
        if before.id not in (SOURCE.id, teacher.id) and before.settings["domain"] == expert.domain:
            raise UserError(
                f"experts ({expert.name}).model={expert.model!r}: no longer the teacher that answered before: it was "
                f"weights {before.weights_hash}, {before.settings}, now weights {teacher.weights_hash}, "
                f"{teacher.settings}; put it back, or give another --run_dir"
            )


def _from_source(request: Request) -> Sample:
    text = request.problem.response or ""
    return Sample(
        problem=request.problem.position,
        kind=request.kind,
        index=request.index,
        text=text,
        tokens=len(words(text)),
        finish_reason="stop",
        seed=0,
        teacher=SOURCE.id,
    )
