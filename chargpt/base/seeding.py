"""Random numbers as pure functions of a key, so that a run has no random state to save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

INIT, DROPOUT, SAMPLE = range(3)  # the second entry of a key: what the numbers are for


def derive_seed(*key: int) -> int:
    """Return a 63-bit seed for a key of non-negative numbers; similar keys give unrelated seeds."""
    high, low = np.random.SeedSequence(key).generate_state(2, np.uint32).tolist()
    return int((high << 31) ^ low)


@contextmanager
def own_random_state() -> Iterator[None]:
    """Restore torch's default generators, on every device, at the end."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        yield
