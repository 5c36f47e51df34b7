"""The training loop: a step, and what happens between steps.

A run depends on its configuration, its data and its `TrainState`, and on nothing else: batches and
dropout are drawn from (seed, step), evaluation draws nothing. What is told to the user goes through
a `Reporter`; what is kept goes through the run folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.checkpoint import (
    MODEL,
    OPTIMIZER,
    STATE,
    find_checkpoint,
    has_checkpoint,
    read_state,
    save_checkpoint,
)
from chargpt.config import TrainConfig, Which
from chargpt.data import Windows
from chargpt.distributed import ParallelChoice, seed_dropout
from chargpt.errors import TrainingError, UserError
from chargpt.evaluation import evaluate
from chargpt.hardware import PrecisionChoice
from chargpt.interrupts import Interrupted, Interruption, Interrupts
from chargpt.metrics import human_count
from chargpt.model import GPT2
from chargpt.optim import schedule
from chargpt.reporting import Reporter
from chargpt.seeding import DROPOUT, derive_seed
from chargpt.validation import check, check_types, from_dict
from chargpt.weights import (
    Tensors,
    check_model_file,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    read_tensors,
)

StopReason = Literal["budget", "patience"] | Interruption
FIRST_PROGRESS = 1e-3  # of a first step on the clock, whose length nobody knows yet
SPIKE, SPIKE_SETTLING = 10, 100  # times the usual norm; steps until one is known
MAX_SKIPPED_IN_A_ROW = 50  # the loss scale halves each time: 2^16 is gone long before


@dataclass(kw_only=True)
class TrainState:
    """Where a run is; with weights and optimizer, all that its future depends on."""

    step: int = 0
    """Optimizer steps made."""
    train_seconds: float = 0.0
    """Spent in steps, compilation included."""
    compile_seconds: float = 0.0
    eval_seconds: float = 0.0
    train_loss: float | None = None
    """Of the last step, nats a token, with dropout."""
    val_loss: float | None = None
    """Of the last evaluation, nats a token."""
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluated_step: int | None = None
    evaluations_since_best: int = 0
    skipped_steps: int = 0
    """Steps whose fp16 gradient overflowed, so that no update was made."""
    skipped_in_a_row: int = 0
    usual_grad_norm: float | None = None
    """Running mean of the gradient's norm."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the fp16 gradient scaler."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("step", "train_seconds", "compile_seconds", "eval_seconds"):
            check(0 <= getattr(self, name) < 2**53, self, name, "the run is damaged")
        usual = self.usual_grad_norm
        check(usual is None or usual > 0, self, "usual_grad_norm", "the run is damaged")


