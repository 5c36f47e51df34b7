"""What `chargpt bench` measures: chargpt itself, and others that train the same shape beside it.

Each is a `Runner`, so that all of them can take turns: a slow spell of the machine then hits all.
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
from typing import Any, Protocol

import torch

from chargpt.base.checks import check_names
from chargpt.base.errors import UserError
from chargpt.compute.device import PrecisionChoice
from chargpt.config import GPT2Config
from chargpt.measure.timing import median_seconds
from chargpt.train import train_step
from chargpt.training.trainer import Trainer

PEERS = ("nanogpt",)
NANOGPT_CONFIG = Path("config", "train_shakespeare_char.py")
NANOGPT_SETTLING, NANOGPT_MIN_STEPS = 5, 10  # it leaves its own first five out, too
_NANOGPT_LINE = re.compile(r"^iter (\d+): loss \S+, time ([\d.]+)ms", re.MULTILINE)


class Runner(Protocol):
    """Something that trains with the shape and the batch of a `Trainer`."""

    name: str
    """What it is and what it computes in."""

    def measure(self, seconds: float) -> float:
        """Train for about `seconds`, warm-up apart; return the median seconds of a step."""


class Own:
    """chargpt, by the step that `chargpt train` makes."""

    name = "chargpt"

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        trainer.model.train()

    def measure(self, seconds: float) -> float:
        """See `Runner`."""
        return median_seconds(self._step, seconds, self.trainer.device)

    def _step(self) -> None:
        train_step(self.trainer)
        self.trainer.state.step += 1


# --- Hugging Face

_ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu_squared": "relu2"}


def hugging_face(trainer: Trainer, *, compiled: bool) -> list[Runner]:
    """Return Hugging Face's GPT-2 in each precision worth trying; none: it is not installed.

    Args:
        trainer: whose shape, batches and precision to take.
        compiled: put it through torch.compile, too.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        return []
    fp32 = PrecisionChoice("fp32", "the weights' own")
    precisions = {choice.name: choice for choice in (fp32, trainer.precision)}
    return [
        HuggingFace(trainer, precision, transformers, compiled=compiled)
        for precision in precisions.values()
    ]


