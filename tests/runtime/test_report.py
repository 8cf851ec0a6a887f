"""The report of a made-up run folder: complete, offline, and safe whatever the model wrote."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.errors import UserError
from runtime.report import _thin, write_report
from runtime.statistics import wilson

HOSTILE = (
    "<think><script>document.title='owned'</script></think> ]]> <!-- \x1b[31mred\x1b[0m \x00 {{7*7}} "
    "{% raw %} \u202egnp.exe\u202c \u2028 <img src=x onerror=\"document.title='owned'\"> </div></main> "
    "&lt;b&gt; <svg onload=alert(1)><style>body{display:none}</style> "
    "<meta http-equiv=refresh content='0;url=//evil.example'>"
)
NAMED = "<script>document.title='owned'</script>$x^2$\x1b"


class Page(HTMLParser):
    """What a browser would build from the page: elements with attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def rollouts(step: int) -> list[dict[str, Any]]:
    def row(i: int) -> dict[str, Any]:
        right = float(i % 2 == 0 or step > 1)
        return {
            "step": step,
            "prompt_index": i // 4,
            "group": i // 4,
            "sample": i % 4,
            "prompt_text": "Ana has 20 cards & <b>Raj</b> 3.",
            "completion_text": HOSTILE if i == 0 else f"<think>20-3={i}</think>\\boxed{{{i}}}",
            "completion_ids": [1, 2, 3],
            "logprobs": [-0.1, -0.2, -0.3],
            "finish_reason": "length" if i == 0 else "stop",
            "reward": right,
            "advantage": right - 0.5,
            "rewards/accuracy": right,
            f"rewards/{NAMED}": None,
            "version": step,
        }

    return [row(i) for i in range(12)]


def metrics(step: int) -> dict[str, Any]:
    share = step / 20
    line = {
        "step": step,
        "reward": 0.4 + 0.5 * share,
        "rewards/accuracy/mean": 0.4 + 0.5 * share,
        f"rewards/{NAMED}/mean": 1.0,
        "frac_reward_zero_std": 0.9 * share,
        "completions/mean_length": 15 + 9 * share,
        "completions/clipped_ratio": 0.0,
        "completions/thinking_fraction": 0.5 + 0.5 * share,
        "rewards/unknown": 0.0,
        "entropy": 0.6 - 0.2 * share,
        "kl": None,
        "sampling/logp_gap/mean": 0.001,
        "sampling/logp_gap/max": 0.1 if step != 3 else 0.0,
        "time/rollout": 0.7,
        "time/reward": 0.01,
        "time/update": 0.4,
        "time/sync": 0.05,
    }
    if step % 10 == 0:
        low, high = wilson(0.5 + 0.4 * share, 400)
        line |= {"eval/accuracy": 0.5 + 0.4 * share, "eval/accuracy_low": low, "eval/accuracy_high": high}
    return line


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run = tmp_path_factory.mktemp("runs") / "<script>tiny"
    (run / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text("model: '<script>x</script>'\noptim:\n  lr: 0.0001\n")
    (run / "environment.json").write_text(json.dumps({"torch": "2.13.0", "git": {"commit": "<script>"}}))
    lines = [json.dumps(metrics(step)) for step in range(1, 21)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 21, "rew']))
    for step in (1, 10, 20):
        pq.write_table(pa.Table.from_pylist(rollouts(step)), run / "rollouts" / f"step-{step:06d}.parquet")
    yield run
    shutil.rmtree(run)


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_figure_is_drawn_with_its_words(page: Page) -> None:
    labels = [a["aria-label"] for tag, a in page.elements if tag == "svg"]
    assert labels == [
        "Reward and held-out accuracy",
        "Reward by part",
        "Length",
        "Completions that show work",
        "Where signal is lost",
        "Sampler-trainer gap",
        "Entropy",
        "Time by phase",
    ]
    for words in (
        "held-out accuracy",
        "groups of equal reward",
        "rollout",
        "0.425 → 0.900",
        "70.0% → 90.0%",
        "$x^2$",
    ):
        assert words in page.text, words


def test_hostile_text_is_shown_and_nothing_else(page: Page, html: str) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "b", "iframe", "link", "object", "form", "a", "base"}
    assert sum(tag == "style" for tag, _ in page.elements) == 1
    assert sum(tag == "meta" for tag, _ in page.elements) == 4
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count("<script>document.title='owned'</script></think>") == 2  # first step and last
    for shown in (
        "]]>",
        "{{7*7}}",
        "{% raw %}",
        "\\x1b[31mred\\x1b[0m",
        "\\u202egnp.exe\\u202c",
        "&lt;b&gt;",
        "\\x00",
    ):
        assert shown in page.text, shown
    assert "49" not in page.text.split("Sample completions")[1].split("How it was run")[0]
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\u2028]", html)


