"""Training: a run from a text to a run folder, the loop, and one step.

    train ─► make_plan ─► fit ─► train_step, _evaluate_and_save ─► summary

A run depends on its configuration, its data and its `TrainState`, and on nothing else: batches and
dropout are functions of (seed, step), and evaluation draws no random numbers. So a run can stop
anywhere and resume, on a CPU with the same bits.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chargpt.base.callable_module import make_callable
from chargpt.base.errors import TrainingError, UserError, is_out_of_memory
from chargpt.base.files import write_json
from chargpt.base.interrupts import StopRequested, StopSignals, stop
from chargpt.base.seeding import own_random_state
from chargpt.compute.device import describe_device, deterministic_algorithms
from chargpt.compute.optimizers import schedule
from chargpt.compute.parallel import accumulating
from chargpt.compute.step import clip_gradient, gradient_norm
from chargpt.compute.world import joined_world, launch_id, recall, remember
from chargpt.config import DataConfig, GPT2Config, SampleConfig, TrainConfig
from chargpt.data.corpus import Corpus
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.evaluation import evaluate, scored_tokens
from chargpt.generate import generate
from chargpt.model import GPT2
from chargpt.runs.checkpoint import has_checkpoint
from chargpt.runs.folder import CONFIG, load, read_config, write_config, write_tokenizer
from chargpt.runs.plot import plot_loss
from chargpt.runs.report import Reporter, SilentReporter
from chargpt.runs.reserve import Resume, free_folder, reserved
from chargpt.training.asked import Asked, settle
from chargpt.training.plan import Plan, make_plan
from chargpt.training.probe import choose_for
from chargpt.training.saving import save_best, save_last, send_model
from chargpt.training.size import Choice
from chargpt.training.summary import SUMMARY, StopReason, Summary, summarize
from chargpt.training.trainer import Trainer

SPIKE, SPIKE_SETTLING = 10, 100  # times the usual norm; steps until one is known
MAX_SKIPPED_IN_A_ROW = 50  # the loss scale halves each time: 2^16 is gone long before
PARTS = ("data", "forward", "backward", "clip", "optimizer")
"""The parts of a step, in order; ``clip`` includes the check that all is finite."""

# --- a run


class TrainResult(NamedTuple):
    """The best model of a run, in evaluation mode, and its record."""

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
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    resume: Resume = False,
    start_from: str | Path | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train a GPT-2 on text, leave a run folder, and return the best model found.

    Args:
        texts: files, folders, globs, "-", names of data sets; see `chargpt.data.corpus`.
        model_config: its shape; ``vocab_size`` 0 follows the text.
        train_config: budget, optimizer, device. Without both configurations, they are chosen for
            the text, the minutes and this machine (see `chargpt.training.size`). One that is
            missing is that of the preset ``tiny``.
        data_config: encoding, documents, split.
        settings: fields of the two configurations by name, such as ``{"minutes": 10}``, that the
            choice keeps; not beside configurations.
        out: the run folder; default: a new one below ``runs/``.
        resume: continue the run in `out`; "auto": start one if `out` has none.
        start_from: a run whose best model to start from, with its shape; dropout may differ, and
            the vocabulary grows with the text.
        quiet: print nothing.

    Raises:
        UserError: anything wrong with texts, configuration or `out`; nothing has been written.
        TrainingError: training cannot continue; what was learned is in the run folder.
    """
    sources = (texts,) if isinstance(texts, str) else tuple(texts)
    start = Path(start_from) if start_from is not None else None
    if settings and (model_config or train_config):
        raise UserError("settings are for a choice: give them, or configurations")
    asked = Asked(model_config, train_config, settings or {})
    with joined_world() as world:
        folder, resume = world.on_first(lambda: _folder(sources, out, resume))
        # On another machine, the command may not have found the run to resume.
        sources, data_config, asked = world.on_first(
            lambda: (sources, data_config or DataConfig(), settle(asked, start, folder, resume))
        )
        model_config, train_config, given = asked
        assert model_config and train_config

        def choose(corpus: Corpus) -> Choice:
            return choose_for(corpus, given or {}, devices=world.size, report=report)

        report = Reporter(folder, quiet=quiet or not world.is_first).note
        with (
            world.entered_on_first(reserved(folder, resume)) as resuming,
            own_random_state(),
            deterministic_algorithms(train_config.deterministic),
        ):
            try:
                plan = make_plan(
                    sources,
                    model_config=model_config,
                    train_config=train_config,
                    data_config=data_config,
                    out=folder,
                    resuming=resuming,
                    start_from=start,
                    choose=None if given is None else choose,
                    quiet=quiet or not world.is_first,
                    report=report,
                    world=world,
                )
            except Exception as error:
                if is_out_of_memory(error):
                    raise _model_too_large(model_config) from error
                raise
            if resume and not resuming:
                report(f"resuming   nothing yet in {folder}: starting from step 0")
            report(f"run        {folder}")
            return _carry_out(plan, quiet=quiet)


