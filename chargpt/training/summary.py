"""What a run achieved, in numbers and in one sentence that a beginner understands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from chargpt.base.interrupts import Interruption
from chargpt.base.units import bits_per_char, perplexity
from chargpt.compute.counts import count_parameters
from chargpt.compute.device import describe_device
from chargpt.data.corpus import Corpus
from chargpt.data.mapped import count_tokens
from chargpt.engine.evaluation import scored_tokens
from chargpt.training.saving import saved_best
from chargpt.training.trainer import Trainer, TrainState

SUMMARY = "summary.json"
OVERFIT_NATS = 0.01  # a validation loss this far above its best is not noise
StopReason = Literal["budget", "patience"] | Interruption


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a run achieved; ``summary.json`` has the same fields."""

    verdict: str
    val_loss: float | None  # the lowest, in nats a token; None: never evaluated
    bits_per_char: float | None
    val_tokens: int | None  # that it was measured on, spread evenly; None: all but the first
    best_step: int | None
    final_val_loss: float | None
    train_loss: float | None
    steps: int
    tokens: int  # characters trained on, repeats included
    train_seconds: float  # compilation included, evaluation apart
    eval_seconds: float
    compile_seconds: float
    tokens_per_second: float
    n_params: int
    stop_reason: StopReason
    skipped_steps: int
    device: str
    precision: str


def summarize(trainer: Trainer, corpus: Corpus, stop_reason: StopReason) -> Summary:
    """Return the summary of a run that has ended."""
    state = trainer.state
    tokens = state.step * trainer.tokens_per_step
    stepping = state.train_seconds - state.compile_seconds
    saved = saved_best(trainer.out)  # may be better, if the run was killed after saving it
    if saved and state.best_val_loss is not None and saved.val_loss < state.best_val_loss:
        state.best_val_loss, state.best_step = saved.val_loss, saved.step
    best = state.best_val_loss
    by_frequency = unigram_nats(corpus.train, corpus.validation, corpus.tokenizer.vocab_size)
    n = len(corpus.validation)
    per_character = n / corpus.tokenizer.n_characters(corpus.validation)
    scored = scored_tokens(n, trainer.windows.block_size, state.eval_tokens)
    part = "" if scored == n - 1 else f" (on {scored:,} of {n:,} tokens, evenly spread)"
    return Summary(
        verdict=verdict(
            state,
            by_frequency,
            stop_reason,
            _budget_end(trainer),
            part=part,
            tokens=(corpus.tokenizer.unit, corpus.tokenizer.units),
        ),
        val_loss=best,
        bits_per_char=None if best is None else bits_per_char(best * per_character),
        val_tokens=scored if part else None,
        best_step=state.best_step,
        final_val_loss=state.val_loss,
        train_loss=state.train_loss,
        steps=state.step,
        tokens=tokens,
        train_seconds=round(state.train_seconds, 3),
        eval_seconds=round(state.eval_seconds, 3),
        compile_seconds=round(state.compile_seconds, 3),
        tokens_per_second=round(tokens / stepping, 1) if stepping > 0 else 0.0,
        n_params=count_parameters(trainer.model),
        stop_reason=stop_reason,
        skipped_steps=state.skipped_steps,
        device=describe_device(trainer.device),
        precision=trainer.precision.name,
    )


def _budget_end(trainer: Trainer) -> str:
    """Return which part of the budget ended the run, for a sentence."""
    step, total, minutes = trainer.state.step, trainer.total_steps, trainer.train_config.minutes
    if minutes is None or total is None or step >= total:
        return "the budget ended"
    return f"the limit of {minutes:g} minutes ended the run (step {step:,} of {total:,})"


def verdict(
    state: TrainState,
    letter_frequency_loss: float,
    stop_reason: StopReason,
    budget_end: str = "the budget ended",
    *,
    part: str = "",
    tokens: tuple[str, str] = ("char", "characters"),
) -> str:
    """Return how good the model is, and what would make it better.

    `letter_frequency_loss` is that of guessing by frequency alone, in nats a token; `budget_end`
    says what ended the run if its reason is "budget"; `part` says which part of the validation
    text was scored, and `tokens` what a token and several are.
    """
    best, (unit, units) = state.best_val_loss, tokens
    letter = "letter" if unit == "char" else unit
    if best is None:
        return (
            f"stopped at step {state.step:,}, before the first evaluation; the last state is kept"
        )
    loss = f"val {best:.3f} nats/{unit} = {bits_per_char(best):.2f} bits/{unit}{part}"
    if best > 0.98 * letter_frequency_loss:
        return (
            f"{loss}; no better than guessing by {letter} frequency: train longer, or give more "
            "text"
        )
    if state.val_loss is not None and state.val_loss > best + OVERFIT_NATS:
        trend = f"overfitting since step {state.best_step:,}: best kept; more text would help"
    elif stop_reason in ("interrupted", "terminated"):
        trend = f"{stop_reason} at step {state.step:,}: best and last are kept"
    elif stop_reason == "patience" or state.best_step != state.evaluated_step:
        trend = "no longer improving"
    else:
        trend = f"still improving when {budget_end}: a longer one would help"
    return (
        f"{loss}; like choosing among {perplexity(best):.1f} equally likely {units} ({letter} "
        f"frequencies alone: {perplexity(letter_frequency_loss):.0f}); {trend}"
    )


def unigram_nats(
    train_ids: npt.NDArray[Any], held_out_ids: npt.NDArray[Any], vocab_size: int
) -> float:
    """Return the mean −ln p of guessing each token by its frequency, add-one smoothed.

    The frequencies are those of `train_ids` (n,). The tokens to guess are `held_out_ids` (m,),
    with m ≥ 1.
    """
    counts = count_tokens(train_ids, vocab_size) + 1
    wanted = count_tokens(held_out_ids, vocab_size)
    nats = wanted @ (np.log(counts.sum()) - np.log(counts))
    return float(nats / wanted.sum())
