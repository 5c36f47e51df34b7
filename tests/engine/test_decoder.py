"""Both decoders, compared with the model without a cache in float64.

The native decoder is also tested as compiled for AVX-512, for AVX2, and without vector extensions.
"""

import ctypes
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import platformdirs
import pytest
import torch
from torch import Tensor
from twin import shake
from variants import kernels_of

from chargpt.base.errors import UserError
from chargpt.compute import library
from chargpt.compute.fast_layers import set_attention, use_kernels
from chargpt.compute.library import KernelsError, find_library
from chargpt.compute.native import LANES, Kernels
from chargpt.config import GPT2Config, OnOffAuto
from chargpt.engine import native_decoder
from chargpt.engine.decoder import Chunk, Decoder, PyTorchDecoder
from chargpt.engine.native_decoder import NativeDecoder, decodes
from chargpt.generate import make_decoder
from chargpt.model import ACTIVATIONS, GPT2

T = 24


class Kind(NamedTuple):
    """A kind of decoder. The native one is the same to the bit for any chunks and neighbours."""

    name: str

    def make(self, model: GPT2, n_slots: int) -> Decoder:
        if self.name == "pytorch":
            return PyTorchDecoder(model, n_slots)
        kernels = kernels_of(self.name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native_decoder, "load_kernels", lambda: kernels)
            assert decodes(model)
            return NativeDecoder(model, n_slots)

    def assert_same(self, a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if self.name == "pytorch" else 0)


@pytest.fixture(scope="module", params=["pytorch", "native", "avx512", "avx2", "plain"])
def kind(request: pytest.FixtureRequest) -> Kind:
    if request.param != "pytorch":
        kernels_of(request.param)  # skips the test where they do not compile
    return Kind(request.param)


def some_model(seed: int = 0, **changes: Any) -> GPT2:
    """A model with large random biases and gains; its logits differ by about one."""
    shape = {"block_size": T, "vocab_size": 11, "n_layer": 2, "n_head": 2, "d_model": 32}
    config = GPT2Config(**shape | {"dropout": 0.1} | changes)
    return shake(GPT2(config), seed=seed, std=0.12).eval()


def some_ids(model: GPT2, n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(model.config.vocab_size) for _ in range(n)]


def uncached(model: GPT2, ids: Sequence[int]) -> Tensor:
    """Return the logits after each id, (n, V), in float64."""
    with torch.no_grad():
        logits: Tensor = deepcopy(model).double().eval()(torch.tensor([list(ids)]))
    return logits[0]


def assert_exact(ours: Tensor, ids: Sequence[int], model: GPT2) -> None:
    """Compare the logits after the last ids with the uncached model's."""
    assert ours.dtype == torch.float32
    expected = uncached(model, ids)[-len(ours) :]
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)


# --- logits with and without a cache

SHAPES: list[dict[str, Any]] = [
    {"norm_placement": placement, "bias": bias, **shape}
    for (placement, bias), shape in zip(
        product(("pre", "post", "sandwich"), (True, False)),
        [
            {"n_head": 2, "d_model": 32, "vocab_size": 11},  # heads of 16
            {"n_head": 1, "d_model": 48, "d_ff": 80, "vocab_size": 65},
            {"n_head": 3, "d_model": 96, "d_ff": 112, "vocab_size": 19},  # heads of 32
            {"n_head": 2, "d_model": 96, "vocab_size": 67, "block_size": 37},  # heads of 48
            {"n_head": 1, "d_model": 16, "d_ff": 16, "vocab_size": 1, "n_layer": 1},
            {"n_head": 5, "d_model": 80, "d_ff": 144, "vocab_size": 33, "n_layer": 3},
        ],
        strict=True,
    )
]
SHAPES += [
    {"block_size": 1},
    {"n_head": 2, "d_model": 128, "vocab_size": 130, "bias": False},  # heads of 64
    {"norm_placement": "post", "n_head": 2, "d_model": 96},
    {"norm_placement": "sandwich", "n_head": 2, "d_model": 32, "vocab_size": 16},
]


