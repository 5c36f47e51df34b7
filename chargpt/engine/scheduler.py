"""Many sequences, one step at a time: each step reads what is new and draws a token for each.

Sequences come and go as they please. What one gets depends on its prompt, its settings and its
seed alone, not on its neighbours: to the bit where the decoder is the native one, elsewhere as
far as a batch's size does not change how a matrix product rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from chargpt.base.checks import check
from chargpt.base.errors import UserError
from chargpt.config import check_sampling
from chargpt.engine.decoder import Chunk, Decoder
from chargpt.engine.sampling import filter_logits, sample_next, uniform_stream

Finish = Literal["length", "end_of_text", "stop"]


class Token(NamedTuple):
    """A token of a text and how likely the model found it."""

    id: int
    logprob: float
    """Natural logarithm of the model's own probability: temperature 1, no filter."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at this place with their log-probabilities, the likeliest first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Settings:
    """How a sequence goes on; see `chargpt.engine.sampling.filter_logits` for the filters."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    bias: Tensor | None = None
    """(V,)."""
    end_id: int | None = None
    """Ends a sequence, and is no part of it."""
    context_kept: float = 0.5
    """Share of block_size that is read anew when the context is full."""
    top_logprobs: int = 0
    """Alternatives to tell of each token."""

    def __post_init__(self) -> None:
        check_sampling(self)
        check(self.top_logprobs >= 0, self, "top_logprobs", "give a whole number of at least 0")


@dataclass(kw_only=True, eq=False)
class Sequence:
    """A text in the making."""

    ids: list[int]
    """Prompt and new tokens."""
    settings: Settings
    seed: int
    slot: int
    n_new: int = 0
    finish: Finish | None = None
    """Why it ended; None: it goes on."""
    prompt_tokens: list[Token] = field(default_factory=list)
    """The prompt's tokens from the second on, where they were asked for."""
    first: int = 0
    """Which of the ids stands at position 0."""
    n_read: int = 0
    """How many of the ids the decoder has read or left behind."""
    logits: Tensor | None = None
    """Of the next token, (V,); None: there are unread ids."""
    seen: Tensor | None = None
    """Tokens that the text has, (V,) of bool; None: the settings do not care."""

    def __post_init__(self) -> None:
        self.uniforms = uniform_stream(self.seed)


