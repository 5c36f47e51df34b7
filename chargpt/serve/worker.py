"""One thread per model that writes all requests in one batch, a character each per step."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, Protocol

from torch import Tensor

from chargpt.base.errors import UserError
from chargpt.config import SampleConfig
from chargpt.engine.decoder import Decoder
from chargpt.engine.scheduler import Engine, Finish, Token, TokenSequence

End = Finish | Literal["cancelled", "failed"]
OnToken = Callable[[int, Token | None, End | None], None]
"""Called in the worker's thread with the sequence's number, its new token, and why it ended."""

PROMPTS_PER_STEP = 4  # more would make the running texts wait
SHORT = 256  # most characters of a text that may use the slots kept free of long texts

log = logging.getLogger("chargpt.serve")


class QueueFull(Exception):  # noqa: N818 (the request is fine)
    """Too many texts wait already."""


class Pace(Protocol):
    """Connects a worker with those that read its tokens."""

    def begin(self) -> None:
        """Wait until the worker may compute the next character."""

    def end(self) -> None:
        """Hand over the tokens of a step."""


@dataclass(eq=False)
class Ticket:
    """A prompt with one text per seed: in the queue, being written or done."""

    ids: list[int]
    config: SampleConfig
    seeds: list[int]
    bias: Tensor | None
    end_id: int | None
    top_logprobs: int
    prompt_logprobs: bool
    on_token: OnToken
    skip: int
    """Random numbers of each seed to leave out, see `Engine.add`."""
    group: object
    """Tickets of one request share it; a group with fewer running texts goes first."""
    done: threading.Event = field(default_factory=threading.Event)
    """Set when all its texts have ended."""
    cancelled: bool = False
    error: str | None = None
    """Why it failed, for the client."""
    prompt_tokens: list[Token] = field(default_factory=list)
    """The prompt's log-probabilities if requested; complete before the first token arrives."""
    started: int = 0
    """How many of its texts have left the queue."""
    ended: set[int] = field(default_factory=set)
    """Numbers of the texts that a reader has ended, for instance at a stop string."""

    def cancel(self) -> None:
        """Stop before the next character of every text; thread-safe."""
        self.cancelled = True

    def end(self, number: int) -> None:
        """Stop one text before its next character; thread-safe."""
        self.ended.add(number)


