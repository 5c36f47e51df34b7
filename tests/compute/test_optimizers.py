"""AdamW against its formulas, Muon against PyTorch's, parameter groups, the schedule as a table."""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chargpt.compute import native
from chargpt.compute.library import why_not_tried
from chargpt.compute.muon import (
    JORDAN,
    POLAR_EXPRESS,
    MuonAdamW,
    MuonSettings,
    Steps,
    newton_schulz,
    newton_schulz_gram,
    orthogonalize,
)
from chargpt.compute.optimizers import adamw, make_optimizer, muon, schedule
from chargpt.config import GPT2Config, TrainConfig
from chargpt.model import GPT2

SHAPE = GPT2Config(vocab_size=11, block_size=8, n_layer=2, n_head=2, d_model=32)
MUON = TrainConfig(optimizer="muon", weight_decay=0.3)


def gpt2(**changes: Any) -> GPT2:
    torch.manual_seed(0)
    return GPT2(SHAPE.replace(**changes))


# --- AdamW


@pytest.mark.parametrize("bias", [True, False])
def test_groups_hold_every_parameter_once_and_decay_matrices_only(bias: bool) -> None:
    model = gpt2(bias=bias)
    optimizer = adamw(model, TrainConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(names.values())
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, share in decay.items():
        vector = name.endswith(".bias") or "norm" in name
        assert share == (0.0 if vector else 0.3), name


def test_adamw_equals_the_formulas() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, in float64, with a different rate in each step.

    The fused implementation runs, in double precision as in single.
    """
    config = TrainConfig(learning_rate=0.1, weight_decay=0.2, beta1=0.8, beta2=0.9)
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    optimizer = adamw(layer, config)
    assert optimizer.defaults["fused"]
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, rate in enumerate((0.1, 0.05, 0.025), start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in layer.named_parameters():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient.clone()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            m, v = first[name] / (1 - 0.8**step), second[name] / (1 - 0.9**step)
            decay = 0.2 if name == "weight" else 0.0
            expected[name] = expected[name] - rate * (
                m / (v.sqrt() + 1e-8) + decay * expected[name]
            )
        optimizer.step()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12)


# --- Muon


def give_gradients(model: nn.Module, seed: int) -> None:
    """Give every parameter a random gradient; scales differ widely, as in real training."""
    generator = torch.Generator().manual_seed(seed)
    for i, parameter in enumerate(model.parameters()):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient * 10.0 ** -(i % 4)


def step(model: GPT2, optimizer: torch.optim.Optimizer, seeds: Sequence[int] = (0,)) -> None:
    for seed in seeds:
        give_gradients(model, seed)
        optimizer.step()


def assert_same_weights(a: nn.Module, b: nn.Module, atol: float) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def hidden_matrices(model: GPT2) -> list[nn.Parameter]:
    return [layer.weight for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize(
    ("dtype", "atol"),
    [
        # The same operations in the same precision: fp32 rounding errors of weights below 0.2.
        (torch.bfloat16, 1e-7),
        # PyTorch rounds to bf16 (1 part in 256) several times: 2% of an update, whose largest entry
        # is about 0.02 at learning rate 0.02, in each of 5 steps.
        (torch.float32, 5 * 0.02 * 0.02),
    ],
)
def test_muon_equals_pytorchs_muon_and_adamw(dtype: torch.dtype, atol: float) -> None:
    model, reference = gpt2(), gpt2()
    optimizer = muon(model, MUON, dtype)
    optimizer.steps, optimizer.parts = JORDAN, {}
    matrices = hidden_matrices(reference)
    others = [p for p in reference.parameters() if all(p is not m for m in matrices)]
    theirs = (
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.3),
        torch.optim.AdamW(others, lr=6e-3, betas=(0.9, 0.99), weight_decay=0.0),
    )
    for seed in range(5):
        give_gradients(model, seed)
        give_gradients(reference, seed)
        for group, their, peak in zip(optimizer.param_groups, theirs, (0.02, 6e-3), strict=True):
            group["lr"] = their.param_groups[0]["lr"] = peak / (seed + 1)
            their.step()
        optimizer.step()
    assert_same_weights(model, reference, atol)
    for (name, moved), start in zip(model.named_parameters(), gpt2().parameters(), strict=True):
        assert not torch.equal(moved, start), name


def test_queries_keys_and_values_are_orthogonalized_separately() -> None:
    model, whole = gpt2(), gpt2()
    optimizer, reference = (muon(m, MUON, torch.float32) for m in (model, whole))
    reference.parts = {}
    weight = model.blocks[0].attention.sublayer.qkv.weight
    before = weight.detach().clone()
    step(model, optimizer)
    step(whole, reference)
    rate = optimizer.param_groups[0]["lr"]
    moved = (weight - (1 - rate * MUON.weight_decay) * before) / (rate * math.sqrt(3))
    for part in moved.detach().chunk(3):
        # A random square matrix keeps a few singular values near 0; most move to about 1.
        assert 0.85 < torch.linalg.svdvals(part).median() < 1.15
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs) == ("qkv.weight" not in name), name


def test_embeddings_decay() -> None:
    model, plain = gpt2(), gpt2()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, muon(model, MUON.replace(embedding_decay=0.5), torch.float32))
    step(plain, muon(plain, MUON.replace(embedding_decay=0.0), torch.float32))
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        decay = MUON.learning_rate * 0.5 if "embedding" in name else 0.0
        torch.testing.assert_close(ours, theirs - decay * before[name], rtol=0, atol=1e-7)


def conditioned(rows: int, columns: int, decades: float) -> Tensor:
    """Return a matrix whose singular values span the given number of decades."""
    random = torch.randn(rows, columns, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(random, full_matrices=False)
    matrix: Tensor = (u * torch.logspace(0, -decades, len(s), dtype=torch.float64)) @ vh
    return matrix.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 32), (32, 128), (128, 32), (96, 32)])
@pytest.mark.parametrize(
    ("steps", "low", "high"), [(JORDAN, 0.67, 1.14), (POLAR_EXPRESS, 0.86, 1.15)]
)
def test_an_update_has_singular_values_of_about_one(
    steps: Steps, low: float, high: float, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    matrices = [conditioned(*shape, decades=1.0), 1e3 * conditioned(*shape, decades=1.0)]
    for before, after in zip(matrices, orthogonalize(matrices, dtype, steps), strict=True):
        assert after.shape == before.shape
        assert after.dtype == before.dtype
        values = torch.linalg.svdvals(after)
        assert values.min() > low
        assert values.max() < high + (0.06 if dtype == torch.bfloat16 else 0)  # it rounds
        u, _, vh = torch.linalg.svd(before, full_matrices=False)
        assert (u * (after @ vh.T)).sum(0).min() > low  # along the same directions


def concentrated(n: int, seed: int) -> Tensor:
    """Return a matrix with one strong direction between a few rows and columns."""
    rng = torch.Generator().manual_seed(seed)
    weak = torch.randn(n, n, generator=rng) / n
    strong = torch.zeros(n, n)
    strong[: 1 + seed % 5, : 1 + seed % 4] = 1
    share = torch.rand(1, generator=rng)
    return share * strong / strong.norm() + 0.01 * (1 - share) * weak


@pytest.mark.parametrize("on_kernels", [False, True])
def test_rounding_never_makes_an_update_large(on_kernels: bool) -> None:
    """bf16 rounds a value that few entries hold as a whole, perhaps to where quintics are steep."""
    if on_kernels and why_not_tried():
        pytest.skip("no kernels here")
    dtype = torch.bfloat16
    if on_kernels and dtype not in native.load_kernels().dtypes:
        pytest.skip("no bf16 here")
    matrices = [concentrated(64, seed) for seed in range(400)]
    after = [torch.zeros(64, 64) for _ in matrices]
    if on_kernels:
        settings = MuonSettings(0.0, 1.0, dtype, POLAR_EXPRESS)
        momenta = [matrix.clone() for matrix in matrices]
        native.muon_update(after, matrices, momenta, [1.0] * len(after), settings)
    else:
        after = orthogonalize(matrices, dtype)
    assert max(torch.linalg.matrix_norm(matrix, 2).item() for matrix in after) < 1.2


def test_orthogonalizing_together_equals_orthogonalizing_separately() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(*shape) for shape in [(8, 24), (24, 8), (8, 8), (8, 24), (8, 8)]]
    for i, together in enumerate(orthogonalize(matrices, torch.float32)):
        (alone,) = orthogonalize([matrices[i]], torch.float32)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [JORDAN, POLAR_EXPRESS])
@pytest.mark.parametrize("decades", [0.0, 2.0, 5.0])
def test_the_gram_iteration_equals_the_plain_iteration(decades: float, steps: Steps) -> None:
    torch.manual_seed(0)
    x = conditioned(32, 96, decades)[None]
    x /= x.norm()
    exact = newton_schulz(x.double(), steps)
    torch.testing.assert_close(newton_schulz_gram(x.double(), steps), exact, rtol=0, atol=1e-9)
    # In fp32 an eigenvalue of the Gram matrix has an error of 1e-7, which each of four steps
    # enlarges by up to 3.4445²: to 2e-3 of a singular value, spread over many entries. bf16
    # errs by 4e-2.
    torch.testing.assert_close(newton_schulz_gram(x, steps).double(), exact, rtol=0, atol=1e-3)


def test_a_gradient_of_zeros_only_decays_the_weights() -> None:
    model = gpt2()
    optimizer = muon(model, MUON, torch.float32)
    matrix = hidden_matrices(model)[0]
    before = matrix.detach().clone()
    matrix.grad = torch.zeros_like(matrix)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), before * (1 - 0.02 * 0.3))


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = gpt2()
    model.blocks[0].attention.sublayer.qkv.weight.requires_grad_(False)
    optimizer = make_optimizer(model, MUON)
    assert isinstance(optimizer, MuonAdamW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden, rest = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    frozen = "blocks.0.attention.sublayer.qkv.weight"
    assert hidden == {names[id(p)] for p in hidden_matrices(model)} - {frozen}
    assert rest == set(names.values()) - hidden - {frozen}


def test_parameters_without_a_gradient_do_not_change() -> None:
    for parameters in ("blocks", "final_norm"):
        model, start = gpt2(), gpt2()
        optimizer = make_optimizer(model, MUON, muon_dtype=torch.float32)
        give_gradients(getattr(model, parameters), seed=0)
        optimizer.step()
        for (name, moved), before in zip(model.named_parameters(), start.parameters(), strict=True):
            assert torch.equal(moved, before) != name.startswith(parameters), name


def test_step_returns_the_loss_of_its_closure() -> None:
    model = gpt2()
    optimizer = make_optimizer(model, MUON, muon_dtype=torch.float32)

    def closure() -> float:
        loss = model(torch.tensor([[1, 2, 3]])).logsumexp(-1).sum()
        loss.backward()
        return loss.item()

    first = optimizer.step(closure)
    assert optimizer.step(closure) != first
    assert optimizer.step() is None


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_dict_restores_an_optimizer(name: Any) -> None:
    config = MUON.replace(optimizer=name)
    model, again = gpt2(), gpt2()
    optimizer, restored = (
        make_optimizer(m, config, muon_dtype=torch.float32) for m in (model, again)
    )
    step(model, optimizer, range(2))
    again.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, range(2, 4))
    step(again, restored, range(2, 4))
    assert_same_weights(model, again, atol=0)


@pytest.mark.parametrize(("name", "peaks"), [("adamw", [6e-3, 6e-3]), ("muon", [0.05, 6e-3])])
def test_every_group_has_its_peak(name: Any, peaks: list[float]) -> None:
    config = TrainConfig(optimizer=name, muon_learning_rate=0.05)
    groups = make_optimizer(gpt2(), config).param_groups
    assert [group["peak"] for group in groups] == [group["lr"] for group in groups] == peaks


# --- the schedule


HIGH, LOW = (1 + math.sqrt(0.5)) / 2, (1 - math.sqrt(0.5)) / 2  # a cosine's quarters


@pytest.mark.parametrize(
    ("progress", "form", "warmup", "fraction", "floor", "share"),
    [
        (0.0, "cosine", 0.2, 1.0, 0.1, 0.0),
        (0.05, "cosine", 0.2, 1.0, 0.1, 0.25),
        (0.2, "cosine", 0.2, 1.0, 0.1, 1.0),  # the peak
        (0.4, "cosine", 0.2, 1.0, 0.1, 0.1 + 0.9 * HIGH),
        (0.8, "cosine", 0.2, 1.0, 0.1, 0.1 + 0.9 * LOW),
        (1.0, "cosine", 0.2, 1.0, 0.1, 0.1),
        (math.inf, "cosine", 0.2, 1.0, 0.1, 0.1),  # beyond the end
        (0.0, "cosine", 0.0, 1.0, 0.1, 1.0),  # no warm-up
        (1.0, "cosine", 0.2, 1.0, 0.0, 0.0),  # down to zero
        (0.7, "cosine", 0.2, 1.0, 1.0, 1.0),  # constant
        (0.5, "cosine", 1.0, 1.0, 0.1, 0.5),  # warm-up only
        (0.6, "cosine", 0.2, 0.4, 0.1, 1.0),  # constant until now
        (0.7, "cosine", 0.2, 0.4, 0.1, 0.1 + 0.9 * HIGH),
        (0.7, "linear", 0.2, 0.4, 0.1, 0.1 + 0.9 * 0.75),
        (1.0, "linear", 0.2, 0.4, 0.1, 0.1),
        (0.6, "linear", 0.2, 0.9, 0.1, 0.55),  # warm-up shortens the cool-down
        (1.0, "linear", 0.2, 0.0, 0.1, 1.0),  # no cool-down
        (1.0, "linear", 1.0, 1.0, 0.1, 1.0),  # warm-up leaves no cool-down
    ],
)
def test_schedule(
    progress: float, form: Any, warmup: float, fraction: float, floor: float, share: float
) -> None:
    shape = {"cooldown_fraction": fraction, "learning_rate_floor": floor}
    config = TrainConfig(cooldown=form, warmup_fraction=warmup, **shape)
    assert schedule(progress, config) == pytest.approx(share, rel=1e-12, abs=1e-15)


def test_schedule_has_no_jump() -> None:
    config = TrainConfig(warmup_fraction=0.02)
    rates = [schedule(i / 10000, config) for i in range(12000)]
    assert max(abs(a - b) for a, b in pairwise(rates)) < 1.01 / 200
    assert rates[:201] == sorted(rates[:201])
    assert rates[200:] == sorted(rates[200:], reverse=True)
