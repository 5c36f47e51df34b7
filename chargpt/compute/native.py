"""The kernels of ``kernels.cpp`` as PyTorch calls, compiled for this processor on first use.

Each function computes what its PyTorch counterpart computes, forward and backward, in one pass over
memory. `supports` says for which tensors. `chargpt.compute.fast_layers` uses them in a model.

Shapes: B batch, T time, H heads, D head size, C = H × D, F = d_ff.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chargpt.base.files import replacing
from chargpt.compute.device import cpu_info, cpu_name
from chargpt.compute.muon import MuonSettings

_FOLDER = Path(__file__).parent / "cpp"
SOURCES = tuple(sorted(_FOLDER.glob("*.cpp")))
HEADERS = tuple(sorted(_FOLDER.glob("*.h")))
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-trapping-math", "-fvisibility=hidden", "-pthread", "-w"),
)
# GCC's tuning for some AMD processors splits some of the multiply-adds, so that a row's sum would
# depend on its neighbours. Clang does not do this and rejects the parameter.
GCC_FLAGS = ("--param=avoid-fma-max-bits=0",)
COMPILERS = ("c++", "g++", "clang++")
_SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

_Pointer, _Int, _Long, _Float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_RANDOM = (ctypes.c_double, ctypes.c_uint64)  # probability, seed
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "attention_forward": (*(_Pointer,) * 3, *(_Long,) * 4, *_RANDOM),
    "attention_backward": (*(_Pointer,) * 5, *(_Long,) * 4, *_RANDOM),
    "layer_norm_forward": (*(_Pointer,) * 6, *(_Long,) * 2, _Float),
    "layer_norm_backward": (*(_Pointer,) * 9, *(_Long,) * 2),
    "linear_forward": (*(_Pointer,) * 4, *(_Long,) * 3),
    "linear_backward": (*(_Pointer,) * 6, *(_Long,) * 3),
    "feed_forward_forward": (*(_Pointer,) * 7, *(_Long,) * 3),
    "feed_forward_backward": (*(_Pointer,) * 10, *(_Long,) * 3),
    "muon": (*(_Pointer,) * 5, _Long, _Float, _Float, _Pointer, _Int),
    "residual_forward": (_Pointer, _Pointer, _Pointer, _Long, *_RANDOM),
    "residual_backward": (_Pointer, _Pointer, _Long, *_RANDOM),
}
LANES = 16
"""Row widths must be multiples of it; see ``vectors.h``."""


class KernelsError(Exception):
    """The kernels cannot be compiled or loaded here; use PyTorch's own layers."""


class Kernels:
    """The functions of the compiled library, by name and value type.

    `library` gives access to ``decoder.cpp``; see `chargpt.engine.native_decoder`. `dtypes` are the
    supported value types.
    """

    def __init__(self, path: Path) -> None:
        self.library = library = ctypes.CDLL(str(path))
        self.dtypes: set[torch.dtype] = set()
        self._functions: dict[tuple[str, torch.dtype], Any] = {}
        for name, signature in _SIGNATURES.items():
            for dtype, suffix in _SUFFIXES.items():
                function = getattr(library, f"{name}_{suffix}", None)
                if function is not None:  # bf16 exists only where the processor supports it
                    function.argtypes, function.restype = signature, ctypes.c_int
                    self._functions[name, dtype] = function
                    self.dtypes.add(dtype)

    def __call__(self, name: str, dtype: torch.dtype, *arguments: Any) -> None:
        """Call a kernel, with a contiguous tensor as the pointer to its values.

        Raises:
            MemoryError: the kernel cannot allocate its working memory.
        """
        self.follow_threads()
        pointers = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        if self._functions[name, dtype](*pointers) != 0:
            raise MemoryError(f"the kernel {name} ran out of memory")

    def follow_threads(self) -> None:
        """Use as many threads as PyTorch does; both numbers belong to the calling thread."""
        self.library.chargpt_set_threads(torch.get_num_threads())


@functools.cache
def load_kernels() -> Kernels:
    """Return the kernels; compile them first if the cache folder does not have them.

    Raises:
        KernelsError: there is no compiler, or it fails.
    """
    path = library_path()
    try:
        if path.exists():
            with suppress(OSError):  # a damaged file: compile it again
                return Kernels(path)
        _compile(path)
        return Kernels(path)
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        message = getattr(error, "stderr", None) or str(error)
        raise KernelsError(" ".join(message.split())[:200] or type(error).__name__) from error


def library_path() -> Path:
    """Return the library's path, which depends on its sources, its flags and this processor."""
    sources = (file.read_text(encoding="utf-8") for file in (*HEADERS, *SOURCES))
    # A home folder may be shared by machines with different processors.
    parts = (*sources, *FLAGS, *GCC_FLAGS, cpu_name(), *cpu_info("flags"))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return Path(platformdirs.user_cache_dir("chargpt"), "kernels", f"kernels-{key}.so")


