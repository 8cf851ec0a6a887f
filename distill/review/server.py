"""A review -> a page on this machine's loopback, for people with the token; it says "saved" when a decision is on disk.

Who may ask: whoever opened the address with the token, which then is in a cookie that no other site's requests carry;
Host and Origin must be this server's own, or a page anywhere could reach it under a name that resolves to 127.0.0.1.
Several people share one token; who they say they are is believed. Assets come from nowhere else, model text is text.
"""

import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import jinja2
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel

from distill.review.decisions import STATES, Review, check_name
from distill.review.log import Action, Record
from distill.review.queue import Item
from runtime.errors import DiskError, UserError
from runtime.progress import visible

ADDRESS = "127.0.0.1"
LARGEST_BODY = 8_000_000
"""Bytes of a request: the longest edit, each of its characters written as an escape."""
KEPT = "\n\t\u200c\u200d"
"""Shown as they are: layout, and what joins letters of some scripts and parts of emoji."""
SAID = {"accept": "accepted", "edit": "edited", "reject": "rejected", "undo": "undone"}


class View(BaseModel):
    """Who looks at what: in the address of every page, and in every request."""

    reviewer: str = ""
    state: str = "todo"
    domain: str = ""
    q: str = ""

    def link(self, **more: object) -> str:
        """The address of a page of this view."""
        fields = {name: getattr(self, name) for name in View.model_fields}
        fields = {name: value for name, value in fields.items() if value != View.model_fields[name].default}
        return "/?" + urlencode({**fields, **{name: value for name, value in more.items() if value is not None}})


class Submission(View):
    """What the page sends: who, in which view, and a key that is the same when it tries again."""

    key: str


class Judgement(Submission):
    """A decision on the row with this number, whose prompt and answer had this digest."""

    row: int
    digest: str
    action: Action
    text: str | None = None


def make_app(review: Review, *, port: int, token: str, reviewers: Sequence[str] = ()) -> FastAPI:
    """The application; reviewers: the only names it takes, unset: any."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    template = _template()
    hosts = {f"{ADDRESS}:{port}", f"localhost:{port}"}
    cookie = f"review-{port}"  # browsers share cookies between the ports of a host

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        request.state.nonce = secrets.token_urlsafe(16)
        refused = _refusal(request, hosts, token, cookie)
        response = PlainTextResponse(refused[1], status_code=refused[0]) if refused else await call_next(request)
        response.headers.update(_headers(request.state.nonce))
        if not refused and "token" in request.query_params:
            response.set_cookie(cookie, token, httponly=True, samesite="strict", path="/")
        return response

    @app.exception_handler(UserError)
    def bad_request(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, status_code=400)

    @app.exception_handler(RequestValidationError)
    def no_submission(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        wrong = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors())
        return JSONResponse({"error": wrong}, status_code=422)

    @app.exception_handler(DiskError)
    def no_disk(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": f"Not saved: {error}"}, status_code=507)

    def known(reviewer: str) -> str:
        name = check_name(reviewer)
        if reviewers and name not in reviewers:
            raise UserError(f"reviewer={name!r}: this review is for {', '.join(reviewers)}")
        return name

    @app.get("/", response_class=HTMLResponse)
    def page(request: Request, row: int | None = None, saved: int | None = None) -> str:
        # Fields by hand: FastAPI's own model of the query would refuse `token`, `row` and `saved` beside them.
        view = View(**{name: request.query_params[name] for name in View.model_fields if name in request.query_params})
        context: dict[str, Any] = {"nonce": request.state.nonce, "title": review.queue.path.name, "states": STATES}
        if not view.reviewer and len(reviewers) == 1:
            view.reviewer = reviewers[0]
        try:
            view.reviewer = known(view.reviewer)
            if view.state not in STATES:
                raise UserError(f"state={view.state!r}: use one of {', '.join(STATES)}")
            if row is not None and not 1 <= row <= len(review.queue.items):
                raise UserError(f"row={row}: the queue has rows 1 to {len(review.queue.items)}")
        except UserError as error:
            entered = "reviewer" in request.query_params
            return template.render(context, names=reviewers, error=str(error) if entered else "", view=None)
        with review.lock:
            return template.render(context, **_context(review, view, row, saved))

    @app.post("/decide")
    def decide(sent: Judgement) -> dict[str, str]:
        items = review.queue.items
        if not 1 <= sent.row <= len(items) or items[sent.row - 1].digest != sent.digest:
            raise UserError(f"row={sent.row}: not what this page shows; load it again")
        item, sent.reviewer = items[sent.row - 1], known(sent.reviewer)
        with review.lock:
            record = review.decide(item, sent.action, reviewer=sent.reviewer, text=sent.text, key=sent.key)
            after = _after(_matching(review, sent), item)
        return {"next": sent.link(row=after and after.number, saved=record.number)}

    @app.post("/undo")
    def undo(sent: Submission) -> dict[str, str]:
        sent.reviewer = known(sent.reviewer)
        record = review.undo(sent.reviewer, key=sent.key)
        if record is None:
            raise UserError("There is nothing left to undo.")
        return {"next": sent.link(row=review.queue.by_id[record.row].number, saved=record.number)}

    return app


def serve(review: Review, *, port: int, reviewers: Sequence[str], announce: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; announce: is given the address. Raises UserError for a port that is taken."""
    try:
        listening = socket.create_server((ADDRESS, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"port={port}: {error}; use --port 0 for any that is free") from error
    with listening:
        port, token = listening.getsockname()[1], secrets.token_urlsafe(24)
        app = make_app(review, port=port, token=token, reviewers=reviewers)
        announce(f"http://{ADDRESS}:{port}/?token={token}")
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_level="warning", access_log=False,
            proxy_headers=False, server_header=False, timeout_graceful_shutdown=2,
        )  # fmt: skip
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:  # the way to end it
            pass


