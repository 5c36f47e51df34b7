"""The optimizers and their schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from chargpt.compute.muon import MuonAdamW
from chargpt.config import TrainConfig
from chargpt.model import GPT2, CausalSelfAttention


def make_optimizer(
    model: GPT2, train_config: TrainConfig, *, muon_dtype: torch.dtype = torch.bfloat16
) -> torch.optim.Optimizer:
    """Return the optimizer that `config` names.

    Every group has a ``peak`` beside its ``lr``: the rate that `schedule` is a share of.

    Args:
        model: on its final device.
        train_config: the optimizer's name, learning rates, memories and decay.
        muon_dtype: what Muon orthogonalises in.
    """
    if train_config.optimizer == "muon":
        optimizer: torch.optim.Optimizer = muon(model, train_config, muon_dtype)
    else:
        optimizer = adamw(model, train_config)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def adamw(model: nn.Module, train_config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019), decaying matrices and embeddings only.

    Decaying a bias or a LayerNorm gain toward zero would fight what it is there for.

    Args:
        model: on its final device.
        train_config: learning rate, betas and decay.
    """
    parameters = _learned(model)
    groups = [
        {
            "params": [p for p in parameters if p.dim() >= 2],
            "weight_decay": train_config.weight_decay,
        },
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=train_config.learning_rate,
        betas=(train_config.beta1, train_config.beta2),
        fused=_can_fuse(parameters) or None,
    )


def muon(model: GPT2, train_config: TrainConfig, dtype: torch.dtype) -> MuonAdamW:
    """Return Muon for the matrices of the blocks, AdamW for all else.

    Queries, keys and values come from matrices of their own, though they are stored as one.
    Embeddings (one of them is the head) are tables of vectors, which orthogonalising would distort.

    Args:
        model: on its final device.
        train_config: learning rates, memories and decay.
        dtype: what Muon orthogonalises in.
    """
    parameters = _learned(model)
    matrices = [p for p in _learned(model.blocks) if p.dim() == 2]
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
        parts=dict.fromkeys(_qkv_weights(model), 3),
    )


def _qkv_weights(model: GPT2) -> list[Tensor]:
    """Return the weights that are three matrices in one: of queries, keys and values."""
    layers = [m.qkv for m in model.modules() if isinstance(m, CausalSelfAttention)]
    return [layer.weight for layer in layers]


def schedule(progress: float, train_config: TrainConfig) -> float:
    """Return the share of the peak learning rate: linear warm-up, constant, then a cool-down.

    A function of progress, so that the same schedule fits a budget in steps and one in minutes.

    Args:
        progress: share of the budget that is spent, in [0, 1]; more counts as 1.
        train_config: warm-up, form and length of the cool-down, floor.

    Returns:
        A share in [0, 1].
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
    left = 1.0 - cooled if linear else (1.0 + math.cos(math.pi * cooled)) / 2.0
    return floor + (1.0 - floor) * left


def _learned(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _can_fuse(parameters: list[nn.Parameter]) -> bool:
    """Return whether PyTorch's fused kernel is known to be good on this device."""
    return all(p.device.type in ("cpu", "cuda") for p in parameters)
