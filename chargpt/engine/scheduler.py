"""Write many sequences at once: each step reads the new tokens and draws one more per sequence.

Sequences join and leave at any time. The tokens of a sequence depend on its prompt, its settings
and its seed, not on its neighbours. With `NativeDecoder` this holds to the bit; with
`PyTorchDecoder` only up to rounding, because a matrix product rounds by the batch size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from chargpt.base.errors import UserError
from chargpt.config import SampleConfig
from chargpt.engine.decoder import Chunk, Decoder
from chargpt.engine.sampling import filter_logits, sample_next, uniform_stream

Finish = Literal["length", "end_of_text", "stop"]


class Token(NamedTuple):
    """A token and its log-probability."""

    id: int
    logprob: float
    """Natural logarithm of the model's own probability: temperature 1, no filter."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at this position with their log-probabilities, best first."""


@dataclass(eq=False)
class TokenSequence:
    """A prompt and the tokens written after it."""

    ids: list[int]
    """Prompt and new tokens."""
    uniforms: Iterator[float]
    slot: int
    config: SampleConfig
    bias: Tensor | None
    end_id: int | None
    top_logprobs: int
    n_new: int = 0
    finish: Finish | None = None
    """Why it ended; None: not finished."""
    prompt_tokens: list[Token] = field(default_factory=list)
    """The prompt's tokens from the second on, if requested."""
    first: int = 0
    """Index of the id at position 0 of the context."""
    n_read: int = 0
    """Number of ids that the decoder has read or dropped from its context."""
    logits: Tensor | None = None
    """Logits of the next token, (V,); None: some ids are unread."""
    seen: Tensor | None = None
    """Tokens in the text, (V,) of bool; None: no repetition penalty."""
    counts: Tensor | None = None
    """How often each token was written, (V,); None: no presence or frequency penalty."""

    def __post_init__(self) -> None:
        config = self.config
        numbers = (config.temperature, config.top_k, config.top_p, config.min_p)
        penalties = (config.presence_penalty, config.frequency_penalty, config.repetition_penalty)
        self.filters = (*numbers, *penalties, id(self.bias), self.top_logprobs)
        """Sequences with equal ones are drawn together."""


