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
from chargpt.compute import native
from chargpt.compute.device import DTYPES, CompileChoice, choose_compile
from chargpt.compute.fast_layers import (
    Backend,
    set_attention,
    use_fast_dropout,
    use_kernels,
)
from chargpt.compute.library import KernelsError, get_library, why_not_tried
from chargpt.compute.native import LANES, load_kernels
from chargpt.compute.parallel import parallelize
from chargpt.compute.step import use_fast_updates
from chargpt.config import Attention, GPT2Config, OnOffAuto, TrainConfig
from chargpt.training.trainer import Trainer

SDPA_MIN_BLOCK = 1024  # below it, the textbook's matrix products are faster on a CPU
WIDEST = {"plain": 0, "avx2": 448, "avx512": 320, "avx512bf16": 320, "amx": 320}
"""By variant, the largest d_model at which the kernels are faster than PyTorch's in fp32."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)

Report = Callable[[str], None]


class SpeedChoices(NamedTuple):
    """How a model computes; another choice rounds differently, see `has_same_bits`."""

    kernels: str  # `chargpt.compute.library.Library.name`, or "off"
    attention: Backend
    compiled: bool


def has_same_bits(trainer: Trainer, choices: SpeedChoices) -> bool:
    """Return whether steps have the same bits on any number of threads, with any variant.

    So it is in fp32 where the kernels compute every layer.
    """
    every_layer = trainer.model.config.activation_function == "gelu"
    return trainer.precision.name == "fp32" and choices.attention == "native" and every_layer


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
    setting = trainer.train_config.compile
    compiling = trainer.world.on_first(lambda: choose_compile(setting, trainer.device))
    if trainer.parallel.kind == "dp":
        compiling = CompileChoice(False, "not over several GPUs in one process")
    kernels, attention = _choose_layers(trainer, report, compiling=compiling.on)
    compiled = _compile(trainer, compiling, report)
    if compiling.on and not compiled:
        kernels, attention = _choose_layers(trainer, report, compiling=False)
    trainer.forward = parallelize(trainer.forward, trainer.parallel, trainer.precision)
    if trainer.parallel.kind == "ddp":
        # DDP arranges its messages after the first step, and sums then round in another way. A
        # resumed run would have other bits.
        trainer.trial_step()
    seconds = time.perf_counter() - start
    trainer.state.compile_seconds += seconds
    trainer.state.train_seconds += seconds
    library = get_library().name if kernels.on else "off"
    return SpeedChoices(kernels=library, attention=attention.backend, compiled=compiled)


def _choose_layers(
    trainer: Trainer, report: Report, *, compiling: bool
) -> tuple[KernelsChoice, AttentionChoice]:
    train_config, model, device = trainer.train_config, trainer.model, trainer.device
    use_fast_dropout(model)
    dtype = DTYPES[trainer.precision.name]
    kernels = choose_kernels(
        train_config.kernels,
        model.config,
        dtype,
        device,
        compiling=compiling,
        sharded=trainer.parallel.kind == "fsdp",
    )
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


def choose_kernels(
    setting: OnOffAuto,
    model_config: GPT2Config,
    dtype: torch.dtype,
    device: torch.device,
    *,
    compiling: bool,
    sharded: bool = False,
) -> KernelsChoice:
    """Return whether to use the kernels; they are loaded, or first compiled, to find out.

    `dtype` is the type of matrix products; `sharded`: processes share the weights.

    Raises:
        UserError: they were requested and do not work here.
    """
    if setting == "off":
        return KernelsChoice(False, "asked for")
    try:
        reason = "FSDP shares the weights among processes" if sharded else ""
        reason = reason or _why_not(setting, model_config, dtype, device, compiling)
    except KernelsError as error:
        reason = f"they do not work here: {error}"
    if not reason:
        return KernelsChoice(True, get_library().how)
    if setting == "on":
        raise UserError(f"kernels is 'on', but {reason}: give --kernels auto")
    return KernelsChoice(False, reason)


def _why_not(
    setting: OnOffAuto,
    model_config: GPT2Config,
    dtype: torch.dtype,
    device: torch.device,
    compiling: bool,
) -> str:
    """Return why the kernels cannot be used, or with "auto" why they should not be, or ""."""
    if device.type != "cpu":
        return f"they are for CPUs, and this is {device.type}"
    if compiling:
        return "torch.compile makes its own"
    for name in ("d_model", "d_ff"):
        if getattr(model_config, name) % LANES:
            return f"{name} is {getattr(model_config, name)}, and they take multiples of {LANES}"
    if setting == "auto" and (reason := why_not_tried()):
        return reason
    return _why_not_this_library(setting, model_config, dtype)


def _why_not_this_library(setting: OnOffAuto, model_config: GPT2Config, dtype: torch.dtype) -> str:
    variant = get_library().variant.name
    if dtype not in load_kernels().dtypes:
        return f"the {variant} kernels have no {str(dtype).removeprefix('torch.')}"
    widest = WIDEST.get(variant, model_config.d_model)
    if setting == "auto" and dtype == torch.float32 and model_config.d_model > widest:
        return f"PyTorch's layers are faster in fp32 for a d_model above {widest}"
    return ""


def bf16_gain(
    train_config: TrainConfig, model_config: GPT2Config, device: torch.device
) -> float | None:
    """Return how much faster the kernels multiply in bf16 than in fp32; None: they are not used."""
    compiling = choose_compile(train_config.compile, device).on
    fits = model_config.d_model % LANES == model_config.d_ff % LANES == 0
    if train_config.kernels == "off" or device.type != "cpu" or compiling or not fits:
        return None
    with suppress(KernelsError):
        if train_config.kernels == "on" or not why_not_tried():
            return native.bf16_gain()
    return None


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
    fits = kernels and head_size % LANES == 0
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
