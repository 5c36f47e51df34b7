"""Calls of every fp32 kernel, and a record of them that ``replay.cpp`` can repeat elsewhere.

Usage: python tests/kernels/record.py FILE
"""

import ctypes
import re
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from chargpt.compute.native import load_kernels

HERE = Path(__file__).parent
Array = npt.NDArray[Any]
_LINE = re.compile(r"^(FUNCTION|KERNEL)\((\w+), (\w+), (.*)\)$", re.M)
FUNCTIONS: dict[str, tuple[str, list[str]]] = {
    name + suffix: (result, types.split(", "))
    for kind, result, name, types in _LINE.findall((HERE / "functions.h").read_text("utf-8"))
    for suffix in (("_fp32", "_bf16") if kind == "KERNEL" else ("",))
}
"""Result and argument types of each exported function, as ``functions.h`` names them."""
_CTYPES = {
    **{"P": ctypes.c_void_p, "Ps": ctypes.c_void_p, "Handle": ctypes.c_void_p},
    **{"Int": ctypes.c_int, "Long": ctypes.c_int64, "Seed": ctypes.c_uint64},
    **{"Float": ctypes.c_float, "Double": ctypes.c_double},
    **{"Status": ctypes.c_int, "Nothing": None},
}


class Caller:
    """Calls the functions of a library, and keeps what each call leaves.

    Attributes:
        results: name of the function, and its arrays after the call, for each call.

    Args:
        library: the compiled kernels.
        record: a file to which each call is written in the format of ``replay.cpp``.
    """

    def __init__(self, library: ctypes.CDLL, record: BinaryIO | None = None) -> None:
        self.library, self.record = library, record
        self.results: list[tuple[str, list[Array]]] = []
        self._decoder: int | None = None

    def __call__(self, name: str, *arguments: Any) -> None:
        """Call a function with numbers, arrays (or None), and lists of arrays (or None).

        Arrays hold values of 4 or 8 bytes; the kernel may change them. No decoder is passed: there
        is one at a time.
        """
        result, types = FUNCTIONS[name]
        function = getattr(self.library, name)
        function.restype = _CTYPES[result]
        function.argtypes = [_CTYPES[type_] for type_ in types]
        if types[0] == "Handle":
            arguments = (self._decoder, *arguments)
        before = [_copy(argument) for argument in arguments]
        returned = function(*(_pass(argument) for argument in arguments))
        if result == "Handle":
            assert returned
            self._decoder = returned
        elif result == "Status":
            assert returned == 0
        after = [_copy(argument) for argument in arguments]
        self.results.append((name, arrays_in(after)))
        if self.record:
            self.record.write(packed_call(name, before, after))


def packed_call(name: str, before: Sequence[Any], after: Sequence[Any]) -> bytes:
    """Return a call in the format of a record: its arguments before and after it."""
    parts = zip(FUNCTIONS[name][1], before, after, strict=True)
    return bytes([len(name)]) + name.encode() + b"".join(_packed(*part) for part in parts)


def arrays_in(arguments: Sequence[Any]) -> list[Array]:
    """Return the arrays among arguments, and those in lists among them."""
    lists = (argument if isinstance(argument, list) else [argument] for argument in arguments)
    return [item for items in lists for item in items if isinstance(item, np.ndarray)]


def _copy(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_copy(item) for item in argument]
    return argument.copy() if isinstance(argument, np.ndarray) else argument


def _pass(argument: Any) -> Any:
    if isinstance(argument, list):
        return (ctypes.c_void_p * len(argument))(*(_pass(item) for item in argument))
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return argument.ctypes.data
    return argument


def _packed(type_: str, before: Any, after: Any) -> bytes:
    if type_ == "Handle":
        return b""
    if type_ == "P":
        if before is None:
            return struct.pack("<q", -1)
        return struct.pack("<q", before.nbytes) + before.tobytes() + after.tobytes()
    if type_ == "Ps":
        pairs = zip(before, after, strict=True)
        return struct.pack("<q", len(before)) + b"".join(_packed("P", *pair) for pair in pairs)
    formats = {"Float": "<d", "Double": "<d", "Seed": "<Q"}
    return struct.pack(formats.get(type_, "<q"), before)


# --- the calls


Noise = Callable[..., Array]
"""Return standard normal values of the given shape, times `size`."""


def call_all(call: Caller) -> None:
    """Call every kernel, with remainders in each axis, and values that become zero or huge."""
    random = np.random.default_rng(1)

    def noise(*shape: int, size: float = 1.0) -> Array:
        return np.float32(size) * random.standard_normal(shape, np.float32)

    for some in (_attention, _linear, _feed_forward, _layer_norm, _residual, _muon, _step):
        some(call, noise)
    _decoder(call, noise, norms="before", has_bias=True)
    _decoder(call, noise, norms="inside, after", has_bias=False)


