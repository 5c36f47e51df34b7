"""Random numbers as pure functions of a key, so that a run has no random state to lose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

INIT, DROPOUT, SAMPLE = range(3)
"""What a stream of random numbers is for: the second entry of its key."""


def derive_seed(*key: int) -> int:
    """Return a 63-bit seed for a key of non-negative numbers; near keys give unrelated seeds."""
    high, low = np.random.SeedSequence(key).generate_state(2, np.uint32).tolist()
    return int((high << 31) ^ low)


@contextmanager
def own_random_state() -> Iterator[None]:
    """Leave torch's default generators, on every device, as they were found."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        yield
