"""The key-value cache: what attention has to remember of the tokens it has read.

Shapes: B sequences, T new tokens, S positions in the cache, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.compute.attention import split_heads


class LayerCache(NamedTuple):
    """Keys and values of one layer, and which of them a forward pass reads and writes."""

    keys: Tensor
    """(slots, H, block_size, D); so are the values."""
    values: Tensor
    slots: Tensor
    """Of each sequence, (B,)."""
    positions: Tensor
    """Of the new tokens, (B, T)."""
    length: int
    """Positions that the longest sequence has, S."""

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """Put new keys and values into the cache, and attend to all of their sequence up to each.

        Args:
            qkv: queries, keys and values of the new tokens side by side, (B, T, 3C).
            n_head: H.

        Returns:
            (B, T, C).
        """
        q, k, v = split_heads(qkv, n_head)  # 3 × (B, H, T, D)
        self.keys[self.slots[:, None], :, self.positions] = k.transpose(1, 2)  # (B, T, H, D)
        self.values[self.slots[:, None], :, self.positions] = v.transpose(1, 2)
        keys = self.keys[self.slots, :, : self.length]  # (B, H, S, D)
        values = self.values[self.slots, :, : self.length]  # (B, H, S, D)
        all_positions = torch.arange(self.length, device=qkv.device)  # (S,)
        visible = all_positions <= self.positions[:, None, :, None]  # (B, 1, T, S)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)  # (B, H, T, D)
        return y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)


class Cache(NamedTuple):
    """The cache of all layers, as a forward pass takes it."""

    layers: Sequence[LayerCache]
    positions: Tensor
    """Of the new tokens, (B, T)."""
