"""What the processes of tests/test_distributed.py run: ``parity`` or ``train``.

The test process calls `measure` itself, alone, for the reference.
"""

import hashlib
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chargpt import train as training
from chargpt.compute.parallel import accumulating
from chargpt.compute.sharding import gathered
from chargpt.compute.world import World, joined_world
from chargpt.config import DataConfig, GPT2Config, TrainConfig
from chargpt.train import train_step
from chargpt.training.plan import make_plan
from chargpt.training.trainer import Trainer

SHAPE = GPT2Config(block_size=32, n_layer=2, n_head=2, d_model=32, dropout=0.0)
RECIPE = TrainConfig(
    steps=100, batch_size=7, learning_rate=1e-3, muon_learning_rate=5e-3, precision="fp32",
    device="cpu",
)  # fmt: skip


@dataclass
class Measured:
    """What a job computed, the same on every rank."""

    gradients: dict[str, torch.Tensor]  # of the first step, before clipping
    losses: list[float]
    batches: str  # SHA-256 of all sequences of the first steps, in order


def trainer_for(text: str, world: World, dropout: float = 0.0, **changes: Any) -> Trainer:
    plan = make_plan(
        [text],
        model_config=SHAPE.replace(dropout=dropout),
        train_config=RECIPE.replace(**changes),
        data_config=DataConfig(),
        out=Path("unused"),
        resuming=False,
        world=world,
    )
    return plan.trainer


def measure(text: str, world: World, n_steps: int, **changes: Any) -> Measured:
    trainer = trainer_for(text, world, **changes)
    gradients = first_gradients(trainer)
    digest, losses = hashlib.sha256(), []
    for _ in range(n_steps):
        for micro_step in range(trainer.train_config.gradient_accumulation_steps):
            digest.update(all_sequences(trainer, micro_step).numpy().tobytes())
        losses.append(train_step(trainer).loss)
        trainer.state.step += 1
    return Measured(gradients, losses, digest.hexdigest())


def first_gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    n = trainer.train_config.gradient_accumulation_steps
    for micro_step in range(n):
        with accumulating(trainer.forward, trainer.parallel, is_last=micro_step == n - 1):
            (trainer.loss(trainer.batch(micro_step), micro_step) / n).backward()
    gradients = {
        name: gathered(parameter.grad).clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }
    trainer.optimizer.zero_grad()
    return gradients


def all_sequences(trainer: Trainer, micro_step: int) -> torch.Tensor:
    """Return the inputs of all ranks, in order."""
    own = trainer.batch(micro_step).inputs
    if trainer.world.size == 1:
        return own
    parts: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(parts, own)
    return torch.cat(parts)


def parity(text: str, out: str, settings: str, n_steps: str) -> None:
    """Measure each of several settings, a JSON list of changes."""
    with joined_world() as world:
        results = [measure(text, world, int(n_steps), **s) for s in json.loads(settings)]
        if world.is_first:
            torch.save([vars(result) for result in results], out)


def train(faults: str, *arguments: str) -> None:
    """Run `chargpt train`; a fault is ``KIND:RANK:STEP[:ATTEMPT]``, with KIND kill or raise."""
    step, attempt = training.train_step, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")

    def faulty_step(trainer: Trainer, *rest: Any) -> Any:
        for fault in faults.split():
            kind, rank, number, when = [*fault.split(":"), "0"][:4]
            here = trainer.world.rank == int(rank) and trainer.state.step == int(number)
            if here and when == attempt:
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise KeyError("a bug on one rank")
        return step(trainer, *rest)

    training.train_step = faulty_step
    from chargpt.cli.main import main

    main(["train", *arguments])


if __name__ == "__main__":
    {"parity": parity, "train": train}[sys.argv[1]](*sys.argv[2:])
