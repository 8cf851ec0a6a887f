"""A made-up run whose every text is hostile, and a way to see what a browser would make of its page."""

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models

from runtime.report import write_report
from runtime.statistics import wilson

HOSTILE = (
    "<think><script>document.title='owned'</script></think> ]]> <!-- \x1b[31mred\x1b[0m \x00 {{7*7}} "
    "{% raw %} \u202egnp.exe\u202c \u2028 <img src=x onerror=\"document.title='owned'\"> </div></main> "
    "&lt;b&gt; </script><svg onload=alert(1)><style>body{display:none}</style> "
    "<meta http-equiv=refresh content='0;url=//evil.example'>"
)
NAMED = "<script>document.title='owned'</script><img src=//evil.example>\x1b"
PIECES = [HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)]
DEFAULTS = {"model": "tiny", "group_size": 8, "optim": {"lr": 1e-6}, "rewards": {"accuracy": 1.0}, "lora": None}


def rollouts(step: int) -> list[dict[str, Any]]:
    """Three groups of four: of the first, two are right; the second's rewards are all equal; the third is spare."""

    def row(i: int) -> dict[str, Any]:
        reward = None if i == 5 else 1.0 if 4 <= i < 8 else float(i % 2 == 0)
        ids = list(range(len(PIECES))) if i == 0 else [len(PIECES) + i % 3] * 3
        return {
            "step": step,
            "prompt_index": i // 4,
            "process": 0,
            "group": i // 4,
            "sample": i % 4,
            "used": i < 8,
            "prompt_text": HOSTILE if i < 4 else f"Ana has {i} cards & <b>Raj</b> 3.",
            "completion_text": HOSTILE if i == 0 else "abc" * 3,
            "completion_ids": ids,
            "logprobs": [-0.25 * (n + 1) for n in range(len(ids))],
            "finish_reason": "length" if i == 0 else "stop",
            "answer": NAMED if i == 0 else "7",
            "reward": reward,
            "advantage": None if reward is None else 0.0 if 4 <= i < 8 else reward - 0.5,
            "rewards/accuracy": reward,
            f"rewards/{NAMED}": None,
            "version": step - 1,
        }

    return [row(i) for i in range(12)]


def trainer(step: int) -> list[dict[str, Any]]:
    """The trainer's log-probs of what was trained on: the first token's is higher by 0.1, the second's by 1."""
    trained = [row for row in rollouts(step) if row["used"] and row["advantage"] is not None]
    return [
        {
            **{name: row[name] for name in ("process", "group", "sample")},
            "logprobs": [p + (0.1, 1.0, 0.0)[min(n, 2)] for n, p in enumerate(row["logprobs"])],
        }
        for row in trained
    ]


def metrics(step: int) -> dict[str, Any]:
    share = step / 20
    line = {
        "step": step,
        "reward": 0.4 + 0.5 * share,
        "reward_std": 0.2,
        "rewards/accuracy/mean": 0.4 + 0.5 * share,
        "rewards/accuracy/std": 0.3,
        f"rewards/{NAMED}/mean": 1.0,
        "frac_reward_zero_std": 0.9 * share,
        "completions/mean_length": 15 + 9 * share,
        "completions/min_length": 3,
        "completions/max_length": 40,
        "completions/mean_terminated_length": 14 + 9 * share,
        "completions/clipped_ratio": 0.0,
        "completions/thinking_fraction": 0.5 + 0.5 * share,
        "rewards/unknown": 0.0,
        "entropy": 0.6 - 0.2 * share,
        "kl": 0.01 * share,
        "clip_ratio/region_mean": 0.02,
        "grad_norm": 1.0,
        "learning_rate": 1e-6,
        "sampling/logp_gap/mean": 0.001,
        "sampling/logp_gap/max": 0.1 if step != 3 else 0.0,
        "weights/version": float(step),
        "tokens_per_second": 900.0,
        f"mine/{NAMED}": 3.0,
        "time/rollout": 0.7,
        "time/reward": 0.01,
        "time/update": 0.4,
        "time/sync": 0.05,
        "step_time": 1.3,
    }
    if step % 10 == 0:
        low, high = wilson(0.5 + 0.4 * share, 400)
        line |= {"eval/accuracy": 0.5 + 0.4 * share, "eval/accuracy_low": low, "eval/accuracy_high": high}
    return line


def write_tokenizer(folder: Path) -> None:
    """Token i is the i-th piece of HOSTILE; the three after them are a, b and c."""
    folder.mkdir(parents=True)
    words = {piece: i for i, piece in enumerate([*_unique(PIECES), "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))


def _unique(pieces: list[str]) -> list[str]:
    assert len(set(pieces)) == len(pieces), "choose another length of PIECES"
    return pieces


def write_run(run: Path) -> Path:
    """The run, 20 steps, of which three have rollouts."""
    for folder in ("rollouts", "trainer"):
        (run / folder).mkdir(parents=True)
    config = (
        f"model: {json.dumps(NAMED)}\ngroup_size: 4\noptim: {{lr: 0.0001}}\nrewards: {{accuracy: 1.0}}\nlora: null\n"
    )
    (run / "config.yaml").write_text(config)
    argv = ["recipes/grpo.py", "--config", f"presets/{NAMED}.yaml", "--optim.lr", "1e-4"]
    about = {"torch": "2.13.0", "git": {"commit": "<script>"}, NAMED: NAMED, "attempts": [{"argv": argv}]}
    (run / "environment.json").write_text(json.dumps(about))
    lines = [json.dumps(metrics(step)) for step in range(1, 21)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 21, "rew']))
    for step in (1, 10, 20):
        for folder, rows in (("rollouts", rollouts(step)), ("trainer", trainer(step))):
            pq.write_table(pa.Table.from_pylist(rows), run / folder / f"step-{step:06d}.parquet")
    write_tokenizer(run / "checkpoints" / "final")
    return run


class Page(HTMLParser):
    """What a browser would build from the page: elements with attributes, text, and what is in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def data(self) -> dict[str, Any]:
        """What the page's script reads."""
        return json.loads(self.scripts[0])

    @property
    def figures(self) -> list[str]:
        """Titles of what is drawn."""
        return [a["aria-label"] or "" for tag, a in self.elements if tag == "svg"]

    @property
    def findings(self) -> list[str]:
        """In order."""
        lists = re.findall(r'<ul class="findings">(.*?)</ul>', self.source, re.DOTALL)
        return [Page(item).text for part in lists for item in re.findall(r"<li>(.*?)</li>", part, re.DOTALL)]


@pytest.fixture(scope="session")
def page_of() -> Any:
    """Path of a report -> what is in it."""
    return lambda path: Page(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def hostile() -> tuple[str, str]:
    """The text of models, and the name of everything."""
    return HOSTILE, NAMED


@pytest.fixture(scope="session")
def make_run() -> Any:
    """Writes the run into a folder."""
    return write_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run, with its report."""
    run = write_run(tmp_path_factory.mktemp("runs") / "<script>tiny")
    assert write_report(run, defaults=DEFAULTS) == run / "report.html"
    yield run
    shutil.rmtree(run)


@pytest.fixture(scope="session")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))
