"""The routes of OpenAI's API: completions, chat and models."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from chargpt.base.version import __version__
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.scheduler import Token
from chargpt.generate import StopStringFilter
from chargpt.serve.bridge import Bridge
from chargpt.serve.errors import ApiError
from chargpt.serve.models import Served
from chargpt.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    Plan,
    Prompt,
    Sampling,
    conversation,
)
from chargpt.serve.worker import End, QueueFull, Ticket

FLUSH_SECONDS = 0.025  # between two chunks of a stream; one per character would cost more than it
_FINISH = {"length": "length", "stop": "stop", "end_of_text": "stop"}

router = APIRouter()


@router.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue a prompt."""
    return _answer(request, body, body.prompt)


@router.post("/v1/chat/completions")
async def chat(request: Request, body: ChatRequest) -> Response:
    """Continue a conversation as text: a model of characters knows no roles."""
    return _answer(request, body, conversation(body.messages))


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """List the models."""
    served = request.app.state.served
    return JSONResponse({"object": "list", "data": [_model(name) for name in served]})


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Response:
    """Describe a model."""
    if name not in request.app.state.served:
        raise _unknown_model(name, request.app.state.served)
    return JSONResponse(_model(name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "chargpt"}


def _unknown_model(name: str, served: Any) -> ApiError:
    message = f"the model {name[:80]!r} does not exist: give {' or '.join(served)}"
    return ApiError(404, message, param="model", code="model_not_found")


def _find(served: dict[str, Served], name: str | None) -> Served:
    """Return the model of that name; a server of one model answers to any name."""
    if not served:
        raise ApiError(503, "the model is loading: try again", headers={"Retry-After": "1"})
    if len(served) == 1:
        return next(iter(served.values()))
    if name not in served:
        raise _unknown_model(name or "", served)
    return served[name]


def _answer(request: Request, body: Sampling, prompt: Prompt) -> Response:
    state = request.app.state
    served = _find(state.served, body.model)
    plan = Plan(body, prompt, served.tokenizer, state.settings)
    shape: Shape = (ChatShape if isinstance(body, ChatRequest) else Shape)(served, plan)
    return Answer(shape, plan, served, state)


class Choice:
    """One text of an answer, on the side of the event loop."""

    def __init__(self, index: int, number: int, plan: Plan, tokenizer: CharTokenizer) -> None:
        self.index, self._number = index, number
        self.ticket: Ticket | None = None
        self.n_characters = 0
        self.finish: str | None = None
        self.error: str | None = None
        self.sent = self.n_taken = 0
        self._tokens: list[Token] = []
        self._text = ""
        self._plan, self._tokenizer = plan, tokenizer
        self._filter = StopStringFilter(plan.config.stop)

    def push(self, token: Token | None, end: End | None) -> None:
        """Take a token of the worker, or the end."""
        if self.finish:
            return
        if end == "failed":
            self.finish, self.error = "error", (self.ticket and self.ticket.error) or "it failed"
            return
        if token is not None and self._plan.max_tokens:
            self._tokens.append(token)
            self._text += self._filter.push(self._tokenizer.decode([token.id]))
        if self._filter.found:
            end = "stop"
            assert self.ticket
            self.ticket.end(self._number)
        if end:
            self._text += self._filter.rest()
            self.finish = _FINISH[end]

    def take(self) -> tuple[str, list[Token]]:
        """Return the text that has come since the last call, and its tokens."""
        text, self._text = self._text, ""
        tokens = self._tokens[: len(text)]
        del self._tokens[: len(text)]
        self.n_characters += len(text)
        return text, tokens


class Shape:
    """The JSON of a completion."""

    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, served: Served, plan: Plan) -> None:
        self.plan, self.tokenizer = plan, served.tokenizer
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.chunk_object if plan.stream else self.object,
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": f"chargpt-{__version__}",
            "seed": plan.seed,
        }

    def usage(self, choices: list[Choice]) -> dict[str, int]:
        """Return the characters read and written."""
        read = sum(map(len, self.plan.own_ids))
        written = sum(choice.n_characters for choice in choices)
        return {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
        }

    def whole(self, choices: list[Choice]) -> dict[str, Any]:
        """Return an answer that is not streamed."""
        parts = [self.choice(choice, "message") for choice in choices]
        return self.head | {"choices": parts, "usage": self.usage(choices)}

    def chunk(self, choices: list[dict[str, Any]], usage: Any = None) -> dict[str, Any]:
        """Return a chunk of a stream."""
        chunk = self.head | {"choices": choices}
        return chunk | {"usage": usage} if self.plan.include_usage else chunk

    def first(self, choices: list[Choice]) -> Iterator[dict[str, Any]]:
        """Yield what a stream begins with."""
        return iter(())

    def choice(self, choice: Choice, key: str) -> dict[str, Any]:
        """Return the text that has come, as a choice."""
        text, tokens = choice.take()
        logprobs = None
        rows: list[tuple[int, Token | None]] = [(token.id, token) for token in tokens]
        if self.plan.echo and not choice.sent:
            ids = self.plan.own_ids[choice.index // self.plan.n]
            text = self.tokenizer.decode(ids) + text
            scored: list[Token] = choice.ticket.prompt_tokens if choice.ticket else []
            scored = scored[max(0, len(scored) - len(ids)) :]
            padded = [None] * (len(ids) - len(scored)) + scored
            rows = [*zip(ids, padded, strict=True), *rows]
        if self.plan.logprobs is not None:
            logprobs = self._logprobs(rows, choice.sent)
        choice.sent += len(text)
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }

    def _logprobs(self, rows: list[tuple[int, Token | None]], start: int) -> dict[str, Any]:
        """Return tokens with their log-probabilities; `start`: offset of the first in the text."""
        tokens = [self.tokenizer.decode([i]) for i, _ in rows]
        offsets = []
        for text in tokens:
            offsets.append(start)
            start += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": [token and token.logprob for _, token in rows],
            "top_logprobs": [
                token
                and {
                    self.tokenizer.decode([i]): p
                    for i, p in (*token.top, (token.id, token.logprob))
                }
                for _, token in rows
            ],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float]:
        pairs = [*token.top, (token.id, token.logprob)]
        return {self.tokenizer.decode([i]): logprob for i, logprob in pairs}


