"""Tensors that FSDP spreads over processes (DTensor): whole ones from shares, and the reverse."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def is_shared(tensor: Tensor) -> bool:
    """Return whether each process holds only its share of a tensor."""
    return hasattr(tensor, "full_tensor")  # a DTensor, whose import takes half a second


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that processes share; all of them must call this together."""
    return cast(Any, tensor).full_tensor() if is_shared(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor on rank 0's CPU, elsewhere an empty one; all must call this.

    A tensor that is not shared is returned as it is.
    """
    if not is_shared(tensor):
        return tensor
    value = whole(tensor)
    return value.cpu() if torch.distributed.get_rank() == 0 else value.new_empty(0)


def own(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor, as a view; a plain tensor is its own share."""
    return cast(Any, tensor).to_local() if is_shared(tensor) else tensor


def shared_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, which every process has, as one that is shared like another."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast(Any, like).device_mesh, cast(Any, like).placements
    return distribute_tensor(value.to(own(like).device), mesh, placements, src_data_rank=None)
