"""A GPT-2 on the kernels against the same GPT-2 in float64: logits, gradients, a loss curve."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import words
from torch import Tensor, nn
from twin import shake
from variants import COMPILERS

from chargpt.compute import native
from chargpt.compute.fast_layers import (
    FAST,
    Backend,
    FastFeedForward,
    FastLayerNorm,
    FastLinear,
    fast_muon_update,
    set_attention,
    use_kernels,
)
from chargpt.compute.library import KernelsError
from chargpt.compute.muon import JORDAN, MuonSettings, muon_update
from chargpt.compute.native import Kernels, load_kernels
from chargpt.config import GPT2Config
from chargpt.model import GPT2

pytestmark = pytest.mark.skipif(not COMPILERS, reason="no C++ compiler here")
BF16 = torch.bfloat16
PLACEMENTS = ["pre", "post", "sandwich"]
KERNELS = {"attention", "embedding", "linear", "feed_forward", "layer_norm", "residual"}

Call = tuple[str, tuple[Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Record the calls of kernels, to be sure that a test does not compare PyTorch with itself."""
    made: list[Call] = []
    call = Kernels.__call__

    def spy(self: Kernels, name: str, dtype: torch.dtype, *arguments: Any) -> None:
        made.append((name, arguments))
        call(self, name, dtype, *arguments)

    monkeypatch.setattr(Kernels, "__call__", spy)
    return made


def names(calls: list[Call]) -> set[str]:
    """Return the names of the called kernels, without their direction."""
    return {name.removesuffix("_forward").removesuffix("_backward") for name, _ in calls}


def config(**changes: Any) -> GPT2Config:
    shape: dict[str, Any] = {"block_size": 21, "vocab_size": 11, "d_model": 32, "d_ff": 48}
    return GPT2Config(**{"n_layer": 2, "n_head": 2, "dropout": 0.0} | shape | changes)


def pair(**changes: Any) -> tuple[GPT2, GPT2]:
    """Return a model and a copy of it on the kernels."""
    plain = shake(GPT2(config(**changes)), std=0.2)
    fast = copy.deepcopy(plain)
    use_kernels(fast)
    set_attention(fast, "native")
    return plain, fast


def some_ids(seed: int = 1, batch: int = 3, time: int = 21) -> Tensor:
    return torch.randint(11, (batch, time), generator=torch.Generator().manual_seed(seed))


