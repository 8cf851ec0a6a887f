"""verl's `compute_score` over our graders: maths by its gold answer, code by its tests.

Tell verl with `custom_reward_function.path=pkg://rewards.verl` and `custom_reward_function.name=compute_score` (under
`reward.` from 0.9 on). Left out: rewards that don't ask whether an answer is right; verl takes one function.

differs: verl has no unknown. A verdict that is unknown gets a score of 0.0, as it has to be some number and NaN would
spoil its whole group, and says so in `unknown`; watch the mean of that.
"""

import json
from collections.abc import Mapping
from typing import Any

from rewards.code_tests import grade_code
from rewards.maths.grade import grade_math
from rewards.verdict import Verdict

CODE = frozenset("codecontests apps codeforces taco humaneval mbpp livecodebench lcb".split())
MATHS = ("gsm8k", "math", "aime", "amc", "numina", "olympiad", "minerva", "dapo", "deepscaler", "big-math", "orz")


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    kind: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Grade one response. Returns, with the same keys for every row as verl wants:

    score, acc: 1.0 or 0.0, 0.0 for unknown. unknown: 1.0 or 0.0. reason: the verdict's. pred: the answer found, "" for
    none and for code; verl's majority vote reads it.

    ground_truth: a gold answer, or tests: a list as `grade_code` has them, or verl's `{"inputs", "outputs"}` with
    `fn_name` or `assert_case`; as JSON text, too.
    kind: "math" or "code". Unset: `extra_info["kind"]`, else by the data source's name.
    Raises ValueError for a data source that says neither: it is the configuration's fault, not the row's.
    """
    kind = (extra_info or {}).get("kind") or kind or kind_of(data_source)
    if kind == "code":
        verdict = _grade_code(solution_str, ground_truth, str((extra_info or {}).get("starter") or ""))
    elif kind == "math":
        scalar = getattr(ground_truth, "ndim", None) == 0  # of numpy, as data frames have them
        verdict = grade_math(ground_truth.item() if scalar else ground_truth, solution_str)
    else:
        raise ValueError(f"data_source={data_source!r}: give kind=math or kind=code in reward_kwargs or extra_info")
    return {
        "score": verdict.score or 0.0,
        "acc": verdict.score or 0.0,
        "unknown": float(verdict.score is None),
        "reason": verdict.reason,
        "pred": (verdict.answer or "") if kind == "math" else "",
    }


def kind_of(data_source: str) -> str | None:
    """What verl's own data sources hold, and those named like them: "math" or "code"; None for others."""
    name = data_source.lower().rpartition("/")[2]
    if name in CODE:
        return "code"
    return "math" if name.startswith(MATHS) else None


def read_tests(ground_truth: Any) -> list[Mapping[str, Any]]:
    """Tests as `grade_code` has them. Raises ValueError (KeyError, TypeError) for what isn't any."""
    tests = json.loads(ground_truth) if isinstance(ground_truth, str | bytes) else ground_truth
    if not isinstance(tests, Mapping):
        return list(tests)
    if tests.get("assert_case") is not None:
        return [{"assert": source} for source in tests["assert_case"]]
    pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
    if not (function := tests.get("fn_name")):
        return [{"input": given, "output": output} for given, output in pairs]
    return [{"call": function, "args": _arguments(given), "output": _from_json(output)} for given, output in pairs]


def _grade_code(response: str, ground_truth: Any, starter: str) -> Verdict:
    try:
        tests = read_tests(ground_truth)
    except (ValueError, KeyError, TypeError, RecursionError):
        return Verdict(outcome="unknown", reason="tests-unusable")
    return grade_code(response, tests, starter=starter)


def _arguments(given: Any) -> list[Any]:
    """APPS writes a call's arguments as a list, or as text with the JSON of one on each line."""
    return [json.loads(line) for line in given.splitlines()] if isinstance(given, str) else list(given)


def _from_json(output: Any) -> Any:
    return json.loads(output) if isinstance(output, str) else output