class Engine:
    """Sequences in, tokens out.

    Args:
        decoder: reads them; its slots are how many there can be at the same time.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.active: list[Sequence] = []
        self._free = list(range(decoder.n_slots))

    @property
    def n_free(self) -> int:
        """Sequences that can be added now."""
        return len(self._free)

    @torch.inference_mode()
    def add(
        self, prompt: Ids[int], settings: Settings, seeds: Ids[int], *, tell_prompt: bool = False
    ) -> list[Sequence]:
        """Read a prompt once and let a sequence for each seed go on from it.

        Args:
            prompt: ids to continue, at least one. Of more than block_size the last are read.
            settings: of these sequences.
            seeds: of their random numbers; no more than `n_free`.
            tell_prompt: tell the log-probabilities of the prompt's tokens, too.

        Raises:
            UserError: the prompt is empty or has ids that the model does not know.
        """
        ids = [int(i) for i in prompt]
        if not ids:
            raise UserError("the prompt has no tokens: give at least one character")
        if not 0 <= min(ids) <= max(ids) < self.decoder.vocab_size:
            known = self.decoder.vocab_size - 1
            raise UserError(f"the prompt has ids out of range: give ids from 0 to {known}")
        if not all(0 <= seed < 2**63 for seed in seeds):
            raise UserError(f"a seed is out of range ({list(seeds)}): give 0 to 2^63 - 1")
        assert 0 < len(seeds) <= self.n_free
        slots, self._free = self._free[: len(seeds)], self._free[len(seeds) :]
        try:
            added = self._begin(ids, settings, seeds, slots, tell_prompt=tell_prompt)
        except BaseException:
            self._free += slots
            raise
        self.active += added
        return added

    def _begin(
        self,
        ids: list[int],
        settings: Settings,
        seeds: Ids[int],
        slots: list[int],
        *,
        tell_prompt: bool,
    ) -> list[Sequence]:
        """Do what `add` says, in slots of its own."""
        added = [
            Sequence(ids=ids.copy(), settings=settings, seed=seed, slot=slot)
            for seed, slot in zip(seeds, slots, strict=True)
        ]
        leader = added[0]
        logits = self.decoder.read([self._chunk(leader)], every=tell_prompt)  # (1 or T, V)
        if tell_prompt:
            leader.prompt_tokens = _tokens(logits[:-1], ids[leader.first + 1 :], settings)
        for sequence in added:
            if sequence is not leader:
                self.decoder.copy(leader.slot, sequence.slot, leader.n_read - leader.first)
            sequence.first, sequence.n_read = leader.first, leader.n_read
            sequence.prompt_tokens, sequence.logits = leader.prompt_tokens, logits[-1]
            if settings.repetition_penalty != 1:
                sequence.seen = torch.zeros_like(logits[-1], dtype=torch.bool)
                sequence.seen[ids] = True
                if settings.end_id is not None:  # it begins a document, and ends it only once
                    sequence.seen[settings.end_id] = False
        return added

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, Token]]:
        """Draw the next token of each sequence; those that end are taken out.

        Returns:
            Sequences with their new tokens, without those that end here by end-of-text.

        Raises:
            UserError: the model's logits are not numbers.
        """
        if not self.active:
            return []
        drawn: list[tuple[Sequence, Token]] = []
        logits = self._logits()  # (B, V)
        for settings, group in groupby(self.active, key=lambda sequence: sequence.settings):
            sequences = list(group)
            rows = logits[len(drawn) : len(drawn) + len(sequences)]  # (those alike, V)
            tokens = _draw(rows, sequences, settings)
            drawn += zip(sequences, tokens, strict=True)
        going_on = []
        for sequence, token in drawn:
            if token.id == sequence.settings.end_id:
                self.remove(sequence, "end_of_text")
                continue
            sequence.ids.append(token.id)
            sequence.n_new += 1
            sequence.logits = None
            if sequence.seen is not None:
                sequence.seen[token.id] = True
            if sequence.n_new == sequence.settings.max_new_tokens:
                self.remove(sequence, "length")
            going_on.append((sequence, token))
        return going_on

    def remove(self, sequence: Sequence, finish: Finish) -> None:
        """End a sequence and free its slot; of one that has ended, nothing changes."""
        if sequence.finish is None:
            sequence.finish = finish
            self.active.remove(sequence)
            self._free.append(sequence.slot)

    def _logits(self) -> Tensor:
        """Let the decoder read what is new; return the logits of all next tokens, (B, V)."""
        unread = [sequence for sequence in self.active if sequence.logits is None]
        if not unread:
            return torch.stack([s.logits for s in self.active if s.logits is not None])
        fresh = self.decoder.read([self._chunk(sequence) for sequence in unread])
        if len(unread) == len(self.active):
            return fresh
        rows = iter(fresh)
        return torch.stack([next(rows) if s.logits is None else s.logits for s in self.active])

    def _chunk(self, sequence: Sequence) -> Chunk:
        """Return the ids that a sequence has to read; where they do not fit, a later start."""
        block_size, n = self.decoder.block_size, len(sequence.ids)
        if n - sequence.first > block_size:
            kept = block_size
            if sequence.n_read:
                kept = max(1, round(sequence.settings.context_kept * block_size))
            sequence.first = sequence.n_read = n - kept
        start = sequence.n_read - sequence.first
        new = sequence.ids[sequence.n_read :]
        sequence.n_read = n
        return Chunk(sequence.slot, start, new)


def _draw(logits: Tensor, sequences: list[Sequence], settings: Settings) -> list[Token]:
    """Draw a token for each of some sequences with the same settings; logits (B, V)."""
    masks = [s.seen for s in sequences if s.seen is not None]
    filtered = filter_logits(
        logits,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        seen=torch.stack(masks) if masks else None,
        bias=settings.bias,
    )
    uniforms = torch.tensor([next(s.uniforms) for s in sequences], dtype=torch.float64)
    ids = sample_next(filtered, uniforms).tolist()
    return _tokens(logits, ids, settings)


def _tokens(logits: Tensor, ids: Ids[int], settings: Settings) -> list[Token]:
    """Return tokens that stand where (n, V) logits were for, with their log-probabilities.

    Raises:
        UserError: the logits are not numbers.
    """
    logprobs = logits.log_softmax(dim=-1)  # (n, V)
    chosen = torch.tensor(ids)[:, None]  # (n, 1)
    of_chosen: list[float] = logprobs.gather(-1, chosen)[:, 0].tolist()
    if any(map(math.isnan, of_chosen)):
        raise UserError("the model gives NaN: its weights are damaged, train it again")
    if not settings.top_logprobs:
        return [Token(i, p) for i, p in zip(ids, of_chosen, strict=True)]
    best = logprobs.topk(min(settings.top_logprobs, logits.size(-1)), dim=-1)
    alternatives = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Token(i, p, tuple(zip(*top, strict=True)))
        for i, p, top in zip(ids, of_chosen, alternatives, strict=True)
    ]
