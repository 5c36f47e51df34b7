"""Who takes part in `chargpt bench`: chargpt, Hugging Face's GPT-2, a local clone of nanoGPT.

Where chargpt uses its kernels, it takes part without them, too: they should never lose.
All take turns, so that a slow phase of the machine affects all of them alike.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chargpt.base.checks import did_you_mean
from chargpt.base.errors import TrainingError, UserError, is_out_of_memory
from chargpt.base.units import human_count
from chargpt.base.version import __version__
from chargpt.compute.device import PrecisionChoice, choose_device, cpu_name, describe_device
from chargpt.config import Device, GPT2Config
from chargpt.training.trainer import Trainer

OWN, PYTORCH, NANOGPT = "chargpt", "PyTorch's layers", "nanoGPT"
NANOGPT_CONFIG = Path("config", "train_shakespeare_char.py")
NANOGPT_SETTLING, NANOGPT_MIN_STEPS = 5, 10  # it also leaves out its own first five steps
_NANOGPT_TIME = re.compile(r"^iter \d+: loss \S+, time ([\d.]+)ms", re.MULTILINE)


class Figures(NamedTuple):
    """A contender's ``characters_per_second``, ``…_min`` and ``…_max``; chargpt's ratio to it."""

    speed: dict[str, float]
    times: float


def compare(
    jobs: Mapping[str, Callable[[], float]],
    n_characters: int,
    rounds: int,
    report: Callable[[str], None],
) -> dict[str, Figures]:
    """Let chargpt and others take turns at a job, which returns its seconds; report each turn."""
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(1, rounds + 1):
        for name, job in jobs.items():
            rate = n_characters / job()
            rates[name].append(rate)
            report(f"round {number} of {rounds}: {name}: {human_count(rate)} characters/s")
    figures = {}
    for name, its in rates.items():
        ends = {"": statistics.median(its), "_min": min(its), "_max": max(its)}
        speed = {f"characters_per_second{end}": rate for end, rate in ends.items()}
        ratios = [own / rate for own, rate in zip(rates[OWN], its, strict=True)]
        figures[name] = Figures(speed, statistics.median(ratios))
    return figures


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the device, the processor, the threads and the versions."""
    return {
        "device": describe_device(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "chargpt": __version__,
        "torch": torch.__version__,
    }


def heading(machine: Mapping[str, Any], rows: Sequence[tuple[str, str]]) -> list[str]:
    """Return the lines above a table: the machine, further rows, an empty line."""
    device = f"{machine['device']} ({machine['cpu']})"
    rows = [("device", device), ("torch", machine["torch"]), *rows]
    return [*(f"{name:<15}{value}" for name, value in rows), ""]


@contextmanager
def enough_memory(device: Device, remedy: str) -> Iterator[None]:
    """Turn "out of memory" into a TrainingError of one line: give a lower `remedy`."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        where = describe_device(choose_device(device).device)
        raise TrainingError(f"out of memory on {where}: give a lower {remedy}") from error


# --- Hugging Face

_ACTIVATIONS = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu_squared": "relu2"}


def hugging_face_model(config: GPT2Config, device: torch.device) -> Any:
    """Return an untrained ``GPT2LMHeadModel``; ImportError without the package transformers."""
    transformers = importlib.import_module("transformers")
    activation = config.activation_function
    its_config = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.d_model,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.d_ff,
        activation_function=_ACTIVATIONS.get(activation, activation),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(its_config)
    model.loss_type = "ForCausalLM"  # its default, which it would otherwise warn about
    return model.to(device)


class HuggingFace:
    """``GPT2LMHeadModel`` with fused AdamW and clipping; always pre-norm and with biases.

    The trainer gives shape and batches, and counts the steps. The model is compiled if the
    trainer's is and torch.compile works. Without the package transformers: ImportError.
    """

    def __init__(self, trainer: Trainer, precision: PrecisionChoice) -> None:
        self.trainer, self.precision = trainer, precision
        self.model = hugging_face_model(trainer.model.config, trainer.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        enabled = precision.name == "fp16"
        self.scaler = torch.amp.GradScaler(trainer.device.type, enabled=enabled)
        self.forward: Callable[..., Any] = self.model
        self.name = f"Hugging Face GPT-2, {precision.name}"
        if trainer.forward is not trainer.model:
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
            inputs = trainer.batch(micro_step).inputs  # (B, T)
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
        trainer.state.step += 1


# --- nanoGPT


def find_clone(peers: Sequence[str]) -> Path | None:
    """Return the folder of the last ``nanogpt=folder``; None: there are no peers.

    Raises:
        UserError: an unknown name, or a folder that lacks a file.
    """
    clone = None
    for peer in peers:
        name, _, folder = peer.partition("=")
        if name != "nanogpt":
            raise UserError(
                f"--peer {peer}: unknown name {name!r}{did_you_mean(name, ['nanogpt'])}"
            )
        if not folder:
            raise UserError(f"--peer {peer} names no folder: give --peer {name}=FOLDER")
        clone = Path(folder).expanduser()
        for file in ("train.py", NANOGPT_CONFIG):
            if not (clone / file).is_file():
                remedy = "give the folder of a clone of nanoGPT"
                raise UserError(f"--peer {peer} has no {file}: {remedy}")
    return clone


def nanogpt_shape(config: GPT2Config) -> dict[str, int]:
    """Return a shape in nanoGPT's names."""
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head")}
    return {**shape, "n_embd": config.d_model}


def run_clone(
    clone: Path, script: str, arguments: Sequence[str], files: Mapping[str, bytes] | None = None
) -> tuple[str, list[float]]:
    """Run Python in a copy of a clone of nanoGPT with further files, on as many threads as here.

    Returns:
        What it printed, and the seconds of each iteration.

    Raises:
        UserError: it failed; the message names the script and has its last line.
    """
    torch.cuda.empty_cache()  # the clone may need the memory; without a GPU this does nothing
    with tempfile.TemporaryDirectory() as folder:
        sources = (*clone.glob("*.py"), *clone.glob("config/*.py"))
        copies = {str(file.relative_to(clone)): file.read_bytes() for file in sources}
        for name, content in {**copies, **(files or {})}.items():
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env=_clone_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
    times = [float(ms) / 1000 for ms in _NANOGPT_TIME.findall(done.stdout)]
    reason = "" if times else "it printed no times of its iterations"
    if done.returncode:
        output = done.stderr.strip() or done.stdout.strip() or "it printed nothing"
        reason = output.splitlines()[-1]
    if reason:
        raise UserError(f"{clone / script} failed ({reason}): check whether it runs on its own")
    return done.stdout, times


def _clone_environment() -> dict[str, str]:
    """Return this environment without what chargpt sets for itself, and with its threads."""
    others = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    return {**others, "OMP_NUM_THREADS": str(torch.get_num_threads())}


class NanoGPT:
    """Training with a clone of nanoGPT; biases, precision and optimizer are its own.

    The trainer gives shape, batches and text. The expected seconds per step set the length of the
    first measurement.
    """

    def __init__(self, clone: Path, trainer: Trainer, step_seconds: float) -> None:
        self.clone, self.trainer, self._step_seconds = clone, trainer, step_seconds
        tokens = trainer.windows.tokens
        data = "data/shakespeare_char"
        self._files = {
            f"{data}/train.bin": tokens.astype("uint16").tobytes(),
            f"{data}/val.bin": trainer.validation.astype("uint16").tobytes(),
            f"{data}/meta.pkl": pickle.dumps({"vocab_size": trainer.model.config.vocab_size}),
        }

    def step_seconds(self, seconds: float) -> float:
        """Train for about `seconds` after a warm-up; return the median seconds of a step."""
        n_steps = max(NANOGPT_MIN_STEPS, round(seconds / self._step_seconds))
        _, times = self.train(NANOGPT_SETTLING + n_steps)
        # Its clock shows less than 0.01 ms as 0, which would make the next division fail.
        self._step_seconds = max(1e-6, statistics.median(times[NANOGPT_SETTLING:] or times))
        return self._step_seconds

    def train(self, max_iters: int, **changes: object) -> tuple[str, list[float]]:
        """Run ``train.py`` with changed settings of nanoGPT; see `run_clone`."""
        model_config, train_config = self.trainer.model.config, self.trainer.train_config
        device = self.trainer.device.type
        settings = {
            "device": device,
            "compile": device == "cuda",
            "eval_iters": 1,
            "eval_interval": 1_000_000_000,
            "log_interval": 1,
            "always_save_checkpoint": False,
            "gradient_accumulation_steps": train_config.gradient_accumulation_steps,
            "batch_size": train_config.batch_size,
            **nanogpt_shape(model_config),
            "dropout": float(model_config.dropout),  # nanoGPT checks the type against its default
            "max_iters": max_iters,
            **changes,
        }
        flags = (f"--{name}={value}" for name, value in settings.items())
        arguments = ["train.py", str(NANOGPT_CONFIG), *flags]
        return run_clone(self.clone, "train.py", arguments, self._files)