def _compile(path: Path) -> None:
    """Compile the library to `path`; no process sees a part of it."""
    compiler = _find_compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *gcc_flags(compiler), "-shared", "-fPIC"]
    with replacing(path) as library:
        _run([*compiler, *flags, *map(str, SOURCES), "-o", str(library)])


def _find_compiler() -> list[str]:
    """Return ``$CXX``, which may include arguments, or the first C++ compiler found."""
    command = shlex.split(os.environ.get("CXX", "")) or [*filter(shutil.which, COMPILERS)][:1]
    if not command:
        raise KernelsError(f"no C++ compiler found ({', '.join(COMPILERS)})")
    return command


def gcc_flags(compiler: Sequence[str]) -> tuple[str, ...]:
    """Return the flags that only GCC accepts, or nothing for another compiler."""
    return () if "clang" in _run([*compiler, "--version"]).lower() else GCC_FLAGS


def _run(command: Sequence[str]) -> str:
    """Run a compiler and return what it prints, in any locale."""
    done = subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", errors="replace"
    )
    return done.stdout


def supports(*values: Tensor, widths: Iterable[int], weights: Iterable[Tensor | None] = ()) -> bool:
    """Return whether the kernels can compute with these tensors.

    Args:
        values: activations; their types must be among the kernels' value types.
        widths: row widths; each must be a multiple of `LANES`.
        weights: parameters; each must be float32.
    """
    if torch.compiler.is_compiling() or any(value.device.type != "cpu" for value in values):
        return False
    kernels = load_kernels()
    return (
        all(width % LANES == 0 for width in widths)
        and all(value.dtype in kernels.dtypes for value in values)
        and all(weight is None or weight.dtype == torch.float32 for weight in weights)
        and product_dtype() in kernels.dtypes
    )


