"""Several devices: how they share each batch. The rest of the package need not know.

====  =====================================================================
none  one device
dp    `torch.nn.DataParallel`: the GPUs of one process
ddp   `DistributedDataParallel`: a process per device, each with all weights
fsdp  `fully_shard` (FSDP2): a process per device, each with a share of them
====  =====================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from chargpt.base.errors import UserError
from chargpt.base.seeding import DROPOUT, derive_seed
from chargpt.compute.counts import training_flops_per_token
from chargpt.compute.device import DTYPES, PrecisionChoice
from chargpt.compute.world import World
from chargpt.config import GPT2Config, Parallel
from chargpt.model import GPT2, CausalSelfAttention, FeedForward

Forward = Callable[[Tensor], Tensor]

DP_MIN_FLOPS = 10**12  # per GPU and pass: copying the model to each GPU takes some milliseconds


class ParallelChoice(NamedTuple):
    """How devices share each batch."""

    kind: Literal["none", "dp", "ddp", "fsdp"]
    reason: str
    n_gpus: int = 1  # in this process


# --- the choice


def choose_parallel(
    requested: Parallel,
    device: torch.device,
    world: World,
    model_config: GPT2Config,
    batch_size: int,
) -> ParallelChoice:
    """Return how the devices share each batch.

    Raises:
        UserError: what was requested cannot work, or there are fewer sequences than devices.
    """
    if world.size > 1:
        return _among_processes(requested, device, world, batch_size)
    if requested == "fsdp":
        raise UserError(
            "parallel is 'fsdp', which shares the weights among several processes: start them with "
            "torchrun --nproc-per-node N -m chargpt train …, or give --parallel auto"
        )
    n_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if requested == "dp":
        return _data_parallel(n_gpus, batch_size)
    line = f"torchrun --nproc-per-node {n_gpus} -m chargpt train …"
    if n_gpus < 2 or requested == "none":
        return ParallelChoice("none", "one device")
    tokens = batch_size // n_gpus * model_config.block_size
    pays = tokens * training_flops_per_token(model_config) >= DP_MIN_FLOPS
    if requested == "auto" and batch_size >= n_gpus and pays:
        reason = f"each batch is shared by {n_gpus} GPUs; faster: {line}"
        return ParallelChoice("dp", reason, n_gpus)
    return ParallelChoice("none", f"one device; {line} shares each batch among {n_gpus} GPUs")


def _among_processes(
    requested: Parallel, device: torch.device, world: World, batch_size: int
) -> ParallelChoice:
    if requested in ("none", "dp"):
        raise UserError(
            f"parallel is {requested!r}, which is for one process, but torchrun started "
            f"{world.size}: give --parallel auto, or start chargpt without torchrun"
        )
    if device.type == "mps":
        raise UserError("PyTorch cannot join several processes on Apple GPUs: give --device cpu")
    n_gpus = torch.cuda.device_count()
    if device.type == "cuda" and world.local_size > n_gpus:
        raise UserError(
            f"torchrun started {world.local_size} processes here, and there are {n_gpus} GPUs: "
            f"give --nproc-per-node {n_gpus}"
        )
    if batch_size < world.size:
        raise UserError(
            f"batch_size is {batch_size}, less than the {world.size} processes that share it: "
            f"give --batch-size {world.size} or more, or fewer processes"
        )
    if requested == "fsdp":
        return ParallelChoice("fsdp", f"{world.size} processes share each batch and the weights")
    return ParallelChoice("ddp", f"{world.size} processes share each batch")


def _data_parallel(n_gpus: int, batch_size: int) -> ParallelChoice:
    if n_gpus < 2:
        raise UserError(
            f"parallel is 'dp', which needs at least two GPUs, but {n_gpus} can be used: "
            "give --parallel auto"
        )
    if batch_size < n_gpus:
        raise UserError(
            f"batch_size is {batch_size}, less than the {n_gpus} GPUs that share it: "
            f"give --batch-size {n_gpus} or more, or --parallel none"
        )
    faster = f"torchrun --nproc-per-node {n_gpus} -m chargpt train …"
    return ParallelChoice("dp", f"each batch is shared by {n_gpus} GPUs; faster: {faster}", n_gpus)


# --- the model


def shard(model: GPT2, choice: ParallelChoice, precision: PrecisionChoice) -> None:
    """With ``fsdp``, leave this rank a share of each parameter, in place; before the optimizer.

    Attention and feed-forward layers compute in the precision of matrix products, and their weights
    travel in it; gradients are averaged in fp32. Embeddings and norms stay in fp32.

    Raises:
        UserError: fp16, whose overflows each rank would see in its own share only.
    """
    if choice.kind != "fsdp":
        return
    from torch.distributed.device_mesh import init_device_mesh  # here: they take half a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if precision.name == "fp16":
        raise UserError("precision is 'fp16', which FSDP cannot scale: give --precision bf16")
    device = model.token_embedding.weight.device.type
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if precision.name == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=DTYPES["bf16"], reduce_dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, CausalSelfAttention | FeedForward):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    # By default, the other parameters stay whole after an evaluation: not those of the optimizer.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


class _Replica(nn.Module):
    """A model that enters autocast itself, because DataParallel's threads lose autocast's type."""

    def __init__(self, model: nn.Module, precision: PrecisionChoice) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, ids: Tensor) -> Tensor:
        with self.precision.autocast(ids.device):
            logits: Tensor = self.model(ids)
        return logits


def parallelize(forward: Forward, choice: ParallelChoice, precision: PrecisionChoice) -> Forward:
    """Return a function that maps ids (B, T) to logits, and whose backward pass averages gradients.

    `forward` is the model, perhaps compiled.
    """
    if choice.kind == "dp":
        replica = _Replica(cast(nn.Module, forward), precision)
        return cast(Forward, nn.DataParallel(replica, device_ids=list(range(choice.n_gpus))))
    if choice.kind == "ddp":
        return cast(Forward, DistributedDataParallel(cast(nn.Module, forward)))
    return forward


def accumulating(
    forward: Forward, choice: ParallelChoice, *, is_last: bool
) -> AbstractContextManager[Any]:
    """Return the context of a forward and backward pass; only the last one averages gradients."""
    if choice.kind == "fsdp":
        cast(Any, forward).set_requires_gradient_sync(is_last)
    if isinstance(forward, DistributedDataParallel) and not is_last:
        return forward.no_sync()
    return nullcontext()


# --- randomness


def seed_dropout(
    seed: int, step: int, micro_step: int, world: World, choice: ParallelChoice
) -> None:
    """Seed torch's default generators for one batch; each device gets a different seed.

    Rank 0 drops what one process alone would. The seed of rank r > 0 is a function of (seed, step,
    micro-step, r), and in one process so is that of GPU r.
    """
    key = (seed, DROPOUT, step, micro_step)
    first = derive_seed(*key, *([world.rank] if world.rank else []))
    torch.manual_seed(first)
    for number in range(1, choice.n_gpus):
        with torch.cuda.device(number):
            torch.cuda.manual_seed(derive_seed(first, number))
