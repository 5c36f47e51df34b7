"""Who takes part in `chargpt bench`: chargpt, Hugging Face's GPT-2, a local clone of nanoGPT.

All take turns, so that a slow phase of the machine affects all of them alike.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
import torch

from chargpt.base.checks import check_names
from chargpt.base.errors import UserError
from chargpt.base.units import human_count
from chargpt.compute.device import PrecisionChoice
from chargpt.config import GPT2Config
from chargpt.train import train_step
from chargpt.training.trainer import Trainer

OWN, NANOGPT = "chargpt", "nanoGPT"
PEERS = ("nanogpt",)
NANOGPT_CONFIG = Path("config", "train_shakespeare_char.py")
NANOGPT_SETTLING, NANOGPT_MIN_STEPS = 5, 10  # it also leaves out its own first five steps
_NANOGPT_LINE = re.compile(r"^iter (\d+): loss \S+, time ([\d.]+)ms", re.MULTILINE)


# --- turns


class Contender(NamedTuple):
    """One of those who are compared."""

    name: str
    measure: Callable[[], float]
    """Take one turn and return the speed, in characters per second."""


Rates = dict[str, list[float]]
"""Characters per second in each round, by the contender's name."""


def take_turns(
    contenders: Sequence[Contender], rounds: int, report: Callable[[str], None]
) -> Rates:
    """Measure each contender once per round, and report a line after each turn."""
    rates: Rates = {contender.name: [] for contender in contenders}
    for number in range(1, rounds + 1):
        for name, measure in contenders:
            rate = measure()
            rates[name].append(rate)
            report(f"round {number} of {rounds}: {name}: {human_count(rate)} characters/s")
    return rates


def summary(rates: Sequence[float]) -> dict[str, float]:
    """Return the median, the lowest and the highest speed of the rounds."""
    return {
        "characters_per_second": statistics.median(rates),
        "characters_per_second_min": min(rates),
        "characters_per_second_max": max(rates),
    }


def ratio(rates: Rates, other: str | None) -> float | None:
    """Return the median of the rounds' ratios of chargpt's speed to another's; None without it."""
    if other is None or other not in rates:
        return None
    return statistics.median(a / b for a, b in zip(rates[OWN], rates[other], strict=True))


# --- chargpt


def own_step(trainer: Trainer) -> Callable[[], None]:
    """Return a function that trains for one step, as `chargpt train` does."""
    trainer.model.train()

    def step() -> None:
        train_step(trainer)
        trainer.state.step += 1

    return step


# --- Hugging Face

_ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu_squared": "relu2"}


def hugging_face_model(config: GPT2Config, device: torch.device) -> Any:
    """Return an untrained ``GPT2LMHeadModel`` of a shape.

    Raises:
        ImportError: the package transformers is not installed.
    """
    transformers = importlib.import_module("transformers")
    its_config = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.d_model,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.d_ff,
        activation_function=_ACTIVATIONS.get(
            config.activation_function, config.activation_function
        ),
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(its_config)
    model.loss_type = "ForCausalLM"  # its default, which it would otherwise warn about
    return model.to(device)


def hugging_face_trainers(trainer: Trainer, *, compiled: bool) -> list[HuggingFace]:
    """Return Hugging Face's GPT-2 in fp32 and in the trainer's precision.

    The list is empty if the package transformers is not installed.
    """
    fp32 = PrecisionChoice("fp32", "the precision of the weights")
    precisions = {choice.name: choice for choice in (fp32, trainer.precision)}
    try:
        return [HuggingFace(trainer, p, compiled=compiled) for p in precisions.values()]
    except ImportError:
        return []


