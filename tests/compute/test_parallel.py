"""How several devices share a batch: the choice, DataParallel's replicas, dropout's seeds.

No GPU is needed. tests/test_distributed.py starts real processes.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from chargpt.base.errors import UserError
from chargpt.compute import parallel
from chargpt.compute.device import PrecisionChoice
from chargpt.compute.parallel import ParallelChoice, choose_parallel, parallelize, seed_dropout
from chargpt.compute.world import ALONE, World
from chargpt.config import GPT2Config, gpt2, tiny

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
FOUR = World(rank=1, size=4, local_rank=1, local_size=4)
TINY = tiny().model_config.replace(vocab_size=65)
LARGE = gpt2().model_config.replace(vocab_size=65)


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("requested", "device", "world", "shape", "batch_size", "kind"),
    [
        ("auto", CUDA, ALONE, LARGE, 16, "dp"),
        ("auto", CUDA, ALONE, TINY, 16, "none"),  # the copies of the weights would take longer
        ("auto", CUDA, ALONE, LARGE, 3, "none"),
        ("dp", CUDA, ALONE, TINY, 4, "dp"),
        ("none", CUDA, ALONE, LARGE, 16, "none"),
        ("ddp", CUDA, ALONE, LARGE, 16, "none"),  # a job of one process
        ("auto", CPU, ALONE, LARGE, 16, "none"),
        ("auto", CUDA, FOUR, TINY, 16, "ddp"),
        ("ddp", CPU, FOUR, TINY, 16, "ddp"),
        ("fsdp", CUDA, FOUR, LARGE, 16, "fsdp"),
    ],
)
def test_the_kind_follows_from_processes_devices_and_work(
    requested: Any,
    device: torch.device,
    world: World,
    shape: GPT2Config,
    batch_size: int,
    kind: str,
) -> None:
    choice = choose_parallel(requested, device, world, shape, batch_size)
    assert choice.kind == kind
    assert choice.n_gpus == (4 if kind == "dp" else 1)
    several_gpus_idle = kind in ("dp", "none") and device is CUDA and requested != "none"
    assert ("torchrun --nproc-per-node 4" in choice.reason) == several_gpus_idle


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("requested", "device", "world", "batch_size", "message"),
    [
        ("dp", CUDA, ALONE, 3, "batch_size is 3, less than the 4 GPUs .* --batch-size 4"),
        ("dp", CPU, ALONE, 32, "'dp', which needs at least two GPUs, but 0 can be used"),
        ("fsdp", CUDA, ALONE, 32, "'fsdp', .* torchrun --nproc-per-node"),
        ("dp", CUDA, FOUR, 32, "'dp', which is for one process, but torchrun started 4"),
        ("none", CPU, FOUR, 32, "'none', which is for one process"),
        ("auto", MPS, FOUR, 32, "Apple GPUs: give --device cpu"),
        ("auto", CPU, FOUR, 3, "batch_size is 3, less than the 4 processes .* --batch-size 4"),
        ("auto", CUDA, World(rank=0, size=5, local_size=5), 32, "5 processes .* 4 GPUs"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(
    requested: Any, device: torch.device, world: World, batch_size: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_parallel(requested, device, world, TINY, batch_size)


def test_only_several_gpus_wrap_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped: list[Any] = []

    def data_parallel(module: nn.Module, device_ids: list[int]) -> nn.Module:
        wrapped.append((module, device_ids))
        return nn.Identity()

    monkeypatch.setattr(parallel.nn, "DataParallel", data_parallel)
    model = nn.Linear(2, 2)
    bf16 = PrecisionChoice("bf16", "")
    assert parallelize(model, ParallelChoice("none", ""), bf16) is model
    parallelize(model, ParallelChoice("dp", "", 2), bf16)
    replica, device_ids = wrapped[0]
    assert device_ids == [0, 1]
    assert all(p is q for p, q in zip(replica.parameters(), model.parameters(), strict=True))
    # DataParallel uses new threads, in which autocast's type is fp16 again.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(replica, torch.ones(1, 2)).result().dtype == torch.bfloat16


def test_each_gpu_and_each_process_gets_another_dropout_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds: dict[Any, int] = {}
    current = [0]

    @contextmanager
    def device(number: int) -> Iterator[None]:
        current.append(number)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeds.update({current[-1]: seed}))
    seed_dropout(7, 3, 1, ALONE, ParallelChoice("dp", "", 3))
    assert seeds.keys() == {1, 2}
    for rank in range(3):
        seed_dropout(7, 3, 1, World(rank=rank, size=3), ParallelChoice("ddp", ""))
        seeds[f"rank {rank}"] = torch.initial_seed()
    seed_dropout(7, 3, 1, ALONE, ParallelChoice("none", ""))
    assert seeds["rank 0"] == torch.initial_seed()
    assert len(set(seeds.values())) == 5