def _room(like: Array | None) -> Array | None:
    """Return room for an output: NaN, which the kernel must overwrite."""
    return None if like is None else np.full_like(like, np.nan)


def _attention(call: Caller, noise: Noise) -> None:
    cases = [
        *((2, 67, 3, 16, 0.0, 1.0), (1, 131, 2, 48, 0.2, 2.0), (1, 96, 1, 64, 0.5, 1.0)),
        *((2, 1, 1, 16, 0.0, 1.0), (1, 49, 1, 32, 0.0, 1e-22), (1, 49, 1, 32, 0.1, 1e-30)),
    ]
    for B, T, H, D, p, size in cases:
        qkv, d_out = noise(B, T, 3, H, D, size=size), noise(B, T, H, D)
        if size == 2:  # the last values overflow in products that only masked weights multiply
            qkv[:, T - 5 :, 2], d_out[:, : T - 5], d_out[:, T - 5 :] = 3e38, 10, 0
        out, sums, d_qkv = _room(d_out), noise(B, H, T, 2), _room(qkv)
        rest = (B, T, H, D, p, 12345678901234567890)
        call("attention_forward_fp32", qkv, out, sums, *rest)
        call("attention_backward_fp32", qkv, out, sums, d_out, d_qkv, *rest)


def _linear(call: Caller, noise: Noise) -> None:
    # 1003 rows are more than a stretch, and sums of 400 values are longer than DEPTH. The first
    # weight has more than CACHED values.
    cases = [(200, 512, 528, True), (1003, 48, 160, True), (130, 400, 65, False)]
    cases += [(1, 16, 16, True), (50, 272, 1, False)]
    for n, inputs, outputs, has_bias in cases:
        x, w, bias = noise(n, inputs), noise(outputs, inputs), noise(outputs) if has_bias else None
        d_out = noise(n, outputs)
        out, d_x, d_w, d_bias = map(_room, (d_out, x, w, bias))
        call("linear_forward_fp32", x, w, bias, out, n, inputs, outputs)
        call("linear_backward_fp32", x, w, d_out, d_x, d_w, d_bias, n, inputs, outputs)


def _feed_forward(call: Caller, noise: Noise) -> None:
    cases = [
        *((1003, 48, 192, True, 1.0), (7, 16, 304, False, 1.0), (49, 80, 16, True, 1.0)),
        *((20, 32, 64, True, 30.0), (20, 32, 64, False, 1e-20), (200, 256, 1040, True, 1.0)),
    ]
    for n, c, f, has_bias, size in cases:
        x, w1, w2, d_out = noise(n, c, size=size), noise(f, c), noise(c, f), noise(n, c, size=size)
        b1, b2 = (noise(f), noise(c)) if has_bias else (None, None)
        before, out = noise(n, f), _room(x)
        call("feed_forward_forward_fp32", x, w1, b1, w2, b2, before, out, n, c, f)
        gradients = map(_room, (x, w1, b1, w2, b2))
        call("feed_forward_backward_fp32", x, w1, w2, before, d_out, *gradients, n, c, f)


def _layer_norm(call: Caller, noise: Noise) -> None:
    cases = [(101, 48, True, True), (48, 400, False, False), (1, 16, True, False)]
    for n, c, has_bias, skips in cases:
        x, gain, d_out = 3 * noise(n, c) + 1, noise(c), noise(n, c)
        x[0] = 0.5  # a row with a variance of 0
        bias, skipped = noise(c) if has_bias else None, noise(n, c) if skips else None
        out, means, inverse_stds = _room(x), noise(n), noise(n)
        call("layer_norm_forward_fp32", x, gain, bias, out, means, inverse_stds, n, c, 1e-5)
        inputs = (x, gain, means, inverse_stds, d_out, skipped)
        call("layer_norm_backward_fp32", *inputs, *map(_room, (x, gain, bias)), n, c)


def _residual(call: Caller, noise: Noise) -> None:
    for n, p in [(16 * 531, 0.1), (4096, 0.0), (16, 0.9)]:
        x, update = noise(n), noise(n)
        call("residual_forward_fp32", x, update, _room(x), n, p, 3)
        call("residual_backward_fp32", x, _room(x), n, p, 3)


def _muon(call: Caller, noise: Noise) -> None:
    shapes = [(16, 48), (48, 16), (80, 112), (112, 80), (304, 64)]
    for some in (shapes, shapes[2:3]):
        weights, gradients, momenta = ([noise(*shape) for shape in some] for _ in range(3))
        gradients[0][:] = momenta[0][:] = 0  # its norm is 0
        numbers = np.array(some, np.int32), np.linspace(0.1, 1, len(some), dtype=np.float32)
        steps = np.float32([3.4445, -4.775, 2.0315, 2.3, -1.7, 0.42, 1.875, -1.25, 0.375])
        tensors = (weights, gradients, momenta, *numbers)
        call("muon_fp32", *tensors, len(some), 0.95, 0.999, steps, 3)