class ChatShape(Shape):
    """The JSON of a chat completion."""

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self, choices: list[Choice]) -> Iterator[dict[str, Any]]:
        """Yield the role of each choice."""
        for choice in choices:
            delta = {"role": "assistant", "content": ""}
            part = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self.chunk([part])

    def choice(self, choice: Choice, key: str) -> dict[str, Any]:
        """Return the text that has come, as a choice."""
        text, tokens = choice.take()
        message: dict[str, Any] = {"content": text}
        if key == "message":
            message = {"role": "assistant", "content": text, "refusal": None}
        logprobs = None
        if self.plan.logprobs is not None:
            logprobs = {"content": [self._entry(token) for token in tokens], "refusal": None}
        return {
            "index": choice.index,
            key: message,
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [self._pair(i, p) for i, p in token.top]
        return self._pair(token.id, token.logprob) | {"top_logprobs": top}

    def _pair(self, number: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([number])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace"))}


class Answer(Response):
    """Sends the texts of a request, and cancels them when the connection closes."""

    def __init__(self, shape: Shape, plan: Plan, served: Served, state: Any) -> None:
        super().__init__()
        self._shape, self._plan, self._served = shape, plan, served
        self._metrics, self._timeout = state.metrics, state.settings.timeout
        self._began = time.monotonic()
        self._news = asyncio.Event()
        self._gone = False
        self._tickets: list[Ticket] = []
        n = plan.n
        self._choices = [
            Choice(index, index % n, plan, served.tokenizer)
            for index in range(n * len(plan.own_ids))
        ]
        self._submit()

    def _submit(self) -> None:
        plan, n = self._plan, self._plan.n
        bridge = self._served.worker.pace
        assert isinstance(bridge, Bridge)
        try:
            for i, ids in enumerate(plan.read_ids):
                choices = self._choices[i * n : (i + 1) * n]
                ticket = self._served.worker.submit(
                    ids,
                    plan.config,
                    plan.seeds,
                    bias=plan.bias,
                    end_id=self._served.tokenizer.end_of_text_id,
                    top_logprobs=plan.logprobs or 0,
                    prompt_logprobs=plan.echo and plan.logprobs is not None,
                    on_token=partial(self._on_token, bridge, choices),
                    group=self,
                )
                self._tickets.append(ticket)
                for choice in choices:
                    choice.ticket = ticket
        except QueueFull as error:
            self._cancel()
            message = "the server is busy: try again in a second"
            headers = {"Retry-After": "1"}
            raise ApiError(429, message, code="queue_full", headers=headers) from error

    def _on_token(
        self,
        bridge: Bridge,
        choices: list[Choice],
        number: int,
        token: Token | None,
        end: End | None,
    ) -> None:
        """Runs in the worker's thread."""
        bridge.post(self._push, choices if end == "failed" else [choices[number]], token, end)

    def _push(self, choices: list[Choice], token: Token | None, end: End | None) -> None:
        for choice in choices:
            choice.push(token, end)
        self._news.set()

    def _cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a closed connection cancels."""
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await (self._stream(send) if self._plan.stream else self._send_whole(scope, send))
        except OSError:  # the connection is closed
            self._gone = True
        finally:
            self._cancel()
            watcher.cancel()
            name = self._served.name
            self._metrics.duration.labels(name).observe(time.monotonic() - self._began)
            self._metrics.characters.labels(name).inc(sum(c.n_characters for c in self._choices))
            self._metrics.prompt_characters.labels(name).inc(sum(map(len, self._plan.own_ids)))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._cancel()
        self._news.set()

    async def _wait(self) -> bool:
        """Wait for news; return whether the client is still there."""
        try:
            left = self._began + self._timeout - time.monotonic()
            if left <= 0:  # a timeout would not interrupt a wait that is over at once
                raise TimeoutError
            async with asyncio.timeout(left):
                await self._news.wait()
        except TimeoutError:
            self._cancel()
            for choice in self._choices:
                choice.finish, choice.error = "error", "timeout"
        self._news.clear()
        return not self._gone

    def _observe_first(self) -> None:
        seconds = time.monotonic() - self._began
        self._metrics.first.labels(self._served.name).observe(seconds)

    async def _send_whole(self, scope: Scope, send: Send) -> None:
        first = True
        while not all(choice.finish for choice in self._choices):
            if not await self._wait():
                return
            if first:
                self._observe_first()
                first = False
        if error := self._error():
            response = error.response()
        else:
            response = JSONResponse(self._shape.whole(self._choices))
        await response(scope, self._no_receive, send)

    @staticmethod
    async def _no_receive() -> Any:
        raise AssertionError("the watcher receives")

    def _error(self) -> ApiError | None:
        reasons = [choice.error for choice in self._choices if choice.error]
        if "timeout" in reasons:
            message = f"the request took longer than {self._timeout:g} s: ask for fewer characters"
            return ApiError(504, message, code="timeout")
        return ApiError(500, reasons[0]) if reasons else None

    async def _stream(self, send: Send) -> None:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send_events(send, list(self._shape.first(self._choices)))
        open_choices, first = [*self._choices], True
        while open_choices:
            if not await self._wait():
                return
            if first:
                self._observe_first()
            if error := self._error():
                await self._send_events(send, [error.body])
                break
            events = []
            for choice in [*open_choices]:
                finished = bool(choice.finish)
                part = self._shape.choice(choice, "delta")
                if finished or part.get("text") or part.get("delta", {}).get("content"):
                    events.append(self._shape.chunk([part]))
                if finished:
                    open_choices.remove(choice)
            await self._send_events(send, events)
            first = False
            if open_choices:
                await asyncio.sleep(FLUSH_SECONDS)
        if self._plan.include_usage:
            usage = self._shape.usage(self._choices)
            await self._send_events(send, [self._shape.chunk([], usage)])
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _send_events(self, send: Send, events: list[Any]) -> None:
        if events:
            lines = (f"data: {json.dumps(event, separators=(',', ':'))}\n\n" for event in events)
            body = "".join(lines).encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
