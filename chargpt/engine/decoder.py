"""Read tokens into a cache, so that earlier tokens are not read again.

A decoder has slots; each holds the keys and values of one sequence. Positions are absolute (learned
embeddings), so a full slot cannot slide: the scheduler re-reads part of the text from position 0.

Shapes: B sequences, T new tokens, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from chargpt.model import GPT2, Cache, LayerCache, evaluating


class Chunk(NamedTuple):
    """New tokens of one sequence."""

    slot: int
    start: int
    """Position of the first new token; the slot holds all positions before it."""
    ids: Sequence[int]


class Decoder(Protocol):
    """Reads chunks of tokens and returns logits."""

    block_size: int
    vocab_size: int
    n_slots: int

    def read(self, chunks: Sequence[Chunk], *, every: bool = False) -> Tensor:
        """Add tokens to the cache, each chunk from position `start` of its slot.

        Args:
            chunks: at least one, each with at least one token; no slot twice.
            every: return logits after every token, not only after the last of each chunk.

        Returns:
            Logits in float32 on the CPU: (chunks, V), or with `every` (tokens of all chunks, V).
        """

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` to slot `target`."""


class PyTorchDecoder:
    """A model on any device, in any mode, with a cache; rounding depends on the batch size."""

    def __init__(self, model: GPT2, n_slots: int) -> None:
        config, weight = model.config, model.token_embedding.weight
        self.block_size, self.vocab_size = config.block_size, config.vocab_size
        self.n_slots = n_slots
        self._model, self._device = model, weight.device
        head_size = config.d_model // config.n_head
        shape = (config.n_layer, 2, n_slots, config.n_head, config.block_size, head_size)
        self._cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)

    @torch.inference_mode()
    def read(self, chunks: Sequence[Chunk], *, every: bool = False) -> Tensor:
        """See `Decoder`."""
        with evaluating(self._model), torch.autocast(self._device.type, enabled=False):
            if all(len(chunk.ids) == len(chunks[0].ids) for chunk in chunks):
                logits = self._forward(chunks)  # (B, T, V)
                return (logits.flatten(0, 1) if every else logits[:, -1]).float().cpu()
            parts = [self._forward([chunk])[0] for chunk in chunks]  # (T, V) each
            return torch.cat(parts if every else [part[-1:] for part in parts]).float().cpu()

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Decoder`."""
        self._cache[:, :, target, :, :length] = self._cache[:, :, source, :, :length]

    def _forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Read chunks of equal length; return logits, (B, T, V)."""
        device, T = self._device, len(chunks[0].ids)
        ids = torch.tensor([list(chunk.ids) for chunk in chunks], device=device)  # (B, T)
        slots = torch.tensor([chunk.slot for chunk in chunks], device=device)  # (B,)
        starts = torch.tensor([chunk.start for chunk in chunks], device=device)  # (B,)
        positions = starts[:, None] + torch.arange(T, device=device)  # (B, T)
        length = max(chunk.start for chunk in chunks) + T
        layers = [LayerCache(kv[0], kv[1], slots, positions, length) for kv in self._cache]
        logits: Tensor = self._model(ids, Cache(layers, positions))
        return logits
