"""The page in a real browser: what people do, what an answer or another site may try, and a server that dies."""

import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytestmark = pytest.mark.browser
PATIENCE = 20_000
"""Milliseconds for what happens at once on a machine at rest."""


@pytest.fixture
def server(serve: Any) -> Any:
    return serve()


class Elsewhere(BaseHTTPRequestHandler):
    """Another server on this machine, with one page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.server.content)  # type: ignore[attr-defined]

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as other:
        threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
        yield other
        other.shutdown()


class Tab:
    """One reviewer's page, in a browser profile of its own; what it loads, logs and asks is kept."""

    def __init__(self, browser: Any, server: Any, reviewer: str) -> None:
        self.context = browser.new_context()
        self.context.set_default_timeout(PATIENCE)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self._dialog)
        self.page.goto(server.address)
        self.page.get_by_label("Your name").fill(reviewer)
        self.page.keyboard.press("Enter")
        self.shows("poem/0")

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.type}")
        dialog.accept()

    def press(self, key: str, *, shows: str | None = None, says: str | None = None) -> None:
        """Press a key and wait for an answer's id or for words in the status line."""
        self.page.keyboard.press(key)
        if says is not None:
            self.says(says)
        if shows is not None:
            self.shows(shows)

    def shows(self, name: str) -> None:
        self.page.locator("#row-id", has_text=name).wait_for()

    def says(self, words: str) -> None:
        self.page.locator("#status", has_text=words).wait_for()

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))


@pytest.fixture
def open_tab(chromium: Any, server: Any) -> Iterator[Callable[[str], Tab]]:
    tabs: list[Tab] = []

    def opened(reviewer: str) -> Tab:
        tabs.append(Tab(chromium, server, reviewer))
        return tabs[-1]

    yield opened
    for tab in tabs:
        tab.context.close()


def said(server: Any) -> list[tuple[str, str, str]]:
    return [(record.reviewer, record.row, record.action) for record in server.records()]


def test_accept_edit_reject_undo_and_reload_by_keyboard(server, open_tab) -> None:
    ana = open_tab("Ana")
    assert "token" not in ana.page.url
    ana.press("a", shows="etc/passwd", says="poem/0 accepted")
    assert said(server) == [("Ana", "poem/0", "accept")]  # on disk when the page says so
    ana.press("r", shows="qa/0", says="../../etc/passwd rejected")
    ana.press("e")
    ana.page.keyboard.press("Control+End")
    ana.page.keyboard.type(" a e r u / Right.\nIn 1871.")  # no shortcut while one writes
    ana.press("Control+Enter", shows="qa/1", says="qa/0 edited")
    record = server.records()[-1]
    assert record.text == "George Eliot. a e r u / Right.\nIn 1871."
    assert record.diff.splitlines()[3:] == ["-George Eliot.", "+George Eliot. a e r u / Right.", "+In 1871."]
    assert ana.text("#progress").startswith("You: 3 of 4")
    ana.page.reload()
    ana.shows("qa/1")
    assert ana.text("#progress").startswith("You: 3 of 4") and ana.text("#status") == ""
    ana.press("u", shows="qa/0", says="qa/0 undone")
    assert ana.text("#answer") == "George Eliot." and ana.text("#progress").startswith("You: 2 of 4")
    ana.press("u", shows="etc/passwd", says="etc/passwd undone")
    assert [action for _, _, action in said(server)] == ["accept", "reject", "edit", "undo", "undo"]
    ana.page.go_back()
    ana.page.reload()
    assert ana.text("#progress").startswith("You: 1 of 4")
    assert ana.complaints == []


def test_buttons_do_what_keys_do(server, open_tab) -> None:
    ana = open_tab("Ana")
    ana.page.get_by_role("button", name="Accept").click()
    ana.says("accepted")
    ana.page.get_by_role("button", name="Reject").click()
    ana.says("rejected")
    ana.page.get_by_role("button", name="Edit").click()
    ana.page.get_by_role("button", name="Save edit").click()
    ana.says("Nothing is changed")
    ana.page.locator("#editor").fill("Mary Ann Evans.")
    ana.page.get_by_role("button", name="Cancel").click()
    assert ana.text("#answer") == "George Eliot."
    ana.page.get_by_role("button", name="Edit").click()
    assert ana.page.locator("#editor").input_value() == "George Eliot."
    ana.page.locator("#editor").fill("Mary Ann Evans.")
    ana.page.get_by_role("button", name="Save edit").click()
    ana.says("edited")
    ana.page.get_by_role("button", name="Undo").click()
    ana.says("undone")
    assert [action for *_, action in said(server)] == ["accept", "reject", "edit", "undo"] and ana.complaints == []


