"""The page in a real browser: nothing of the run runs, nothing is fetched, and what people do works."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.report import write_comparison, write_report

pytestmark = pytest.mark.browser
PATIENCE = 20_000
"""Milliseconds for what happens at once on a machine at rest."""


class Tab:
    """An open report; what it loads, logs and asks is kept."""

    def __init__(self, browser: Any, path: Path, fragment: str = "", **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.type), dialog.dismiss()))
        self.address = path.as_uri() + fragment
        self.page.goto(self.address)

    def count(self) -> str:
        """How many match and are shown."""
        return str(self.page.locator("#count").inner_text())

    def backgrounds(self) -> list[str]:
        """Of the tokens of the first completion."""
        script = "list => list.map(token => getComputedStyle(token).backgroundColor)"
        return list(self.page.locator(".sample >> nth=0 >> .completion i").evaluate_all(script))

    def colour(self, name: str) -> list[str]:
        """Colour by it; what the first completion's tokens look like then."""
        self.page.get_by_label(name, exact=True).check()
        return self.backgrounds()


@pytest.fixture
def tab(chromium: Any, run: Path, page: Any) -> Iterator[Tab]:
    tab = Tab(chromium, run / "report.html")
    yield tab
    assert [url.partition("#")[0] for url in tab.requests] == [tab.address]
    assert tab.complaints == []
    tab.context.close()


def test_nothing_of_the_run_runs(tab: Tab, page: Any, hostile: tuple[str, str]) -> None:
    tab.page.locator("details.more summary").click()
    assert tab.page.title() == "<script>tiny: report"
    assert tab.page.evaluate("document.querySelectorAll('img, iframe, link, object, b, script').length") == 2
    prompt = tab.page.locator(".prompt >> nth=0").inner_text()
    assert prompt == page.data["prompts"][0]
    assert tab.page.locator(".completion >> nth=0").inner_text() == prompt  # it was the completion, too
    assert tab.page.locator("#samples").is_visible()  # the <style> in it hides nothing


def test_filters(tab: Tab) -> None:
    assert tab.count() == "36 match, 12 shown."
    tab.page.get_by_role("button", name="Show more").click()
    assert tab.count() == "36 match, 24 shown."
    tab.page.get_by_label("Verdict").select_option("wrong")
    assert tab.count() == "12 match, 12 shown."
    assert tab.page.locator(".chip.wrong").count() == 12 and tab.page.locator(".chip.right").count() == 0
    assert tab.page.locator("#more").is_hidden()
    tab.page.get_by_label("Step").select_option("10")
    assert tab.count() == "4 match, 4 shown."
    tab.page.get_by_label("Verdict").select_option("unknown")
    assert tab.count() == "1 match, 1 shown."
    tab.page.get_by_role("button", name="Clear").click()
    tab.page.locator("#count", has_text="36 match").wait_for()
    tab.page.get_by_label("truncated").check()
    assert tab.count() == "3 match, 3 shown."
    tab.page.get_by_label("truncated").uncheck()
    tab.page.get_by_label("all-equal groups").check()
    assert tab.count() == "12 match, 12 shown."
    tab.page.get_by_label("all-equal groups").uncheck()
    tab.page.get_by_label("Text").fill("<IMG src=x")
    assert tab.count() == "12 match, 12 shown."
    tab.page.get_by_label("Text").fill("ana has 9 cards")
    assert tab.count() == "3 match, 3 shown."
    tab.page.get_by_label("Text").fill("")
    tab.page.get_by_label("Order").select_option("length")
    assert tab.page.locator(".sample header >> nth=2").get_by_text("truncated").is_visible()  # the three long ones


def test_tokens_are_coloured(tab: Tab) -> None:
    clear = "rgba(0, 0, 0, 0)"
    tab.page.get_by_label("Verdict").select_option("wrong")  # b b b, trained on
    assert set(tab.backgrounds()) == {clear}
    assert tab.colour("log-prob") == [f"rgba(234, 88, 12, {alpha})" for alpha in ("0.04", "0.075", "0.114")]
    assert tab.colour("ratio") == ["rgba(234, 88, 12, 0.15)", "rgba(234, 88, 12, 0.75)", "rgba(234, 88, 12, 0)"]
    assert tab.colour("mask") == [clear, "rgba(168, 85, 247, 0.6)", clear]
    tab.page.get_by_label("all-equal groups").check()
    tab.page.get_by_label("Verdict").select_option("right")
    assert tab.colour("mask") == ["rgba(100, 116, 139, 0.3)"] * 3  # advantage 0
    assert set(tab.colour("nothing")) == {clear}


