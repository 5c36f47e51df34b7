"""The training loop: a step, and what happens between steps.

A run depends on its configuration, its data and its `TrainState`, and on nothing else: batches and
dropout are drawn from (seed, step), evaluation draws nothing. What is told to the user goes through
a `Reporter`; what is kept goes through the run folder.
"""

from __future__ import annotations

import math
import time
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.base.errors import TrainingError
from chargpt.base.interrupts import Interrupted, Interruption, Interrupts
from chargpt.base.seeding import DROPOUT, derive_seed
from chargpt.compute.optimizers import schedule
from chargpt.compute.parallel import seed_dropout
from chargpt.engine.scoring import evaluate
from chargpt.runs.checkpoint import has_checkpoint
from chargpt.runs.report import Reporter
from chargpt.training.saving import save_best, save_last
from chargpt.training.trainer import Trainer

StopReason = Literal["budget", "patience"] | Interruption
FIRST_PROGRESS = 1e-3  # of a first step on the clock, whose length nobody knows yet
SPIKE, SPIKE_SETTLING = 10, 100  # times the usual norm; steps until one is known
MAX_SKIPPED_IN_A_ROW = 50  # the loss scale halves each time: 2^16 is gone long before


class StepResult(NamedTuple):
    """What a step saw."""

    loss: float
    """Nats a token, over all the step's sequences, with dropout."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    """AdamW's."""
    skipped: bool


class NonFiniteError(TrainingError):
    """The loss or the gradient is not a number; the weights have not been touched."""


def train_step(trainer: Trainer) -> StepResult:
    """Make one optimizer update.

    Raises:
        NonFiniteError: loss or gradient is not finite, and no loss scaling is on that could mend
            it; the weights are those before the step.
    """
    config, scaler = trainer.train_config, trainer.scaler
    lr = _set_learning_rate(trainer)
    loss = torch.zeros((), device=trainer.device)
    for micro_step in range(config.gradient_accumulation_steps):
        micro_loss = _micro_loss(trainer, micro_step) / config.gradient_accumulation_steps
        scaler.scale(micro_loss).backward()  # type: ignore[no-untyped-call]
        loss += micro_loss.detach()
    scaler.unscale_(trainer.optimizer)
    grad_norm = gradient_norm(trainer)
    finite = bool(torch.isfinite(loss) & torch.isfinite(grad_norm))
    if not finite and not scaler.is_enabled():
        reason = _first_non_finite(trainer, float(loss))
        trainer.optimizer.zero_grad()
        raise NonFiniteError(reason)
    clip_gradient(trainer, grad_norm)
    scaler.step(trainer.optimizer)  # makes no update if the scaled gradient overflowed
    scaler.update()
    trainer.optimizer.zero_grad()
    return StepResult(float(loss), float(grad_norm), lr, skipped=not finite)


