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
import sys
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
from chargpt.compute.muon import AdamWSettings, AdamWTensors, MuonSettings

_FOLDER = Path(__file__).parent / "cpp"
SOURCES = tuple(
    _FOLDER / f"{name}.cpp" for name in ("kernels", "decoder", "pool", "products", "step")
)
HEADER = _FOLDER / "kernels.h"
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=off"),
    *("-fno-math-errno", "-fno-trapping-math", "-w"),
)
# GCC's tuning for some AMD processors splits some of the multiply-adds, so that a row's sum would
# depend on its neighbours. Clang does not do this and rejects the parameter.
GCC_FLAGS = ("--param=avoid-fma-max-bits=0",)
COMPILERS = ("c++", "g++", "clang++")
_SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

_Pointer, _Int, _Long, _Float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_RANDOM = (ctypes.c_double, ctypes.c_uint64)  # probability, seed
_Double = ctypes.c_double
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "adamw": (*(_Pointer,) * 6, _Long, *(_Double,) * 5),
    "attention_forward": (*(_Pointer,) * 3, *(_Int,) * 4, *_RANDOM),
    "attention_backward": (*(_Pointer,) * 5, *(_Int,) * 4, *_RANDOM),
    "layer_norm_forward": (*(_Pointer,) * 6, _Long, _Int, _Float),
    "layer_norm_backward": (*(_Pointer,) * 8, _Long, _Int),
    "linear_forward": (*(_Pointer,) * 4, _Long, _Int, _Int),
    "linear_backward": (*(_Pointer,) * 6, _Long, _Int, _Int),
    "cross_entropy": (*(_Pointer,) * 5, _Long, _Long),
    "embedding_forward": (*(_Pointer,) * 5, _Long, _Long, *_RANDOM),
    "embedding_backward": (*(_Pointer,) * 3, _Long, _Long, _Long, *_RANDOM),
    "feed_forward_forward": (*(_Pointer,) * 7, _Long, _Int, _Int),
    "feed_forward_backward": (*(_Pointer,) * 10, _Long, _Int, _Int),
    "muon": (*(_Pointer,) * 5, _Int, _Float, _Float, _Pointer, _Int),
    "norm": (_Pointer, _Pointer, _Long, _Pointer),
    "residual_forward": (_Pointer, _Pointer, _Pointer, _Long, *_RANDOM),
    "residual_backward": (_Pointer, _Pointer, _Long, *_RANDOM),
    "scale": (_Pointer, _Pointer, _Pointer, _Long, _Float),
}


class KernelsError(Exception):
    """The kernels cannot be compiled or loaded here; use PyTorch's own layers."""


class Kernels:
    """The functions of the compiled library; those of ``kernels.cpp`` by name and value type.

    `library` gives access to ``decoder.cpp``; see `chargpt.engine.native_decoder`. Row widths must
    be multiples of `lanes`, the values per vector; `dtypes` are the supported value types.
    """

    def __init__(self, path: Path) -> None:
        self.library = library = ctypes.CDLL(str(path))
        self.lanes: int = library.chargpt_lanes()
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
        pointers = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
        if self._functions[name, dtype](*pointers) != 0:
            raise MemoryError(f"the kernel {name} ran out of memory")


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
    sources = (file.read_text(encoding="utf-8") for file in (HEADER, *SOURCES))
    # A home folder may be shared by machines with different processors.
    parts = (*sources, *FLAGS, *GCC_FLAGS, cpu_name(), *cpu_info("flags"))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return Path(platformdirs.user_cache_dir("chargpt"), "kernels", f"kernels-{key}.so")


