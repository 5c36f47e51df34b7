"""A model with everything needed to train it, and the state of its run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from chargpt.base.checks import check, check_fields
from chargpt.compute.device import PrecisionChoice
from chargpt.compute.fast_layers import FastGPT2
from chargpt.compute.optimizers import ngram_share
from chargpt.compute.parallel import ParallelChoice, seed_dropout
from chargpt.compute.step import cross_entropy
from chargpt.compute.world import ALONE, World
from chargpt.config import TrainConfig
from chargpt.data.windows import Batch, Windows
from chargpt.model import GPT2
from chargpt.training.ngram_targets import NgramTargets

FIRST_PROGRESS = 1e-3  # of a first step on the clock, whose length is not known yet
WHOLE_PART, USUAL_PART, MOST_PART = 2**17, 2**18, 10**6
"""Validation tokens: what is always scored whole, the usual part of more, the largest part."""
GRACE = 0.05  # share of the minutes that passes before a limit beside steps or epochs counts


@dataclass(kw_only=True)
class TrainState:
    """The state of a run; with weights and optimizer, all that its future depends on."""

    step: int = 0  # optimizer steps made
    train_seconds: float = 0.0  # in steps, compilation included
    compile_seconds: float = 0.0
    eval_seconds: float = 0.0
    train_loss: float | None = None  # of the last step, nats a token, with dropout
    val_loss: float | None = None  # of the last evaluation, nats a token
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluated_step: int | None = None
    eval_tokens: int | None = None  # most that an evaluation scores; None: not decided yet
    evaluations_since_best: int = 0
    skipped_steps: int = 0  # without an update, because their fp16 gradient overflowed
    skipped_in_a_row: int = 0
    usual_grad_norm: float | None = None  # running mean
    scaler: dict[str, Any] = field(default_factory=dict)  # state of the fp16 gradient scaler

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("step", "train_seconds", "compile_seconds", "eval_seconds"):
            check(0 <= getattr(self, name) < 2**53, self, name, "the run is damaged")
        check((self.usual_grad_norm or 0) >= 0, self, "usual_grad_norm", "the run is damaged")


@dataclass(kw_only=True)
class Trainer:
    """A model with everything needed to train it."""

    model: GPT2
    forward: Callable[[Tensor], Tensor]
    """The model as it is called: it may be compiled, or share a batch with other devices."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    windows: Windows
    validation: npt.NDArray[Any]  # token ids, (m,)
    train_config: TrainConfig
    precision: PrecisionChoice
    parallel: ParallelChoice
    out: Path  # the run folder
    ngram: NgramTargets | None = None  # soft targets, if they have a weight
    world: World = ALONE  # the processes that train together
    state: TrainState = field(default_factory=TrainState)
    saved_step: int | None = None  # of the last checkpoint written or read

    # --- one batch

    def batch(self, micro_step: int) -> Batch:
        """Return one of the ``gradient_accumulation_steps`` batches of the next step, from 0.

        Its inputs and targets are on the device, (B, T) each. Of several processes, each gets its
        share of the ``batch_size`` sequences, whose numbers do not depend on how many there are.
        """
        inputs, targets = self.windows.batch(*self._sequences(micro_step))
        return Batch(inputs.to(self.device), targets.to(self.device))

    def _sequences(self, micro_step: int) -> tuple[int, int]:
        """Return the first sequence of a batch for this process, and how many there are."""
        batch_size = self.train_config.batch_size
        share = self.world.share(batch_size)
        first = self.state.step * self.sequences_per_step + micro_step * batch_size
        return first + share.start, len(share)

    def loss(self, batch: Batch, micro_step: int) -> Tensor:
        """Return the mean loss of a batch in nats a token, a scalar.

        The step and `micro_step`, the batch's number in it, seed dropout. Of several processes,
        each weights its share, so that the mean over them is the mean over the whole batch.
        """
        seed = self.train_config.seed
        seed_dropout(seed, self.state.step, micro_step, self.world, self.parallel)
        with self.precision.autocast(self.device):
            logits = self.forward(batch.inputs)  # (B, T, V)
        share = ngram_share(self.progress, self.train_config)
        surplus = self._surplus(batch, micro_step) if share else None
        loss = cross_entropy(self.model, logits, batch.targets, surplus, share)
        weight = len(batch.inputs) * self.world.size / self.train_config.batch_size
        return loss if weight == 1 else loss * weight

    def _surplus(self, batch: Batch, micro_step: int) -> Tensor:
        """Return what the n-gram expects beyond the targets, (B, T, V); its rows sum to 0."""
        assert self.ngram is not None
        starts = self.windows.starts(*self._sequences(micro_step))
        fast = isinstance(self.model, FastGPT2)
        expected = self.ngram.expected(starts, batch.targets.size(1), fast=fast).to(self.device)
        targets = batch.targets[..., None]
        return expected.scatter_add_(2, targets, torch.full_like(targets, -1, dtype=torch.float32))

    def trial_step(self) -> None:
        """Run a forward and a backward pass that change nothing, so that the model compiles."""
        self.model.train()
        try:
            loss = self.loss(self.batch(0), 0)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        finally:
            self.optimizer.zero_grad()

    # --- the run

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.token_embedding.weight.device

    @property
    def sequences_per_step(self) -> int:
        """Windows per optimizer step."""
        return self.train_config.batch_size * self.train_config.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Characters per optimizer step."""
        return self.sequences_per_step * self.windows.block_size

    @property
    def total_steps(self) -> int | None:
        """Length of the run, unless a limit in minutes ends it; None: the clock alone decides."""
        if self.train_config.epochs is None:
            return self.train_config.steps
        sequences = self.train_config.epochs * self.windows.per_epoch
        return max(1, round(sequences / self.sequences_per_step))

    @property
    def progress(self) -> float:
        """Share of the budget that is spent: of the steps or of the minutes, the larger one."""
        return max(self._share_of_steps(self.state.step), self._share_of_minutes(self._stepping))

    @property
    def next_progress(self) -> float:
        """Progress after the next step, if it takes as long as the steps so far on average."""
        before = self.state.step
        if self.total_steps is None and before == 0:
            return FIRST_PROGRESS
        seconds = self._stepping * (before + 1) / max(1, before)
        return max(self._share_of_steps(before + 1), self._share_of_minutes(seconds))

    @property
    def _stepping(self) -> float:
        """Seconds in steps, without compilation."""
        return self.state.train_seconds - self.state.compile_seconds

    def _share_of_steps(self, step: int) -> float:
        return 0.0 if self.total_steps is None else step / self.total_steps

    def _share_of_minutes(self, seconds: float) -> float:
        """Return which share of the minutes is spent after `seconds` in steps.

        Beside steps or epochs it starts after the grace: a slow first step, or a short pause, must
        not change the schedule of a run that ends in time.
        """
        if self.train_config.minutes is None:
            return 0.0
        # Compilation shortens the run; it must not spend the warm-up.
        budget = 60 * self.train_config.minutes - self.state.compile_seconds
        grace = 0.0 if self.total_steps is None else GRACE * budget
        return max(0.0, (seconds - grace) / (budget - grace)) if budget > 0 else 1.0

    @property
    def eval_interval(self) -> int:
        """Steps between evaluations; see `TrainConfig.eval_interval`."""
        if self.train_config.eval_interval:
            return self.train_config.eval_interval
        epoch = self.windows.per_epoch / self.sequences_per_step
        # A forward pass costs a third of a step: ten times that keeps evaluation below a tenth.
        scored = min(len(self.validation), self.train_config.eval_characters or USUAL_PART)
        cheap = 10 / 3 * scored / self.tokens_per_step
        return round(max(25, min(250, epoch), cheap))

    def choose_eval_tokens(self) -> int:
        """Return the most tokens that evaluations score; see `TrainConfig.eval_characters`.

        The first evaluation decides, from how much was trained by then. It is kept, so that losses
        can be compared, and a resumed run scores the same part.
        """
        asked, state = self.train_config.eval_characters, self.state
        if state.eval_tokens is None and state.evaluated_step is not None:
            state.eval_tokens = len(self.validation)  # a run that was begun before this was chosen
        if state.eval_tokens is None:
            tenth = 3 * state.step * self.tokens_per_step // 10  # of the time so far
            state.eval_tokens = asked or min(MOST_PART, max(WHOLE_PART, tenth))
        return state.eval_tokens
