"""What training costs, by arithmetic alone: bytes of memory, and the time of many devices.

The formulas are explained in docs/scaling.md, with the measurements that their constants come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from chargpt.compute.counts import parameters_of
from chargpt.config import GPT2Config, TrainConfig

# --- memory


class ActivationBytes(NamedTuple):
    """Bytes that the backward pass needs, per token and layer."""

    per_channel: float  # times d_model
    per_pair: float  # times heads × block_size, where attention keeps its (T, T) weights


KERNELS = {"fp32": ActivationBytes(64.0, 0.0), "bf16": ActivationBytes(36.5, 0.0)}
PYTORCH = {"fp32": ActivationBytes(79.0, 8.0), "bf16": ActivationBytes(60.0, 4.0)}
DROPOUT = {"fp32": ActivationBytes(22.0, 7.3), "bf16": ActivationBytes(10.0, 3.5)}
"""What dropout adds on PyTorch's layers: masks. The kernels draw them again."""
LOGITS = 12.0  # bytes per token and entry of the vocabulary: logits, their gradient, log-softmax
EXPECTED = 8.0  # the same for soft targets: what an n-gram expects, and its copy
COUNTED = 75.0  # bytes per token that an n-gram counts, while it does


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of a training process."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    ngram: int  # for soft targets

    @property
    def total(self) -> int:
        """All of them; the program and its libraries come on top."""
        return sum(asdict(self).values())


def memory_of(
    config: GPT2Config,
    train_config: TrainConfig,
    *,
    precision: str,
    kernels: bool,
    pairs: bool,
    world: int = 1,
    counted: int = 0,
) -> Memory:
    """Return the memory of one of `world` processes that share each batch.

    Args:
        config: with a known vocabulary size.
        train_config: optimizer, batch size and ``parallel``; ``fsdp`` divides the weights, too.
        precision: of matrix products: fp32, bf16 or fp16.
        kernels: whether the C++ kernels compute, or PyTorch's layers.
        pairs: whether attention keeps its (T, T) weights, as the backend ``matmul`` does.
        world: number of processes.
        counted: tokens that an n-gram counts for soft targets; 0: no n-gram.
    """
    size = 4 * parameters_of(config)
    matrices = 4 * config.n_layer * (4 * config.d_model**2 + 2 * config.d_model * config.d_ff)
    momenta = 2 * size - (matrices if train_config.optimizer == "muon" else 0)
    shares = world if train_config.parallel == "fsdp" else 1
    tokens = -(-train_config.batch_size // world) * config.block_size
    kind = "fp32" if precision == "fp32" else "bf16"
    per = (KERNELS if kernels else PYTORCH)[kind]
    channel, pair = per
    of_attention = config.attention_dropout
    if not kernels and config.dropout > 0:
        channel += DROPOUT[kind].per_channel
    if not kernels and (config.dropout if of_attention is None else of_attention) > 0:
        pair += DROPOUT[kind].per_pair
    # The width of the feed-forward layer counts as the usual 4 × d_model, in proportion.
    width = (config.d_model + config.d_ff / 4) / 2
    layer = channel * width + pairs * pair * config.n_head * config.block_size
    return Memory(
        weights=size // shares,
        gradients=size // shares,
        optimizer=momenta // shares,
        activations=round(tokens * config.n_layer * layer),
        logits=round(tokens * config.vocab_size * LOGITS),
        ngram=round(counted * COUNTED + bool(counted) * tokens * config.vocab_size * EXPECTED),
    )


# --- many devices


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Devices in machines, and how fast they exchange gradients."""

    per_machine: int = 8
    link: float = 100e9  # bytes a second between two devices of a machine
    network: float = 12.5e9  # bytes a second between two machines: 100 Gbit/s
    latency: float = 20e-6  # seconds of a message
    bucket: int = 25 << 20  # bytes of gradients that DDP sends together


class Shared(NamedTuple):
    """A step that several devices share."""

    devices: int
    batch_size: int
    seconds: float
    waiting: float  # of them, seconds that gradients take after the backward pass
    efficiency: float  # speed per device, as a share of that of one


def ring_seconds(n_bytes: float, devices: int, cluster: Cluster) -> float:
    """Return how long a ring all-reduce takes: 2 (W - 1) messages of n / W bytes, one by one.

    Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    The slowest link of the ring counts.
    """
    if devices == 1:
        return 0.0
    bandwidth = cluster.link if devices <= cluster.per_machine else cluster.network
    messages = 2 * (devices - 1)
    buckets = max(1, -(-n_bytes // cluster.bucket))
    return messages * (n_bytes / devices / bandwidth + buckets * cluster.latency)


def shared_step(
    seconds_of: Callable[[int], float],
    n_parameters: int,
    batch_size: int,
    devices: int,
    cluster: Cluster,
    *,
    accumulation: int = 1,
) -> Shared:
    """Return the time of a step of ``ddp`` on so many devices.

    Each device gets an equal share of each of the step's `accumulation` batches, at least one
    sequence; `seconds_of` is the time of a step of so many sequences on one device. All gradients
    but those of the last bucket travel during the backward pass, two thirds of the step.
    """
    batch_size = max(batch_size, devices)
    compute = seconds_of(accumulation * -(-batch_size // devices))
    n_bytes = 4.0 * n_parameters
    whole = ring_seconds(n_bytes, devices, cluster)
    last = ring_seconds(min(n_bytes, cluster.bucket), devices, cluster)
    waiting = max(last, whole - 2 / 3 * compute)
    seconds = compute + waiting
    alone = seconds_of(accumulation * batch_size) / devices
    return Shared(devices, batch_size, seconds, waiting, alone / seconds)


# --- GPUs that are not at hand

GPU_SHARE = 0.25  # of a GPU's speed, for models as small as these; nanoGPT reports up to 0.5


class Gpu(NamedTuple):
    """Figures from the maker's data sheet."""

    flops: float  # dense products a second, in the precision
    memory: float  # bytes
    precision: str = "bf16"


GPUS = {
    "t4": Gpu(65e12, 16e9, "fp16"),
    "l4": Gpu(121e12, 24e9),
    "a10": Gpu(125e12, 24e9),
    "a100": Gpu(312e12, 80e9),
    "h100": Gpu(989e12, 80e9),
    "h200": Gpu(989e12, 141e9),
}