def product_dtype() -> torch.dtype:
    """Return the type of the factors of matrix products, as autocast sets it."""
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32
    return torch.get_autocast_dtype("cpu")


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, rest: Any, out: list[Tensor], kept: Any, *inputs: Any
    ) -> Tensor:
        ctx.name, ctx.rest, ctx.n_inputs = name, rest, len(inputs)
        ctx.save_for_backward(*inputs, *kept)
        return out[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        saved, n = ctx.saved_tensors, ctx.n_inputs
        inputs, kept = saved[:n], saved[n:]
        gradients = [None if x is None else torch.empty_like(x) for x in inputs]
        tensors = (inputs[0], *inputs[1::2], *kept, d_out.contiguous(), *gradients)
        load_kernels()(f"{ctx.name}_backward", d_out.dtype, *tensors, *ctx.rest)
        return None, None, None, None, *gradients


def _with_backward(
    name: str, rest: Sequence[float], out: Tensor, kept: Sequence[Tensor], *inputs: Tensor | None
) -> Tensor:
    """Return `out` as a differentiable function of x and of weights and biases in turn, `inputs`.

    The backward kernel takes x and the weights, the tensors in `kept`, the gradient of `out`, room
    for the gradient of each input, and `rest`.
    """
    result: Tensor = _Backward.apply(name, rest, [out], kept, *inputs)  # type: ignore[no-untyped-call]
    return result


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _seed(dropout_p: float) -> int:
    """Draw the seed of a mask from torch's default generator."""
    return int(torch.randint(2**62, ())) if dropout_p > 0 else 0


def attention(qkv: Tensor, n_head: int, dropout_p: float) -> Tensor:
    """Compute causal self-attention, like `chargpt.model.causal_attention`.

    Args:
        qkv: queries, keys and values side by side, (B, T, 3C).
        n_head: H; C / H must be a multiple of `LANES`.
        dropout_p: probability of dropping an attention weight.

    Returns:
        (B, T, C).
    """
    qkv = qkv.contiguous()
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    out = qkv.new_empty(B, T, C)
    sums = torch.empty(B, n_head, T, 2)  # the backward pass recomputes the softmax from them
    rest = (B, T, n_head, C // n_head, dropout_p, _seed(dropout_p))
    load_kernels()("attention_forward", qkv.dtype, qkv, out, sums, *rest)
    return _with_backward("attention", rest, out, (out, sums), qkv)


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the last axis of x, float32, (…, C), like `torch.nn.functional.layer_norm`.

    Under autocast the result already has the type of the next matrix product, which saves a pass.
    """
    return fork_layer_norm(x, gain, bias, eps)[0]


def fork_layer_norm(
    x: Tensor, gain: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `layer_norm` of x, and x for what goes around it: the kernel adds the gradients."""
    x, gain, bias = _contiguous(x, gain, bias)
    out: tuple[Tensor, Tensor] = _LayerNorm.apply(x, gain, bias, eps, product_dtype())  # type: ignore[no-untyped-call]
    return out


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(x, dtype=dtype)
        n, C = x.numel() // x.size(-1), x.size(-1)
        kept = torch.empty(2, n)  # means and inverse standard deviations
        tensors = (x, gain, bias, out, kept[0], kept[1])
        load_kernels()("layer_norm_forward", dtype, *tensors, n, C, eps)
        ctx.save_for_backward(x, gain, bias, kept)
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_around: Tensor | None) -> Any:
        x, gain, bias, kept = ctx.saved_tensors
        if d_out is None:
            return d_around, None, None, None, None
        d_out, d_around = _contiguous(d_out, d_around)
        gradients = [None if t is None else torch.empty_like(t) for t in (x, gain, bias)]
        tensors = (x, gain, kept[0], kept[1], d_out, d_around, *gradients)
        n, C = kept.size(1), x.size(-1)
        load_kernels()("layer_norm_backward", d_out.dtype, *tensors, n, C)
        return *gradients, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b, like `torch.nn.functional.linear` under autocast.

    Args:
        x: (…, inputs).
        weight: float32, (outputs, inputs).
        bias: float32, (outputs,).

    Returns:
        (…, outputs), in the type of matrix products.
    """
    x, weight, bias = _contiguous(x.to(product_dtype()), weight, bias)
    outputs, inputs = weight.shape
    sizes = (x.numel() // inputs, inputs, outputs)
    out = x.new_empty(*x.shape[:-1], outputs)
    load_kernels()("linear_forward", x.dtype, x, weight, bias, out, *sizes)
    return _with_backward("linear", sizes, out, (), x, weight, bias)


def feed_forward(
    x: Tensor, expand: Tensor, expand_bias: Tensor | None, project: Tensor, bias: Tensor | None
) -> Tensor:
    """Return GELU(x W₁ᵀ + b₁) W₂ᵀ + b₂, with GELU in the tanh form.

    Args:
        x: (…, C).
        expand: W₁, float32, (F, C).
        expand_bias: b₁, (F,).
        project: W₂, float32, (C, F).
        bias: b₂, (C,); None if and only if b₁ is None.

    Returns:
        (…, C), in the type of matrix products.
    """
    inputs = _contiguous(x.to(product_dtype()), expand, expand_bias, project, bias)
    x, (F, C) = inputs[0], expand.shape
    sizes = (x.numel() // C, C, F)
    before, out = x.new_empty(*x.shape[:-1], F), torch.empty_like(x)
    load_kernels()("feed_forward_forward", x.dtype, *inputs, before, out, *sizes)
    return _with_backward("feed_forward", sizes, out, (before,), *inputs)


def residual_sum(x: Tensor, update: Tensor, dropout_p: float) -> Tensor:
    """Return x + dropout(update), for float32 `x` and `update` of one shape."""
    out: Tensor = _ResidualSum.apply(x, update, dropout_p)  # type: ignore[no-untyped-call]
    return out


class _ResidualSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, dropout_p: float) -> Tensor:
        x, update = x.contiguous(), update.contiguous()
        out = torch.empty_like(x)
        ctx.dtype, ctx.random = update.dtype, (dropout_p, _seed(dropout_p))
        load_kernels()("residual_forward", ctx.dtype, x, update, out, x.numel(), *ctx.random)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        d_out = d_out.contiguous()
        if ctx.dtype == d_out.dtype and ctx.random[0] == 0:
            return d_out, d_out, None
        d_update = torch.empty_like(d_out, dtype=ctx.dtype)
        load_kernels()("residual_backward", ctx.dtype, d_out, d_update, d_out.numel(), *ctx.random)
        return d_out, d_update, None


def muon_update(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lengths: Sequence[float],
    settings: MuonSettings,
) -> None:
    """Call Muon's kernel, like `chargpt.compute.muon.muon_update`; gradients stay unchanged."""
    n, n_steps = len(weights), len(settings.steps)
    addresses = [
        (_Pointer * n)(*(t.data_ptr() for t in ts)) for ts in (weights, gradients, momenta)
    ]
    shapes = (_Int * (2 * n))(*(size for weight in weights for size in weight.shape))
    steps = (_Float * (3 * n_steps))(*(number for step in settings.steps for number in step))
    tensors = (*addresses, shapes, (_Float * n)(*lengths))
    numbers = (n, settings.momentum, settings.decay, steps, n_steps)
    load_kernels()("muon", settings.dtype, *tensors, *numbers)