def logits_and_gradients(
    model: GPT2, ids: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits, and the gradient of every parameter for random targets."""
    model.zero_grad()
    with torch.autocast("cpu", BF16, enabled=dtype == BF16):
        logits = model(ids)
    loss = F.cross_entropy(logits.flatten(0, 1).to(model.head.weight.dtype), some_ids(2).flatten())
    loss.backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(ours: Tensor, exact: Tensor) -> float:
    """Return the root mean square of the error, relative to that of the exact values."""
    difference = ours.detach().double() - exact.detach()
    return math.sqrt(difference.square().mean() / exact.detach().square().mean())


# --- values and gradients


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({}, set()),
        ({"bias": False}, set()),
        ({"norm_placement": "post"}, set()),
        ({"norm_placement": "sandwich", "bias": False}, set()),
        ({"vocab_size": 48}, set()),  # whole vectors: the head uses a kernel too
        ({"activation_function": "relu"}, {"feed_forward"}),
        ({"activation_function": "gelu_exact", "bias": False}, {"feed_forward"}),
        ({"d_ff": 41}, {"feed_forward"}),  # not a multiple of the vector width
        ({"n_head": 16}, {"attention"}),  # heads of two
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_logits_and_gradients_equal_the_plain_models(
    calls: list[Call], changes: dict[str, Any], without: set[str], training: bool
) -> None:
    plain, fast = pair(**changes)
    exact = copy.deepcopy(plain).double()
    logits, gradients = logits_and_gradients(fast.train(training), some_ids())
    assert names(calls) == KERNELS - without
    expected, exact_gradients = logits_and_gradients(exact, some_ids())
    assert expected.std() > 0.5  # the values to compare are not all zero
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == exact_gradients.keys()
    for name, gradient in gradients.items():
        assert error(gradient, exact_gradients[name]) < 1e-5, name


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("bias", [True, False])
def test_bf16_errors_are_like_those_of_pytorch(
    calls: list[Call], placement: str, bias: bool
) -> None:
    """Both round values to 8 bits, but in different places, so both are compared with float64."""
    if BF16 not in load_kernels().dtypes:
        pytest.skip("this processor does not multiply bf16")
    plain, fast = pair(norm_placement=placement, bias=bias)
    expected, exact_gradients = logits_and_gradients(copy.deepcopy(plain).double(), some_ids())
    residuals: list[torch.dtype] = []
    for block in (*plain.blocks, *fast.blocks):
        block.register_forward_hook(lambda _, x, y: residuals.append(y.dtype))
    theirs, their_gradients = logits_and_gradients(plain, some_ids(), BF16)
    assert not calls
    ours, our_gradients = logits_and_gradients(fast, some_ids(), BF16)
    assert names(calls) >= KERNELS - {"residual"}
    assert residuals == [torch.float32] * 4  # rounding them each time would lose small updates
    assert error(ours, expected) < 1.25 * error(theirs, expected)
    for name, exact in exact_gradients.items():
        # A gain's gradient sums over few tokens, so its error may double by chance.
        assert error(our_gradients[name], exact) < 2 * error(their_gradients[name], exact), name


def test_every_layer_drops_with_the_models_probability_in_training_only(
    calls: list[Call],
) -> None:
    plain, fast = pair(dropout=0.25)
    ids, logits = some_ids(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        logits.append(fast.train()(ids))
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)
    drops = [(name, rest[-2:]) for name, rest in calls if name.startswith(("attention", "resid"))]
    first = drops[: len(drops) // 3]
    assert len(first) == 3 * 2
    assert {p for _, (p, _) in drops} == {0.25}
    assert len({seed for _, (_, seed) in first}) == len(first)  # layers drop independently
    torch.testing.assert_close(
        fast.eval()(some_ids()), plain.eval()(some_ids()), rtol=1e-5, atol=1e-5
    )


def test_frozen_weights_and_inference_mode() -> None:
    plain, fast = pair()
    for model in (plain, fast):
        for part in (model.token_embedding, model.position_embedding, model.blocks[0]):
            part.requires_grad_(False)
    (_, expected), (_, gradients) = (logits_and_gradients(m, some_ids()) for m in (plain, fast))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(fast(some_ids()), plain(some_ids()), rtol=1e-5, atol=1e-5)


# --- the swap


def test_use_kernels_keeps_parameters_and_state() -> None:
    model = GPT2(config())
    parameters = {name: id(p) for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [name for name, _ in model.named_modules()]
    use_kernels(model)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert model.head.weight is model.token_embedding.weight
    assert [name for name, _ in model.named_modules()] == modules
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    kinds = {type(module) for module in model.modules()}
    assert not kinds & FAST.keys()
    assert {FastLayerNorm, FastLinear, FastFeedForward} <= kinds
    classes = [type(module) for module in model.modules()]
    use_kernels(model)  # a second call changes nothing
    assert [type(module) for module in model.modules()] == classes


def test_without_a_compiler_the_model_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Kernels:
        raise KernelsError("no compiler")

    monkeypatch.setattr(native, "load_kernels", fail)
    model = GPT2(config())
    before, classes = model(some_ids()), [type(module) for module in model.modules()]
    with pytest.raises(KernelsError):
        use_kernels(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(some_ids()), before)


# --- falling back


@pytest.mark.parametrize(
    ("changes", "compiling"), [({"d_model": 18, "d_ff": 27, "n_head": 3}, False), ({}, True)]
)
def test_unsupported_widths_and_compiled_models_use_pytorch(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], compiling: bool
) -> None:
    """The results have the same bits as those of the plain model."""
    plain, fast = pair(**changes)
    set_attention(plain, "matmul")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    (expected, gradients), (ours, our_gradients) = (
        logits_and_gradients(m, some_ids()) for m in (plain, fast)
    )
    assert not calls
    assert torch.equal(ours, expected)
    for name, gradient in gradients.items():
        assert torch.equal(our_gradients[name], gradient), name


@pytest.mark.parametrize(
    ("convert", "backend"),
    # The kernel for attention has no weights, so it supports bf16.
    [(GPT2.double, "native"), (GPT2.half, "native"), (GPT2.bfloat16, "matmul")],
)
def test_a_model_of_another_type_uses_pytorch(
    calls: list[Call], convert: Callable[[GPT2], GPT2], backend: Backend
) -> None:
    plain, fast = (convert(model).eval() for model in pair())
    set_attention(plain, "matmul")
    set_attention(fast, backend)
    with torch.no_grad():
        assert torch.equal(fast(some_ids()), plain(some_ids()))
    assert not calls


# --- Muon


@pytest.mark.parametrize(
    ("shape", "dtype", "supported"),
    [
        ((16, 48), torch.float32, True),
        ((16, 41), torch.float32, False),
        ((9, 48), torch.float32, False),
        ((16, 48), torch.float64, False),
    ],
)
def test_muon_uses_the_kernels_for_supported_matrices(
    calls: list[Call], shape: tuple[int, ...], dtype: torch.dtype, supported: bool
) -> None:
    settings = MuonSettings(momentum=0.9, decay=0.9, dtype=dtype, steps=JORDAN)
    results = []
    for update in (fast_muon_update, muon_update):
        generator = torch.Generator().manual_seed(1)
        tensors = [[torch.randn(shape, generator=generator, dtype=dtype)] for _ in range(3)]
        update(*tensors, [0.1], settings)
        results.append((tensors[0][0], tensors[2][0]))
    assert bool(calls) == supported
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 if supported else 0)


# --- learning


def curve(seed: int, dtype: torch.dtype, *, kernels: bool) -> float:
    """Return the mean loss of the last 50 of 200 steps."""
    text = words(20_000)
    alphabet = sorted(set(text))
    data = torch.tensor([alphabet.index(c) for c in text])
    torch.manual_seed(seed)
    shape = {"block_size": 32, "vocab_size": len(alphabet), "n_layer": 1, "d_ff": 128}
    model = GPT2(config(dropout=0.1, **shape))
    set_attention(model, "native" if kernels else "matmul")
    if kernels:
        use_kernels(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.1)
    losses = []
    for _ in range(200):
        starts = torch.randint(len(data) - 33, (8, 1))
        windows = data[starts + torch.arange(33)]
        with torch.autocast("cpu", BF16, enabled=dtype == BF16):
            logits = model(windows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 2.5
    return sum(losses[150:]) / 50


def test_a_model_on_the_kernels_learns_as_well_as_a_plain_one() -> None:
    """The losses differ as little as those of different seeds, for every supported value type."""
    plain = torch.tensor([curve(seed, torch.float32, kernels=False) for seed in range(4)])
    mean, spread = plain.mean().item(), plain.std().item()
    assert mean < 1.5  # the model has learned
    assert spread < 0.1
    for dtype in sorted(load_kernels().dtypes, key=str):
        losses = [curve(seed, dtype, kernels=True) for seed in (10, 11)]
        assert abs(sum(losses) / 2 - mean) < 3 * spread * math.sqrt(1 / 2 + 1 / 4), dtype
