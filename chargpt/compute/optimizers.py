"""The optimizers and the learning rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from chargpt.compute.muon import MuonAdamW
from chargpt.config import TrainConfig
from chargpt.model import GPT2, CausalSelfAttention

NGRAM_FALL = 0.35  # share of the budget


def make_optimizer(
    model: GPT2, train_config: TrainConfig, *, muon_dtype: torch.dtype = torch.bfloat16
) -> torch.optim.Optimizer:
    """Return the optimizer that `train_config` names.

    Each group has an ``lr`` and a ``peak``, the learning rate that `schedule` returns a share of.
    The model must be on its final device. Muon orthogonalises in `muon_dtype`.
    """
    use_muon = train_config.optimizer == "muon"
    optimizer = muon(model, train_config, muon_dtype) if use_muon else adamw(model, train_config)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def adamw(model: nn.Module, train_config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019), which decays matrices and embeddings only.

    Decay would pull biases and LayerNorm gains toward zero, against their purpose.
    """
    parameters = _trainable(model)
    decayed = [p for p in parameters if p.dim() >= 2]
    others = [p for p in parameters if p.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": train_config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=train_config.learning_rate,
        betas=(train_config.beta1, train_config.beta2),
        fused=_can_fuse(parameters) or None,
    )


def muon(model: GPT2, train_config: TrainConfig, dtype: torch.dtype) -> MuonAdamW:
    """Return Muon for the matrices of the blocks, with AdamW for the rest.

    Queries, keys and values count as three matrices, although one parameter stores them. Embeddings
    (the head is one) are tables of vectors, which orthogonalisation would distort.
    """
    parameters = _trainable(model)
    matrices = [p for p in _trainable(model.blocks) if p.dim() == 2]
    hidden = {id(p) for p in matrices}
    return MuonAdamW(
        matrices,
        [p for p in parameters if id(p) not in hidden],
        matrix_lr=train_config.muon_learning_rate,
        momentum=train_config.muon_momentum,
        weight_decay=train_config.weight_decay,
        lr=train_config.learning_rate,
        betas=(train_config.beta1, train_config.beta2),
        embedding_decay=train_config.embedding_decay,
        dtype=dtype,
        fused=_can_fuse(parameters),
        parts={m.qkv.weight: 3 for m in model.modules() if isinstance(m, CausalSelfAttention)},
    )


def schedule(progress: float, train_config: TrainConfig) -> float:
    """Return the learning rate as a share of its peak: linear warm-up, constant, then cool-down.

    It depends on progress, the share of the budget already used (above 1 counts as 1), so the same
    schedule fits a budget in steps and one in minutes.
    """
    progress = min(progress, 1.0)
    warmup, floor = train_config.warmup_fraction, train_config.learning_rate_floor
    if progress < warmup:
        return progress / warmup
    start = max(warmup, 1.0 - train_config.cooldown_fraction)
    if progress <= start:
        return 1.0
    cooled = (progress - start) / (1.0 - start)
    linear = train_config.cooldown == "linear"
    factor = 1.0 - cooled if linear else (1.0 + math.cos(math.pi * cooled)) / 2.0
    return floor + (1.0 - floor) * factor


def ngram_share(progress: float, train_config: TrainConfig) -> float:
    """Return which share of the loss compares with the n-gram; see `TrainConfig.ngram_weight`."""
    start, end = train_config.ngram_weight, train_config.ngram_weight_floor
    return start + (end - start) * min(1.0, progress / NGRAM_FALL)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    """Return whether PyTorch's fused kernel works well on this device."""
    return all(p.device.type in ("cpu", "cuda") for p in parameters)