def _step(call: Caller, noise: Noise) -> None:
    for n, c, rows, p in [(300, 48, 65, 0.1), (1, 16, 7, 0.0)]:
        ids, places = (np.arange(n) * 37 % rows, np.arange(n) % 50)
        tokens, positions, d_out = noise(rows, c), noise(50, c), noise(n, c)
        call("embedding_forward_fp32", ids, places, tokens, positions, _room(d_out), n, c, p, 7)
        call("embedding_backward_fp32", ids, d_out, _room(tokens), n, rows, c, p, 7)
    for n, v, size in [(301, 65, 1.0), (7, 3, 1.0), (20, 100, 30.0), (5, 1, 1.0)]:
        logits, targets = noise(n, v, size=size), np.arange(n) * 5 % v
        for d_logits in (_room(logits), None):
            call("cross_entropy_fp32", logits, targets, noise(n), noise(1), d_logits, n, v)
    v, keys = 7, np.array([1, 2, 9, 13, 20])  # contexts 0, 1 and 2; context 2 has one gram
    counts, firsts = np.float32([2, 1, 3, 1, 1]), np.array([0, 2, 4, 5])
    totals, contexts = np.float32([3, 4, 1]), np.array([0, 1, 2, -1] * 9)
    targets, counted = np.array([2, 2, 6, 0] * 9), np.array([1, 1, 1, 0] * 9)
    level = (keys, counts, firsts, totals)
    call("ngram_find_fp32", keys, len(keys), contexts, targets, np.zeros(36, int), 36, v)
    call("ngram_mix_fp32", *level, contexts, targets, counted, np.abs(noise(36, v)), 36, v)
    shapes = [(65, 48), (1,), (9000,), (7, 3)]  # 9000: more than a chunk
    weights, gradients, means, squares = ([noise(*shape) for shape in shapes] for _ in range(4))
    squares = [np.abs(square) for square in squares]
    steps = [np.float32([number]) for number in (0, 1, 10, 10_000)]
    sizes = np.array([weight.size for weight in weights])
    tensors = (weights, gradients, means, squares, steps)
    call("adamw_fp32", *tensors, sizes, len(sizes), 3e-3, 0.9, 0.95, 0.1, 1e-8)
    call("norm_fp32", gradients, sizes, len(sizes), noise(1))
    call("scale_fp32", gradients, [_room(g) for g in gradients], sizes, len(sizes), 0.37)


def _decoder(call: Caller, noise: Noise, norms: str, has_bias: bool) -> None:
    layers, heads, c, f, vocab, block, slots = 2, 3, 48, 80, 65, 97, 3

    def pair(*shape: int, on: bool = True, size: float = 1.0) -> list[Array | None]:
        bias = noise(shape[0]) if on and has_bias else None
        return [noise(*shape, size=size) if on else None, bias]

    tensors: list[Array | None] = [noise(vocab, c), noise(block, c)]
    for _ in range(layers):
        for first, hidden in ((3 * c, c), (f, f)):
            for place in ("before", "inside", "after"):
                tensors += pair(c, on=place in norms)
            tensors += [*pair(first, c, size=0.2), *pair(c, hidden, size=0.2)]
    tensors += [*pair(c), noise(vocab, c), None]
    sizes = np.array([layers, heads, c, f, vocab, block, slots], np.int32)
    call("decoder_new", sizes, 1e-5, tensors)

    def read(rows: Sequence[tuple[int, int]], wanted: Sequence[int], strips: int) -> None:
        ids = [(7 * slot + 5 * position) % vocab for slot, position in rows]
        columns = (ids, *zip(*rows, strict=True))
        inputs = [np.array(column, np.int32) for column in columns]
        outputs = (len(wanted), np.array(wanted, np.int32), noise(len(wanted), vocab))
        call("decoder_forward", len(rows), *inputs, *outputs, strips)

    # 70 rows are more than MAX_ROWS.
    read([(0, p) for p in range(70)], [3, 64, 69], 1)
    call("decoder_copy", 0, 2, 67)
    read([(2, 67), (1, 0), (1, 1), (0, 70)], [0, 2, 3], 6)
    read([(1, p) for p in range(2, 90)], [87], 4)
    read([(0, 71), (2, 68)], [0, 1], 1)
    call("decoder_free")


if __name__ == "__main__":
    with Path(sys.argv[1]).open("wb") as record:
        library = load_kernels().library
        library.chargpt_set_threads(3)
        call_all(Caller(library, record))