def test_the_page_forbids_and_needs_no_network(page: Page) -> None:
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'; style-src 'unsafe-inline';")
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "style", "clip-path"):
                assert not re.search(r"//|data:|url\((?!#)", value or ""), (tag, name, value)


def test_ids_are_unique_and_references_resolve(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {(v or "") for _, a in page.elements for k, v in a.items() if k == "xlink:href"}
    clips = {c for _, a in page.elements for c in re.findall(r"url\((#[^)]*)\)", a.get("clip-path") or "")}
    assert clips and wanted
    assert {ref.removeprefix("#") for ref in wanted | clips} <= set(ids)


def test_samples_are_of_the_first_and_last_step_with_their_parts(page: Page) -> None:
    samples = page.text.split("Sample completions")[1]
    assert re.findall(r"Step (\d+) \((\d+) completions\)", samples) == [("1", "12"), ("20", "12")]
    assert samples.count("\\boxed{2}") == samples.count("\\boxed{10}") == 2  # rows 0, 2, 4, ... of 12
    for chip in ("reward 1", "accuracy 1", "unknown", "advantage +0.50", "3 tokens", "cut at the limit"):
        assert chip in samples, chip
    thinking = [a for tag, a in page.elements if tag == "span" and a.get("class") == "thinking"]
    assert len(thinking) == 12


def test_notes_say_what_is_wrong(page: Page) -> None:
    assert "77% of the groups have equal rewards" not in page.text
    assert "of the groups have equal rewards and teach nothing" in page.text
    assert "metrics.jsonl: 1 unreadable line(s) were left out." in page.text


def test_configuration_and_environment_are_shown(page: Page) -> None:
    assert "model: '<script>x</script>'\noptim:\n  lr: 0.0001" in page.text
    assert '"commit": "<script>"' in page.text


def test_the_same_run_gives_the_same_bytes(run: Path, html: str) -> None:
    assert write_report(run).read_text(encoding="utf-8") == html


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text())
    assert "No steps recorded yet." in page.text
    assert not any(tag == "svg" for tag, _ in page.elements)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_torn_files_are_named_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step-000001.parquet").write_bytes(b"PAR1 torn")
    (tmp_path / "environment.json").write_text("{")
    (tmp_path / "config.yaml").write_bytes(b"model: \xff\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 1, "eval/accuracy": 0.5}\n')
    page = Page(write_report(tmp_path).read_text())
    assert "rollouts/step-000001.parquet can't be read" in page.text
    assert "environment.json is not readable JSON." in page.text
    assert "model: \\xff" in page.text
    assert [a["aria-label"] for tag, a in page.elements if tag == "svg"] == ["Reward and held-out accuracy"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run_dir=.*nowhere"):
        write_report(tmp_path / "nowhere")


def test_long_curves_are_averaged_not_sampled() -> None:
    thinned = _thin([float(i) for i in range(10_000)])
    assert len(thinned) == 400
    assert thinned[0] == 12.0  # the mean of 0..24
    assert _thin([1.0, 2.0]) == [1.0, 2.0]


@pytest.mark.browser
def test_a_browser_runs_nothing_of_it(run: Path, html: str, tmp_path: Path) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium")
    profile, picture = tmp_path / "profile", tmp_path / "report.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--window-size=1200,3000",
    ]
    flags += ["--disable-background-networking", "--enable-logging=stderr", "--virtual-time-budget=2000"]

    def browse(*more: str) -> subprocess.CompletedProcess[str]:
        command = [chromium, *flags, *more, (run / "report.html").as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)

    dumped = browse("--dump-dom")
    dom = Page(dumped.stdout)
    assert "<title>&lt;script&gt;tiny: run report</title>" in dumped.stdout  # no script changed it
    assert not any(tag in ("script", "img") for tag, _ in dom.elements)
    assert dom.text.count("document.title='owned'") == Page(html).text.count("document.title='owned'")
    assert "Refused to" not in dumped.stderr and "violates the following Content Security" not in dumped.stderr
    browse(f"--screenshot={picture}")
    assert picture.stat().st_size > 50_000  # a blank page is a tenth of it