class Worker:
    """Writes texts with one engine, in its own thread.

    Args:
        decoder: its slots are the texts written at the same time.
        max_waiting: texts in the queue; more raise `QueueFull`.
        name: of the thread.
    """

    def __init__(self, decoder: Decoder, *, max_waiting: int = 128, name: str = "worker") -> None:
        self.max_waiting = max_waiting
        self.n_slots = decoder.n_slots
        self.n_characters = 0
        """Characters computed since the start, also those that nobody read."""
        self.pace: Pace | None = None
        self._engine = Engine(decoder)
        self._reserved = decoder.n_slots // 4
        self._waiting: list[Ticket] = []
        self._running: dict[TokenSequence, tuple[Ticket, int]] = {}
        self._last_turn: dict[object, int] = {}
        self._turns = count(1)
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Texts in the queue."""
        with self._changed:
            return self._count_waiting()

    @property
    def n_running(self) -> int:
        """Texts being written."""
        return len(self._running)

    def submit(
        self,
        ids: Sequence[int],
        config: SampleConfig,
        seeds: Sequence[int],
        *,
        on_token: OnToken,
        bias: Tensor | None = None,
        end_id: int | None = None,
        top_logprobs: int = 0,
        prompt_logprobs: bool = False,
        skip: int = 0,
        group: object = None,
    ) -> Ticket:
        """Put a prompt into the queue, one text per seed; thread-safe.

        `on_token` must not block. After a cancellation it may be called once more. For the other
        arguments see `Engine.add` and `Ticket`.

        Raises:
            QueueFull: with these texts, more than `max_waiting` would wait beside the free slots.
        """
        options = (bias, end_id, top_logprobs, prompt_logprobs, on_token, skip)
        ticket = Ticket([*ids], config, [*seeds], *options, group=group)
        ticket.group = group or ticket
        with self._changed:
            free = self.n_slots - len(self._running)
            if self._stopping or self._count_waiting() + len(seeds) > self.max_waiting + free:
                raise QueueFull
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def stop(self) -> None:
        """End the thread after its step; texts that are not finished fail."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout=10)

    def _count_waiting(self) -> int:
        return sum(len(t.seeds) - t.started for t in self._waiting if not t.cancelled)

    # --- in the thread

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._turn()
            except Exception as error:  # a bug or no memory: these requests fail, the server lives
                log.exception("a step failed")
                reason = str(error) if isinstance(error, UserError) else "the server failed"
                self._fail_all(reason)
        self._fail_all("the server stops")

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self._running)
            return not self._stopping

    def _turn(self) -> None:
        """Let a few texts begin and write one character of each text."""
        if self.pace:
            self.pace.begin()
        self._remove_unwanted()
        for _ in range(PROMPTS_PER_STEP):
            if not self._start_next():
                break
        for sequence, token in self._engine.step():
            ticket, number = self._running[sequence]
            self.n_characters += token is not None
            if sequence.finish:
                del self._running[sequence]
            ticket.on_token(number, token, sequence.finish)
            if sequence.finish:
                self._check_done(ticket)
        if self.pace:
            self.pace.end()

    def _remove_unwanted(self) -> None:
        for sequence, (ticket, number) in [*self._running.items()]:
            if ticket.cancelled or number in ticket.ended:
                self._engine.remove(sequence, "stop")
                del self._running[sequence]
                self._check_done(ticket)
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.cancelled]
            self._waiting = [ticket for ticket in self._waiting if not ticket.cancelled]
        for ticket in gone:
            self._check_done(ticket)

    def _start_next(self) -> bool:
        """Start texts of the ticket whose turn it is; return whether there was one."""
        with self._changed:
            ticket, n = self._choose()
            if ticket is None:
                return False
            first, ticket.started = ticket.started, ticket.started + n
            groups = {waiting.group for waiting in self._waiting}
            self._last_turn = {g: turn for g, turn in self._last_turn.items() if g in groups}
            self._last_turn[ticket.group] = next(self._turns)
            if ticket.started == len(ticket.seeds):
                self._waiting.remove(ticket)
        try:
            added = self._engine.add(
                ticket.ids,
                ticket.config,
                ticket.seeds[first : first + n],
                bias=ticket.bias,
                end_id=ticket.end_id,
                top_logprobs=ticket.top_logprobs,
                prompt_logprobs=ticket.prompt_logprobs,
                skip=ticket.skip,
            )
        except UserError as error:
            self._fail(ticket, str(error))
            return True
        ticket.prompt_tokens = added[0].prompt_tokens
        self._running |= zip(added, zip([ticket] * n, count(first), strict=False), strict=True)
        return True

    def _choose(self) -> tuple[Ticket | None, int]:
        """Return the ticket to start from, and how many of its texts may start now.

        First come the groups with the fewest running texts, and of these the one that has waited
        longest for its turn. Long texts leave a quarter of the slots
        to short ones, so that a short text never waits for a long one.
        """
        if not self._waiting or not self._engine.n_free:
            return None, 0
        running = Counter(ticket.group for ticket, _ in self._running.values())
        n_long = sum(t.config.max_new_tokens > SHORT for t, _ in self._running.values())

        def rank(ticket: Ticket) -> tuple[int, int]:
            return running[ticket.group], self._last_turn.get(ticket.group, 0)

        for ticket in sorted(self._waiting, key=rank):
            free = self._engine.n_free
            if ticket.config.max_new_tokens > SHORT:
                free = min(free, self.n_slots - self._reserved - n_long)
            if len({waiting.group for waiting in self._waiting}) > 1:
                free = min(free, 1)
            if free > 0:
                return ticket, min(free, len(ticket.seeds) - ticket.started)
        return None, 0

    def _fail(self, ticket: Ticket, reason: str) -> None:
        """End a ticket and its running texts with an error."""
        ticket.error, ticket.cancelled = reason, True
        for sequence in [s for s, (owner, _) in self._running.items() if owner is ticket]:
            self._engine.remove(sequence, "stop")
            del self._running[sequence]
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
        ticket.on_token(0, None, "failed")
        ticket.done.set()

    def _fail_all(self, reason: str) -> None:
        with self._changed:
            tickets = {ticket for ticket, _ in self._running.values()} | {*self._waiting}
        for ticket in tickets:
            self._fail(ticket, reason)
        if self.pace:
            self.pace.end()

    def _check_done(self, ticket: Ticket) -> None:
        left = ticket.started < len(ticket.seeds) and not ticket.cancelled
        if not left and all(owner is not ticket for owner, _ in self._running.values()):
            ticket.done.set()
