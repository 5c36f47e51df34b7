"""Costs: the ring is compared with a simulation of its messages, bytes with real tensors."""

from typing import Any

import pytest
import torch

from chargpt.compute.cost import Cluster, memory_of, ring_seconds, shared_step
from chargpt.compute.optimizers import make_optimizer
from chargpt.config import GPT2Config, TrainConfig
from chargpt.model import GPT2

CONFIG = GPT2Config(block_size=16, vocab_size=30, n_layer=3, n_head=2, d_model=32)


def simulated_ring(n_bytes: float, devices: int, cluster: Cluster) -> float:
    """Return the time of a ring all-reduce whose rounds follow each other.

    In each of 2 (W - 1) rounds every device sends a chunk to the next one. First the chunks are
    summed: then each device has the whole sum of one chunk, and passes it on.
    """
    summed = [[{i} for _ in range(devices)] for i in range(devices)]  # whose parts, per chunk
    seconds = 0.0
    bandwidth = cluster.link if devices <= cluster.per_machine else cluster.network
    for phase in range(2):
        for turn in range(devices - 1):
            chunks = [(i + phase - turn) % devices for i in range(devices)]
            sent = [set(summed[i][chunk]) for i, chunk in enumerate(chunks)]
            for i, chunk in enumerate(chunks):
                summed[(i + 1) % devices][chunk] |= sent[i]
            seconds += n_bytes / devices / bandwidth + cluster.latency
    assert all(parts == set(range(devices)) for chunks in summed for parts in chunks)
    return seconds


@pytest.mark.parametrize("devices", [2, 3, 8, 13])
def test_the_ring_takes_as_long_as_its_messages(devices: int) -> None:
    cluster = Cluster(per_machine=8, link=7e9, network=2e9, latency=3e-6)
    expected = simulated_ring(1e6, devices, cluster)
    assert ring_seconds(1e6, devices, cluster) == pytest.approx(expected)


def test_one_device_waits_for_nobody_and_more_lose_efficiency() -> None:
    steps = [
        shared_step(lambda n: 0.01 * n, 10**7, 64, devices, Cluster())
        for devices in (1, 2, 8, 64, 256)
    ]
    assert steps[0].seconds == pytest.approx(0.64)
    efficiencies = [step.efficiency for step in steps]
    assert efficiencies[0] == 1
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert steps[4].batch_size == 256  # a sequence for each
    for step in steps:
        assert step.seconds >= step.waiting >= 0


def test_what_a_step_takes_anyway_is_not_shared() -> None:
    cluster = Cluster(latency=0.0, link=1e18, network=1e18)
    alone, four = (shared_step(lambda n: 1.0 + n, 100, 8, n, cluster) for n in (1, 4))
    assert (alone.seconds, four.seconds) == (9.0, pytest.approx(3.0))
    assert four.efficiency == pytest.approx(9 / 4 / 3)
    # Each of three accumulated batches is shared, and grows with the devices that it needs.
    many = shared_step(lambda n: 1.0 + n, 100, 8, 16, cluster, accumulation=3)
    assert (many.batch_size, many.seconds) == (16, pytest.approx(1.0 + 3))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_gradients_and_moments_are_those_of_a_real_step(optimizer: Any) -> None:
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    config = TrainConfig(optimizer=optimizer, steps=1)
    step = make_optimizer(model, config, muon_dtype=torch.float32)
    model(torch.zeros(2, 16, dtype=torch.int64)).sum().backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    step.step()
    memory = memory_of(CONFIG, config, precision="fp32", kernels=False, pairs=True)
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == gradients
    moments = (value for state in step.state.values() for value in state.values() if value.dim())
    assert memory.optimizer == sum(moment.nbytes for moment in moments)
    sharded = config.replace(parallel="fsdp")
    half = memory_of(CONFIG, sharded, precision="fp32", kernels=False, pairs=True, world=2)
    assert half.weights * 2 == memory.weights


@pytest.mark.parametrize("pairs", [True, False])
def test_activations_are_about_what_autograd_keeps(pairs: bool) -> None:
    """On PyTorch's layers without dropout; a step also needs some that nothing keeps."""
    config = CONFIG.replace(dropout=0.0, d_model=64, block_size=64)
    model: Any = GPT2(config)
    for block in model.blocks:
        block.attention.sublayer.backend = "matmul" if pairs else "sdpa"
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.zeros(8, 64, dtype=torch.int64)).sum()
    train_config = TrainConfig(batch_size=8, steps=1)
    memory = memory_of(config, train_config, precision="fp32", kernels=False, pairs=pairs)
    assert loss.isfinite()
    assert sum(kept.values()) == pytest.approx(memory.activations, rel=0.35)