class HuggingFace:
    """``GPT2LMHeadModel`` with AdamW (fused) and clipping; always pre-norm and with biases.

    Args:
        trainer: whose shape and batches to take.
        precision: of its matrix products.
        transformers: the module.
        compiled: put it through torch.compile, if that works.
    """

    def __init__(
        self, trainer: Trainer, precision: PrecisionChoice, transformers: Any, *, compiled: bool
    ) -> None:
        self.trainer, self.precision = trainer, precision
        self.model = (
            hugging_face_model(trainer.model.config, transformers).to(trainer.device).train()
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        enabled = precision.name == "fp16"
        self.scaler = torch.amp.GradScaler(trainer.device.type, enabled=enabled)
        self.forward: Callable[..., Any] = self.model
        self.name = f"Hugging Face GPT-2, {precision.name}"
        self._step_number = 0
        if compiled:
            self._compile()

    def measure(self, seconds: float) -> float:
        """See `Runner`."""
        return median_seconds(self._step, seconds, self.trainer.device)

    def _compile(self) -> None:
        self.forward = torch.compile(self.model)
        try:
            self._step()
            self.name += ", compiled"
        except Exception:
            self.optimizer.zero_grad()
            self.forward = self.model
            self.name += ", not compiled"

    def _step(self) -> None:
        trainer, config = self.trainer, self.trainer.train_config
        total = torch.zeros((), device=trainer.device)
        for micro_step in range(config.gradient_accumulation_steps):
            first = self._step_number * trainer.sequences_per_step + micro_step * config.batch_size
            inputs = trainer.windows.batch(first, config.batch_size).inputs  # (B, T)
            inputs = inputs.to(trainer.device)
            with self.precision.autocast(trainer.device):
                loss = self.forward(
                    input_ids=inputs, labels=inputs, use_cache=False
                ).loss  # it shifts them itself
            loss = loss / config.gradient_accumulation_steps
            self.scaler.scale(loss).backward()
            total += loss.detach()
        if config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        float(total)  # read, as every training loop that reports its loss does
        self._step_number += 1


def hugging_face_model(shape: GPT2Config, transformers: Any) -> Any:
    """Return a ``GPT2LMHeadModel`` of a shape, untrained.

    Args:
        shape: its activation must be one that Hugging Face has.
        transformers: the module.
    """
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.block_size,
        n_embd=shape.d_model,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_inner=shape.d_ff,
        activation_function=_ACTIVATIONS.get(shape.activation_function, shape.activation_function),
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # what it falls back on, with a warning
    return model


# --- a local clone of nanoGPT


def parse_peers(given: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each peer, by its name.

    Args:
        given: each ``name=folder``.

    Raises:
        UserError: an unknown name, or a folder that does not hold what it should.
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


def copy_clone(clone: Path, folder: Path) -> None:
    """Copy what a clone of nanoGPT runs to an empty folder."""
    for file in (*clone.glob("*.py"), *clone.glob("config/*.py")):
        copy = folder / file.relative_to(clone)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


class NanoGPT:
    """A clone of nanoGPT, run as it is in a process of its own; nothing is written to the clone.

    Its biases, precision and optimizer are its own choice.

    Args:
        clone: the folder with its ``train.py``.
        trainer: whose shape, batches and text to take.
        folder: an empty one to run it in.
        guess: seconds that a step of it may take, for the length of the first measurement.
    """

    def __init__(self, clone: Path, trainer: Trainer, folder: Path, guess: float) -> None:
        self.name = "nanoGPT"
        self.clone, self.trainer, self.folder = clone, trainer, folder
        self._step_seconds = guess
        copy_clone(clone, folder)
        self._write_text()

    def measure(self, seconds: float) -> float:
        """See `Runner`; this process sleeps meanwhile.

        Raises:
            UserError: the clone does not train.
        """
        torch.cuda.empty_cache()  # the clone may need the room; without a GPU this does nothing
        n_steps = max(NANOGPT_MIN_STEPS, round(seconds / self._step_seconds))
        done = subprocess.run(
            self._command(NANOGPT_SETTLING + n_steps),
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True,
            text=True,
            check=False,
        )
        times = [float(ms) / 1000 for _, ms in _NANOGPT_LINE.findall(done.stdout)]
        if done.returncode or len(times) <= NANOGPT_SETTLING:
            said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
            raise UserError(f"{self.clone / 'train.py'} failed ({said}): see whether it runs alone")
        # Fine clocks show less than 0.01 ms as 0: a model so small is not to stop the division.
        self._step_seconds = max(1e-6, statistics.median(times[NANOGPT_SETTLING:]))
        return self._step_seconds

    def _command(self, max_iters: int) -> list[str]:
        shape, config, device = (
            self.trainer.model.config,
            self.trainer.train_config,
            self.trainer.device,
        )
        flags = {
            "device": device.type,
            "compile": device.type == "cuda",
            "eval_iters": 1,
            "eval_interval": 1_000_000_000,
            "log_interval": 1,
            "always_save_checkpoint": False,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "batch_size": config.batch_size,
            "block_size": shape.block_size,
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "n_embd": shape.d_model,
            "dropout": float(shape.dropout),  # its flags want the type of its own default
            "max_iters": max_iters,
        }
        words = [f"--{name}={value}" for name, value in flags.items()]
        return [sys.executable, "train.py", str(NANOGPT_CONFIG), *words]

    def _write_text(self) -> None:
        data = self.folder / "data" / "shakespeare_char"
        data.mkdir(parents=True)
        tokens = self.trainer.windows.tokens.numpy().astype("uint16")
        tokens.tofile(data / "train.bin")
        tokens.tofile(data / "val.bin")
        meta = {"vocab_size": self.trainer.model.config.vocab_size}
        (data / "meta.pkl").write_bytes(pickle.dumps(meta))
