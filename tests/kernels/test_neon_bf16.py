"""The kernels with NEON's products of bfloat16 against formulas in float64."""

from collections.abc import Iterator

import pytest
import torch
from compute.test_native import (
    BF16,
    Setting,
    attend,
    attention_formula,
    attention_mask,
    by_definition,
    cases,
    compare,
    noise,
)
from kernels.emulator import EmulatedKernels, Replay

from chargpt.compute import native
from chargpt.compute.muon import MuonSettings


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder = tmp_path_factory.mktemp("neon")
    kernels = EmulatedKernels(Replay(folder, "armv8.2-a+bf16"), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load_kernels", lambda: kernels)
        yield Setting(kernels, BF16)


@pytest.mark.parametrize(
    ("batch", "time", "n_head", "head_size", "f", "has_bias"),
    [(1, 1, 1, 16, 16, True), (2, 67, 3, 32, 80, False), (1, 131, 2, 48, 160, True)],
)
def test_values_and_gradients(
    setting: Setting, batch: int, time: int, n_head: int, head_size: int, f: int, has_bias: bool
) -> None:
    c = n_head * head_size
    qkv = noise(batch, time, 3 * c, seed=time, dtype=BF16)
    compare(setting, attend(n_head), attention_formula(n_head), qkv=qkv)
    for kernel, formula, inputs in cases((batch, time), c, f, has_bias, BF16).values():
        compare(setting, kernel, formula, **inputs)


def test_attention_with_dropout(setting: Setting) -> None:
    kept = attention_mask(setting, 2, 0.2, 5, 1, 51) != 0
    formula = attention_formula(2, kept.double() / 0.8)
    torch.manual_seed(5)  # `compare` calls the kernel once
    compare(setting, attend(2, 0.2), formula, qkv=noise(1, 51, 96, seed=1, dtype=BF16))


def test_muon(setting: Setting) -> None:
    steps = ((3.4445, -4.7750, 2.0315), (2.3, -1.7, 0.42), (1.875, -1.25, 0.375))
    settings = MuonSettings(momentum=0.9, decay=0.75, dtype=BF16, steps=steps)
    sizes = [(80, 48), (48, 112)]
    weights, gradients, momenta = (
        [noise(*size, seed=10 * kind + i) for i, size in enumerate(sizes)] for kind in range(3)
    )
    everything = zip(weights, gradients, momenta, strict=True)
    exact = [by_definition(*(t.double() for t in ts), 1.0, settings)[0] for ts in everything]
    shapes = torch.tensor(sizes, dtype=torch.int32)
    tensors = (weights, gradients, momenta, shapes, torch.ones(len(sizes)))
    setting.kernels("muon", BF16, *tensors, len(sizes), 0.9, 0.75, torch.tensor(steps), 3)
    for ours, weight, size in zip(weights, exact, sizes, strict=True):
        error = (ours.double() - weight).square().mean().sqrt()
        assert error < max(size) ** -0.5 * 4 * 3.4 * 2**-8  # see tests/compute/test_native.py
