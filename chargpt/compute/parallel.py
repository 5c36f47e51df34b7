"""Several GPUs behind one small seam: the rest of the package never asks how many there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from chargpt.base.errors import UserError
from chargpt.base.seeding import derive_seed
from chargpt.compute.device import PrecisionChoice
from chargpt.config import Parallel


class ParallelChoice(NamedTuple):
    """The GPUs that share each batch; none: the model's own device does it all."""

    device_ids: list[int]
    reason: str


def choose_parallel(wish: Parallel, device: torch.device, batch_size: int) -> ParallelChoice:
    """Return which GPUs to use, in one process.

    Args:
        wish: ``dp`` wants all GPUs; ``auto`` and ``none`` are one device.
        device: the model's device.
        batch_size: sequences in a batch, at least one a GPU.

    Raises:
        UserError: ``dp`` without two GPUs, or a batch smaller than their number.
    """
    n_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if wish != "dp":
        more = f"; --parallel dp shares each batch among {n_gpus}" if n_gpus > 1 else ""
        return ParallelChoice([], f"one device{more}")
    if n_gpus < 2:
        raise UserError(
            f"parallel is 'dp', which needs two GPUs or more, and there are {n_gpus} to use: "
            "give --parallel auto"
        )
    if batch_size < n_gpus:
        raise UserError(
            f"batch_size is {batch_size}, fewer than the {n_gpus} GPUs that are to share it: "
            f"give --batch-size {n_gpus} or more, or --parallel none"
        )
    return ParallelChoice(list(range(n_gpus)), f"each batch is shared by {n_gpus} GPUs")


class _Replica(nn.Module):
    """A model that enters autocast by itself: DataParallel's threads do not know its type."""

    def __init__(self, model: nn.Module, precision: PrecisionChoice) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, ids: Tensor) -> Tensor:
        with self.precision.autocast(ids.device):
            logits: Tensor = self.model(ids)
        return logits


def parallelize(model: nn.Module, choice: ParallelChoice, precision: PrecisionChoice) -> nn.Module:
    """Return a module that computes what `model` does, on the chosen GPUs.

    The parameters stay those of `model`, which is what is saved and sampled.

    Args:
        model: maps ids (B, T) to logits (B, T, V).
        choice: the GPUs, each of which gets a share of B.
        precision: of the matrix products.
    """
    if not choice.device_ids:
        return model
    return nn.DataParallel(_Replica(model, precision), device_ids=choice.device_ids)


def seed_dropout(seed: int, choice: ParallelChoice) -> None:
    """Seed torch's default generators, each GPU that shares a batch differently."""
    torch.manual_seed(seed)
    for number in choice.device_ids[1:]:
        with torch.cuda.device(number):
            torch.cuda.manual_seed(derive_seed(seed, number))
