"""The panel on a real pseudo-terminal, plain lines elsewhere, and hostile text made harmless."""

import io
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from runtime.progress import sparkline, terminal_plot, track_steps, visible

METRICS = {
    "reward": 0.485,
    "rewards/accuracy/mean": 0.5,
    "rewards/[red]\x1b[31mformat/mean": 1.0,
    "completions/mean_length": 15.5,
    "sampling/logp_gap/mean": 0.0011,
    "entropy": 0.43,
    "tokens_per_second": 2690.0,
    "note": "not a number",
}
HOSTILE = "[bold]x[/bold] [/] \x1b]0;title\x07\x1b[2J \u202e\u200b\x9b"


def on_pipe(run: Callable[[Console], None], *, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    run(Console(file=file, _environ={"TERM": "xterm-256color", "FORCE_COLOR": "1"}))
    file.flush()
    return raw.getvalue().decode(encoding)


def on_terminal(run: Callable[[Console], None]) -> str:
    """Run with a console on a pseudo-terminal; return every byte it got."""
    master, slave = os.openpty()
    got: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # how Linux says that the other end is closed
                return
            if not data:
                return
            got.append(data)

    reader = threading.Thread(target=drain)
    reader.start()
    with open(slave, "w", encoding="utf-8") as file:  # noqa: PTH123  (a descriptor has no path)
        run(Console(file=file, width=100, _environ={"TERM": "xterm-256color"}))
    reader.join(timeout=10)
    os.close(master)
    return b"".join(got).decode()


def three_steps(console: Console) -> None:
    with track_steps(3, f"GRPO {HOSTILE}", console=console) as tracker:
        for step in (1, 2, 3):
            with tracker.phase("sampling"):
                time.sleep(0.3 if step == 1 else 0)  # longer than a refresh
            tracker.update(step, METRICS | {"reward": 0.1 * step})
        tracker.log(HOSTILE)


def test_a_pipe_gets_one_plain_line_per_step() -> None:
    lines = on_pipe(three_steps).splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("step 1/3  reward 0.100  accuracy 0.500  [red]\\x1b[31mformat 1.000  length 15.5")
    assert "gap 0.0011  entropy 0.430  tokens/s 2,690  0." in lines[1]
    assert re.search(r"s  eta \d:\d\d$", lines[2])
    assert not lines[3].endswith("eta 0:00")
    assert all(line.isprintable() for line in lines)


def test_a_pipe_that_is_not_utf8_gets_escapes_not_an_error() -> None:
    def run(console: Console) -> None:
        with track_steps(1, "日本", console=console) as tracker:
            tracker.log("é")

    assert on_pipe(run, encoding="ascii") == "\\u65e5\\u672c: 1 steps\n\\xe9\n"


def test_a_terminal_gets_the_panel() -> None:
    seen = on_terminal(three_steps)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    for part in ("sampling", "3/3", "reward", "0.300", "accuracy", "gap", "2,690", "▁▄█", "╭", "0.1 → 0.3"):
        assert part in text, part
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") == 1  # the cursor comes back


def test_hostile_text_reaches_a_terminal_as_text() -> None:
    seen = on_terminal(three_steps)
    assert "[bold]x[/bold] [/]" in seen  # not taken for markup, nor raising MarkupError
    assert "\\x1b]0;title\\x07\\x1b[2J \\u202e\\u200b\\x9b" in seen
    assert not re.search("\x1b\\]|\x07|\x1b\\[2J|\u202e|\u200b|\x9b", seen)


def test_the_cursor_comes_back_after_an_error() -> None:
    def run(console: Console) -> None:
        with pytest.raises(KeyboardInterrupt), track_steps(3, "t", console=console) as tracker:
            with tracker.phase("updating"):
                raise KeyboardInterrupt

    assert on_terminal(run).rstrip().endswith("\x1b[?25h")


def test_a_phase_is_timed_also_when_it_fails() -> None:
    with track_steps(1, "t", console=Console(file=io.StringIO())) as tracker:
        with tracker.phase("sampling") as outer:
            with pytest.raises(OSError), tracker.phase("scoring") as inner:
                time.sleep(0.02)
                raise OSError
            time.sleep(0.02)
    assert inner.seconds >= 0.02
    assert outer.seconds >= inner.seconds + 0.02


def test_a_resumed_run_counts_on() -> None:
    def run(console: Console) -> None:
        with track_steps(10, "t", start=8, console=console) as tracker:
            time.sleep(0.05)
            tracker.update(9, {})

    first, second = on_pipe(run).splitlines()
    assert first == "t: 10 steps, from step 9"
    # One step of the two left took 0.05 s: the eight done earlier say nothing of this machine's speed.
    assert second.startswith("step 9/10") and second.endswith("eta 0:00")


def test_what_is_counted_may_be_something_else() -> None:
    def run(console: Console) -> None:
        with track_steps(10, "t", start=8, unit="row", console=console) as tracker:
            tracker.update(9, {})

    first, second = on_pipe(run).splitlines()
    assert first == "t: 10 rows, from row 9" and second.startswith("row 9/10")


def test_nothing_is_written_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    on_pipe(three_steps)
    terminal_plot({"reward": [0.1, 0.2]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcødé 日本 🙂", "plain ünïcødé 日本 🙂"),
        ("two\nlines", "two\nlines"),
        ("\x00\x1b\x7f\x85\t\r", "\\x00\\x1b\\x7f\\x85\\t\\r"),
        ("\u202e\u2066\u200b\ufeff\u2028\U000e0041", "\\u202e\\u2066\\u200b\\ufeff\\u2028\\U000e0041"),
        ("\ud800", "\\ud800"),
    ],
)
def test_visible_spells_out_what_acts_or_hides(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_visible_keeps_only_what_it_is_told_to() -> None:
    assert visible("a\n\tb", keep="") == "a\\n\\tb"
    assert visible("a\n\tb", keep="\n\t") == "a\n\tb"


def test_sparkline_spans_low_to_high() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0]) == "▄▄"
    assert sparkline([1.0, float("nan"), 2.0]) == "▁█"
    assert sparkline([0.0] * 50 + [1.0] * 50, width=2) == "▁█"
    assert sparkline([]) == ""


def test_terminal_plot_draws_two_charts_in_eighty_plain_columns() -> None:
    drawn = terminal_plot({"accuracy": [0.5, 0.7, 0.9], "length": [15.0, 20.0, 24.0]})
    lines = drawn.splitlines()
    assert len(lines) == 12
    assert max(map(len, lines)) == 80
    assert "\x1b" not in drawn
    assert "accuracy" in lines[0] and "length" in lines[0]
    assert {"0.90", "0.50", "24", "15"} <= set(re.findall(r"[\d.]+", drawn))
    assert lines[-1].split() == ["1", "2", "3", "1", "2", "3"]


def test_terminal_plot_leaves_out_what_is_missing() -> None:
    drawn = terminal_plot({"accuracy": [None, 0.7, float("nan"), 0.9], "none": [None] * 4}, steps=[10, 20, 30, 40])
    assert "none" not in drawn
    assert drawn.splitlines()[-1].split() == ["20", "40"]
    assert terminal_plot({"none": []}) == ""


def test_terminal_plot_survives_constant_and_single_values() -> None:
    assert "one" in terminal_plot({"one": [0.5]})
    assert "flat" in terminal_plot({"flat": [1.0, 1.0, 1.0]})