def _compile(path: Path) -> None:
    """Compile the library to `path`; no process sees a part of it."""
    compiler = _find_compiler()
    path.parent.mkdir(parents=True, exist_ok=True)
    # The kernels share the OpenMP threads of PyTorch. Apple's Clang has no OpenMP.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    flags = [*FLAGS, *gcc_flags(compiler), *openmp, "-shared", "-fPIC"]
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
        widths: row widths; each must be a multiple of the kernels' lanes.
        weights: parameters; each must be float32.
    """
    if torch.compiler.is_compiling() or any(value.device.type != "cpu" for value in values):
        return False
    kernels = load_kernels()
    return (
        all(width % kernels.lanes == 0 for width in widths)
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
        n_head: H; C / H must be a multiple of the kernels' lanes.
        dropout_p: probability of dropping an attention weight.

    Returns:
        (B, T, C).
    """
    qkv = qkv.contiguous()
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    out = qkv.new_empty(B, T, C)
    log_sums = torch.empty(B, n_head, T)  # the backward pass recomputes the softmax from them
    rest = (B, T, n_head, C // n_head, dropout_p, _seed(dropout_p))
    load_kernels()("attention_forward", qkv.dtype, qkv, out, log_sums, *rest)
    return _with_backward("attention", rest, out, (out, log_sums), qkv)


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the last axis of x, float32, (…, C), like `torch.nn.functional.layer_norm`.

    Under autocast the result already has the type of the next matrix product, which saves a pass.
    """
    x, gain, bias = _contiguous(x, gain, bias)
    out = torch.empty_like(x, dtype=product_dtype())
    n, C = x.numel() // x.size(-1), x.size(-1)
    means, inverse_stds = torch.empty(n), torch.empty(n)
    tensors = (x, gain, bias, out, means, inverse_stds)
    load_kernels()("layer_norm_forward", out.dtype, *tensors, n, C, eps)
    return _with_backward("layer_norm", (n, C), out, (means, inverse_stds), x, gain, bias)


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


# --- a step besides its layers: step.cpp


def embedding(
    ids: Tensor, places: Tensor, tokens: Tensor, positions: Tensor, dropout_p: float
) -> Tensor:
    """Return dropout(tokens[ids] + positions[places]), float32, (B, T, C).

    Args:
        ids: rows of `tokens`, (B, T).
        places: rows of `positions`, (T,) or (B, T).
        tokens: float32, (V, C); C must be a multiple of the kernels' lanes.
        positions: float32, (block_size, C).
        dropout_p: probability of dropping a value.

    Raises:
        IndexError: a table has no such row.
    """
    assert tokens.size(1) == positions.size(1)
    ids, places = _rows(ids, len(tokens)), _rows(places, len(positions))
    places = places.expand_as(ids).contiguous()
    tables = _contiguous(tokens, positions)
    out: Tensor = _Embedding.apply(dropout_p, ids, places, *tables)  # type: ignore[no-untyped-call]
    return out


def _rows(ids: Tensor, n: int) -> Tensor:
    """Return ids as contiguous int64; an IndexError if one is not in [0, n)."""
    ids = ids.long().contiguous()
    if ids.numel():
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= n:
            raise IndexError(f"{low if low < 0 else high} is not a row of a table of {n} rows")
    return ids


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dropout_p: float, *tensors: Tensor) -> Tensor:
        ids, places, tokens, positions = tensors
        C = tokens.size(1)
        out = tokens.new_empty(*ids.shape, C)
        ctx.save_for_backward(ids, places)
        ctx.shapes, ctx.random = (tokens.shape, positions.shape), (dropout_p, _seed(dropout_p))
        rest = (ids.numel(), C, *ctx.random)
        load_kernels()("embedding_forward", out.dtype, *tensors, out, *rest)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Any:
        d_out, gradients = d_out.contiguous(), []
        tables = zip(ctx.saved_tensors, ctx.shapes, ctx.needs_input_grad[3:], strict=True)
        for ids, shape, needed in tables:
            d_table = d_out.new_empty(shape) if needed else None
            if d_table is not None:
                tensors, sizes = (ids, d_out, d_table), (ids.numel(), *shape)
                load_kernels()("embedding_backward", d_out.dtype, *tensors, *sizes, *ctx.random)
            gradients.append(d_table)
        return None, None, None, *gradients


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, a float32 scalar.

    Args:
        logits: float32 or bfloat16, (…, V).
        targets: (…), as many as rows of logits.

    Raises:
        IndexError: a target is not in [0, V).
    """
    out: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return out


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each target, float32, flat; not differentiable."""
    return _cross_entropy(logits, targets, None)[0]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        ctx.save_for_backward(gradient)
        return _cross_entropy(logits, targets, gradient)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        if d_mean == 1:
            return gradient, None
        scaled = torch.empty_like(gradient)
        _scale([gradient], [scaled], float(d_mean))
        return scaled, None


def _cross_entropy(
    logits: Tensor, targets: Tensor, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the loss of each row and their mean; fill the gradient of the mean."""
    V = logits.size(-1)
    logits, targets = logits.contiguous(), _rows(targets, V)
    n = targets.numel()
    assert logits.numel() == n * V
    losses, mean = torch.empty(n), torch.empty(())
    load_kernels()("cross_entropy", logits.dtype, logits, targets, losses, mean, gradient, n, V)
    return losses, mean


def in_kernels_memory(*tensors: Tensor) -> bool:
    """Return whether `norm`, `scale_` and `adamw_update` take these tensors."""
    return not torch.compiler.is_compiling() and all(
        t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in tensors
    )


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all values of the tensors together, a scalar."""
    result = torch.empty(())
    lists = (_addresses(tensors), _sizes(tensors))
    load_kernels()("norm", torch.float32, *lists, len(tensors), result)
    return result


def scale_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply tensors by a factor, in place."""
    _scale(tensors, tensors, factor)


def _scale(tensors: Sequence[Tensor], out: Sequence[Tensor], factor: float) -> None:
    lists = (_addresses(tensors), _addresses(out), _sizes(tensors))
    load_kernels()("scale", out[0].dtype, *lists, len(tensors), factor)


def adamw_update(tensors: AdamWTensors, settings: AdamWSettings) -> None:
    """Call AdamW's kernel, like `chargpt.compute.muon.adamw_update`."""
    sizes = [weight.numel() for weight in tensors.weights]
    for column in (tensors.gradients, tensors.means, tensors.squares):
        assert [tensor.numel() for tensor in column] == sizes
    n = len(sizes)
    assert len(tensors.steps) == n
    lists = (*map(_addresses, tensors), (_Long * n)(*sizes))
    numbers = (settings.lr, *settings.betas, settings.weight_decay, settings.eps)
    load_kernels()("adamw", torch.float32, *lists, n, *numbers)


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (_Pointer * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _sizes(tensors: Sequence[Tensor]) -> Any:
    return (_Long * len(tensors))(*(tensor.numel() for tensor in tensors))
