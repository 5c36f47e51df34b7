"""Automatic choices of device and precision, and several GPUs; only the CUDA calls are faked."""

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chargpt.base.errors import UserError
from chargpt.compute import device as hardware
from chargpt.compute.device import (
    choose_compile,
    choose_device,
    choose_precision,
    cpu_info,
    cpu_name,
    matmul_flops,
)

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_prefers_cuda_then_mps_then_cpu(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").device.type == expected
    assert choose_device("cpu").device.type == "cpu"
    if not mps:
        with pytest.raises(UserError, match="device is 'mps', which PyTorch does not find here"):
            choose_device("mps")


@pytest.mark.parametrize(("bf16_rate", "name"), [(3e9, "bf16"), (1.4e9, "fp32"), (3e7, "fp32")])
def test_a_cpu_uses_bf16_if_it_is_much_faster(
    monkeypatch: pytest.MonkeyPatch, bf16_rate: float, name: str
) -> None:
    rates = {torch.bfloat16: bf16_rate, torch.float32: 1e9}
    monkeypatch.setattr(hardware, "matmul_flops", lambda dtype, *_: rates[dtype])
    assert choose_precision("auto", CPU).name == name


def test_a_cpu_without_fast_bf16_says_so_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """It said "this CPU multiplies bf16 0.0× as fast as fp32, measured"."""
    rates = {torch.float32: 100e9, torch.bfloat16: 3e9}
    monkeypatch.setattr(hardware, "matmul_flops", lambda dtype, *_: rates[dtype])
    reason = choose_precision("auto", CPU).reason
    assert reason == "fp32 is faster here: bf16 runs at 3% of its speed"


def test_the_measurement_leaves_the_generator_as_it_is() -> None:
    before = torch.get_rng_state()
    assert 1e7 < matmul_flops(torch.float32, CPU, (64, 64, 64), seconds=0.01) < 1e14
    assert torch.equal(torch.get_rng_state(), before)


def test_cpu_info_lists_distinct_values(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor : {}\nmodel name : A\ncpu MHz : 2{}\nflags : avx2 fma\n\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text.format(0, 0) + text.format(1, 1))
    assert cpu_info("model name") == ["A"]
    assert cpu_info("flags") == ["avx2 fma"]
    assert cpu_info("processor") == ["0", "1"]
    assert cpu_name() == "A"

    def fail(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", fail)  # as on Windows and macOS
    assert cpu_info("flags") == []
    assert cpu_name() == (platform.processor() or platform.machine())


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_uses_bf16_if_it_has_it(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: has_bf16)
    assert choose_precision("auto", CUDA).name == expected
    assert choose_precision("fp16", CUDA).name == "fp16"
    assert choose_precision("auto", MPS).name == "fp32"


def test_unsupported_precisions_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: False)
    for name, device, message in (
        ("fp16", CPU, "'fp16', which is many times slower than fp32 on a"),
        ("bf16", CUDA, "'bf16', which this GPU does not support: give --pre"),
        ("fp16", MPS, "'fp16', which needs loss scaling, available on CUDA"),
    ):
        with pytest.raises(UserError, match=message):
            choose_precision(name, device)


def test_autocast_multiplies_in_the_chosen_precision() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with choose_precision("bf16", CPU).autocast(CPU):
        assert layer(x).dtype == torch.bfloat16
    with choose_precision("fp32", CPU).autocast(CPU):
        assert layer(x).dtype == torch.float32


def test_auto_compiles_on_a_gpu_with_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/bin/cc" if name == "cc" else None)
    assert choose_compile("auto", CUDA).on
    assert not choose_compile("auto", CPU).on
    assert choose_compile("on", CPU).on
    assert not choose_compile("off", CUDA).on
    monkeypatch.setattr(hardware.shutil, "which", lambda _: None)
    assert not choose_compile("auto", CUDA).on
