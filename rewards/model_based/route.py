"""Rows of every kind -> the reward each deserves: a rule where one exists, a judge where there is a reference, a model.

As DeepSeek-V3 does it (its report, 5.2.1): maths answers and code are graded by rules; a free-form answer is judged
against its reference; what has no ground truth is scored by the reward model. A verifier may be asked about answers
that the maths rule calls wrong (rules miss equal answers: arXiv 2505.14625), and about nothing else: what a rule calls
right, hacked or unknown stays so. Where a row's part isn't configured or can't say, the reward is unknown.
As a reward: `rewards.model_based.route:reward(source=route.yaml)`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import rewards
from rewards.completions import text_of
from rewards.model_based.judge import Judge, JudgeConfig, open_judge
from rewards.model_based.scalar import reward as open_reward_model
from rewards.model_based.settings import read_settings
from rewards.verdict import Verdict

Kind = Literal["math", "code", "free", "open"]
Rule = Callable[[Any, str], Verdict]
"""(gold or tests, response) -> verdict."""
FINAL = ("hack/", "no-answer", "unequal/hedge")
"""Reasons, by how they begin, for which the maths rule's "wrong" is final: there is no answer, or more than one."""
Model = Callable[..., Sequence[float | None]]
"""A reward function, TRL's signature."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Who scores what."""

    judge: JudgeConfig | None = None
    """Of answers with a free-form reference. None: they are unknown."""
    reward_model: str | None = None
    """Of answers without a ground truth: a checkpoint folder, or a YAML file of RewardModelConfig. None: unknown."""
    verifier: JudgeConfig | None = None
    """Whom to ask about maths answers that the rule calls wrong. None: the rule has the last word."""


def reward(source: str) -> Callable[..., list[float | None]]:
    """The reward function of a YAML file of `Routing`; loads its models and asks the canaries now."""
    routing = read_settings(source, Routing)
    return Router(
        rules={"math": lambda gold, response: rewards.grade_math(gold, response), "code": _grade_code},
        judge=open_judge(routing.judge) if routing.judge else None,
        model=open_reward_model(routing.reward_model) if routing.reward_model else None,
        verifier=open_judge(routing.verifier) if routing.verifier else None,
    ).route


def kind_of(row: Mapping[str, Any]) -> Kind:
    """What a row is graded by: its `kind` if that is one of these; "code" if it has tests, "open" without answer.

    An answer in prose, of more than three words besides LaTeX commands, is "free"; any other "math". Data with short
    free-form answers ("in spring") should say so in `kind`.
    """
    if row.get("kind") in get_args(Kind):
        return row["kind"]
    if row.get("tests"):
        return "code"
    answer = row.get("answer")
    if answer is None or not str(answer).strip():
        return "open"
    words = re.findall(r"[^\W\d_]{2,}", re.sub(r"\\[A-Za-z]+", " ", str(answer)))
    return "free" if len(words) > 3 else "math"


class Router:
    """Sends each row to its grader; each model is asked once a batch."""

    def __init__(
        self, *, rules: Mapping[str, Rule], judge: Judge | None, model: Model | None, verifier: Judge | None
    ) -> None:
        """rules: graders of "math" and "code". The rest: see `Routing`."""
        self.rules, self.judge, self.model, self.verifier = rules, judge, model, verifier

    def route(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_extra: Callable[[str, list[Any]], None] = lambda column, values: None,
        log_metric: Callable[[str, float], None] = lambda name, value: None,
        **columns: Any,
    ) -> list[float | None]:
        """A reward in [0, 1] for each completion, or None; TRL's signature. Columns read: kind, answer, tests.

        Rules and judges give 0 or 1; the reward model's number goes through a sigmoid, so that it weighs alike. Logs
        the columns `route` and `route_reason`, and how often the verifier was asked and overruled the rule.
        """
        texts = [text_of(completion) for completion in completions]
        rows = [
            {name: columns[name][i] for name in ("kind", "answer", "tests") if columns.get(name)}
            for i in range(len(texts))
        ]
        kinds = [kind_of(row) for row in rows]
        scores: dict[int, tuple[float | None, str]] = {}
        of_kind = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in get_args(Kind)}

        for kind, gold in (("math", "answer"), ("code", "tests")):
            for i in of_kind[kind]:
                verdict = self.rules[kind](rows[i].get(gold), texts[i])
                scores[i] = verdict.score, verdict.reason
        self._appeal([i for i in of_kind["math"] if scores[i][0] == 0], prompts, texts, rows, scores, log_metric)

        if self.judge and (free := of_kind["free"]):
            verdicts = _judge(self.judge, free, prompts, texts, rows)
            scores |= {i: (verdict.score, verdict.reason) for i, verdict in verdicts.items()}
        if self.model and (open_ := of_kind["open"]):
            values = self.model(prompts=[prompts[i] for i in open_], completions=[texts[i] for i in open_])
            scores |= {
                i: (None, "reward-model/unknown") if value is None else (_sigmoid(value), "reward-model")
                for i, value in zip(open_, values, strict=True)
            }

        found = [scores.get(i, (None, f"no-grader/{kind}")) for i, kind in enumerate(kinds)]
        log_extra("route", list(kinds))
        log_extra("route_reason", [reason for _, reason in found])
        for kind, count in Counter(kinds).items():
            log_metric(f"route/{kind}", count / len(kinds))
        return [score for score, _ in found]

    def _appeal(
        self,
        wrong: Sequence[int],
        prompts: Sequence[Any],
        texts: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        scores: dict[int, tuple[float | None, str]],
        log_metric: Callable[[str, float], None],
    ) -> None:
        """Ask the verifier about the rule's negatives that hold an answer, in place; if it can't say, they stand."""
        asked = [i for i in wrong if not scores[i][1].startswith(FINAL)]
        if not self.verifier or not asked:
            return
        verdicts = _judge(self.verifier, asked, prompts, texts, rows)
        for i, verdict in verdicts.items():
            if verdict.outcome == "right":
                scores[i] = 1.0, f"verifier-overrules/{scores[i][1]}"
        outcomes = Counter(verdict.outcome for verdict in verdicts.values())
        log_metric("verifier/asked", len(asked))
        log_metric("verifier/overruled", outcomes["right"])
        log_metric("verifier/unknown", outcomes["unknown"])


def _judge(
    judge: Judge,
    which: Sequence[int],
    prompts: Sequence[Any],
    texts: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> dict[int, Verdict]:
    verdicts = judge.judge(
        [prompts[i] for i in which], [texts[i] for i in which], [rows[i].get("answer") for i in which]
    )
    return dict(zip(which, verdicts, strict=True))


def _grade_code(tests: Any, response: str) -> Verdict:
    return rewards.grade_code(response, tests)


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
