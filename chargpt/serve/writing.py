"""Writes a text for the page, through the worker that all requests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from chargpt.base.errors import UserError
from chargpt.config import SampleConfig
from chargpt.engine.scheduler import Token
from chargpt.serve.bridge import Bridge
from chargpt.serve.models import Served
from chargpt.serve.records import Contexts, record_of
from chargpt.serve.worker import End, QueueFull, Ticket

MOST_IDS, MOST_WRITTEN = 1_000_000, 20_000
_MOST_WAITING = 2**20  # log-probabilities that may wait for a slow reader


class Settings(BaseModel):
    """The settings of the page; see ``web/page/settings.js``."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    temperature: Annotated[float, Field(ge=0, le=2)]
    topK: Annotated[int, Field(ge=0)]  # noqa: N815 (JavaScript's spelling)
    topP: Annotated[float, Field(gt=0, le=1)]  # noqa: N815
    minP: Annotated[float, Field(ge=0, le=1)]  # noqa: N815
    seed: Annotated[int, Field(ge=0, lt=2**53)]

    def config(self) -> SampleConfig:
        """Return the same for the engine."""
        return SampleConfig(
            temperature=self.temperature, top_k=self.topK, top_p=self.topP, min_p=self.minP
        )


class Task(BaseModel):
    """What the page asks for: see `LocalEngine.write` in ``web/engine/local_engine.js``."""

    model: str | None = None
    ids: Annotated[list[int], Field(max_length=MOST_IDS)]
    start: Annotated[int, Field(alias="from", ge=0, le=MOST_IDS)]
    n: Annotated[int, Field(ge=0, le=MOST_WRITTEN)]
    settings: Settings


class PageText:
    """Continues a text, and yields the records of given and new characters.

    A text is written in parts with the same start of the context; each is a request to the worker.
    Character number i is drawn by random number i of the seed, so a text that is continued from
    any place gets the same characters again.
    """

    def __init__(self, served: Served, task: Task) -> None:
        self._served = served
        self._vocab_size = served.tokenizer.vocab_size
        self._contexts = Contexts(served.tokenizer, served.model.config.block_size)
        self._config, self._seed = task.settings.config(), task.settings.seed
        self._ids = list(task.ids)
        self._n_given, self._end = len(task.ids), len(task.ids) + task.n
        self._index = task.start
        if task.start == 0 and task.ids and served.tokenizer.end_of_text_id is None:
            self._index = 1  # nothing predicts the first character
        self._drawn: asyncio.Queue[Token | None] = asyncio.Queue()
        self._ticket: Ticket | None = None

    def start(self) -> None:
        """Hand the next part to the worker, if there is one; may raise its `QueueFull`."""
        if self._index >= self._end:
            return
        self._until = min(self._end, self._contexts.end_of(self._index))
        self._until = min(self._until, self._index + max(1, _MOST_WAITING // self._vocab_size))
        given = self._index < self._n_given
        if given:
            self._until = min(self._until, self._n_given)
        at = self._until - 1 if given else self._index  # the character to predict after the prompt
        self._first = self._contexts.first_of(at)
        prompt = self._contexts.tokens(self._ids[self._first : at], self._first)
        drawn: asyncio.Queue[Token | None] = asyncio.Queue()
        self._drawn = drawn
        worker = self._served.worker
        bridge = worker.pace
        assert isinstance(bridge, Bridge)

        def on_token(number: int, token: Token | None, end: End | None) -> None:
            bridge.post(drawn.put_nowait, token)

        self._ticket = worker.submit(
            prompt,
            self._config.replace(max_new_tokens=1 if given else self._until - at),
            [self._seed],
            skip=at,
            end_id=None,
            top_logprobs=self._vocab_size,
            prompt_logprobs=self._index < at,
            group=self,
            on_token=on_token,
        )

    async def records(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the records, after `start`.

        The last item has the ``reason`` why the text ended, or an ``error``.
        """
        reason = "length"
        try:
            while self._index < self._end and reason == "length":
                given = self._index < self._n_given
                async for record in self._given() if given else self._written():
                    yield record
                    if not given and record["id"] == self._served.tokenizer.end_of_text_id:
                        reason = "end_of_text"
                        break
                if reason == "length":
                    self.start()
            self.close()
            yield {"reason": reason}
        except QueueFull:
            yield {"error": "the server is busy: press Continue in a few seconds"}
        except UserError as error:
            yield {"error": str(error)}

    def close(self) -> None:
        """Stop the computation."""
        if self._ticket is not None:
            self._ticket.cancel()

    async def _given(self) -> AsyncIterator[dict[str, Any]]:
        token = await self._next()
        n_before = self._until - 1 - self._index
        assert self._ticket is not None
        before = self._ticket.prompt_tokens[-n_before:] if n_before else []
        last = self._ids[self._until - 1]
        for each in [*before, Token(last, dict(token.top)[last], token.top)]:
            yield record_of(each, self._index, self._first, self._vocab_size, None)
            self._index += 1

    async def _written(self) -> AsyncIterator[dict[str, Any]]:
        while self._index < self._until:
            token = await self._next()
            self._ids.append(token.id)
            record = record_of(token, self._index, self._first, self._vocab_size, self._config)
            self._index += 1
            yield record

    async def _next(self) -> Token:
        token = await self._drawn.get()
        if token is None:
            assert self._ticket is not None
            raise UserError(self._ticket.error or "the server stops")
        return token
