"""The models of a server: each loaded once, with its worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chargpt.compute.device import choose_device
from chargpt.config import CheckpointName, Device, OnOffAuto
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.decoder import Chunk, Decoder, PyTorchDecoder
from chargpt.generate import make_decoder
from chargpt.model import GPT2
from chargpt.runs.folder import load_characters
from chargpt.serve.worker import Worker


@dataclass(eq=False)
class Served:
    """A model that answers requests by its name."""

    name: str
    run: Path
    model: GPT2
    tokenizer: CharTokenizer
    worker: Worker
    which: CheckpointName
    kernels: OnOffAuto = "auto"


class OneByOne:
    """Reads each sequence in a forward pass of its own, so that rounding ignores the neighbours."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.block_size, self.vocab_size = decoder.block_size, decoder.vocab_size
        self.n_slots = decoder.n_slots
        self.copy = decoder.copy

    def read(self, chunks: Sequence[Chunk], *, every: bool = False) -> Tensor:
        """See `Decoder`."""
        return torch.cat([self._decoder.read([chunk], every=every) for chunk in chunks])


def exact_decoder(model: GPT2, n_slots: int, kernels: OnOffAuto = "auto") -> Decoder:
    """Return a decoder whose logits are the same to the bit for any neighbours."""
    decoder = make_decoder(model, n_slots, kernels)
    return OneByOne(decoder) if isinstance(decoder, PyTorchDecoder) else decoder


def load_served(
    run: Path,
    *,
    name: str | None = None,
    which: CheckpointName = "best",
    device: Device = "auto",
    kernels: OnOffAuto = "auto",
    n_slots: int = 32,
    max_waiting: int = 128,
) -> Served:
    """Load a run and start its worker.

    Raises:
        UserError: not a run, or a damaged one.
    """
    model, tokenizer = load_characters(run, which=which, device=choose_device(device).device)
    name = name or run.resolve().name
    decoder = exact_decoder(model, n_slots, kernels)
    worker = Worker(decoder, max_waiting=max_waiting, name=f"worker of {name}")
    return Served(name, run, model, tokenizer, worker, which, kernels)
