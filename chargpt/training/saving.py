"""A trainer written to its run folder and read from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chargpt.base.checks import from_dict
from chargpt.base.errors import TrainingError, UserError
from chargpt.base.units import human_count
from chargpt.compute.world import World
from chargpt.config import CheckpointName
from chargpt.runs.checkpoint import MODEL, OPTIMIZER, STATE, read_state, save_checkpoint
from chargpt.runs.weights import (
    Tensors,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    read_tensors,
)
from chargpt.training.trainer import Trainer, TrainState


class Best(NamedTuple):
    """What a best checkpoint says about itself."""

    step: int
    val_loss: float


def saved_best(run: Path) -> Best | None:
    """Return the step and loss of the best checkpoint.

    Its step may be later than that of ``last/``, if the run was killed between two saves.
    """
    try:
        state = read_state(run / "best")
    except UserError:
        return None
    step, val_loss = state.get("step"), state.get("val_loss")
    return Best(step, val_loss) if type(step) is int and type(val_loss) is float else None


def save_best(trainer: Trainer) -> None:
    """Write the model that was just evaluated as the best one, unless a better one is there.

    Raises:
        TrainingError: it cannot be written, or contains NaN or infinity.
    """
    state = trainer.state
    saved = trainer.world.on_first(lambda: saved_best(trainer.out))
    if saved is None or state.val_loss is None or saved.val_loss >= state.val_loss:
        weights = {MODEL: model_tensors(trainer.model)}
        _save(trainer, "best", weights, {"step": state.step, "val_loss": state.val_loss})


def save_last(trainer: Trainer) -> None:
    """Write everything needed to resume from here.

    Raises:
        TrainingError: it cannot be written, or contains NaN or infinity.
    """
    trainer.state.scaler = trainer.scaler.state_dict()
    parts = {
        MODEL: model_tensors(trainer.model),
        OPTIMIZER: optimizer_tensors(trainer.optimizer, trainer.model),
    }
    _save(trainer, "last", parts, asdict(trainer.state))
    trainer.saved_step = trainer.state.step


def _save(
    trainer: Trainer, checkpoint: CheckpointName, parts: Mapping[str, Tensors], state: Any
) -> None:
    out, step = trainer.out, trainer.state.step
    if not trainer.world.is_first:
        return
    for name, tensor in (item for tensors in parts.values() for item in tensors.items()):
        # A sum takes a tenth of the time, and a NaN or an infinity always shows in it.
        if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            raise TrainingError(
                f"{name} is not finite after step {step}, so nothing was saved: the earlier "
                f"checkpoints are in {out}; continue with --resume, perhaps with --precision fp32"
            )
    try:
        save_checkpoint(out, checkpoint, parts, state)
    except (OSError, MemoryError) as error:
        if not out.exists():
            raise TrainingError(
                f"{out} has vanished, with all that was saved: train again"
            ) from error
        n_bytes = sum(t.nbytes for tensors in parts.values() for t in tensors.values())
        reason, remedy = "not enough memory", "close other programs"
        if isinstance(error, OSError):
            reason, remedy = error.strerror or str(error), "make room there, or make it writable"
        raise TrainingError(
            f"{out / checkpoint} could not be saved after step {step} ({reason}; it needs "
            f"{human_count(n_bytes)}B): earlier checkpoints are kept; {remedy}, and continue with "
            "--resume"
        ) from error


def send_model(model: torch.nn.Module, world: World) -> None:
    """Copy rank 0's weights into the models of the other ranks; weights must not be shared yet."""
    if world.size > 1:
        sent = world.send_tensors(model_tensors(model) if world.is_first else None)
        load_model_tensors(model, sent)


def restore_last(trainer: Trainer) -> None:
    """Put a trainer where `save_last` left the run; ``last/`` must have been verified.

    Raises:
        UserError: the checkpoint does not fit the model.
    """
    folder, scaler, world = trainer.out / "last", trainer.scaler, trainer.world

    def read(file: str) -> Tensors:
        """Return the tensors that rank 0 reads: other machines may not have the folder."""
        return world.send_tensors(read_tensors(folder / file) if world.is_first else None)

    load_model_tensors(trainer.model, read(MODEL))
    load_optimizer_tensors(trainer.optimizer, trainer.model, read(OPTIMIZER))
    trainer.state = state = world.on_first(lambda: from_dict(TrainState, read_state(folder)))
    trainer.saved_step = state.step
    if not trainer.optimizer.state and state.step > state.skipped_steps:
        raise UserError(f"{folder / OPTIMIZER} is empty: the run is damaged")
    state.skipped_in_a_row = 0
    if scaler.is_enabled() and state.scaler:
        if state.scaler.keys() != scaler.state_dict().keys():
            raise UserError(f"{folder / STATE} has an unknown kind of scaler: the run is damaged")
        scaler.load_state_dict(state.scaler)
