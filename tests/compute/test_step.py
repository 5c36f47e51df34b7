"""What a step computes besides the layers: against float64, and the same bits everywhere."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from variants import COMPILERS, kernels_of

from chargpt.compute import native, step
from chargpt.compute.fast_layers import use_kernels
from chargpt.compute.muon import AdamWSettings, AdamWTensors, adamw_update
from chargpt.compute.native import Kernels
from chargpt.compute.optimizers import make_optimizer
from chargpt.config import GPT2Config, TrainConfig
from chargpt.model import GPT2

if not COMPILERS:
    pytest.skip("no C++ compiler here", allow_module_level=True)

BF16 = torch.bfloat16
VARIANTS = ("native", "avx512", "avx2", "plain")
SIZES = (1, 7, 16, 130, 8192, 8193, 30_011)  # of tensors: less than a vector, and several chunks
VOCABULARIES = (1, 2, 15, 16, 17, 65, 331)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that selects a variant of the kernels and a number of threads."""
    used: set[Kernels] = set()

    def select(variant: str, threads: int = 1) -> None:
        kernels = kernels_of(variant)
        used.add(kernels)
        kernels.library.chargpt_set_threads(threads)
        monkeypatch.setattr(native, "load_kernels", lambda: kernels)

    yield select
    for kernels in used:
        kernels.library.chargpt_set_threads(1)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, use: Callable[..., None]) -> None:
    use(request.param, 2)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers(n: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


def tensors(seed: int) -> list[Tensor]:
    return [noise(size, seed=seed + size) for size in SIZES]


def assert_close(ours: Tensor, exact: Tensor) -> None:
    """The largest error is below a hundred roundings of the largest value."""
    assert ours.shape == exact.shape
    scale = max(1e-3, float(exact.abs().max())) if exact.numel() else 1.0
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=100 * 2**-24 * scale)


# --- the input embedding


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("batch", "time", "vocab_size"), [(1, 1, 1), (5, 7, 3), (60, 90, 65), (2, 4, 5000), (0, 4, 3)]
)
def test_embedding_equals_the_formula(
    batch: int, time: int, vocab_size: int, dropout_p: float
) -> None:
    ids, positions, C = numbers(vocab_size, batch, time), torch.arange(time).flip(0), 48
    tables = [noise(rows, C, seed=rows).requires_grad_() for rows in (vocab_size, time + 2)]
    torch.manual_seed(3)
    out = native.embedding(ids, positions, *tables, dropout_p)
    upstream = noise(*out.shape, seed=5)
    gradients = torch.autograd.grad(out, tables, upstream)

    exact = [table.detach().double().requires_grad_() for table in tables]
    torch.manual_seed(3)  # the mask is that of the residual sum
    mask = native.residual_sum(torch.zeros_like(out), torch.ones_like(out), dropout_p).double()
    expected = (F.embedding(ids, exact[0]) + F.embedding(positions, exact[1])) * mask
    assert_close(out.detach(), expected.detach())
    if dropout_p and batch > 5:
        assert mask.unique().numel() == 2
        assert float((mask == 0).double().mean()) == pytest.approx(dropout_p, abs=0.01)
    for ours, theirs in zip(
        gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True
    ):
        assert_close(ours, theirs)


def test_a_frozen_table_gets_no_gradient() -> None:
    tokens, positions = noise(5, 16), noise(7, 16).requires_grad_()
    native.embedding(numbers(5, 2, 3), torch.arange(3), tokens, positions, 0.0).sum().backward()
    assert tokens.grad is None
    assert positions.grad is not None


@pytest.mark.parametrize("wrong", [-1, 5])
def test_ids_outside_a_table_are_refused(wrong: int) -> None:
    good, bad, table = torch.tensor([[0, 4]]), torch.tensor([[0, wrong]]), noise(5, 16)
    for ids, positions in ((bad, good), (good, bad)):
        with pytest.raises(IndexError, match=str(wrong)):
            native.embedding(ids, positions, table, table, 0.0)
    for loss in (native.cross_entropy, native.token_losses):
        with pytest.raises(IndexError, match=str(wrong)):
            loss(noise(2, 5), bad)


