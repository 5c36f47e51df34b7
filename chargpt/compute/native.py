"""The kernels of ``cpp/`` as PyTorch calls; `chargpt.compute.library` finds their library.

Each function computes what its PyTorch counterpart computes, forward and backward, in one pass over
memory. `supports` says for which tensors. `chargpt.compute.fast_layers` uses them in a model.

Shapes: B batch, T time, H heads, D head size, C = H × D, F = d_ff.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from chargpt.compute.library import KernelsError, get_library
from chargpt.compute.muon import AdamWSettings, AdamWTensors, MuonSettings

_SUFFIXES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

_Pointer, _Int, _Long, _Float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_RANDOM = (ctypes.c_double, ctypes.c_uint64)  # probability, seed
_Double = ctypes.c_double
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "adamw": (*(_Pointer,) * 6, _Long, *(_Double,) * 5),
    "attention_forward": (*(_Pointer,) * 3, *(_Long,) * 4, *_RANDOM),
    "attention_backward": (*(_Pointer,) * 5, *(_Long,) * 4, *_RANDOM),
    "cross_entropy": (*(_Pointer,) * 5, _Long, _Long),
    "embedding_forward": (*(_Pointer,) * 5, _Long, _Long, *_RANDOM),
    "embedding_backward": (*(_Pointer,) * 3, _Long, _Long, _Long, *_RANDOM),
    "layer_norm_forward": (*(_Pointer,) * 6, *(_Long,) * 2, _Float),
    "layer_norm_backward": (*(_Pointer,) * 9, *(_Long,) * 2),
    "linear_forward": (*(_Pointer,) * 4, *(_Long,) * 3),
    "linear_backward": (*(_Pointer,) * 6, *(_Long,) * 3),
    "feed_forward_forward": (*(_Pointer,) * 7, *(_Long,) * 3),
    "feed_forward_backward": (*(_Pointer,) * 10, *(_Long,) * 3),
    "muon": (*(_Pointer,) * 5, _Long, _Float, _Float, _Pointer, _Int),
    "ngram_find": (_Pointer, _Long, *(_Pointer,) * 3, _Long, _Long),
    "ngram_mix": (*(_Pointer,) * 8, _Long, _Long),
    "norm": (_Pointer, _Pointer, _Long, _Pointer),
    "residual_forward": (_Pointer, _Pointer, _Pointer, _Long, *_RANDOM),
    "residual_backward": (_Pointer, _Pointer, _Long, *_RANDOM),
    "scale": (_Pointer, _Pointer, _Pointer, _Long, _Float),
}
LANES = 16
"""Row widths must be multiples of it; see ``vectors.h``."""


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
    """Return the kernels; they are compiled first if no library of them is found.

    Raises:
        KernelsError: as `chargpt.compute.library.find_library`; or the library lacks a function.
    """
    try:
        return Kernels(get_library().path)
    except (OSError, AttributeError) as error:
        raise KernelsError(str(error)) from error


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


@functools.cache
def bf16_gain() -> float:
    """Return how many times as fast as in float32 a matrix product is in bfloat16; 0 without it.

    The two take turns, and the best turn of each counts, so that a busy neighbour changes little.
    """
    if torch.bfloat16 not in load_kernels().dtypes:
        return 0.0
    weight, x = torch.ones(512, 512), torch.ones(960, 512)
    inputs = {dtype: x.to(dtype) for dtype in _SUFFIXES}
    times: dict[torch.dtype, list[float]] = {dtype: [] for dtype in _SUFFIXES}
    for dtype in 8 * (*_SUFFIXES,):
        out = torch.empty_like(inputs[dtype])
        start = time.perf_counter()
        load_kernels()("linear_forward", dtype, inputs[dtype], weight, None, out, 960, 512, 512)
        times[dtype].append(time.perf_counter() - start)
    return min(times[torch.float32]) / min(times[torch.bfloat16])


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
    x: Tensor, gain: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Return `layer_norm` of x, and x for what goes around it: the kernel adds the gradients.

    `dtype` is the type of the result; None: that of matrix products.
    """
    x, gain, bias = _contiguous(x, gain, bias)
    out: tuple[Tensor, Tensor] = _LayerNorm.apply(x, gain, bias, (eps, dtype))  # type: ignore[no-untyped-call]
    return out


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, bias: Tensor | None, settings: Any
    ) -> tuple[Tensor, Tensor]:
        eps, dtype = settings
        out = torch.empty_like(x, dtype=dtype or product_dtype())
        n, C = x.numel() // x.size(-1), x.size(-1)
        kept = torch.empty(2, n)  # means and inverse standard deviations
        tensors = (x, gain, bias, out, kept[0], kept[1])
        load_kernels()("layer_norm_forward", out.dtype, *tensors, n, C, eps)
        ctx.save_for_backward(x, gain, bias, kept)
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_around: Tensor | None) -> Any:
        x, gain, bias, kept = ctx.saved_tensors
        if d_out is None:
            return d_around, None, None, None
        d_out, d_around = _contiguous(d_out, d_around)
        gradients = [None if t is None else torch.empty_like(t) for t in (x, gain, bias)]
        tensors = (x, gain, kept[0], kept[1], d_out, d_around, *gradients)
        n, C = kept.size(1), x.size(-1)
        load_kernels()("layer_norm_backward", d_out.dtype, *tensors, n, C)
        return *gradients, None


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