def test_figures_of_a_token_by_pointer_and_by_keyboard(tab: Tab) -> None:
    tab.page.get_by_label("Verdict").select_option("wrong")
    readout = tab.page.locator(".token >> nth=0")
    tab.page.locator(".completion >> nth=0 >> i >> nth=1").hover()
    said = 'token 2 of 3 "b" · log p -0.5 (60.65 %) · π_trainer / π_sampler 2.7183 (log 1) · trained, weight at its cap'
    assert readout.inner_text() == said
    tab.page.locator(".completion >> nth=0").focus()
    tab.page.keyboard.press("ArrowRight")
    assert readout.inner_text().startswith("token 3 of 3")
    tab.page.keyboard.press("ArrowRight")
    assert readout.inner_text().startswith("token 3 of 3")  # the end
    tab.page.keyboard.press("Home")
    assert readout.inner_text().startswith('token 1 of 3 "b" · log p -0.25')
    assert tab.page.locator(".completion i.at").count() == 1


def test_a_completion_is_reached_by_tab_from_the_filter(tab: Tab) -> None:
    tab.page.get_by_role("button", name="Clear").focus()
    tab.page.keyboard.press("Tab")
    assert tab.page.evaluate("document.activeElement.className") == "completion"
    assert tab.page.locator(".token >> nth=0").inner_text().startswith("token 1 of")


def test_the_numbers_of_a_curve(tab: Tab) -> None:
    plot, readout = tab.page.locator("#entropy .plot"), tab.page.locator("#entropy .readout")
    plot.focus()
    tab.page.keyboard.press("Home")
    assert readout.inner_text() == "step 1: entropy 0.59"
    tab.page.keyboard.press("ArrowRight")
    assert readout.inner_text() == "step 2: entropy 0.58"
    tab.page.set_viewport_size({"width": 420, "height": 900})
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    tab.page.mouse.move(box["x"] + box["width"] * (54 + 458 * 9 / 19) / 520, box["y"] + 50)
    assert readout.inner_text() == "step 10: entropy 0.5"


def test_a_finding_leads_to_its_completions(tab: Tab) -> None:
    tab.page.get_by_role("link", name="those of step 20").click()
    tab.page.locator("#count", has_text="4 match, 4 shown.").wait_for()
    assert tab.page.get_by_label("all-equal groups").is_checked()
    assert tab.page.get_by_label("Step").input_value() == "20"
    tab.page.get_by_role("link", name="Where signal is lost").click()
    assert tab.page.evaluate("document.querySelector(':target').id") == "signal"


@pytest.mark.parametrize("fragment", ["#samples?verdict=wrong&colour=mask", "#samples?elements=1&__proto__=1&step=<b>"])
def test_an_address_can_carry_a_filter(chromium: Any, run: Path, page: Any, fragment: str) -> None:
    tab = Tab(chromium, run / "report.html", fragment)
    shown = "12 match, 12 shown." if "wrong" in fragment else "36 match, 12 shown."
    assert tab.count() == shown and tab.complaints == []
    tab.context.close()


@pytest.mark.parametrize("width", [1200, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_its_window_and_can_be_read(chromium: Any, run: Path, page: Any, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900}
    tab = Tab(chromium, run / "report.html", "#samples?colour=ratio", viewport=size, color_scheme=scheme)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = tab.page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert contrast(ink, paper) > 7
    tab.context.close()


def contrast(one: str, other: str) -> float:
    """WCAG 2's ratio of two `rgb(…)`."""

    def luminance(colour: str) -> float:
        parts = [int(v) / 255 for v in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_a_comparison_runs_nothing_either(chromium: Any, run: Path, tmp_path: Path) -> None:
    tab = Tab(chromium, write_comparison([run, run], tmp_path / "compared.html"))
    assert tab.page.title() == "2 runs compared: report"
    assert tab.page.evaluate("document.querySelectorAll('img, iframe, link, b, script').length") == 2
    plot = tab.page.locator("[data-figure^=entropy]")
    plot.focus()
    tab.page.keyboard.press("End")
    assert tab.page.locator("[id^=entropy] .readout").inner_text().count("0.4") == 2
    assert len(tab.requests) == 1 and tab.complaints == []
    tab.context.close()


def test_a_page_without_runs_files_has_no_errors(chromium: Any, tmp_path: Path) -> None:
    tab = Tab(chromium, write_report(tmp_path))
    assert "No steps recorded yet." in tab.page.locator("main").inner_text()
    assert tab.complaints == []
    tab.context.close()
