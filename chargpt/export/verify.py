"""Compare an exported model with its source, before anybody uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from chargpt.base.errors import VerificationError
from chargpt.model import GPT2, evaluating

Floats = npt.NDArray[np.float32]
LogitsOf = Callable[[Sequence[int]], Floats]
"""Maps T token ids to the logits after each of them, (T, V)."""


def logits_of(model: GPT2) -> LogitsOf:
    """Return the function from ids to logits that a model computes, on its own device."""

    def compute(ids: Sequence[int]) -> Floats:
        device = model.token_embedding.weight.device
        with evaluating(model), torch.inference_mode():
            logits = model(torch.tensor([list(ids)], device=device))[0]  # (T, V)
        result: Floats = logits.float().cpu().numpy()
        return result

    return compute


def probes(model: GPT2, n: int = 10) -> list[list[int]]:
    """Return `n` random prompts of 1 to block_size tokens, the same each time."""
    rng = np.random.default_rng(0)
    lengths = np.geomspace(1, model.config.block_size, n).round().astype(int)
    return [rng.integers(model.config.vocab_size, size=length).tolist() for length in lengths]


def check_logits(
    source: LogitsOf, target: LogitsOf, prompts: Sequence[Sequence[int]], tolerance: float
) -> float:
    """Return the largest difference of two models' logits.

    Raises:
        VerificationError: it is above `tolerance`, or NaN; names the prompt, position and token.
    """
    largest = 0.0
    for number, ids in enumerate(prompts, start=1):
        ours, theirs = source(ids), target(ids)
        if ours.shape != theirs.shape:
            raise VerificationError(
                f"prompt {number} gives logits of shape {theirs.shape}, not {ours.shape}: "
                "nothing was written"
            )
        difference = np.abs(ours - theirs)  # (T, V)
        worst = float(difference.max())
        if not worst <= tolerance:  # also for NaN
            position, token = np.unravel_index(
                np.nan_to_num(difference, nan=np.inf).argmax(), difference.shape
            )
            raise VerificationError(
                f"the exported model differs by {worst:.2g} (at most {tolerance:g} is allowed), at "
                f"prompt {number}, position {position}, token {token}: nothing was written"
            )
        largest = max(largest, worst)
    return largest


def greedy(logits: LogitsOf, ids: Sequence[int], n: int, block_size: int) -> list[int]:
    """Return the `n` likeliest next tokens, one after another, from the last block_size tokens."""
    written = list(ids)
    for _ in range(n):
        written.append(int(logits(written[-block_size:])[-1].argmax()))
    return written[len(ids) :]