# --- cross-entropy


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_cross_entropy_equals_pytorchs(vocab_size: int, dtype: torch.dtype) -> None:
    if dtype not in native.load_kernels().dtypes:
        pytest.skip("this variant has no bf16")
    shape = (3, 100, vocab_size)
    logits = (6 * noise(*shape) + 40).to(dtype).requires_grad_()
    targets = numbers(vocab_size, 3, 100)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact.flatten(0, 1), targets.flatten())
    loss = native.cross_entropy(logits, targets)
    assert_close(loss.detach(), expected.detach())
    losses = F.cross_entropy(exact.flatten(0, 1), targets.flatten(), reduction="none")
    assert_close(native.token_losses(logits.detach(), targets), losses.detach())
    for factor in (1.0, 0.25):
        (ours,) = torch.autograd.grad(loss * factor, logits, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected * factor, exact, retain_graph=True)
        assert ours.dtype == dtype
        # bf16 keeps 8 bits of each value, and a factor of 1/4 loses none.
        rtol = 0 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=100 * 2**-24 / 300)


@pytest.mark.usefixtures("variant")
def test_extreme_logits() -> None:
    logits = torch.zeros(2, 17)
    logits[0, 3], logits[1, 3] = 1e4, -1e4
    targets = torch.tensor([3, 3])
    assert native.token_losses(logits, targets).tolist() == [0.0, pytest.approx(1e4 + math.log(16))]
    for position in (0, 16):
        broken = logits.clone()
        broken[1, position] = math.nan
        assert native.cross_entropy(broken, targets).isnan()
        assert not native.token_losses(broken, targets)[0].isnan()


# --- the norm, clipping, AdamW


@pytest.mark.usefixtures("variant")
def test_norm_and_scale() -> None:
    some = tensors(1)
    exact = torch.cat([tensor.double() for tensor in some])
    assert_close(native.norm(some), exact.norm())
    native.scale_(some, 0.3)
    assert_close(torch.cat(some), exact * 0.3)
    for value in (math.nan, math.inf):
        some[-1][-1] = value
        assert not native.norm(some).isfinite()


@pytest.mark.usefixtures("variant")
def test_adamw_equals_pytorchs() -> None:
    settings = AdamWSettings(0.1, (0.8, 0.9), 0.2, 1e-8, fused=None)
    ours = AdamWTensors(
        tensors(1), [], *(list(map(torch.zeros_like, tensors(1))) for _ in "mv"), []
    )
    exact = AdamWTensors(*([t.double() for t in column] for column in ours))
    ours.steps.extend(torch.tensor(float(i)) for i in range(len(SIZES)))  # of different ages
    exact.steps.extend(step.clone() for step in ours.steps)
    for seed in range(3):
        gradients = [10.0 ** -(3 * i) * g for i, g in enumerate(tensors(50 + seed))]
        native.adamw_update(ours._replace(gradients=gradients), settings)
        doubles = [g.double() for g in gradients]
        adamw_update(exact._replace(gradients=doubles), settings)
    for columns in zip(ours, exact, strict=True):
        for our, their in zip(*columns, strict=True):
            # The second moment of a gradient of 1e-18 is below the smallest float.
            torch.testing.assert_close(our.double(), their.double(), rtol=1e-5, atol=1e-6)
    assert [int(s) for s in ours.steps] == [i + 3 for i in range(len(SIZES))]


# --- the same bits


def everything() -> list[Tensor]:
    """Return what all kernels compute from fixed inputs."""
    torch.manual_seed(1)
    tables = [noise(rows, 80, seed=rows).requires_grad_() for rows in (65, 128)]
    x = native.embedding(numbers(65, 40, 128), torch.arange(128), *tables, 0.1)
    upstream = noise(40, 128, 80, seed=2)
    results = [x, *torch.autograd.grad(x, tables, upstream)]
    for V in VOCABULARIES:
        logits = (5 * noise(700, V)).requires_grad_()
        loss = native.cross_entropy(logits, numbers(V, 700))
        results += [loss, *torch.autograd.grad(0.3 * loss, logits)]
    gradients = tensors(3)
    results.append(native.norm(gradients))
    native.scale_(gradients, 0.7)
    settings = AdamWSettings(0.1, (0.8, 0.9), 0.2, 1e-8, fused=True)
    squares = [tensor.square() for tensor in tensors(7)]
    state = AdamWTensors(
        tensors(5), gradients, tensors(6), squares, [torch.tensor(4.0) for _ in SIZES]
    )
    native.adamw_update(state, settings)
    return [result.detach() for result in (*results, *state.weights, *state.means, *state.squares)]


def test_the_bits_depend_on_neither_threads_nor_the_width_of_vectors(
    use: Callable[..., None],
) -> None:
    use("plain")
    expected = everything()
    for variant in VARIANTS:
        try:
            use(variant)
        except pytest.skip.Exception:
            continue
        for threads in (1, 2, 4):
            use(variant, threads)
            for i, (result, reference) in enumerate(zip(everything(), expected, strict=True)):
                assert torch.equal(result, reference), (variant, threads, i)