class HuggingFace:
    """``GPT2LMHeadModel`` with fused AdamW and clipping; always pre-norm and with biases.

    Args:
        trainer: gives shape and batches.
        precision: precision of the matrix products.
        compiled: use torch.compile if it works.

    Raises:
        ImportError: the package transformers is not installed.
    """

    def __init__(self, trainer: Trainer, precision: PrecisionChoice, *, compiled: bool) -> None:
        self.trainer, self.precision = trainer, precision
        self.model = hugging_face_model(trainer.model.config, trainer.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        enabled = precision.name == "fp16"
        self.scaler = torch.amp.GradScaler(trainer.device.type, enabled=enabled)
        self.forward: Callable[..., Any] = self.model
        self.name = f"Hugging Face GPT-2, {precision.name}"
        self._step_number = 0
        if compiled:
            self._compile()

    def _compile(self) -> None:
        self.forward = torch.compile(self.model)
        try:
            self.step()
            self.name += ", compiled"
        except Exception:
            self.optimizer.zero_grad()
            self.forward = self.model
            self.name += ", not compiled"

    def step(self) -> None:
        """Train for one step."""
        trainer, config = self.trainer, self.trainer.train_config
        total = torch.zeros((), device=trainer.device)
        for micro_step in range(config.gradient_accumulation_steps):
            first = self._step_number * trainer.sequences_per_step + micro_step * config.batch_size
            inputs = trainer.windows.batch(first, config.batch_size).inputs  # (B, T)
            inputs = inputs.to(trainer.device)
            with self.precision.autocast(trainer.device):
                output = self.forward(input_ids=inputs, labels=inputs, use_cache=False)
            loss = output.loss / config.gradient_accumulation_steps  # it shifts the labels itself
            self.scaler.scale(loss).backward()
            total += loss.detach()
        if config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        float(total)  # read the loss, as every training loop does that reports it
        self._step_number += 1


# --- nanoGPT


def parse_peers(given: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each peer by its name.

    Args:
        given: each ``name=folder``.

    Raises:
        UserError: an unknown name, or a folder that lacks a file.
    """
    peers: dict[str, Path] = {}
    for peer in given:
        name, _, folder = peer.partition("=")
        try:
            check_names([name], PEERS)
        except UserError as error:
            raise UserError(f"--peer {peer}: {error}") from error
        if not folder:
            raise UserError(f"--peer {peer} names no folder: give --peer {name}=FOLDER")
        peers[name] = Path(folder).expanduser()
        for file in (Path("train.py"), NANOGPT_CONFIG):
            if not (peers[name] / file).is_file():
                raise UserError(
                    f"--peer {peer} has no {file}: give the folder of a clone of nanoGPT"
                )
    return peers


class Clone:
    """A copy of a clone of nanoGPT in an empty folder; nothing is written to the clone itself."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder
        for file in (*source.glob("*.py"), *source.glob("config/*.py")):
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)

    def run(self, script: str, arguments: Sequence[str]) -> str:
        """Run Python in the copy, with as many threads as here, and return what it printed.

        Raises:
            UserError: it failed; the message names the script and has its last line.
        """
        torch.cuda.empty_cache()  # the clone may need the memory; without a GPU this does nothing
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            output = done.stderr.strip() or done.stdout.strip() or "it printed nothing"
            raise self.failure(script, output.splitlines()[-1])
        return done.stdout

    def failure(self, script: str, reason: str) -> UserError:
        """Return the error for a script that did not do its work."""
        file = self.source / script
        return UserError(f"{file} failed ({reason}): check whether it runs on its own")


class NanoGPT:
    """Training with a clone of nanoGPT; biases, precision and optimizer are its own.

    Args:
        clone: the clone.
        trainer: gives shape, batches and text.
        folder: an empty folder to run it in.
        guess: expected seconds per step, which set the length of the first measurement.
        validation: token ids to validate on, (m,); default: the training text.
    """

    def __init__(
        self,
        clone: Path,
        trainer: Trainer,
        folder: Path,
        guess: float,
        validation: npt.NDArray[Any] | None = None,
    ) -> None:
        self.clone, self.trainer = Clone(clone, folder), trainer
        self._step_seconds = guess
        data = folder / "data" / "shakespeare_char"
        data.mkdir(parents=True)
        tokens = trainer.windows.tokens.numpy()
        tokens.astype("uint16").tofile(data / "train.bin")
        (tokens if validation is None else validation).astype("uint16").tofile(data / "val.bin")
        meta = {"vocab_size": trainer.model.config.vocab_size}
        (data / "meta.pkl").write_bytes(pickle.dumps(meta))

    def step_seconds(self, seconds: float) -> float:
        """Train for about `seconds` after a warm-up; return the median seconds of a step.

        Raises:
            UserError: the clone does not train.
        """
        n_steps = max(NANOGPT_MIN_STEPS, round(seconds / self._step_seconds))
        output = self.train(NANOGPT_SETTLING + n_steps)
        times = [float(ms) / 1000 for _, ms in _NANOGPT_LINE.findall(output)]
        if len(times) <= NANOGPT_SETTLING:
            raise self.clone.failure("train.py", "it printed no times of its iterations")
        # Its clock shows less than 0.01 ms as 0, which would make the next division fail.
        self._step_seconds = max(1e-6, statistics.median(times[NANOGPT_SETTLING:]))
        return self._step_seconds

    def train(self, max_iters: int, **changes: object) -> str:
        """Run ``train.py`` and return its output, which has a line for each iteration.

        `changes` replace settings of nanoGPT that a measurement of speed uses.

        Raises:
            UserError: the clone does not train.
        """
        model_config, train_config = self.trainer.model.config, self.trainer.train_config
        device = self.trainer.device
        settings = {
            "device": device.type,
            "compile": device.type == "cuda",
            "eval_iters": 1,
            "eval_interval": 1_000_000_000,
            "log_interval": 1,
            "always_save_checkpoint": False,
            "gradient_accumulation_steps": train_config.gradient_accumulation_steps,
            "batch_size": train_config.batch_size,
            "block_size": model_config.block_size,
            "n_layer": model_config.n_layer,
            "n_head": model_config.n_head,
            "n_embd": model_config.d_model,
            "dropout": float(model_config.dropout),  # nanoGPT checks the type against its default
            "max_iters": max_iters,
            **changes,
        }
        flags = [f"--{name}={value}" for name, value in settings.items()]
        return self.clone.run("train.py", ["train.py", str(NANOGPT_CONFIG), *flags])