class Engine:
    """Write sequences with one decoder, at most `n_slots` at the same time."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.active: list[TokenSequence] = []
        self._free = list(range(decoder.n_slots))

    @property
    def n_free(self) -> int:
        """Number of sequences that can be added now."""
        return len(self._free)

    @torch.inference_mode()
    def add(
        self,
        prompt: Sequence[int],
        config: SampleConfig,
        seeds: Sequence[int],
        *,
        bias: Tensor | None = None,
        end_id: int | None = None,
        top_logprobs: int = 0,
        prompt_logprobs: bool = False,
        skip: int = 0,
    ) -> list[TokenSequence]:
        """Read a prompt once and start one sequence per seed.

        Args:
            prompt: at least one id. If longer than block_size, only its end is read.
            config: its filters, ``max_new_tokens`` and ``context_kept`` are used.
            seeds: of the random numbers; at most `n_free`.
            bias: see `filter_logits`.
            end_id: token that ends a sequence without becoming a part of it.
            top_logprobs: alternatives to return for each token.
            prompt_logprobs: return the log-probabilities of the prompt's tokens, too.
            skip: random numbers of each seed to leave out, those of an earlier part of the text.

        Raises:
            UserError: an empty prompt, a value out of range, or a model that gives NaN.
        """
        ids = [int(i) for i in prompt]
        if not ids:
            raise UserError("the prompt has no tokens: give at least one character")
        if not 0 <= min(ids) <= max(ids) < self.decoder.vocab_size:
            known = self.decoder.vocab_size - 1
            raise UserError(f"the prompt has ids out of range: give ids from 0 to {known}")
        if not all(0 <= seed < 2**63 for seed in seeds):
            raise UserError(f"a seed is out of range ({list(seeds)}): give 0 to 2^63 - 1")
        if top_logprobs < 0:
            raise UserError(f"top_logprobs is {top_logprobs}: give a whole number of at least 0")
        assert 0 < len(seeds) <= self.n_free
        options = (config, bias, end_id, top_logprobs)
        added = [
            TokenSequence([*ids], uniform_stream(seed, skip), slot, *options)
            for seed, slot in zip(seeds, self._free, strict=False)
        ]
        self._read_prompt(added, prompt_logprobs=prompt_logprobs)
        del self._free[: len(added)]
        self.active += added
        return added

    def _read_prompt(self, added: list[TokenSequence], *, prompt_logprobs: bool) -> None:
        """Read the prompt into the first sequence's slot and copy it to the other slots."""
        leader = added[0]
        logits = self.decoder.read([self._chunk(leader)], every=prompt_logprobs)  # (1 or T, V)
        if prompt_logprobs:
            ids = leader.ids[leader.first + 1 :]
            leader.prompt_tokens = _tokens(logits[:-1], ids, leader.top_logprobs)
        for sequence in added:
            if sequence is not leader:
                self.decoder.copy(leader.slot, sequence.slot, leader.n_read - leader.first)
            sequence.first, sequence.n_read = leader.first, leader.n_read
            sequence.prompt_tokens, sequence.logits = leader.prompt_tokens, logits[-1]
            if sequence.config.repetition_penalty != 1:
                sequence.seen = torch.zeros_like(logits[-1], dtype=torch.bool)
                sequence.seen[sequence.ids] = True
                if sequence.end_id is not None:  # not a character of the text
                    sequence.seen[sequence.end_id] = False
            if sequence.config.presence_penalty or sequence.config.frequency_penalty:
                sequence.counts = torch.zeros_like(logits[-1])

    @torch.inference_mode()
    def step(self) -> list[tuple[TokenSequence, Token | None]]:
        """Draw the next token of each active sequence; finished sequences free their slots.

        Returns:
            Each sequence with its new token, or None if it ended by end-of-text.

        Raises:
            UserError: the model gives NaN.
        """
        if not self.active:
            return []
        logits = self._logits()  # (B, V)
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for row, sequence in enumerate(self.active):
            groups[sequence.filters].append(row)
        drawn: dict[int, Token] = {}
        with _one_thread():
            for rows in groups.values():
                part = logits if len(groups) == 1 else logits[rows]  # (rows, V)
                tokens = _draw(part, [self.active[row] for row in rows])
                drawn |= zip(rows, tokens, strict=True)
        return [(s, self._append(s, drawn[row])) for row, s in enumerate([*self.active])]

    def _append(self, sequence: TokenSequence, token: Token) -> Token | None:
        """Add a token to a sequence; end-of-text and the last token end it."""
        if token.id == sequence.end_id:
            self.remove(sequence, "end_of_text")
            return None
        sequence.ids.append(token.id)
        sequence.n_new += 1
        sequence.logits = None
        if sequence.seen is not None:
            sequence.seen[token.id] = True
        if sequence.counts is not None:
            sequence.counts[token.id] += 1
        if sequence.n_new == sequence.config.max_new_tokens:
            self.remove(sequence, "length")
        return token

    def remove(self, sequence: TokenSequence, finish: Finish) -> None:
        """End a sequence and free its slot; does nothing if it has ended already."""
        if sequence.finish is None:
            sequence.finish = finish
            self.active.remove(sequence)
            self._free.append(sequence.slot)

    def _logits(self) -> Tensor:
        """Read all unread tokens; return the logits of every next token, (B, V)."""
        unread = [sequence for sequence in self.active if sequence.logits is None]
        if unread:
            fresh = self.decoder.read([self._chunk(sequence) for sequence in unread])
            if len(unread) == len(self.active):
                return fresh
            for sequence, logits in zip(unread, fresh, strict=True):
                sequence.logits = logits
        return torch.stack([s.logits for s in self.active if s.logits is not None])

    def _chunk(self, sequence: TokenSequence) -> Chunk:
        """Return the ids to read next; if the context is full, restart it from its last part."""
        block_size, n = self.decoder.block_size, len(sequence.ids)
        if n - sequence.first > block_size:
            kept = block_size
            if sequence.n_read:
                kept = max(1, round(sequence.config.context_kept * block_size))
            sequence.first = sequence.n_read = n - kept
        read, sequence.n_read = sequence.n_read, n
        return Chunk(sequence.slot, read - sequence.first, sequence.ids[read:])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let PyTorch use one thread, for tensors so small that waiting for another costs more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _draw(logits: Tensor, sequences: list[TokenSequence]) -> list[Token]:
    """Draw a token for each of B sequences with the same settings; logits are (B, V)."""
    masks = [s.seen for s in sequences if s.seen is not None]
    seen = torch.stack(masks) if masks else None  # (B, V)
    written = [s.counts for s in sequences if s.counts is not None]
    counts = torch.stack(written) if written else None  # (B, V)
    config, bias = sequences[0].config, sequences[0].bias
    filtered = filter_logits(logits, config, seen=seen, counts=counts, bias=bias)
    uniforms = torch.tensor([next(s.uniforms) for s in sequences], dtype=torch.float64)
    return _tokens(logits, sample_next(filtered, uniforms).tolist(), sequences[0].top_logprobs)


def _tokens(logits: Tensor, ids: Sequence[int], top_logprobs: int) -> list[Token]:
    """Return n tokens with the log-probabilities that the logits (n, V) give them."""
    logprobs = logits.log_softmax(dim=-1)  # (n, V)
    of_chosen: list[float] = logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()
    if any(map(math.isnan, of_chosen)):
        raise UserError("the model gives NaN: its weights are damaged, train it again")
    if not top_logprobs:
        return [Token(i, p) for i, p in zip(ids, of_chosen, strict=True)]
    best = logprobs.topk(min(top_logprobs, logits.size(-1)), dim=-1)
    rows = zip(ids, of_chosen, best.indices.tolist(), best.values.tolist(), strict=True)
    return [Token(i, p, tuple(zip(*top, strict=True))) for i, p, *top in rows]
