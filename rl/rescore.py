"""A stored step -> the same completions under other rewards, with their advantages anew: what would have been taught.

Nothing is sampled. The columns a reward reads come from the run's data, where every prompt is looked up by its text,
because the step's file holds no more of a row than its answer. Left out: rewards that compare the rows of one call
see a step's rows in another order than they did where dynamic sampling took several rounds.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rl.flips import Change, Pair
from rl.record import PART, SCHEMA, or_nan, or_none, prompt_text
from rl.rollout import punish_overlong, score, set_advantages
from rl.score import Scorer
from rl.types import Group, Prompt
from runtime.errors import UserError
from runtime.files import replacing
from runtime.rows import Row, Rows, load_rows
from sampling.protocol import Completion


@dataclass(frozen=True, kw_only=True)
class Rescoring:
    """What is paid, and how rewards become advantages."""

    rewards: Mapping[Any, float]
    """Name or callable -> weight."""
    gates: Mapping[str, str]
    """Reward -> the one that must be 1 for it to be paid, by name."""
    advantage: str
    """As `loss.advantage`."""
    overlong_buffer: int
    """Tokens; 0: off."""
    max_tokens: int
    """The run's, which the buffer counts back from."""
    time_limit: float
    """Seconds a call of a reward may take."""


class Problems:
    """The data's rows, found by the prompts that rollouts hold."""

    def __init__(self, source: str, *, exact: bool) -> None:
        """exact: a row must also have the answer it had; otherwise, whatever answer it has now is taken.
        Data that can't be read finds nothing; `missing` then says why."""
        self.source, self.exact = source, exact
        self.missing: str | None = None
        try:
            self.rows = load_rows(source)
        except UserError as error:
            self.rows, self.missing = Rows(source=source), str(error)
        self._places: dict[Any, list[int]] = {}
        for place, row in enumerate(self.rows):
            self._places.setdefault(self._key(prompt_text(row["prompt"]), row["answer"]), []).append(place)
        self.asked: dict[int, Row | None] = {}
        """Prompt index -> what was found for it."""
        self.other_answer: set[int] = set()
        """Prompts whose answer in the data is not the one the run had."""

    @property
    def lost(self) -> int:
        """Prompts asked for that the data does not have as they were."""
        return sum(row is None for row in self.asked.values())

    def complete(self, stored: Prompt) -> Prompt:
        """A stored prompt with the messages and columns of its row; without a row, as it is: text and answer."""
        answer = stored.columns["answer"]
        places = self._places.get(self._key(prompt_text(stored.content), answer), [])
        # Rows set aside as too long moved the index down, so among equal prompts the first from the index on is it.
        place = min(places, key=lambda p: (p < stored.index, abs(p - stored.index)), default=None)
        row = self.asked[stored.index] = None if place is None else self.rows[place]
        if row is None:
            return stored
        if row["answer"] != answer:
            self.other_answer.add(stored.index)
        columns = {name: value for name, value in row.items() if name != "prompt"}
        return replace(stored, content=row["prompt"], columns=columns)

    def _key(self, text: str, answer: str | None) -> Any:
        return (text, answer) if self.exact else text


READ = (
    *("step", "prompt_index", "epoch", "process", "group", "sample", "used", "seed", "prompt_text", "completion_text"),
    *("completion_ids", "finish_reason", "version", "answer", "reward", "advantage"),
)
"""Columns of a step's file that matter here; log-probs and experts are most of its size."""


def read_pairs(path: Path) -> list[Pair]:
    """The groups of a step's file, of all its processes, not yet scored anew. UserError if it isn't such a file."""
    try:
        schema = pq.read_schema(path)
        wrong = [name for name in READ if name not in schema.names or schema.field(name).type != SCHEMA[name]]
        if wrong:
            raise UserError(
                f"{path} is not a step's rollout as it is written now: column {wrong[0]!r} is "
                f"{'of another type' if wrong[0] in schema.names else 'missing'}. A file of another program, or of "
                "another version: score it with the version that wrote it"
            )
        parts = [name for name in schema.names if name.startswith(PART)]
        rows = pq.read_table(path, columns=[*READ, *parts], page_checksum_verification=True).to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or no Parquet file ({reason}); move it away to go on without") from error
    groups = itertools.groupby(rows, key=lambda row: (row["process"], row["group"]))
    return [_pair(list(members), parts) for _, members in groups]


def rescore_step(pairs: Sequence[Pair], scorer: Scorer, problems: Problems, settings: Rescoring) -> None:
    """Fill in `new` and `unknown` of a step's groups: a call for each process's groups, as they were scored."""
    for pair in pairs:
        pair.new.prompt = problems.complete(pair.old.prompt)
    for _, own in itertools.groupby(pairs, key=lambda pair: pair.process):
        called = list(own)
        groups = [pair.new for pair in called]
        scores = score(groups, scorer, step=called[0].step - 1)
        if settings.overlong_buffer:
            punish_overlong(groups, max_tokens=settings.max_tokens, buffer=settings.overlong_buffer)
        set_advantages(groups, settings.advantage)
        reasons = [reasons for pair in called for reasons in pair.unknown]
        for unknown in scores.unknown:
            reasons[unknown.row].append(f"{unknown.reward}: {unknown.reason}")


def write_step(path: Path, pairs: Sequence[Pair]) -> None:
    """One row per completion, in the order and with the keys of the step's rollout, to be joined with it."""
    rows = [
        {
            "step": pair.step,
            "prompt_index": pair.old.prompt.index,
            "process": pair.process,
            "group": pair.number,
            "sample": i,
            "used": pair.used,
            "reward_old": or_none(pair.old.rewards[i]),
            "reward_new": or_none(pair.new.rewards[i]),
            "advantage_old": or_none(pair.old.advantages[i]),
            "advantage_new": or_none(pair.new.advantages[i]),
            "flipped": Change(pair=pair, sample=i).flipped,
            "unknown": "; ".join(pair.unknown[i]) or None,
            **{f"old/{name}": or_none(values[i]) for name, values in pair.old.parts.items()},
            **{f"new/{name}": or_none(values[i]) for name, values in pair.new.parts.items()},
        }
        for pair in pairs
        for i in range(len(pair.old.completions))
    ]
    kinds = {"used": pa.bool_(), "flipped": pa.bool_(), "unknown": pa.string()}
    kinds |= dict.fromkeys(("step", "prompt_index", "process", "group", "sample"), pa.int64())
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in rows[0]])
    with replacing(path) as aside:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), aside, compression="zstd")


def _pair(rows: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> Pair:
    first = rows[0]
    old = Group(
        prompt=Prompt(
            index=first["prompt_index"],
            epoch=first["epoch"],
            seed=first["seed"],
            content=first["prompt_text"],
            ids=[],  # no reward sees them
            columns={"answer": first["answer"]},
        ),
        completions=[
            Completion(
                ids=row["completion_ids"],
                logprobs=[],
                finish_reason=row["finish_reason"],
                version=row["version"],
            )
            for row in rows
        ],
        texts=[row["completion_text"] for row in rows],
        parts={name.removeprefix(PART): [or_nan(row[name]) for row in rows] for name in parts},
        rewards=[or_nan(row["reward"]) for row in rows],
        advantages=[or_nan(row["advantage"]) for row in rows],
    )
    new = replace(old, parts={}, rewards=[], advantages=[])
    return Pair(
        step=first["step"],
        process=first["process"],
        number=first["group"],
        used=first["used"],
        old=old,
        new=new,
        unknown=[[] for _ in rows],
    )