def _first_non_finite(trainer: Trainer, loss: float) -> str:
    """Return what of a step is not a number, by name."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    for name, parameter in trainer.model.named_parameters():
        gradient = parameter.grad
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            return f"the gradient of {name} is not finite"
    return "the norm of the gradient is too large for a number"


def gradient_norm(trainer: Trainer) -> Tensor:
    """Return the norm of the whole gradient, a scalar."""
    gradients = [p.grad for p in _parameters(trainer) if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, foreach=_foreach(trainer))


def clip_gradient(trainer: Trainer, norm: Tensor) -> None:
    """Shorten the gradient, whose norm this is, to ``grad_clip``, if that is not 0."""
    if trainer.train_config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(
            _parameters(trainer), trainer.train_config.grad_clip, norm, foreach=_foreach(trainer)
        )


def _parameters(trainer: Trainer) -> list[Tensor]:
    return [p for group in trainer.optimizer.param_groups for p in group["params"]]


def _foreach(trainer: Trainer) -> bool | None:
    return True if trainer.device.type == "cpu" else None  # CPUs do not do so by themselves


def _micro_loss(trainer: Trainer, micro_step: int) -> Tensor:
    """Return the mean loss of one batch in nats a token, a scalar."""
    config, step = trainer.train_config, trainer.state.step
    first = step * trainer.sequences_per_step + micro_step * config.batch_size
    inputs, targets = trainer.windows.batch(first, config.batch_size)  # (B, T) each
    seed_dropout(derive_seed(config.seed, DROPOUT, step, micro_step), trainer.parallel)
    with trainer.precision.autocast(trainer.device):
        logits = trainer.forward(inputs.to(trainer.device))  # (B, T, V)
    targets = targets.to(trainer.device).flatten()  # (B × T,)
    return F.cross_entropy(logits.float().flatten(0, 1), targets)


def trial_step(trainer: Trainer) -> None:
    """Go forward and backward once, changing nothing, so that lazy compilation happens."""
    trainer.model.train()
    try:
        trainer.scaler.scale(_micro_loss(trainer, 0)).backward()  # type: ignore[no-untyped-call]
    finally:
        trainer.optimizer.zero_grad()


def _set_learning_rate(trainer: Trainer) -> float:
    state = trainer.state
    if trainer.total_steps is not None:
        at_end = (state.step + 1) / trainer.total_steps
    else:
        at_end = trainer.progress * (1 + 1 / state.step) if state.step else FIRST_PROGRESS
    share = schedule(at_end, trainer.train_config)
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return trainer.train_config.learning_rate * share


# --- the loop


def fit(trainer: Trainer, reporter: Reporter) -> StopReason:
    """Train until the budget is spent, nothing improves any more, or somebody stops it.

    Returns:
        Why it ended. The best and the last state are in the run folder.

    Raises:
        TrainingError: the loss is not finite; the last good state is in the run folder.
    """
    state, config = trainer.state, trainer.train_config
    trainer.model.train()
    with Interrupts() as interrupts:
        try:
            while trainer.progress < 1:
                if _evaluation_is_due(trainer):
                    _evaluate_and_save(trainer, reporter, interrupts)
                if _patience_is_over(trainer):  # perhaps before this process began
                    return "patience"
                _timed_step(trainer, reporter)
                interrupts.grant()
                if config.save_interval and state.step % config.save_interval == 0:
                    save_last(trainer)
            if state.evaluated_step != state.step:
                _evaluate_and_save(trainer, reporter, interrupts)
        except Interrupted as interruption:
            save_last(trainer)
            return interruption.reason
    return "budget"


def _evaluation_is_due(trainer: Trainer) -> bool:
    """Return whether the step just made, perhaps before an interruption, is one to evaluate."""
    step = trainer.state.step
    return step > 0 and step % trainer.eval_interval == 0 and trainer.state.evaluated_step != step


def _patience_is_over(trainer: Trainer) -> bool:
    state, patience = trainer.state, trainer.train_config.patience
    return state.evaluated_step == state.step and 0 < patience <= state.evaluations_since_best


def _timed_step(trainer: Trainer, reporter: Reporter) -> None:
    state = trainer.state
    start = time.perf_counter()
    try:
        result = train_step(trainer)
    except NonFiniteError as error:
        if trainer.saved_step != state.step:  # a repeated failure keeps what was there before
            save_last(trainer)
        raise TrainingError(
            f"step {state.step + 1} stopped before its update ({error}); the state before it is in "
            f"{trainer.out / 'last'}: try --precision fp32, or, in a new run, a "
            f"--learning-rate below {trainer.train_config.learning_rate:g}"
        ) from error
    state.train_seconds += time.perf_counter() - start
    state.step += 1
    state.train_loss = result.loss if not result.skipped else state.train_loss
    _count_skipped(trainer, result)
    _note_spike(trainer, result, reporter)
    reporter.step(
        {
            "step": state.step,
            "loss": result.loss if not result.skipped else None,
            "learning_rate": result.learning_rate,
            "grad_norm": result.grad_norm if not result.skipped else None,
            "tokens": state.step * trainer.tokens_per_step,
            "train_seconds": round(state.train_seconds, 3),
        },
        progress=trainer.progress,
        log=state.step % trainer.train_config.log_interval == 0,
    )


def _note_spike(trainer: Trainer, result: StepResult, reporter: Reporter) -> None:
    """Tell of a gradient far longer than usual, which a look at the mean loss does not show."""
    state, norm = trainer.state, result.grad_norm
    if result.skipped:
        return
    usual = state.usual_grad_norm
    if usual and state.step > SPIKE_SETTLING and norm > SPIKE * usual:
        reporter.note(
            f"step {state.step:,}: the gradient's norm is {norm:.3g}, {norm / usual:.0f} times "
            "the usual"
        )
    # A spike counts as little as the largest norm that is none.
    state.usual_grad_norm = 0.98 * usual + 0.02 * min(norm, SPIKE * usual) if usual else norm


def _count_skipped(trainer: Trainer, result: StepResult) -> None:
    state = trainer.state
    state.skipped_steps += result.skipped
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if result.skipped else 0
    if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        save_last(trainer)
        raise TrainingError(
            f"{MAX_SKIPPED_IN_A_ROW} steps in a row overflowed fp16 and were skipped: "
            "try --precision bf16 or fp32, or a lower --learning-rate in a new run"
        )


def _evaluate_and_save(trainer: Trainer, reporter: Reporter, interrupts: Interrupts) -> None:
    state = trainer.state
    if not has_checkpoint(trainer.out, "last"):
        save_last(trainer)  # so that a best one without it has lost it
    start = time.perf_counter()
    with interrupts.amid():
        val_loss = evaluate(
            trainer.model,
            trainer.validation,
            trainer.windows.block_size,
            batch_size=trainer.train_config.batch_size,
            autocast=trainer.precision.autocast(trainer.device),
        )
    state.val_loss = val_loss
    state.eval_seconds += time.perf_counter() - start
    if not math.isfinite(state.val_loss):
        state.val_loss = None
        raise TrainingError(
            f"the validation loss after step {state.step} is not finite; the states before are in "
            f"{trainer.out}: try --precision fp32, or a lower --learning-rate in a new run"
        )
    state.evaluated_step = state.step
    is_best = state.best_val_loss is None or state.val_loss < state.best_val_loss
    if is_best:
        state.best_val_loss, state.best_step = state.val_loss, state.step
    state.evaluations_since_best = 0 if is_best else state.evaluations_since_best + 1
    reporter.evaluation(step=state.step, val_loss=state.val_loss, is_best=is_best)
    if is_best:
        save_best(trainer)
    save_last(trainer)
    with interrupts.amid():
        reporter.sample(step=state.step, val_loss=state.val_loss)
