"""How a model computes on this machine: kernels, attention backend, compilation.

Each is chosen before the first step, says why in one line, and has a slower twin to fall back to.
None changes what is learned, but for rounding and for which values dropout drops.
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
    fast_muon_update,
    set_attention,
    use_fast_dropout,
    use_kernels,
)
from chargpt.compute.muon import MuonAdamW
from chargpt.compute.native import KernelsError, library_path, load_kernels
from chargpt.config import Attention, GPT2Config, OnOffAuto
from chargpt.training.trainer import Trainer

Note = Callable[[str], None]


class SpeedChoices(NamedTuple):
    """How a model computes; another choice rounds differently."""

    kernels: str
    """The library's name, which stands for its sources and the processor; or "off"."""
    attention: Backend
    compiled: bool


SDPA_MIN_BLOCK = 1024  # below it, the textbook's matrix products are faster on a CPU
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)


def prepare(trainer: Trainer, note: Note) -> SpeedChoices:
    """Make a trainer's steps as fast as its configuration allows.

    The seconds it takes are counted as compilation, which is a part of training.

    Args:
        trainer: before its first step; its model and `forward` are changed.
        note: takes lines for the user.

    Returns:
        What was chosen.

    Raises:
        UserError: kernels were asked for, and there are none here.
    """
    start = time.perf_counter()
    if trainer.device.type == "cpu":
        keep_memory()
    compiling = choose_compile(trainer.train_config.compile, trainer.device)
    if trainer.parallel.device_ids:
        compiling = CompileChoice(False, "not over several GPUs in one process")
    kernels, attention = _choose_layers(trainer, note, compiling=compiling.on)
    compiled = _compile(trainer, compiling, note)
    if compiling.on and not compiled:
        kernels, attention = _choose_layers(trainer, note, compiling=False)
    seconds = time.perf_counter() - start
    trainer.state.compile_seconds += seconds
    trainer.state.train_seconds += seconds
    library = library_path().stem if kernels.on else "off"
    return SpeedChoices(kernels=library, attention=attention.backend, compiled=compiled)


def _choose_layers(
    trainer: Trainer, note: Note, *, compiling: bool
) -> tuple[KernelsChoice, AttentionChoice]:
    config, model, device = trainer.train_config, trainer.model, trainer.device
    kernels = choose_kernels(config.kernels, device, compiling)
    if kernels.on:
        use_kernels(model)
        if isinstance(trainer.optimizer, MuonAdamW):
            trainer.optimizer.update = fast_muon_update
    note(f"kernels    {'on' if kernels.on else 'off'} ({kernels.reason})")
    attention = choose_attention(config.attention, model.config, device, kernels=kernels.on)
    use_fast_dropout(model)
    set_attention(model, attention.backend)
    note(f"attention  {attention.backend} ({attention.reason})")
    return kernels, attention


def keep_memory() -> None:
    """Let freed memory stay with the process, where the C library can be told to (glibc).

    Every step frees its activations; giving them back to the system and getting zeroed pages again
    costs a tenth of a step.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


# --- kernels


class KernelsChoice(NamedTuple):
    """Whether to use the kernels of `chargpt.compute.native`."""

    on: bool
    reason: str


def choose_kernels(wish: OnOffAuto, device: torch.device, compiling: bool) -> KernelsChoice:
    """Return whether to use the kernels; they are compiled to find out.

    Raises:
        UserError: they were asked for, and do not work here.
    """
    if wish == "off":
        return KernelsChoice(False, "asked for")
    if device.type != "cpu":
        reason = f"they are for CPUs, and this is {device.type}"
    elif compiling:
        reason = "torch.compile makes its own"
    elif wish == "auto" and not sys.platform.startswith("linux"):
        reason = "they were tried on Linux only; --kernels on tries them here"
    else:
        known = library_path().exists()
        start = time.perf_counter()
        try:
            load_kernels()
        except KernelsError as error:
            reason = f"they cannot be compiled here: {error}"
        else:
            seconds = time.perf_counter() - start
            how = "compiled before" if known else f"compiled for this processor in {seconds:.1f} s"
            return KernelsChoice(True, how)
    if wish == "on":
        raise UserError(f"kernels is 'on', but {reason}: give --kernels auto")
    return KernelsChoice(False, reason)


# --- attention


class AttentionChoice(NamedTuple):
    """An attention backend."""

    backend: Backend
    reason: str


def choose_attention(
    wish: Attention, shape: GPT2Config, device: torch.device, *, kernels: bool
) -> AttentionChoice:
    """Return the attention backend to train with.

    The rule is what ``benchmarks/attention.py`` measured; a rule rather than a trial on the spot,
    so that a seed gives the same run every time.

    Args:
        wish: a backend, or ``auto``.
        shape: of the model.
        device: where it is.
        kernels: whether ``native`` is to be had.

    Raises:
        UserError: ``native`` was asked for, and the kernels are off or do not fit the shape.
    """
    head_size = shape.d_model // shape.n_head
    fits = kernels and head_size % load_kernels().lanes == 0
    if wish == "native" and not fits:
        why = f"do not take heads of {head_size}" if kernels else "are off"
        raise UserError(f"attention is 'native', and the kernels {why}: give --attention auto")
    if wish != "auto":
        return AttentionChoice(wish, "asked for")
    if device.type != "cpu":
        return AttentionChoice("sdpa", "PyTorch's fused kernel")
    if fits:
        return AttentionChoice("native", "the fastest on a CPU")
    drops = shape.dropout > 0 if shape.attention_dropout is None else shape.attention_dropout > 0
    if drops or shape.block_size < SDPA_MIN_BLOCK:
        return AttentionChoice("matmul", "the fastest of PyTorch's on a CPU, at this block_size")
    return AttentionChoice("sdpa", "the fastest of PyTorch's on a CPU, at this block_size")


# --- compilation


def _compile(trainer: Trainer, choice: CompileChoice, note: Note) -> bool:
    """Compile the model if that is wished for; return whether a trial step worked."""
    if not choice.on:
        note(f"compile    off ({choice.reason})")
        return False
    eager = trainer.forward
    try:
        trainer.forward = cast(Callable[[Tensor], Tensor], torch.compile(trainer.model))
        trainer.trial_step()
        note(f"compile    on ({choice.reason})")
        return True
    except Exception as error:
        if is_out_of_memory(error):
            raise
        trainer.forward = eager
        first_line = str(error).strip().partition("\n")[0][:200]
        note(f"compile    failed, going on without ({type(error).__name__}: {first_line})")
        return False