# --- memory


def test_without_memory_a_kernel_raises_memory_error_and_changes_nothing(
    use: Callable[..., None],
) -> None:
    use("failing", 2)
    library = native.load_kernels().library
    table, ids = noise(65, 16).requires_grad_(), numbers(65, 20, 128)
    logits, targets = noise(700, 65).requires_grad_(), numbers(65, 700)
    settings = AdamWSettings(0.1, (0.8, 0.9), 0.2, 1e-8, fused=True)

    def updated() -> Tensor:
        steps = [torch.tensor(1.0) for _ in SIZES]
        state = AdamWTensors(tensors(1), tensors(2), tensors(3), tensors(4), steps)
        try:
            native.adamw_update(state, settings)
        except MemoryError:
            assert all(map(torch.equal, state.weights, tensors(1)))
            assert {float(s) for s in steps} == {1.0}
            raise
        return torch.cat(state.weights).nan_to_num()

    def embedded() -> Tensor:
        x = native.embedding(ids, torch.arange(128) % 65, table, table, 0.0)
        return torch.autograd.grad(x.square().sum(), table)[0]

    for compute in (
        embedded,
        lambda: torch.autograd.grad(0.5 * native.cross_entropy(logits, targets), logits)[0],
        lambda: native.norm(tensors(1)),
        updated,
    ):
        expected, failures, result = compute(), 0, None
        while result is None:
            library.fail_allocation(failures)
            try:
                result = compute()
            except MemoryError:
                failures += 1
        library.fail_allocation(-1)
        assert failures > 0
        assert torch.equal(result, expected)


# --- in a step


SHAPE = GPT2Config(block_size=8, vocab_size=11, n_layer=1, n_head=2, d_model=32, dropout=0.0)


def update(model: GPT2, optimizer: torch.optim.Optimizer, seed: int, max_norm: float) -> float:
    """Update a model as `chargpt.train` does, from random gradients; return their norm."""
    parameters = list(model.parameters())
    for i, parameter in enumerate(parameters):
        parameter.grad = noise(*parameter.shape, seed=seed + i).to(parameter.dtype)
    norm = step.gradient_norm(model, parameters)
    step.clip_gradient(model, parameters, norm, max_norm)
    optimizer.step()
    return float(norm)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("double", [False, True])
def test_updates_on_the_kernels_equal_pytorchs_and_share_their_state(
    monkeypatch: pytest.MonkeyPatch, name: Any, double: bool
) -> None:
    """After each update the two optimizers exchange their states, and continue alike."""
    config = TrainConfig(optimizer=name, embedding_decay=0.2, weight_decay=0.3)
    plain = GPT2(SHAPE).to(torch.float64 if double else torch.float32)
    fast, used = copy.deepcopy(plain), set()
    call = Kernels.__call__

    def spy(self: Kernels, name: str, *rest: Any) -> None:
        used.add(name)
        call(self, name, *rest)

    monkeypatch.setattr(Kernels, "__call__", spy)
    use_kernels(fast)
    theirs, ours = (
        make_optimizer(model, config, muon_dtype=torch.float32) for model in (plain, fast)
    )
    step.use_fast_updates(ours)
    for seed, max_norm in ((100, 1e-3), (200, 1e9), (300, 0.5)):
        norms = [update(m, o, seed, max_norm) for m, o in ((plain, theirs), (fast, ours))]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)
        for their, our in zip(plain.parameters(), fast.parameters(), strict=True):
            torch.testing.assert_close(our, their, rtol=0, atol=0 if double else 1e-6)
        their_state, our_state = (copy.deepcopy(o.state_dict()) for o in (theirs, ours))
        theirs.load_state_dict(our_state)
        ours.load_state_dict(their_state)
    assert used & {"norm", "scale", "adamw"} == (set() if double else {"norm", "scale", "adamw"})
    assert isinstance(ours, type(theirs))
    assert ours.state[fast.token_embedding.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_the_loss_of_a_model_on_the_kernels() -> None:
    plain = GPT2(SHAPE)
    fast = copy.deepcopy(plain)
    use_kernels(fast)
    logits, targets = noise(4, 8, 11), numbers(11, 4, 8)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    for model, same in ((plain, True), (fast, False)):
        losses = step.token_losses(model, logits, targets)
        torch.testing.assert_close(losses, expected)
        assert torch.equal(losses, expected) or not same
        torch.testing.assert_close(step.cross_entropy(model, logits, targets), expected.mean())
