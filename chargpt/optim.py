"""The optimizer and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from chargpt.config import TrainConfig


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019), decaying matrices and embeddings only.

    Decaying a bias or a LayerNorm gain toward zero would fight what it is there for.

    Args:
        model: on its final device.
        config: learning rate, betas and decay.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    on_gpu = any(p.is_cuda for p in parameters)
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=on_gpu or None,
    )


def learning_rate(progress: float, config: TrainConfig) -> float:
    """Return the learning rate: linear warm-up, then half a cosine down to the floor.

    A function of progress, so that the same schedule fits a budget in steps and one in minutes.

    Args:
        progress: share of the budget that is spent, in [0, 1]; more counts as 1.
        config: peak, floor and warm-up.
    """
    progress = min(progress, 1.0)
    peak, floor, warmup = config.learning_rate, config.learning_rate_floor, config.warmup_fraction
    if progress < warmup:
        return peak * progress / warmup
    cooled = (progress - warmup) / (1.0 - warmup) if warmup < 1.0 else 1.0
    return peak * (floor + (1.0 - floor) * (1.0 + math.cos(math.pi * cooled)) / 2.0)
