"""The C++ decoder (``decoder.cpp``) for CPUs: one call computes a whole GPT-2 with its cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from chargpt.compute.library import KernelsError
from chargpt.compute.native import LANES, load_kernels
from chargpt.engine.decoder import Chunk
from chargpt.model import GPT2, CausalSelfAttention, FeedForward, Residual

_Pointer, _Int, _Long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
THREADS_FROM = 4_000_000  # multiply-adds; with fewer, one thread is faster


class NativeDecoder:
    """A snapshot of a model's weights and a cache, in float32.

    The logits of a sequence are the same to the bit for any neighbours and any cut into chunks.

    Args:
        model: one that `decodes` accepts.
        n_slots: sequences in the cache at the same time.

    Raises:
        KernelsError: the kernels cannot be compiled.
        MemoryError: the cache does not fit.
    """

    def __init__(self, model: GPT2, n_slots: int) -> None:
        self._kernels = load_kernels()
        self._library = _library()
        config = model.config
        self.block_size, self.vocab_size = config.block_size, config.vocab_size
        self.n_slots = n_slots
        self._weights = sum(p.numel() for p in model.parameters())
        tensors = [None if t is None else t.detach().float().contiguous() for t in _tensors(model)]
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        pointers = (_Pointer * len(tensors))(*addresses)
        shape = (config.n_layer, config.n_head, config.d_model, config.d_ff)
        sizes = (_Int * 7)(*shape, config.vocab_size, config.block_size, n_slots)
        self._handle = self._library.decoder_new(sizes, model.final_norm.eps, pointers)
        if not self._handle:
            raise MemoryError(f"the key-value cache for {n_slots} sequences does not fit")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._library.decoder_free(self._handle)

    def read(self, chunks: Sequence[Chunk], *, every: bool = False) -> Tensor:
        """See `Decoder`."""
        lengths = [len(chunk.ids) for chunk in chunks]
        n = sum(lengths)
        ids = np.fromiter(chain.from_iterable(chunk.ids for chunk in chunks), np.int32, n)
        slots = np.repeat(np.array([chunk.slot for chunk in chunks], np.int32), lengths)
        ranges = (range(chunk.start, chunk.start + len(chunk.ids)) for chunk in chunks)
        positions = np.fromiter(chain.from_iterable(ranges), np.int32, n)
        limits = ((ids, self.vocab_size), (slots, self.n_slots), (positions, self.block_size))
        if any(values.min() < 0 or values.max() >= limit for values, limit in limits):
            raise IndexError(f"a token, slot or position is out of range: {chunks}")
        wanted = np.arange(n, dtype=np.int32) if every else np.cumsum(lengths, dtype=np.int32) - 1
        # (n or chunks, V)
        logits = torch.empty(len(wanted), self.vocab_size, dtype=torch.float32, device="cpu")
        self._kernels.follow_threads()
        strips = 2 * torch.get_num_threads() if n * self._weights >= THREADS_FROM else 1
        inputs = (n, *(array.ctypes.data for array in (ids, slots, positions)))
        outputs = (len(wanted), wanted.ctypes.data, logits.data_ptr())
        self._library.decoder_forward(self._handle, *inputs, *outputs, strips)
        return logits

    def copy(self, source: int, target: int, length: int) -> None:
        """See `Decoder`."""
        slots_fit = min(source, target) >= 0 and max(source, target) < self.n_slots
        if not slots_fit or not 0 <= length <= self.block_size:
            raise IndexError(f"{length} positions of slot {source} do not fit slot {target}")
        self._library.decoder_copy(self._handle, source, target, length)


def decodes(model: GPT2) -> bool:
    """Return whether `NativeDecoder` supports a model; `KernelsError`: it cannot be compiled."""
    config = model.config
    load_kernels()
    sizes = (config.d_model // config.n_head, config.d_model, config.d_ff)
    return (
        model.token_embedding.weight.device.type == "cpu"
        and all(parameter.dtype == torch.float32 for parameter in model.parameters())
        and config.activation_function == "gelu"
        and all(size % LANES == 0 for size in sizes)
    )


def _library() -> ctypes.CDLL:
    library = load_kernels().library
    try:
        library.decoder_new.argtypes = (_Pointer, ctypes.c_float, _Pointer)
        library.decoder_new.restype = _Pointer
        library.decoder_free.argtypes = (_Pointer,)
        library.decoder_free.restype = library.decoder_forward.restype = None
        library.decoder_copy.restype = None
        library.decoder_forward.argtypes = (
            *(_Pointer, _Long, _Pointer, _Pointer, _Pointer),
            *(_Long, _Pointer, _Pointer, _Int),
        )
        library.decoder_copy.argtypes = (_Pointer, _Int, _Int, _Int)
    except AttributeError as error:
        raise KernelsError(str(error)) from error
    return library


def _tensors(model: GPT2) -> list[Tensor | None]:
    """Return the parameters in the order of ``decoder.cpp``."""
    tensors: list[Tensor | None] = [model.token_embedding.weight, model.position_embedding.weight]
    for block in model.blocks:
        for residual in (block.attention, block.feed_forward):
            assert isinstance(residual, Residual)
            for norm in (residual.norm, residual.sublayer_norm, residual.sum_norm):
                tensors += _pair(norm)
            sublayer = residual.sublayer
            assert isinstance(sublayer, CausalSelfAttention | FeedForward)
            first = sublayer.expand if isinstance(sublayer, FeedForward) else sublayer.qkv
            tensors += [*_pair(first), *_pair(sublayer.projection)]
    return [*tensors, *_pair(model.final_norm), model.head.weight, None]


def _pair(module: nn.Module) -> list[Tensor | None]:
    """Return weight and bias, each None if the module lacks it."""
    return [getattr(module, "weight", None), getattr(module, "bias", None)]
