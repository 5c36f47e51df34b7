"""Automatic choices and the seam to several GPUs; CUDA is mocked at its boundary only."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from chargpt.base.errors import UserError
from chargpt.compute import device as hardware
from chargpt.compute import parallel as distributed
from chargpt.compute.device import PrecisionChoice, choose_compile, choose_device, choose_precision
from chargpt.compute.parallel import ParallelChoice, choose_parallel, parallelize, seed_dropout

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def offer(monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_cuda_then_mps_then_cpu(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str
) -> None:
    offer(monkeypatch, cuda=cuda, mps=mps)
    assert choose_device("auto").device.type == expected
    assert choose_device("cpu").device.type == "cpu"


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)
    with pytest.raises(UserError, match="device is 'mps', which this PyTorch does not find: give"):
        choose_device("mps")


@pytest.mark.parametrize(("bf16_rate", "expected"), [(3e9, "bf16"), (1.4e9, "fp32"), (1e8, "fp32")])
def test_a_cpu_takes_bf16_where_it_is_measured_faster(
    monkeypatch: pytest.MonkeyPatch, bf16_rate: float, expected: str
) -> None:
    rates = {torch.bfloat16: bf16_rate, torch.float32: 1e9}
    monkeypatch.setattr(hardware, "matmul_rate", lambda dtype: rates[dtype])
    choice = choose_precision("auto", CPU)
    assert choice.name == expected
    assert (
        choice.reason
        == f"this CPU multiplies bf16 {bf16_rate / 1e9:.1f}× as fast as fp32, measured"
    )


def test_the_measurement_measures_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    assert 1e7 < hardware.matmul_rate(torch.float32, seconds=0.01) < 1e14
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_takes_bf16_or_else_scaled_fp16(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: has_bf16)
    assert choose_precision("auto", CUDA).name == expected
    assert choose_precision("fp16", CUDA).name == "fp16"
    assert choose_precision("auto", MPS).name == "fp32"


def test_precisions_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: False)
    with pytest.raises(UserError, match="'fp16', which CPUs multiply many times slower than"):
        choose_precision("fp16", CPU)
    with pytest.raises(UserError, match="'bf16', which this GPU lacks: give --precision fp16"):
        choose_precision("bf16", CUDA)
    with pytest.raises(UserError, match="'fp16', which needs loss scaling, and that is for CUDA"):
        choose_precision("fp16", MPS)


def test_autocast_multiplies_in_the_chosen_type() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with choose_precision("bf16", CPU).autocast(CPU):
        assert layer(x).dtype == torch.bfloat16
    with choose_precision("fp32", CPU).autocast(CPU):
        assert layer(x).dtype == torch.float32


def test_compile_is_for_gpus_with_a_compiler_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "/bin/cc" if name == "cc" else None)
    assert choose_compile("auto", CUDA).on
    assert not choose_compile("auto", CPU).on
    assert choose_compile("on", CPU).on
    assert not choose_compile("off", CUDA).on
    monkeypatch.setattr(hardware.shutil, "which", lambda _: None)
    assert choose_compile("auto", CUDA) == (False, "no C compiler here")


# --- several GPUs


def test_several_gpus_share_a_batch_if_it_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_parallel("auto", CUDA, 32) == (
        [],
        "one device; --parallel dp shares each batch among 4",
    )
    assert choose_parallel("dp", CUDA, 4).device_ids == [0, 1, 2, 3]
    assert choose_parallel("none", CUDA, 32).device_ids == []
    assert choose_parallel("auto", CPU, 32).device_ids == []
    with pytest.raises(UserError, match="batch_size is 3, fewer than the 4 GPUs .* --batch-size 4"):
        choose_parallel("dp", CUDA, 3)
    with pytest.raises(
        UserError, match="parallel is 'dp', which needs two GPUs or more, and there"
    ):
        choose_parallel("dp", CPU, 32)


def test_one_device_is_the_model_itself_and_several_wrap_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    assert [p is q for p, q in zip(replica.parameters(), model.parameters(), strict=True)] == [
        True,
        True,
    ]
    # In a thread of its own, as DataParallel runs it, where autocast's type is back to fp16.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(replica, torch.ones(1, 2)).result().dtype == torch.bfloat16


def test_each_gpu_drops_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[int, int] = {}
    current = [0]

    class Device:
        def __init__(self, number: int) -> None:
            self.number = number

        def __enter__(self) -> None:
            current[0] = self.number

        def __exit__(self, *_: Any) -> None:
            current[0] = 0

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeds.update({current[0]: seed}))
    seed_dropout(7, ParallelChoice([0, 1, 2], ""))
    assert seeds.keys() == {1, 2}
    assert len({7, *seeds.values()}) == 3
