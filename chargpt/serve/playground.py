"""The page of the server: that of the one-file export, with the model on the server.

GET  /               the page (see ``web/page/remote.js``)
GET  /compare        two of them side by side (``web/page/compare.js``)
GET  /page/facts     what the page shows of a run, with an ETag that changes as it trains
POST /page/write     the records of a text as JSON lines, then why it ended
POST /page/inspect   how one character was predicted
"""

from __future__ import annotations

import asyncio
import html
import json
from collections.abc import AsyncIterator, Mapping
from importlib.resources import files
from typing import Annotated, NamedTuple

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from chargpt.export.web_bundle import data_text, fill, join_modules, script_text, served_policy
from chargpt.serve.errors import ApiError
from chargpt.serve.inside import inspect
from chargpt.serve.live import Live
from chargpt.serve.models import Served
from chargpt.serve.records import Contexts
from chargpt.serve.worker import QueueFull
from chargpt.serve.writing import PageText, Task

_BATCH_SECONDS = 0.016  # records of this time are sent together: a page shows 60 images per second
_PAGE_HEADERS = {"Cache-Control": "no-cache", "X-Frame-Options": "SAMEORIGIN"}


class ServedPage(NamedTuple):
    """A page, and the policy to send with it."""

    html: str
    policy: str


class Question(BaseModel):
    """Which character to look at: see `LocalEngine.inspect` in ``web/engine/local_engine.js``."""

    model: str | None = None
    ids: Annotated[list[int], Field(max_length=100_000)]
    """The characters of the context."""
    first: Annotated[int, Field(ge=0)]
    """Index of the first one in the text."""


def add_playground(app: FastAPI) -> None:
    """Add the routes of the page; ``app.state.served`` has the models by name."""
    live: dict[str, Live] = {}
    pages: dict[str, ServedPage] = {}

    def live_of(served: Served) -> Live:
        if served.name not in live:
            live[served.name] = Live(served)
        return live[served.name]

    def page(entry: str, template: str, title: str) -> HTMLResponse:
        if entry not in pages:
            pages[entry] = make_served_page(entry, template, title)
        text, policy = pages[entry]
        return HTMLResponse(text, headers=_PAGE_HEADERS | {"Content-Security-Policy": policy})

    @app.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return page("page/remote.js", "page.html", "chargpt")

    @app.get("/compare", include_in_schema=False)
    async def show_comparison() -> HTMLResponse:
        return page("page/compare.js", "compare.html", "Two side by side")

    @app.get("/page/facts", include_in_schema=False)
    async def facts(request: Request, model: str | None = None) -> Response:
        ready = request.app.state.ready
        if ready is not None and not ready.is_set():
            return JSONResponse({}, 202)
        state = await live_of(_find(request, model)).current()
        headers = {"ETag": state.tag, "Cache-Control": "no-cache"}
        if request.headers.get("If-None-Match") == state.tag:
            return Response(status_code=304, headers=headers)
        names = list(request.app.state.served)
        return JSONResponse(state.facts | {"models": names}, headers=headers)

    @app.post("/page/write", include_in_schema=False)
    async def write(request: Request, task: Task) -> Response:
        served = _find(request, task.model)
        await live_of(served).current()  # with the newest checkpoint
        _check_ids(served, task.ids)
        if task.start > len(task.ids):
            raise ApiError(400, "from is behind the end of ids: give at most their number")
        text = PageText(served, task)
        try:
            text.start()
        except QueueFull as error:
            message = "the server is busy: try again in a few seconds"
            raise ApiError(429, message, headers={"Retry-After": "2"}) from error
        return _Lines(text)

    @app.post("/page/inspect", include_in_schema=False)
    async def look_inside(request: Request, question: Question) -> JSONResponse:
        served = _find(request, question.model)
        _check_ids(served, question.ids)
        contexts = Contexts(served.tokenizer, served.model.config.block_size)
        context = contexts.tokens(question.ids, question.first)
        if len(context) > served.model.config.block_size:
            raise ApiError(400, "the context is longer than the model's block_size")
        return JSONResponse(await asyncio.to_thread(inspect, served.model, context))


def make_served_page(entry: str, template: str, title: str) -> ServedPage:
    """Return a page without a model, whose script asks this server.

    Args:
        entry: its script, such as ``page/remote.js``.
        template: its HTML.
        title: for the moment until the script knows the model.
    """
    web = files("chargpt").joinpath("web")
    script = script_text("\n" + join_modules(web, entry))
    style = "\n" + web.joinpath("page.css").read_text("utf-8")
    policy = served_policy(script, style)
    values = {
        "title": html.escape(title),
        "policy": policy,
        "style": style,
        "script": script,
    }
    if template == "page.html":
        values |= {"facts": data_text(None), "weights": "", "worker": ""}
    text = fill(web.joinpath(template).read_text("utf-8"), values)
    return ServedPage(text, f"{policy}; frame-ancestors 'self'")


def _find(request: Request, name: str | None) -> Served:
    """Return the model of this name, or the first one."""
    served: Mapping[str, Served] = request.app.state.served
    if not served:
        raise ApiError(503, "the model is still loading", headers={"Retry-After": "1"})
    if name is None:
        return next(iter(served.values()))
    if name not in served:
        raise ApiError(404, "this server has no such model: reload the page")
    return served[name]


def _check_ids(served: Served, ids: list[int]) -> None:
    known = served.tokenizer.vocab_size
    if ids and not 0 <= min(ids) <= max(ids) < known:
        raise ApiError(400, f"the text has ids out of range: give ids from 0 to {known - 1}")


class _Lines(StreamingResponse):
    """The records as lines of JSON, those of a moment together; its end stops the computation."""

    def __init__(self, text: PageText) -> None:
        super().__init__(_batches(text), media_type="application/jsonl")
        self._text = text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # the page may have closed the connection, even before the first record
            self._text.close()


async def _batches(text: PageText) -> AsyncIterator[str]:
    clock = asyncio.get_running_loop().time
    batch, sent = "", clock()
    async for record in text.records():
        batch += json.dumps(record, separators=(",", ":")) + "\n"
        if clock() - sent >= _BATCH_SECONDS or "index" not in record:
            yield batch
            batch, sent = "", clock()
