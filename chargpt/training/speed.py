"""How a model computes on this machine: kernels, attention, compilation.

Each is chosen before the first step, has a reason in one line, and a slower twin to fall back to.
No choice changes what is learned, except for rounding and for which values dropout drops.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, cast

import torch
from torch import Tensor

from chargpt.base.errors import UserError, is_out_of_memory
from chargpt.compute.device import CompileChoice, choose_compile
from chargpt.compute.fast_layers import (
    Backend,
    set_attention,
    use_fast_dropout,
    use_kernels,
)
from chargpt.compute.native import KernelsError, library_path, load_kernels
from chargpt.compute.step import use_fast_updates
from chargpt.config import Attention, GPT2Config, OnOffAuto
from chargpt.training.trainer import Trainer

SDPA_MIN_BLOCK = 1024  # below it, the textbook's matrix products are faster on a CPU
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)

Report = Callable[[str], None]


class SpeedChoices(NamedTuple):
    """How a model computes; another choice rounds differently."""

    kernels: str  # the library's name, which stands for its sources and the processor; or "off"
    attention: Backend
    compiled: bool


def accelerate(trainer: Trainer, report: Report) -> SpeedChoices:
    """Make a trainer's steps as fast as its configuration allows, and report each choice.

    It changes the model and `forward`, before the first step. The seconds it takes count as
    compilation, which is part of training.

    Raises:
        UserError: kernels were requested and do not work here.
    """
    start = time.perf_counter()
    if trainer.device.type == "cpu":
        keep_memory()
    compiling = choose_compile(trainer.train_config.compile, trainer.device)
    if trainer.parallel.device_ids:
        compiling = CompileChoice(False, "not over several GPUs in one process")
    kernels, attention = _choose_layers(trainer, report, compiling=compiling.on)
    compiled = _compile(trainer, compiling, report)
    if compiling.on and not compiled:
        kernels, attention = _choose_layers(trainer, report, compiling=False)
    seconds = time.perf_counter() - start
    trainer.state.compile_seconds += seconds
    trainer.state.train_seconds += seconds
    library = library_path().stem if kernels.on else "off"
    return SpeedChoices(kernels=library, attention=attention.backend, compiled=compiled)


def _choose_layers(
    trainer: Trainer, report: Report, *, compiling: bool
) -> tuple[KernelsChoice, AttentionChoice]:
    train_config, model, device = trainer.train_config, trainer.model, trainer.device
    use_fast_dropout(model)
    kernels = choose_kernels(train_config.kernels, device, compiling)
    if kernels.on:
        use_kernels(model)
        use_fast_updates(trainer.optimizer)
    report(f"kernels    {'on' if kernels.on else 'off'} ({kernels.reason})")
    attention = choose_attention(train_config.attention, model.config, device, kernels=kernels.on)
    set_attention(model, attention.backend)
    report(f"attention  {attention.backend} ({attention.reason})")
    return kernels, attention


def keep_memory() -> None:
    """Keep freed memory in the process, where the C library allows it (glibc).

    Every step frees its activations. Returning them to the system and getting zeroed pages again
    costs a tenth of a step.
    """
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


# --- kernels


class KernelsChoice(NamedTuple):
    """Whether to use the kernels of `chargpt.compute.native`."""

    on: bool
    reason: str


def choose_kernels(setting: OnOffAuto, device: torch.device, compiling: bool) -> KernelsChoice:
    """Return whether to use the kernels; they are compiled to find out.

    Raises:
        UserError: they were requested and do not work here.
    """
    if setting == "off":
        return KernelsChoice(False, "asked for")
    if device.type != "cpu":
        reason = f"they are for CPUs, and this is {device.type}"
    elif compiling:
        reason = "torch.compile makes its own"
    elif setting == "auto" and not sys.platform.startswith("linux"):
        reason = "they were tried on Linux only; --kernels on tries them here"
    else:
        known = library_path().exists()
        start = time.perf_counter()
        try:
            load_kernels()
            seconds = time.perf_counter() - start
            how = "compiled before" if known else f"compiled for this processor in {seconds:.1f} s"
            return KernelsChoice(True, how)
        except KernelsError as error:
            reason = f"they cannot be compiled here: {error}"
    if setting == "on":
        raise UserError(f"kernels is 'on', but {reason}: give --kernels auto")
    return KernelsChoice(False, reason)


# --- attention


class AttentionChoice(NamedTuple):
    """How attention computes."""

    backend: Backend
    reason: str


def choose_attention(
    setting: Attention, model_config: GPT2Config, device: torch.device, *, kernels: bool
) -> AttentionChoice:
    """Return how attention computes in training.

    The rule is what ``benchmarks/attention.py`` measured. It is a rule and not a measurement made
    now, so that a seed gives the same run every time. `kernels`: whether they are on.

    Raises:
        UserError: ``native`` was requested, and the kernels are off or do not fit the shape.
    """
    head_size = model_config.d_model // model_config.n_head
    fits = kernels and head_size % load_kernels().lanes == 0
    if setting == "native" and not fits:
        why = f"do not take heads of {head_size}" if kernels else "are off"
        raise UserError(f"attention is 'native', and the kernels {why}: give --attention auto")
    if setting != "auto":
        return AttentionChoice(setting, "asked for")
    if device.type != "cpu":
        return AttentionChoice("sdpa", "PyTorch's fused kernel")
    if fits:
        return AttentionChoice("native", "the fastest on a CPU")
    dropout = model_config.attention_dropout
    drops = (model_config.dropout if dropout is None else dropout) > 0
    backend: Backend = "matmul" if drops or model_config.block_size < SDPA_MIN_BLOCK else "sdpa"
    return AttentionChoice(backend, "the fastest of PyTorch's on a CPU, at this block_size")


# --- compilation


def _compile(trainer: Trainer, choice: CompileChoice, report: Report) -> bool:
    """Compile the model if that was chosen; return whether a trial step worked."""
    if not choice.on:
        report(f"compile    off ({choice.reason})")
        return False
    eager = trainer.forward
    try:
        trainer.forward = cast(Callable[[Tensor], Tensor], torch.compile(trainer.model))
        trainer.trial_step()
        report(f"compile    on ({choice.reason})")
        return True
    except Exception as error:
        if is_out_of_memory(error):
            raise
        trainer.forward = eager
        first_line = str(error).strip().partition("\n")[0][:200]
        report(f"compile    failed, continuing without ({type(error).__name__}: {first_line})")
        return False