def _folder(sources: Sequence[str], out: str | Path | None, resume: Resume) -> tuple[Path, Resume]:
    """Return the run folder, and whether to resume.

    The processes that torchrun starts in place of failed ones resume the run of those. It may have
    lost what they remembered with the machine that they ran on; then the folder says it.
    """
    if started := recall("run"):
        return Path(started), "auto"
    folder = Path(out) if out is not None else free_folder(sources)
    has_run = launch_id() is not None and (folder / CONFIG).is_file()
    if has_run and read_config(folder).environment.get("launch") == launch_id():
        return folder, "auto"
    return folder, resume


def _carry_out(plan: Plan, *, quiet: bool) -> TrainResult:
    """Train as planned, and write what came of it."""
    trainer, world = plan.trainer, plan.trainer.world
    try:
        files = _run_files(plan, quiet=quiet) if world.is_first else nullcontext(SilentReporter())
        with files as reporter:
            stop_reason = fit(trainer, reporter)
        summary = world.on_first(lambda: _finish(plan, stop_reason))
        return TrainResult(_best_model(trainer), plan.corpus.tokenizer, summary, trainer.out)
    except OSError as error:
        raise TrainingError(
            f"{error.filename or trainer.out}: {error.strerror or error}; the checkpoints in "
            f"{trainer.out} are kept: make room there, or make it writable, and continue with "
            "--resume"
        ) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise _out_of_memory(trainer) from error
        raise


@contextmanager
def _run_files(plan: Plan, *, quiet: bool) -> Iterator[Reporter]:
    """Write what the run begins with, and yield what reports its progress."""
    trainer = plan.trainer
    reporter = Reporter(
        trainer.out,
        quiet=quiet,
        track=trainer.train_config.track,
        write_sample=_sampler(plan) if trainer.train_config.sample_length else None,
        unit=plan.corpus.tokenizer.unit,
        resumed_step=trainer.state.step,
        evaluated_step=trainer.state.evaluated_step,
    )
    write_config(trainer.out, plan.run_config)
    write_tokenizer(trainer.out, plan.corpus.tokenizer)
    remember("run", str(trainer.out))
    with reporter:
        yield reporter


def _sampler(plan: Plan) -> Callable[[], str]:
    """Return a function that writes a sample with the model as it is now."""
    trainer, train_config = plan.trainer, plan.trainer.train_config
    config = SampleConfig(max_new_tokens=train_config.sample_length, seed=train_config.seed)

    def sample() -> str:
        # A model that processes share is whole in its checkpoint only, which was just written.
        shared = trainer.parallel.kind == "fsdp"
        model = load(trainer.out, which="last").model if shared else trainer.model
        texts = generate(model, plan.corpus.tokenizer, [""], config, kernels=train_config.kernels)
        return "".join(text for _, text in texts)

    return sample


def _finish(plan: Plan, stop_reason: StopReason) -> Summary:
    """Write what a run that has ended leaves, and return its summary."""
    trainer = plan.trainer
    summary = summarize(trainer, plan.corpus, stop_reason)
    write_json(trainer.out / SUMMARY, asdict(summary))
    plot_loss(trainer.out)
    return summary


def _best_model(trainer: Trainer) -> GPT2:
    """Return the best model, which rank 0 reads and sends to the others."""
    first = trainer.world.is_first
    model = load(trainer.out).model if first else GPT2(trainer.model.config).eval()
    send_model(model, trainer.world)
    return model.to(trainer.device)


def _model_too_large(model_config: GPT2Config) -> UserError:
    return UserError(
        f"the model does not fit into memory: give a lower --d-model ({model_config.d_model}), "
        f"--n-layer ({model_config.n_layer}) or --block-size ({model_config.block_size})"
    )


def _out_of_memory(trainer: Trainer) -> TrainingError:
    train_config, shape = trainer.train_config, trainer.model.config
    batch_size = train_config.batch_size
    divisor = next((n for n in range(2, batch_size + 1) if batch_size % n == 0), 1)
    same = (
        f"--batch-size {batch_size // divisor} --gradient-accumulation-steps "
        f"{train_config.gradient_accumulation_steps * divisor}, which learns the same, or "
    )
    return TrainingError(
        f"out of memory on {describe_device(trainer.device)}: start a new run with "
        f"{same if divisor > 1 else ''}a lower --block-size ({shape.block_size}), --n-layer "
        f"({shape.n_layer}) or --d-model ({shape.d_model})"
    )


