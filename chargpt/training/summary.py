"""What came out of a run, in numbers and in a sentence that a beginner understands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from chargpt.base.interrupts import Interruption
from chargpt.base.units import bits_per_char, perplexity
from chargpt.training.trainer import TrainState

SUMMARY = "summary.json"
StopReason = Literal["budget", "patience"] | Interruption
OVERFIT_NATS = 0.01  # a validation loss this far above its best is no noise


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What came out of a run; ``summary.json`` holds the same."""

    verdict: str
    val_loss: float | None
    """Lowest loss over the whole validation part, nats a character; None: never evaluated."""
    bits_per_char: float | None
    best_step: int | None
    final_val_loss: float | None
    train_loss: float | None
    steps: int
    tokens: int
    """Trained, not distinct."""
    train_seconds: float
    """Compilation included, evaluation apart."""
    eval_seconds: float
    compile_seconds: float
    tokens_per_second: float
    n_params: int
    stop_reason: StopReason
    skipped_steps: int
    device: str
    precision: str


def verdict(state: TrainState, letter_frequency_loss: float, stop_reason: StopReason) -> str:
    """Return how good the model is, and what would make it better.

    Args:
        state: at the end of the run.
        letter_frequency_loss: of guessing by letter frequency alone, nats a character.
        stop_reason: why the run ended.
    """
    best = state.best_val_loss
    if best is None:
        return (
            f"stopped at step {state.step:,}, before the first evaluation; the last state is kept"
        )
    parts = [f"val {best:.3f} nats/char = {bits_per_char(best):.2f} bits/char"]
    if best > 0.98 * letter_frequency_loss:
        parts.append("no better than guessing by letter frequency: train longer, or give more text")
        return "; ".join(parts)
    parts.append(
        f"as unsure as between {perplexity(best):.1f} characters, where letter frequency alone "
        f"leaves {perplexity(letter_frequency_loss):.0f}"
    )
    if state.val_loss is not None and state.val_loss > best + OVERFIT_NATS:
        parts.append(f"overfitting since step {state.best_step:,}: best kept; more text would help")
    elif stop_reason in ("interrupted", "terminated"):
        parts.append(f"{stop_reason} at step {state.step:,}: best and last are kept")
    elif stop_reason == "patience" or state.best_step != state.evaluated_step:
        parts.append("no longer improving")
    else:
        parts.append("still improving when its time was up: a longer budget would help")
    return "; ".join(parts)


def unigram_nats(
    train_ids: npt.NDArray[Any], held_out_ids: npt.NDArray[Any], vocab_size: int
) -> float:
    """Return the mean −ln p of guessing each token by its frequency, add-one smoothed.

    Args:
        train_ids: the text that the frequencies are taken from, shape (n,).
        held_out_ids: the text to guess, shape (m,) with m ≥ 1.
        vocab_size: number of tokens.
    """
    counts = np.bincount(train_ids, minlength=vocab_size) + 1
    nats = np.log(counts.sum()) - np.log(counts[held_out_ids])
    return float(nats.mean())