def in_pieces(
    decoder: Decoder, texts: dict[int, list[int]], rng: random.Random, start: int = 0
) -> dict[int, Tensor]:
    """Read texts (by slot) in random chunks, random slots at a time; return their logits."""
    read = dict.fromkeys(texts, 0)
    logits: dict[int, list[Tensor]] = {slot: [] for slot in texts}
    while unread := [slot for slot in texts if read[slot] < len(texts[slot])]:
        chunks = []
        longest = rng.choice([1, 1, 3, 100])
        for slot in rng.sample(unread, rng.randint(1, len(unread))):
            n = rng.randint(1, min(longest, len(texts[slot]) - read[slot]))
            chunks.append(Chunk(slot, start + read[slot], texts[slot][read[slot] :][:n]))
            read[slot] += n
        parts = decoder.read(chunks, every=True).split([len(chunk.ids) for chunk in chunks])
        for chunk, part in zip(chunks, parts, strict=True):
            logits[chunk.slot].append(part)
    return {slot: torch.cat(parts) for slot, parts in logits.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_equal_the_uncached_model_at_every_position(
    kind: Kind, shape: dict[str, Any]
) -> None:
    model = some_model(**shape)
    n = model.config.block_size
    lengths = [1, n, max(1, n // 2), n, max(1, n - 1), min(n, 3)]
    texts = {slot: some_ids(model, length, slot) for slot, length in enumerate(lengths)}
    decoder = kind.make(model, len(texts) + 2)
    assert (decoder.block_size, decoder.n_slots) == (n, len(texts) + 2)
    for slot, logits in in_pieces(decoder, texts, random.Random(1)).items():
        assert len(logits) == len(texts[slot])
        assert_exact(logits, texts[slot], model)
        if n > 1 and model.config.vocab_size > 1:
            assert logits.std() > 0.3, "the comparison is not one of zeros"


@pytest.mark.parametrize("seed", range(12))
def test_chunks_do_not_matter(kind: Kind, seed: int) -> None:
    """Any lengths, order and neighbours."""
    rng = random.Random(seed)
    model = some_model(seed, **rng.choice(SHAPES[:4]))
    n = model.config.block_size
    texts = {slot: some_ids(model, rng.randint(1, n), slot) for slot in range(rng.randint(1, 9))}
    at_once = {
        slot: kind.make(model, 1).read([Chunk(0, 0, ids)], every=True)
        for slot, ids in texts.items()
    }
    for slot, logits in in_pieces(kind.make(model, len(texts)), texts, rng).items():
        kind.assert_same(logits, at_once[slot])
    # All in one call, in any order.
    chunks = [Chunk(slot, 0, texts[slot]) for slot in rng.sample(sorted(texts), len(texts))]
    result = kind.make(model, len(texts)).read(chunks, every=True)
    for chunk, part in zip(chunks, result.split([len(c.ids) for c in chunks]), strict=True):
        kind.assert_same(part, at_once[chunk.slot])


def test_more_rows_than_one_kernel_call_takes(kind: Kind) -> None:
    """More than 64: a long prompt, long beside short prompts, and 100 slots."""
    model = some_model(block_size=200, vocab_size=13)
    texts = [some_ids(model, n, n) for n in (200, 63, 64, 65, 1, 130)]
    chunks = [Chunk(slot, 0, ids) for slot, ids in enumerate(texts)]
    every = kind.make(model, 6).read(chunks, every=True).split([len(ids) for ids in texts])
    for ids, part in zip(texts, every, strict=True):
        assert_exact(part, ids, model)
    last = kind.make(model, 6).read(chunks)
    kind.assert_same(last, torch.stack([part[-1] for part in every]))

    decoder = kind.make(model, 100)
    slots = random.Random(0).sample(range(100), 100)
    texts = [some_ids(model, 4, slot) for slot in range(100)]
    for position in range(4):
        chunks = [Chunk(slot, position, texts[slot][position : position + 1]) for slot in slots]
        result = decoder.read(chunks)
        for slot, row in list(zip(slots, result, strict=True))[::7]:
            assert_exact(row[None], texts[slot][: position + 1], model)


# --- slots


def test_a_reused_slot_keeps_nothing_of_its_old_content(kind: Kind) -> None:
    model = some_model()
    decoder = kind.make(model, 2)
    for seed, n in enumerate((T, 3, 1, 17, T)):
        ids = some_ids(model, n, seed)
        fresh = kind.make(model, 2).read([Chunk(1, 0, ids)], every=True)
        kind.assert_same(decoder.read([Chunk(1, 0, ids)], every=True), fresh)
    # Also when reading restarts within a slot.
    ids = some_ids(model, T, 9)
    whole = decoder.read([Chunk(0, 0, ids)], every=True)
    kind.assert_same(decoder.read([Chunk(0, 5, ids[5:9])], every=True), whole[5:9])


def test_other_slots_do_not_matter(kind: Kind) -> None:
    model = some_model()
    ids = some_ids(model, T, 0)
    alone = kind.make(model, 1).read([Chunk(0, 0, ids)], every=True)
    decoder = kind.make(model, 9)
    for slot in range(9):
        decoder.read([Chunk(slot, 0, some_ids(model, T, 10 + slot))])
    logits = []
    for position in range(T):
        logits.append(decoder.read([Chunk(4, position, ids[position : position + 1])]))
        decoder.read([Chunk(position % 4, position, [1]), Chunk(5 + position % 4, 0, [2, 3])])
    kind.assert_same(torch.cat(logits), alone)


@pytest.mark.parametrize("variant", ["native", "avx2", "plain"])
def test_the_native_decoder_skips_positions_that_are_masked(variant: str) -> None:
    """It does not multiply them by zero: NaN at a later position has no effect."""
    kernels_of(variant)
    model = some_model()
    with torch.no_grad():
        model.position_embedding.weight[-1] = torch.nan
    ids = some_ids(model, T, 0)
    decoder = Kind(variant).make(model, 2)
    logits = decoder.read([Chunk(0, 0, ids), Chunk(1, 0, ids)], every=True).view(2, T, -1)
    assert logits[:, -1].isnan().all()
    undamaged = some_model()
    assert_exact(logits[0, :-1], ids[:-1], undamaged)
    assert_exact(decoder.read([Chunk(0, 0, ids[:7])], every=True), ids[:7], undamaged)


@pytest.mark.parametrize("length", [1, 7, 16, 21, 32, 39])
def test_a_copied_slot_is_independent(kind: Kind, length: int) -> None:
    """Also when a part of a slot is copied, over older content."""
    model = some_model(block_size=40, n_head=3, d_model=144, vocab_size=11)  # heads of 48
    prompt = some_ids(model, 39, 0)
    ways = {slot: some_ids(model, 40 - length, slot) for slot in (3, 0, 4)}
    decoder = kind.make(model, 5)
    others = {slot: some_ids(model, 40, 7 + slot) for slot in range(5)}
    for slot, ids in others.items():
        decoder.read([Chunk(slot, 0, ids)])
    decoder.read([Chunk(3, 0, prompt)])
    for target in (0, 4):
        decoder.copy(3, target, length)
    logits = in_pieces(decoder, ways, random.Random(0), start=length)
    for slot, way in ways.items():
        expected = kind.make(model, 1).read([Chunk(0, 0, prompt[:length] + way)], every=True)
        kind.assert_same(logits[slot], expected[length:])
    for slot in (1, 2):  # not copied to
        last = kind.make(model, 1).read([Chunk(0, 0, others[slot])])
        kind.assert_same(decoder.read([Chunk(slot, 39, others[slot][39:])]), last)


# --- threads


@pytest.fixture
def two_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [{}, {"norm_placement": "sandwich", "n_head": 3, "d_model": 96}])
def test_two_threads_give_the_bits_of_one(
    monkeypatch: pytest.MonkeyPatch, two_threads: Callable[[int], None], shape: dict[str, Any]
) -> None:
    kernels_of("native")
    monkeypatch.setattr(native_decoder, "THREADS_FROM", 0)
    model = some_model(block_size=80, vocab_size=65, **shape)
    texts = {slot: some_ids(model, 80 - 9 * slot, slot) for slot in range(2)}
    logits = {}
    for built, read in product((1, 2), repeat=2):
        two_threads(built)
        decoder = NativeDecoder(model, 4)
        two_threads(read)
        logits[built, read] = torch.cat([*in_pieces(decoder, texts, random.Random(0)).values()])
    for other in logits.values():
        assert torch.equal(other, logits[1, 1])


def without_library(model: GPT2, calls: list[tuple[Any, ...]]) -> NativeDecoder:
    """Return a decoder that computes nothing and records its kernel calls."""
    kernels_of("native")
    decoder = NativeDecoder(model, 1)
    free = decoder._library.decoder_free
    record = lambda *arguments: calls.append(arguments)  # noqa: E731
    decoder._library = SimpleNamespace(decoder_forward=record, decoder_free=free)  # type: ignore[assignment]
    return decoder


def test_threads_share_only_large_reads(
    monkeypatch: pytest.MonkeyPatch, two_threads: Callable[[int], None]
) -> None:
    model = some_model()
    calls: list[tuple[Any, ...]] = []
    decoder = without_library(model, calls)
    two_threads(2)
    weights = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(native_decoder, "THREADS_FROM", weights * 10)
    for n in (1, T):
        decoder.read([Chunk(0, 0, [1] * n)])
    assert [arguments[-1] > 1 for arguments in calls] == [False, True]


# --- the model


def test_reading_does_not_change_the_model(kind: Kind) -> None:
    """Mode, weights and gradients stay; dropout is off during a read."""
    model = some_model(dropout=0.5).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    ids = some_ids(model, T, 0)
    logits = kind.make(model, 1).read([Chunk(0, 0, ids)], every=True)
    assert_exact(logits, ids, model)
    assert not logits.requires_grad
    assert all(module.training for module in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    model(torch.tensor([ids])).sum().backward()  # fails if the weights are inference tensors


def test_an_untied_head_and_unusual_strides(kind: Kind) -> None:
    model = some_model()
    generator = torch.Generator().manual_seed(5)
    untied = 0.2 * torch.randn(32, 11, generator=generator).t()  # (11, 32), not contiguous
    model.head.weight = torch.nn.Parameter(untied)
    model.blocks[1].feed_forward.sublayer.expand.weight = torch.nn.Parameter(  # type: ignore[union-attr]
        0.1 * torch.randn(32, 128, generator=generator).t()
    )
    ids = some_ids(model, T, 0)
    assert_exact(kind.make(model, 1).read([Chunk(0, 0, ids)], every=True), ids, model)


def test_fast_layers_give_the_same_logits(kind: Kind) -> None:
    kernels_of("native")
    model = some_model()
    ids = some_ids(model, T, 0)
    before = kind.make(model, 1).read([Chunk(0, 0, ids)], every=True)
    use_kernels(model)
    set_attention(model, "native")
    after = kind.make(model, 1).read([Chunk(0, 0, ids)], every=True)
    kind.assert_same(after, before)
    model.train()
    assert_exact(kind.make(model, 1).read([Chunk(0, 0, ids)], every=True), ids, some_model())


@pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")],
)
def test_logits_are_float32_on_the_cpu_for_any_torch_defaults(
    dtype: torch.dtype, device: str
) -> None:
    decoder, before = without_library(some_model(), []), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            logits = decoder.read([Chunk(0, 0, [1, 2])])
    finally:
        torch.set_default_dtype(before)
    assert (logits.dtype, logits.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("backend", ["matmul", "sdpa"])
def test_every_attention_backend_uses_the_cache(backend: Any) -> None:
    model = some_model()
    set_attention(model, backend)
    ids = some_ids(model, T, 0)
    logits = in_pieces(PyTorchDecoder(model, 1), {0: ids}, random.Random(0))[0]
    assert_exact(logits, ids, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_weight_types(dtype: torch.dtype) -> None:
    model = some_model().to(dtype)
    ids = some_ids(model, T, 0)
    logits = in_pieces(PyTorchDecoder(model, 2), {1: ids}, random.Random(0))[1]
    assert logits.dtype == torch.float32
    tolerance = 1e-6 if dtype == torch.float64 else 0.1  # logits of about 1, 8 significant bits
    torch.testing.assert_close(logits.double(), uncached(model, ids), rtol=0, atol=tolerance)


# --- choice of the decoder


def kind_of(model: GPT2, kernels: OnOffAuto) -> type:
    return type(make_decoder(model, 1, kernels))


UNSUPPORTED: list[dict[str, Any]] = [
    {"n_head": 4, "d_model": 24},  # heads of 6
    {"n_head": 1, "d_model": 34},
    {"n_head": 2, "d_model": 32, "d_ff": 66},
    *({"activation_function": name} for name in sorted(ACTIVATIONS.keys() - {"gelu"})),
    *({"dtype": dtype} for dtype in (torch.bfloat16, torch.float16, torch.float64)),
]


def on_a_linux_with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels_of("native")
    monkeypatch.setattr(sys, "platform", "linux")


def test_a_supported_model_gets_the_native_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_linux_with_kernels(monkeypatch)
    for model in (some_model(), some_model(norm_placement="post", bias=False, n_head=1)):
        assert kind_of(model, "auto") is kind_of(model, "on") is NativeDecoder
        assert kind_of(model, "off") is PyTorchDecoder
    monkeypatch.setattr(sys, "platform", "darwin")
    assert kind_of(some_model(), "auto") is PyTorchDecoder
    assert kind_of(some_model(), "on") is NativeDecoder


@pytest.mark.parametrize("shape", UNSUPPORTED, ids=str)
def test_an_unsupported_model_falls_back(
    monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
) -> None:
    on_a_linux_with_kernels(monkeypatch)
    dtype = shape.get("dtype", torch.float32)
    model = some_model(**{name: value for name, value in shape.items() if name != "dtype"})
    model.blocks[1].to(dtype)
    assert kind_of(model, "auto") is kind_of(model, "off") is PyTorchDecoder
    with pytest.raises(UserError, match=r"^kernels is 'on', but .*: give --kernels auto$"):
        make_decoder(model, 1, "on")
    if dtype == torch.float32:
        ids = some_ids(model, T, 0)
        assert_exact(make_decoder(model, 1).read([Chunk(0, 0, ids)], every=True), ids, model)


@pytest.mark.parametrize("variant", ["avx2", "plain"])
def test_widths_must_be_multiples_of_the_lanes(
    monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    kernels = kernels_of(variant)
    monkeypatch.setattr(native_decoder, "load_kernels", lambda: kernels)
    for width in (4, 8, 12, 16, 24):
        model = some_model(n_head=2, d_model=2 * width, d_ff=64)
        assert decodes(model) == (width % LANES == 0)
        if decodes(model):
            ids = some_ids(model, T, 0)
            logits = NativeDecoder(model, 1).read([Chunk(0, 0, ids)], every=True)
            assert_exact(logits, ids, model)


def test_without_a_compiler_pytorch_decodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(tmp_path / "cache"))
    monkeypatch.setattr(library, "PREBUILT", tmp_path)
    monkeypatch.setattr(native_decoder, "load_kernels", lambda: Kernels(find_library().path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert kind_of(some_model(), "auto") is PyTorchDecoder
    with pytest.raises(UserError, match=r"no C\+\+ compiler found .*: give --kernels auto$") as e:
        make_decoder(some_model(), 1, "on")
    assert "\n" not in str(e.value)


def test_a_library_without_a_decoder_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = SimpleNamespace(library=ctypes.CDLL(None))
    monkeypatch.setattr(native_decoder, "load_kernels", lambda: empty)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(KernelsError):
        NativeDecoder(some_model(), 1)
    assert kind_of(some_model(), "auto") is PyTorchDecoder


def test_a_cache_that_does_not_fit_is_a_memory_error() -> None:
    kernels_of("native")
    with pytest.raises(MemoryError, match="cache for 2147483647 sequences does not fit"):
        NativeDecoder(some_model(block_size=1024, n_head=1, d_model=16), 2**31 - 1)


def test_values_out_of_range_do_not_reach_the_kernels() -> None:
    kernels_of("native")
    decoder = NativeDecoder(some_model(), 2)
    for chunk in (
        Chunk(0, 0, [11]),
        Chunk(0, 0, [-1]),
        Chunk(2, 0, [1]),
        Chunk(-1, 0, [1]),
        Chunk(0, T - 1, [1, 1]),
    ):
        with pytest.raises(IndexError):
            decoder.read([chunk])
    for target, length in ((2, 1), (-1, 1), (1, T + 1), (1, -1)):
        with pytest.raises(IndexError):
            decoder.copy(0, target, length)
