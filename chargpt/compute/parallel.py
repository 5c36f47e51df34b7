"""Several GPUs: the rest of the package does not need to know how many there are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from chargpt.base.errors import UserError
from chargpt.base.seeding import derive_seed
from chargpt.compute.device import PrecisionChoice
from chargpt.config import Parallel


class ParallelChoice(NamedTuple):
    """The GPUs that share each batch; an empty list means the model's own device."""

    device_ids: list[int]
    reason: str


def choose_parallel(requested: Parallel, device: torch.device, batch_size: int) -> ParallelChoice:
    """Return which GPUs to use, in one process: all for ``dp``, else the model's device alone.

    Raises:
        UserError: ``dp`` with fewer than two GPUs, or with more GPUs than sequences.
    """
    n_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if requested != "dp":
        more = f"; --parallel dp shares each batch among {n_gpus}" if n_gpus > 1 else ""
        return ParallelChoice([], f"one device{more}")
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
    return ParallelChoice(list(range(n_gpus)), f"each batch is shared by {n_gpus} GPUs")


class _Replica(nn.Module):
    """A model that enters autocast itself, because DataParallel's threads lose autocast's type."""

    def __init__(self, model: nn.Module, precision: PrecisionChoice) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, ids: Tensor) -> Tensor:
        with self.precision.autocast(ids.device):
            logits: Tensor = self.model(ids)
        return logits


def parallelize(model: nn.Module, choice: ParallelChoice, precision: PrecisionChoice) -> nn.Module:
    """Return a module that maps ids (B, T) to the logits of `model`; each GPU gets a share of B."""
    if not choice.device_ids:
        return model
    return nn.DataParallel(_Replica(model, precision), device_ids=choice.device_ids)


def seed_dropout(seed: int, choice: ParallelChoice) -> None:
    """Seed torch's default generators; each GPU that shares a batch gets a different seed."""
    torch.manual_seed(seed)
    for number in choice.device_ids[1:]:
        with torch.cuda.device(number):
            torch.cuda.manual_seed(derive_seed(seed, number))