@dataclass(kw_only=True)
class Trainer:
    """A model and everything needed to make it better."""

    model: GPT2
    forward: Callable[[Tensor], Tensor]
    """The model as it is called: perhaps compiled, perhaps over several GPUs."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    windows: Windows
    validation: npt.NDArray[Any]
    """Token ids, (m,)."""
    config: TrainConfig
    precision: PrecisionChoice
    parallel: ParallelChoice
    out: Path
    """The run folder."""
    state: TrainState = field(default_factory=TrainState)
    saved_step: int | None = None
    """Of the last checkpoint written or read."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.token_embedding.weight.device

    @property
    def sequences_per_step(self) -> int:
        """Windows that one optimizer step learns from."""
        return self.config.batch_size * self.config.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Characters that one optimizer step learns from."""
        return self.sequences_per_step * self.windows.block_size

    @property
    def total_steps(self) -> int | None:
        """Length of the run; None where the clock decides."""
        if self.config.steps is not None:
            return self.config.steps
        if self.config.epochs is not None:
            sequences = self.config.epochs * self.windows.per_epoch
            return max(1, round(sequences / self.sequences_per_step))
        return None

    @property
    def progress(self) -> float:
        """Share of the budget that is spent."""
        if self.total_steps is not None:
            return self.state.step / self.total_steps
        assert self.config.minutes is not None
        # Compilation shortens the run; it must not spend the warm-up.
        budget = 60 * self.config.minutes - self.state.compile_seconds
        spent = self.state.train_seconds - self.state.compile_seconds
        return spent / budget if budget > 0 else 1.0

    @property
    def eval_interval(self) -> int:
        """Steps between evaluations; see ``TrainConfig.eval_interval``."""
        if self.config.eval_interval:
            return self.config.eval_interval
        epoch = self.windows.per_epoch / self.sequences_per_step
        # A forward pass is a third of a step: ten times that keeps evaluation below a tenth.
        cheap = 10 / 3 * len(self.validation) / self.tokens_per_step
        return round(max(25, min(250, epoch), cheap))


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
    config, scaler = trainer.config, trainer.scaler
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
    if trainer.config.grad_clip:
        torch.nn.utils.clip_grads_with_norm_(
            _parameters(trainer), trainer.config.grad_clip, norm, foreach=_foreach(trainer)
        )


def _parameters(trainer: Trainer) -> list[Tensor]:
    return [p for group in trainer.optimizer.param_groups for p in group["params"]]


def _foreach(trainer: Trainer) -> bool | None:
    return True if trainer.device.type == "cpu" else None  # CPUs do not do so by themselves


def _micro_loss(trainer: Trainer, micro_step: int) -> Tensor:
    """Return the mean loss of one batch in nats a token, a scalar."""
    config, step = trainer.config, trainer.state.step
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
    share = schedule(at_end, trainer.config)
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return trainer.config.learning_rate * share


# --- the loop


def fit(trainer: Trainer, reporter: Reporter) -> StopReason:
    """Train until the budget is spent, nothing improves any more, or somebody stops it.

    Returns:
        Why it ended. The best and the last state are in the run folder.

    Raises:
        TrainingError: the loss is not finite; the last good state is in the run folder.
    """
    state, config = trainer.state, trainer.config
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
    state, patience = trainer.state, trainer.config.patience
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
            f"--learning-rate below {trainer.config.learning_rate:g}"
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
        log=state.step % trainer.config.log_interval == 0,
    )


def _note_spike(trainer: Trainer, result: StepResult, reporter: Reporter) -> None:
    """Tell of a gradient far longer than usual, which a look at the mean loss does not show."""
    state, norm = trainer.state, result.grad_norm
    if result.skipped:
        return
    usual = state.usual_grad_norm
    if usual is not None and state.step > SPIKE_SETTLING and norm > SPIKE * usual:
        reporter.note(
            f"step {state.step:,}: the gradient's norm is {norm:.3g}, {norm / usual:.0f} times "
            "the usual"
        )
    # A spike counts as little as the largest norm that is none.
    norm = norm if usual is None else min(norm, SPIKE * usual)
    state.usual_grad_norm = norm if usual is None else 0.98 * usual + 0.02 * norm


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
            batch_size=trainer.config.batch_size,
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
    saved = saved_best(trainer.out)
    if is_best and (saved is None or saved.val_loss >= state.val_loss):
        weights = {MODEL: model_tensors(trainer.model)}
        _save(trainer, "best", weights, {"step": state.step, "val_loss": state.val_loss})
    save_last(trainer)
    with interrupts.amid():
        reporter.sample(step=state.step, val_loss=state.val_loss)


class Best(NamedTuple):
    """What a best checkpoint says of itself."""

    step: int
    val_loss: float


def saved_best(run: Path) -> Best | None:
    """Return what the best checkpoint is; it may be of a future that was cut off."""
    try:
        state = read_state(run / "best")
    except UserError:
        return None
    step, val_loss = state.get("step"), state.get("val_loss")
    return Best(step, val_loss) if type(step) is int and type(val_loss) is float else None


def save_last(trainer: Trainer) -> None:
    """Write everything needed to go on from here.

    Raises:
        TrainingError: it cannot be written, or holds what is no number.
    """
    trainer.state.scaler = trainer.scaler.state_dict()
    parts = {
        MODEL: model_tensors(trainer.model),
        OPTIMIZER: optimizer_tensors(trainer.optimizer, trainer.model),
    }
    _save(trainer, "last", parts, asdict(trainer.state))
    trainer.saved_step = trainer.state.step


def _save(trainer: Trainer, which: Which, parts: Mapping[str, Tensors], state: Any) -> None:
    """Write a checkpoint.

    Raises:
        TrainingError: it cannot be written, or holds what is no number; those before it are kept.
    """
    for name, tensor in (item for tensors in parts.values() for item in tensors.items()):
        if not _is_finite(tensor):
            raise TrainingError(
                f"{name} is not finite after step {trainer.state.step}, so that nothing was saved: "
                f"the states before are in {trainer.out}; go on with --resume, perhaps with "
                "--precision fp32"
            )
    try:
        save_checkpoint(trainer.out, which, parts, state)
    except OSError as error:
        if not trainer.out.exists():
            raise TrainingError(
                f"{trainer.out} has vanished, with all that was saved: train again"
            ) from error
        n_bytes = sum(t.nbytes for tensors in parts.values() for t in tensors.values())
        raise TrainingError(
            f"{trainer.out / which} could not be saved after step {trainer.state.step} "
            f"({error.strerror or error}; it needs {human_count(n_bytes)}B): those before it are "
            "kept; make room there, or make it writable, and go on with --resume"
        ) from error


def _is_finite(tensor: Tensor) -> bool:
    # A sum takes a tenth of the time, and nothing that is no number gets lost in it.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def restore_last(trainer: Trainer) -> None:
    """Put a trainer where `save_last` left the run in its folder.

    Raises:
        UserError: there is no whole checkpoint, or it does not fit the model.
    """
    folder = find_checkpoint(trainer.out, "last")
    check_model_file(folder / MODEL, trainer.model.config)
    load_model_tensors(trainer.model, read_tensors(folder / MODEL))
    load_optimizer_tensors(trainer.optimizer, trainer.model, read_tensors(folder / OPTIMIZER))
    trainer.state = from_dict(TrainState, read_state(folder))
    trainer.saved_step = trainer.state.step
    if not trainer.optimizer.state and trainer.state.step > trainer.state.skipped_steps:
        raise UserError(f"{folder / OPTIMIZER} is empty: the run is damaged")
    trainer.state.skipped_in_a_row = 0
    if trainer.scaler.is_enabled() and trainer.state.scaler:
        if trainer.state.scaler.keys() != trainer.scaler.state_dict().keys():
            raise UserError(f"{folder / STATE} has a scaler of other fields: the run is damaged")
        trainer.scaler.load_state_dict(trainer.state.scaler)