def _refusal(request: Request, hosts: set[str], token: str, cookie: str) -> tuple[int, str] | None:
    """Status and reason, or None for a request that may pass."""
    host, origin = request.headers.getlist("host"), request.headers.getlist("origin")
    if len(host) != 1 or host[0] not in hosts:
        return 421, f"This review answers at {' and '.join(sorted(hosts))} only."
    if origin not in ([], [f"http://{host[0]}"]) or (request.method != "GET" and not origin):
        return 403, "Requests from other pages are refused."
    given = request.query_params.get("token", request.cookies.get(cookie, ""))
    if not secrets.compare_digest(given.encode(), token.encode()):
        return 403, "Open the address that the command printed: each start of it makes a new one."
    if request.method != "GET":
        length = request.headers.get("content-length", "")
        if not (length.isascii() and length.isdecimal() and int(length) <= LARGEST_BODY):
            return 413, f"A request has at most {LARGEST_BODY:,} bytes, and says how many."
        if request.headers.get("content-type") != "application/json":
            return 415, "Send application/json."
    return None


def _headers(nonce: str) -> dict[str, str]:
    sources = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; form-action 'self'"
    return {
        "Content-Security-Policy": f"default-src 'none'; {sources}; base-uri 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = lambda text: visible(text, keep=KEPT)
    return environment.get_template("page.html.jinja")


def _matching(review: Review, view: View) -> list[Item]:
    return review.decisions.matching(view.reviewer, state=view.state, domain=view.domain, text=view.q)


def _after(matching: list[Item], item: Item) -> Item | None:
    """The next one to look at, from the beginning again behind the last."""
    others = [other for other in matching if other is not item]
    return next((other for other in others if other.number > item.number), others[0] if others else None)


def _context(review: Review, view: View, row: int | None, saved: int | None) -> dict[str, Any]:
    """What the template shows."""
    decisions, matching = review.decisions, _matching(review, view)
    item = review.queue.items[row - 1] if row is not None else next(iter(matching), None)
    said = decisions.of(item) if item else {}
    mine = said.get(view.reviewer)
    before = [other for other in matching if item and other.number < item.number]
    behind = [other for other in matching if item and other.number > item.number]
    return {
        "view": view,
        "item": item,
        "mine": mine,
        # What others say would sway somebody who hasn't decided, and make agreement worth nothing.
        "others": [record for who, record in said.items() if mine and who != view.reviewer],
        "said": SAID,
        "matching": len(matching),
        "place": len(before) + 1 if item in matching else None,
        "previous": view.link(row=before[-1].number) if before else None,
        "next": view.link(row=behind[0].number) if behind else None,
        "domains": sorted({other.domain for other in review.queue.items} - {""}),
        "progress": decisions.progress(view.reviewer),
        "agreements": decisions.agreements(),
        "saved": _saved(review, view, saved),
        "can_undo": decisions.last(view.reviewer) is not None,
    }


def _saved(review: Review, view: View, number: int | None) -> Record | None:
    """The record to confirm: one of this reviewer's."""
    records = review.log.records
    found = records[number - 1] if number is not None and 1 <= number <= len(records) else None
    return found if found and found.reviewer == view.reviewer else None