# --- the loop


def fit(trainer: Trainer, reporter: SilentReporter) -> StopReason:
    """Train until the budget is spent, nothing improves any more, or the user stops it.

    Return why it ended; the best and the last state are then in the run folder.

    Raises:
        TrainingError: the loss is not finite; the last good state is in the run folder.
    """
    state, save_interval = trainer.state, trainer.train_config.save_interval
    trainer.model.train()
    with StopSignals() as signals, _garbage_collector_at_rest():
        try:
            while trainer.progress < 1:
                if state.step > 0 and state.step % trainer.eval_interval == 0:
                    _evaluate_and_save(trainer, reporter, signals)
                if _patience_is_over(trainer):  # possibly before this process started
                    return "patience"
                _step(trainer, reporter)
                _agree(trainer, signals)
                if save_interval and state.step % save_interval == 0:
                    save_last(trainer)
            _evaluate_and_save(trainer, reporter, signals)
        except StopRequested as request:
            save_last(trainer)
            return request.reason
    return "budget"


def _agree(trainer: Trainer, signals: StopSignals) -> None:
    """Raise `StopRequested` if any process was asked to stop; take rank 0's clock."""
    world, state = trainer.world, trainer.state
    clock = state.train_seconds if world.is_first else 0.0
    state.train_seconds, request = world.highest(clock, signals.received)
    stop(int(request))  # a signal since then waits for the next step: all must stop together


def _interruptible(trainer: Trainer, signals: StopSignals) -> AbstractContextManager[None]:
    """Return a context that a signal may end, unless other processes wait for its end."""
    return signals.interruptible() if trainer.world.size == 1 else nullcontext()


