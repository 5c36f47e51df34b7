"""A run, from a text to a run folder: ``chargpt train`` in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from chargpt.base.callable_module import make_callable
from chargpt.base.errors import TrainingError, UserError, is_out_of_memory
from chargpt.base.files import write_json
from chargpt.base.seeding import own_random_state
from chargpt.base.units import bits_per_char
from chargpt.compute.counts import count_parameters
from chargpt.compute.device import describe_device, deterministic_algorithms
from chargpt.config import CheckpointName, DataConfig, GPT2Config, SampleConfig, TrainConfig, tiny
from chargpt.data.tokenizer import CharTokenizer
from chargpt.generate import generate_text
from chargpt.measure.baselines import unigram_nats
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
from chargpt.training.loop import StopReason, fit
from chargpt.training.plan import Plan, environment_changes, make_plan
from chargpt.training.saving import saved_best
from chargpt.training.speed import prepare
from chargpt.training.summary import SUMMARY, Summary, verdict
from chargpt.training.trainer import Trainer


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
        environment = plan.config["environment"]
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
    return lambda: "".join(generate_text(trainer.model, tokenizer, config, kernels=kernels))


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