# --- a step besides its layers: step.cpp


def embedding(
    ids: Tensor, places: Tensor, tokens: Tensor, positions: Tensor, dropout_p: float
) -> Tensor:
    """Return dropout(tokens[ids] + positions[places]), float32, (B, T, C).

    Args:
        ids: rows of `tokens`, (B, T).
        places: rows of `positions`, (T,) or (B, T).
        tokens: float32, (V, C); C must be a multiple of `LANES`.
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


def cross_entropy(
    logits: Tensor, targets: Tensor, surplus: Tensor | None = None, share: float = 0.0
) -> Tensor:
    """Return the mean cross-entropy in nats, a float32 scalar.

    Args:
        logits: float32 or bfloat16, (…, V).
        targets: (…), as many as rows of logits.
        surplus: None, or float32, like the logits; see `chargpt.compute.step.cross_entropy`.
        share: what of it the gradient takes.

    Raises:
        IndexError: a target is not in [0, V).
    """
    out: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, targets, surplus, share
    )
    return out


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each target, float32, flat; not differentiable."""
    return _cross_entropy(logits, targets, None)[0]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, surplus: Tensor | None, share: float
    ) -> Tensor:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        ctx.save_for_backward(gradient)
        mean = _cross_entropy(logits, targets, gradient)[1]
        if surplus is not None:
            gradient.sub_(surplus, alpha=share / targets.numel())
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        if d_mean == 1:
            return gradient, None, None, None
        scaled = torch.empty_like(gradient)
        _scale([gradient], [scaled], float(d_mean))
        return scaled, None, None, None


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


def mix_ngram(level: Sequence[Any], *arrays: Any) -> None:
    """Compute `chargpt.training.ngram_targets._mix`, whose arguments and arrays these are."""
    tensors = [torch.from_numpy(array) for array in (*level, *arrays)]
    load_kernels()("ngram_mix", torch.float32, *tensors, *tensors[-1].shape)


def find_grams(keys: Any, context: Any, token: Any, vocab_size: int) -> Any:
    """Compute `chargpt.training.ngram_targets._find`, whose arguments these are."""
    keys, context, token = (torch.from_numpy(a).contiguous() for a in (keys, context, token))
    grams = torch.empty_like(context)
    sizes = (len(keys), context, token, grams, context.numel(), vocab_size)
    load_kernels()("ngram_find", torch.float32, keys, *sizes)
    return grams.numpy()


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