@contextmanager
def _garbage_collector_at_rest() -> Iterator[None]:
    """Keep it from visiting all of PyTorch's objects again and again: a twentieth of a step."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _patience_is_over(trainer: Trainer) -> bool:
    state, patience = trainer.state, trainer.train_config.patience
    return state.evaluated_step == state.step and 0 < patience <= state.evaluations_since_best


def _evaluate_and_save(trainer: Trainer, reporter: SilentReporter, signals: StopSignals) -> None:
    """Evaluate the model, unless that was done before a resume, and save it."""
    state = trainer.state
    if state.evaluated_step == state.step:
        return
    if not has_checkpoint(trainer.out, "last"):
        save_last(trainer)  # a folder with best/ alone has therefore lost its last/
    most, n_tokens = trainer.choose_eval_tokens(), len(trainer.validation)
    scored = scored_tokens(n_tokens, trainer.windows.block_size, most)
    start = time.perf_counter()
    with _interruptible(trainer, signals), reporter.evaluating(scored) as advance:
        val_loss = evaluate(
            trainer.model,
            trainer.validation,
            trainer.windows.block_size,
            most=most,
            batch_size=-(-trainer.train_config.batch_size // trainer.world.size),
            autocast=trainer.precision.autocast(trainer.device),
            world=trainer.world,
            advance=advance,
        )
    state.eval_seconds += time.perf_counter() - start
    if not math.isfinite(val_loss):
        raise TrainingError(
            f"the validation loss after step {state.step} is {val_loss}; earlier checkpoints are "
            f"in {trainer.out}: try --precision fp32, or a lower --learning-rate in a new run"
        )
    state.val_loss, state.evaluated_step = val_loss, state.step
    state.evaluations_since_best += 1
    is_best = state.best_val_loss is None or val_loss < state.best_val_loss
    if is_best:
        state.best_val_loss, state.best_step = val_loss, state.step
        state.evaluations_since_best = 0
    part = scored if scored < n_tokens - 1 else None
    reporter.evaluation(step=state.step, val_loss=val_loss, is_best=is_best, part=part)
    if is_best:
        save_best(trainer)
    save_last(trainer)
    with _interruptible(trainer, signals):
        reporter.sample(step=state.step, val_loss=val_loss)


def _step(trainer: Trainer, reporter: SilentReporter) -> None:
    """Make a step, count it, and report it."""
    state = trainer.state
    start = time.perf_counter()
    try:
        result = train_step(trainer)
    except NonFiniteError as error:
        if trainer.saved_step != state.step:  # a repeated failure keeps the earlier checkpoint
            save_last(trainer)
        raise TrainingError(
            f"step {state.step + 1} stopped before its update ({error}); the state before it is in "
            f"{trainer.out / 'last'}: try --precision fp32, or, in a new run, a "
            f"--learning-rate below {trainer.train_config.learning_rate:g}"
        ) from error
    state.train_seconds += time.perf_counter() - start
    state.step += 1
    measured = (result.loss, result.grad_norm)  # JSON has neither NaN nor infinity
    loss, grad_norm = (x if math.isfinite(x) and not result.skipped else None for x in measured)
    if loss is not None:
        state.train_loss = loss
    _count_skipped(trainer, result)
    if grad_norm is not None:
        _report_spike(trainer, grad_norm, reporter)
    reporter.step(
        {
            "step": state.step,
            "loss": loss,
            "learning_rate": result.learning_rate,
            "grad_norm": grad_norm,
            "tokens": state.step * trainer.tokens_per_step,
            "train_seconds": round(state.train_seconds, 3),
        },
        progress=trainer.progress,
        log=state.step % trainer.train_config.log_interval == 0,
    )


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


def _report_spike(trainer: Trainer, norm: float, reporter: SilentReporter) -> None:
    """Report a gradient far longer than usual, which the mean loss does not show."""
    state = trainer.state
    usual = state.usual_grad_norm
    if usual and state.step > SPIKE_SETTLING and norm > SPIKE * usual:
        reporter.note(
            f"step {state.step:,}: the gradient's norm is {norm:.3g}, {norm / usual:.0f} times "
            "the usual"
        )
    # A spike counts at most as the largest norm that is not a spike.
    state.usual_grad_norm = 0.98 * usual + 0.02 * min(norm, SPIKE * usual) if usual else norm


# --- one step


class StepResult(NamedTuple):
    """What a step measured."""

    loss: float  # nats a token, over all the step's sequences, with dropout
    grad_norm: float  # norm of the whole gradient, before clipping
    learning_rate: float  # AdamW's
    skipped: bool  # whether the scaled gradient overflowed, so that no update was made


class NonFiniteError(TrainingError):
    """The loss or the gradient is NaN or infinite; the weights are unchanged."""


def train_step(trainer: Trainer, lap: Callable[[str], None] = lambda part: None) -> StepResult:
    """Make one optimizer update, which leaves ``trainer.state`` as it is.

    `lap` is called with the name of each part that has ended, one of `PARTS`.

    Raises:
        NonFiniteError: loss or gradient is NaN or infinite, and there is no loss scaling that could
            correct it; the weights are those before the step.
    """
    optimizer, scaler = trainer.optimizer, trainer.scaler
    n_batches = trainer.train_config.gradient_accumulation_steps
    learning_rate = _set_learning_rate(trainer)
    loss = torch.zeros((), device=trainer.device)
    for micro_step in range(n_batches):
        batch = trainer.batch(micro_step)
        lap("data")
        is_last = micro_step == n_batches - 1
        with accumulating(trainer.forward, trainer.parallel, is_last=is_last):
            micro_loss = trainer.loss(batch, micro_step) / n_batches
            lap("forward")
            scaler.scale(micro_loss).backward()  # type: ignore[no-untyped-call]
        lap("backward")
        loss += micro_loss.detach()
    if trainer.world.size > 1:
        loss.fill_(trainer.world.total(float(loss))[0] / trainer.world.size)
    scaler.unscale_(optimizer)
    grad_norm = _clip_gradient(trainer, loss)
    lap("clip")
    scale = scaler.get_scale()
    scaler.step(optimizer)  # makes no update if the scaled gradient overflowed,
    scaler.update()  # and then lowers the scale
    optimizer.zero_grad()
    lap("optimizer")
    skipped = scaler.get_scale() < scale
    return StepResult(float(loss), float(grad_norm), learning_rate, skipped)


def _set_learning_rate(trainer: Trainer) -> float:
    """Set the rates of the next step; return AdamW's.

    They are the highest of the schedule during the step, so that no step has rate 0: neither the
    first one, where warm-up starts, nor the last one, where a cool-down may end at 0.
    """
    train_config = trainer.train_config
    start, end = trainer.progress, trainer.next_progress
    peak = min(max(start, train_config.warmup_fraction), end)
    share = max(schedule(progress, train_config) for progress in (start, peak, end))
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return train_config.learning_rate * share


def _clip_gradient(trainer: Trainer, loss: Tensor) -> Tensor:
    """Check that all is finite, shorten the gradient to ``grad_clip``, return its norm before."""
    max_norm, optimizer = trainer.train_config.grad_clip, trainer.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = gradient_norm(trainer.model, parameters)
    is_finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
    if not is_finite and not trainer.scaler.is_enabled():
        reason = _first_non_finite(trainer, float(loss))
        optimizer.zero_grad()
        raise NonFiniteError(reason)
    if max_norm:  # 0 clips nothing
        clip_gradient(trainer.model, parameters, norm, max_norm)
    return norm


def _first_non_finite(trainer: Trainer, loss: float) -> str:
    """Return which part of a step is NaN or infinite, by name."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name} is not finite"
    return "the norm of the gradient overflows"


make_callable(__name__, train)
