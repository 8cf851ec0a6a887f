"""The generator on many machines: teachers and graders as Ray actors, one ledger with the process that was started.

A batch goes to one teacher and then to one grader, as in a single process, so it has the same answers wherever it is
made, and the shards are the same. An actor that is lost is started again and gets its batch anew; nothing of that batch
was acknowledged, so nothing is lost or there twice. Checkpoints must be where all machines see them.
"""

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distill.config import DistillConfig, ExpertConfig
from distill.run import Batch, Run, check_teacher, ungraded
from distill.teacher import Request, Respondent, open_teacher
from distill.types import Finding, Key, Problem, Sample, Teacher
from distill.verify import Answer, Verifier
from runtime.errors import UserError
from runtime.interrupt import SIGNALS

POLL = 0.5
"""Seconds between two looks at whether to leave."""


class RayTeacher:
    """An actor that answers; it holds the last expert it was asked for."""

    def __init__(self, seed: int, models: dict[str, str]) -> None:
        """models: named checkpoints -> where they are."""
        self.seed = seed
        self.models = {name: lambda path=path: Path(path) for name, path in models.items()}
        self._teacher: tuple[ExpertConfig, Respondent] | None = None

    def answer(
        self, expert: ExpertConfig, requests: Sequence[Request], problems: Sequence[Problem]
    ) -> tuple[Teacher, list[Sample]]:
        """Who answered, and what. problems: to prove a teacher's weights on."""
        if self._teacher is None or self._teacher[0] != expert:
            if self._teacher is not None:
                self._teacher[1].close()
            self._teacher = expert, open_teacher(expert, seed=self.seed, problems=problems, named_models=self.models)
        teacher = self._teacher[1]
        return teacher.record, [s for samples in teacher.answer(requests, stop=lambda: False) for s in samples]


class RayGrader:
    """An actor that grades."""

    def __init__(self, config: DistillConfig) -> None:
        self.verifier = Verifier(config)

    def grade(self, expert: ExpertConfig, answers: Sequence[Answer]) -> dict[Key, Finding]:
        """As `Verifier.submit`."""
        return self.verifier.submit(expert, answers).result()


class _Task(NamedTuple):
    """What an actor is busy with."""

    actor: Any
    batch: Batch
    is_grading: bool


class RayRun(Run):
    """A run whose work is done elsewhere."""

    def run(self) -> None:
        """Each batch sampled by the next free teacher and graded by the next free grader; all committed here."""
        try:
            import ray
        except ImportError as error:
            raise UserError("ray: it isn't installed; run: pip install -e '.[ray]'") from error

        if not self.batches:
            return
        settings, models = self.config.ray, self._models()
        assert settings is not None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        with _handlers_kept():
            ray.init(address=settings.address, include_dashboard=False, log_to_driver=False)
        try:
            lost = {"max_restarts": settings.max_restarts, "max_task_retries": settings.max_restarts, "num_cpus": 0}
            teach = ray.remote(RayTeacher).options(num_gpus=settings.gpus, scheduling_strategy="SPREAD", **lost)
            grade = ray.remote(RayGrader).options(scheduling_strategy="SPREAD", **lost)
            teachers = [teach.remote(self.config.seed, models) for _ in range(settings.workers)]
            graders = [grade.remote(self.config) for _ in range(settings.workers)]
            self._work(ray, teachers, graders)
        finally:
            ray.shutdown()

    def _work(self, ray: Any, teachers: list[Any], graders: list[Any]) -> None:
        waiting, sampled, busy = deque(self.batches), deque[Batch](), dict[Any, _Task]()
        with self.tracked() as tracker:
            while busy or sampled or (waiting and not self.interrupt.requested):
                while graders and sampled:
                    batch, actor = sampled.popleft(), graders.pop()
                    answers = ungraded(self.ledger, batch)
                    busy[actor.grade.remote(batch.expert, answers)] = _Task(actor, batch, True)
                while teachers and waiting and not self.interrupt.requested:
                    batch = waiting.popleft()
                    if not (asked := self.to_ask(batch)):
                        sampled.append(batch)
                        continue
                    actor, problems = teachers.pop(), self.ledger.problems(batch.positions)
                    busy[actor.answer.remote(batch.expert, asked, problems)] = _Task(actor, batch, False)
                done = ray.wait(list(busy), timeout=POLL)[0] if busy else []
                for reference in done:
                    task, result = busy.pop(reference), ray.get(reference)
                    if task.is_grading:
                        graders.append(task.actor)
                        self.settle(task.batch, result, tracker)
                    else:
                        teachers.append(task.actor)
                        self._acknowledge(task.batch, *result)
                        sampled.append(task.batch)

    def _acknowledge(self, batch: Batch, teacher: Teacher, samples: list[Sample]) -> None:
        check_teacher(self.ledger, batch.expert, teacher)
        self.ledger.add_teacher(teacher)
        self.ledger.add_samples(samples)

    def _models(self) -> dict[str, str]:
        """Named checkpoints that experts use, made here."""
        wanted = {expert.model for expert in self.config.experts if expert.endpoint is None}
        return {name: str(make()) for name, make in self.named_models.items() if name in wanted}


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray puts handlers of its own in the place of those that let a run save before it leaves."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    if threading.current_thread() is threading.main_thread():
        for signum, handler in before.items():
            signal.signal(signum, handler)
