"""Automatic choices of device and precision, and several GPUs; only the CUDA calls are faked."""

import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chargpt.base.errors import UserError
from chargpt.compute import device as hardware
from chargpt.compute import parallel as distributed
from chargpt.compute.device import (
    PrecisionChoice,
    choose_compile,
    choose_device,
    choose_precision,
    cpu_info,
    cpu_name,
    matmul_flops,
)
from chargpt.compute.parallel import ParallelChoice, choose_parallel, parallelize, seed_dropout

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


# --- several GPUs


def test_dp_shares_a_batch_among_gpus_if_it_is_large_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert "--parallel dp shares each batch among 4" in choose_parallel("auto", CUDA, 32).reason
    assert choose_parallel("dp", CUDA, 4).device_ids == [0, 1, 2, 3]
    for requested, device in (("auto", CUDA), ("none", CUDA), ("auto", CPU)):
        assert choose_parallel(requested, device, 32).device_ids == []
    with pytest.raises(UserError, match="batch_size is 3, less than the 4 GPUs .* --batch-size 4"):
        choose_parallel("dp", CUDA, 3)
    with pytest.raises(UserError, match="parallel is 'dp', which needs at least two GPUs, but 0"):
        choose_parallel("dp", CPU, 32)


def test_only_several_gpus_wrap_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped: list[Any] = []

    def data_parallel(module: nn.Module, device_ids: list[int]) -> nn.Module:
        wrapped.append((module, device_ids))
        return nn.Identity()

    monkeypatch.setattr(distributed.nn, "DataParallel", data_parallel)
    model = nn.Linear(2, 2)
    bf16 = PrecisionChoice("bf16", "")
    assert parallelize(model, ParallelChoice([], ""), bf16) is model
    parallelize(model, ParallelChoice([0, 1], ""), bf16)
    replica, device_ids = wrapped[0]
    assert device_ids == [0, 1]
    assert all(p is q for p, q in zip(replica.parameters(), model.parameters(), strict=True))
    # DataParallel uses new threads, in which autocast's type is fp16 again.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(replica, torch.ones(1, 2)).result().dtype == torch.bfloat16


def test_each_gpu_gets_another_dropout_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[int, int] = {}
    current = [0]

    @contextmanager
    def device(number: int) -> Iterator[None]:
        current.append(number)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeds.update({current[-1]: seed}))
    seed_dropout(7, ParallelChoice([0, 1, 2], ""))
    assert seeds.keys() == {1, 2}
    assert len({7, *seeds.values()}) == 3