def test_views_by_state_domain_and_text(server, open_tab) -> None:
    ana = open_tab("Ana")
    ana.page.get_by_label("Domain").select_option("qa")
    ana.shows("qa/0")
    ana.press("ArrowRight", shows="qa/1")
    ana.press("ArrowLeft", shows="qa/0")
    ana.press("a", shows="qa/1")
    ana.page.get_by_label("State").select_option("You accepted")
    ana.shows("qa/0")
    assert "1 of 1" in ana.text("form") and ana.page.locator("#mine").inner_text() == "You accepted this"
    ana.press("/")
    ana.page.keyboard.type("canberra")
    ana.page.keyboard.press("Enter")
    ana.page.get_by_text("Nothing here.").wait_for()
    ana.page.get_by_label("State").select_option("All answers")
    ana.shows("qa/1")
    assert ana.page.get_by_label("Text").input_value() == "canberra"


def test_two_reviewers_at_once(server, open_tab) -> None:
    ana, raj = open_tab("Ana"), open_tab("Raj")
    ana.press("a", shows="etc/passwd")
    raj.press("a", shows="etc/passwd")
    ana.press("a", shows="qa/0")
    raj.press("r", shows="qa/0")
    assert raj.text("#progress") == "You: 2 of 4 · Together: 1 settled, 1 disputed"
    raj.press("u", shows="etc/passwd")
    assert raj.page.locator(".tag", has_text="Ana").count() == 0  # hidden until Raj has decided
    ana.page.reload()
    assert ana.text("#progress") == "You: 2 of 4 · Together: 2 settled, 0 disputed"  # Raj's undo is Raj's alone
    raj.press("r", shows="qa/0")
    raj.press("k", shows="qa/0")  # the view is of what waits: nothing before
    raj.page.get_by_label("State").select_option("Disputed")
    raj.shows("etc/passwd")
    assert raj.page.locator(".tag", has_text="Ana").inner_text() == "Ana accepted it"
    raj.page.get_by_text("Agreement of reviewers").click()
    assert raj.text("#agreement td:nth-child(3)") == "50 %" and raj.text("#agreement td:nth-child(4)") == "0.00"
    dinner = "../../etc/passwd"
    assert said(server) == [
        ("Ana", "poem/0", "accept"), ("Raj", "poem/0", "accept"), ("Ana", dinner, "accept"),
        ("Raj", dinner, "reject"), ("Raj", dinner, "undo"), ("Raj", dinner, "reject"),
    ]  # fmt: skip


def test_an_answer_is_text_whatever_is_in_it(server, open_tab) -> None:
    ana = open_tab("Ana")
    ana.press("ArrowRight", shows="../../etc/passwd")
    hostile = server.queue.items[1].answer
    assert ana.text("#answer") == hostile.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")
    ana.press("e")
    assert ana.page.locator("#editor").input_value() == hostile
    ana.page.keyboard.press("Control+End")
    ana.page.keyboard.type("</textarea><img src=x onerror=\"document.title='owned'\">")
    ana.press("Control+Enter", says="edited")
    ana.page.get_by_label("State").select_option("You edited")
    ana.shows("../../etc/passwd")
    assert ana.text("#answer").endswith("</textarea><img src=x onerror=\"document.title='owned'\">")
    ana.page.get_by_text("What you changed").click()
    assert "+<img" in ana.text("#diff")
    assert ana.page.locator("img, iframe").count() == 0 and ana.page.locator("script").count() == 1
    assert "owned" not in ana.page.title()
    assert ana.complaints == []  # nothing even tried, or the policy would have said so
    assert all(url.startswith(f"{server.origin}/") for url in ana.requests)
    assert server.records()[0].row == "../../etc/passwd"
    assert {path.name for path in server.queue.path.parent.iterdir()} == {"queue.jsonl", server.queue.log_path.name}


