"""A run, from a text to a run folder: ``chargpt train`` in Python."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from chargpt.base.callable_module import make_callable
from chargpt.base.errors import TrainingError, UserError, is_out_of_memory
from chargpt.base.files import write_json
from chargpt.base.interrupts import Interrupted, Interrupts
from chargpt.base.seeding import own_random_state
from chargpt.base.units import bits_per_char
from chargpt.compute.counts import count_parameters
from chargpt.compute.device import describe_device, deterministic_algorithms
from chargpt.compute.optimizers import schedule
from chargpt.config import CheckpointName, DataConfig, GPT2Config, SampleConfig, TrainConfig, tiny
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.scoring import evaluate
from chargpt.generate import generate
from chargpt.model import GPT2
from chargpt.runs.checkpoint import finish_save, has_checkpoint
from chargpt.runs.folder import (
    CONFIG,
    load,
    write_config,
    write_tokenizer,
)
from chargpt.runs.plot import plot_loss
from chargpt.runs.report import Reporter
from chargpt.runs.reserve import _check_folder, _held, free_folder
from chargpt.training.plan import Plan, environment_changes, make_plan
from chargpt.training.saving import save_best, save_last, saved_best
from chargpt.training.speed import prepare
from chargpt.training.summary import SUMMARY, StopReason, Summary, unigram_nats, verdict
from chargpt.training.trainer import Trainer

FIRST_PROGRESS = 1e-3  # of a first step on the clock, whose length nobody knows yet
SPIKE, SPIKE_SETTLING = 10, 100  # times the usual norm; steps until one is known
PARTS = ("data", "forward", "backward", "clip", "optimizer")
"""The parts of a step, in order; ``clip`` includes the check that all is finite."""
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


def train_step(trainer: Trainer, lap: Callable[[str], None] = lambda part: None) -> StepResult:
    """Make one optimizer update.

    Args:
        trainer: its parameters and its optimizer's state change; ``trainer.state`` does not.
        lap: called with the name of each part that has ended, one of `PARTS`.

    Raises:
        NonFiniteError: loss or gradient is not finite, and no loss scaling is on that could mend
            it; the weights are those before the step.
    """
    config, scaler = trainer.train_config, trainer.scaler
    lr = _set_learning_rate(trainer)
    loss = torch.zeros((), device=trainer.device)
    for micro_step in range(config.gradient_accumulation_steps):
        batch = trainer.batch(micro_step)
        lap("data")
        micro_loss = trainer.loss_of(batch, micro_step) / config.gradient_accumulation_steps
        lap("forward")
        scaler.scale(micro_loss).backward()  # type: ignore[no-untyped-call]
        lap("backward")
        loss += micro_loss.detach()
    scaler.unscale_(trainer.optimizer)
    grad_norm = gradient_norm(trainer)
    finite = bool(torch.isfinite(loss) & torch.isfinite(grad_norm))
    if not finite and not scaler.is_enabled():
        reason = _first_non_finite(trainer, float(loss))
        trainer.optimizer.zero_grad()
        raise NonFiniteError(reason)
    clip_gradient(trainer, grad_norm)
    lap("clip")
    scaler.step(trainer.optimizer)  # makes no update if the scaled gradient overflowed
    scaler.update()
    trainer.optimizer.zero_grad()
    lap("optimizer")
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


# --- a run, from a text to a run folder


class TrainResult(NamedTuple):
    """The best model of a run, and how it came about."""

    model: GPT2
    tokenizer: CharTokenizer
    summary: Summary
    run: Path


def train(
    texts: str | Sequence[str] = "tiny-shakespeare",
    *,
    model_config: GPT2Config | None = None,
    train_config: TrainConfig | None = None,
    data_config: DataConfig | None = None,
    out: str | Path | None = None,
    resume: bool | Literal["auto"] = False,
    quiet: bool = False,
) -> TrainResult:
    """Train a GPT-2 on text and leave a run folder.

    Args:
        texts: files, folders, globs, "-" or names of data sets; see `chargpt.data.corpus.load_corpus`.
        model_config: its shape; default: the preset ``tiny``. ``vocab_size`` 0 follows the text.
        train_config: budget, optimizer, device; default: the preset ``tiny``.
        data_config: encoding, documents, split.
        out: the run folder; default: a new one below ``runs/``.
        resume: go on with the run in `out`; "auto": or begin it, if there is none.
        quiet: print nothing.

    Returns:
        The best model found, in evaluation mode, with its tokenizer, summary and run folder.

    Raises:
        UserError: anything wrong with texts, configuration or `out`; nothing has been written.
        TrainingError: training cannot go on; what was learned is in the run folder.
    """
    sources = (texts,) if isinstance(texts, str) else tuple(texts)
    model_config, train_config, data_config = (
        model_config or tiny().model_config,
        train_config or tiny().train_config,
        data_config or DataConfig(),
    )
    folder = Path(out) if out is not None else free_folder(sources)
    try:
        _check_folder(folder, resume)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be a run folder ({error.strerror}): give another --out"
        ) from error
    with _held(folder), own_random_state():
        resuming = (folder / CONFIG).exists() and has_checkpoint(folder, "last")
        if not resuming and has_checkpoint(folder, "best"):
            raise UserError(
                f"{folder} has a best checkpoint and no last one, from which a run goes on: take "
                "last/ from a backup, or train anew with another --out"
            )
        if resume is True and not resuming:
            raise UserError(
                f"{folder} has no checkpoint to go on from: give --resume auto to begin anew"
            )
        plan = _plan(sources, model_config, train_config, data_config, folder, resuming=resuming)
        if resume and not resuming:
            plan.lines.append(f"resuming   nothing yet in {folder}: starting from step 0")
        return _carry_out(plan, quiet=quiet)


def _plan(
    sources: Sequence[str],
    model_config: GPT2Config,
    train_config: TrainConfig,
    data_config: DataConfig,
    folder: Path,
    *,
    resuming: bool,
) -> Plan:
    try:
        return make_plan(
            sources,
            model_config=model_config,
            train_config=train_config,
            data_config=data_config,
            out=folder,
            resuming=resuming,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise UserError(
                f"the model does not fit into memory: give a lower --d-model ({model_config.d_model}), "
                f"--n-layer ({model_config.n_layer}) or --block-size ({model_config.block_size})"
            ) from error
        raise


def _carry_out(plan: Plan, *, quiet: bool) -> TrainResult:
    trainer = plan.trainer
    try:
        stop_reason = _train(plan, quiet=quiet)
        return _finish(plan, stop_reason)
    except OSError as error:
        raise TrainingError(
            f"{error.filename or trainer.out}: {error.strerror or error}; the checkpoints in "
            f"{trainer.out} are kept: make room there, or make it writable, and go on with --resume"
        ) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise _out_of_memory(trainer) from error
        raise


def _train(plan: Plan, *, quiet: bool) -> StopReason:
    trainer, out = plan.trainer, plan.trainer.out
    reporter = Reporter(
        out,
        quiet=quiet,
        track=trainer.train_config.track,
        write_sample=_sampler(plan) if trainer.train_config.sample_length else None,
        resumed_step=trainer.state.step,
        evaluated_step=trainer.state.evaluated_step,
    )
    for line in [*plan.lines, f"run        {out}"]:
        reporter.note(line)
    with deterministic_algorithms(trainer.train_config.deterministic):
        environment = plan.config.environment
        environment |= prepare(trainer, reporter.note)._asdict()
        for line in environment_changes(plan.environment_before, environment):
            reporter.note(line)
        for which in get_args(CheckpointName):
            finish_save(out, which)
        write_config(out, plan.config)
        write_tokenizer(out, plan.corpus.tokenizer)
        with reporter:
            return fit(trainer, reporter)


def _out_of_memory(trainer: Trainer) -> TrainingError:
    config, shape = trainer.train_config, trainer.model.config
    smaller = next((n for n in range(2, config.batch_size + 1) if config.batch_size % n == 0), 1)
    batch, steps = config.batch_size // smaller, config.gradient_accumulation_steps * smaller
    same = f"--batch-size {batch} --gradient-accumulation-steps {steps}, which learns the same, or "
    return TrainingError(
        f"out of memory on {describe_device(trainer.device)}: begin a new run with "
        f"{same if smaller > 1 else ''}a lower --block-size ({shape.block_size}), --n-layer "
        f"({shape.n_layer}) or --d-model ({shape.d_model})"
    )


def _sampler(plan: Plan) -> Callable[[], str]:
    trainer, tokenizer = plan.trainer, plan.corpus.tokenizer
    kernels = trainer.train_config.kernels
    config = SampleConfig(
        max_new_tokens=trainer.train_config.sample_length, seed=trainer.train_config.seed
    )
    return lambda: "".join(
        piece for _, piece in generate(trainer.model, tokenizer, [""], config, kernels=kernels)
    )


def _finish(plan: Plan, stop_reason: StopReason) -> TrainResult:
    trainer = plan.trainer
    summary = _summarize(plan, stop_reason)
    write_json(trainer.out / SUMMARY, asdict(summary))
    plot_loss(trainer.out)
    best = load(trainer.out, device=trainer.device)
    return TrainResult(best.model, best.tokenizer, summary, trainer.out)


def _summarize(plan: Plan, stop_reason: StopReason) -> Summary:
    trainer, state = plan.trainer, plan.trainer.state
    tokens = state.step * trainer.tokens_per_step
    stepping = state.train_seconds - state.compile_seconds
    saved = saved_best(trainer.out)  # that of a future that was cut off may be better
    if saved and state.best_val_loss is not None and saved.val_loss < state.best_val_loss:
        state.best_val_loss, state.best_step = saved.val_loss, saved.step
    best = state.best_val_loss
    corpus = plan.corpus
    guess = unigram_nats(corpus.train, corpus.validation, corpus.tokenizer.vocab_size)
    return Summary(
        verdict=verdict(state, guess, stop_reason),
        val_loss=best,
        bits_per_char=None if best is None else bits_per_char(best),
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


make_callable(__name__, train)