def test_another_name_for_it_gets_nothing(server, open_tab) -> None:
    ana = open_tab("Ana")
    reply = ana.page.goto(f"http://evil.example:{server.port}/?token={server.token}")  # resolves to 127.0.0.1
    assert reply.status == 421 and "Snow" not in ana.page.content()


# The first is the same site, whatever its port: its requests carry the cookie.
@pytest.mark.parametrize("name", ["127.0.0.1", "evil.example"])
def test_another_page_gets_nothing(server, open_tab, elsewhere, name: str) -> None:
    page, digest = f"{server.origin}/?reviewer=Ana", server.queue.items[0].digest
    elsewhere.content = f"""<!doctype html><title>attack</title><iframe src="{page}"></iframe><script>
      const body = JSON.stringify({{reviewer: "Ana", key: "k", row: 1, digest: "{digest}", action: "reject"}});
      const ask = (url, more) => fetch(url, {{credentials: "include", ...more}}).then((reply) => reply.text());
      Promise.allSettled([
        ask("{page}"), ask("{page}", {{mode: "no-cors"}}),
        ask("{server.origin}/decide", {{method: "POST", mode: "no-cors", body}}),
        ask("{server.origin}/decide", {{method: "POST", headers: {{"Content-Type": "application/json"}}, body}}),
      ]).then((all) => document.title = all.map((one) => one.value || one.status));
    </script>""".encode()
    ana = open_tab("Ana")
    ana.page.goto(f"http://{name}:{elsewhere.server_port}/")
    ana.page.wait_for_function("document.title != 'attack'")
    assert ana.page.title() == "rejected,rejected,rejected,rejected"
    assert all("Snow" not in frame.content() for frame in ana.page.frames)
    assert f"{server.origin}/decide" in ana.requests
    assert server.records() == []
    ana.page.goto(page)
    ana.press("a", says="accepted")  # its own page still works


def test_a_killed_server_loses_no_decision_and_no_edit(server, serve, open_tab) -> None:
    ana = open_tab("Ana")
    ana.press("a", shows="etc/passwd", says="accepted")
    ana.press("r", shows="qa/0", says="rejected")
    server.end(signal.SIGKILL)
    ana.press("e")
    ana.page.keyboard.press("Control+End")
    ana.page.keyboard.type(" Yes.")
    ana.press("Control+Enter", says="Not saved: the server doesn't answer")
    assert said(server) == [("Ana", "poem/0", "accept"), ("Ana", "../../etc/passwd", "reject")]
    again = serve("--port", str(server.port), FAILPOINT="review/saved")
    ana.press("Control+Enter", says="Open the address that the command printed")  # it has another token now
    ana.context.new_page().goto(again.address)
    ana.press(
        "Control+Enter", says="Not saved: the server doesn't answer"
    )  # killed when it had saved, before it said so
    again.end()
    assert again.code == -signal.SIGKILL and len(server.records()) == 3
    last = serve("--port", str(server.port))
    ana.context.new_page().goto(last.address)
    ana.press("Control+Enter", shows="qa/1", says="qa/0 edited")
    assert [action for *_, action in said(server)] == ["accept", "reject", "edit"]
    assert server.records()[2].text == "George Eliot. Yes."


def test_an_edit_survives_a_reload_until_it_is_saved(server, open_tab) -> None:
    ana = open_tab("Ana")
    ana.press("e")
    ana.page.locator("#editor").fill("Snow\nfalls.")
    ana.page.reload()
    ana.says("not saved yet")
    assert ana.complaints == ["dialog: beforeunload"]  # it asked first
    assert ana.page.locator("#editor").input_value() == "Snow\nfalls."
    ana.page.locator("#editor").focus()
    ana.press("Control+Enter", shows="etc/passwd", says="edited")
    ana.press("u", shows="poem/0")
    assert not ana.page.locator("#editor").is_visible() and ana.text("#answer") == "Snow is\nwhite."
