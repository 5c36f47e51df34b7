"""Counts of parameters and of floating-point operations in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chargpt.config import GPT2Config

if TYPE_CHECKING:
    from torch import nn  # only here, because help must be quick


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; the tied embedding counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_of(config: GPT2Config) -> int:
    """Return the number of parameters of a known vocabulary size, without building the model."""
    C, F = config.d_model, config.d_ff
    matrices = 4 * C * C + 2 * C * F
    biases = (3 * C + C) + (F + C) if config.bias else 0
    norm = 2 * C if config.bias else C
    norms = norm * (4 if config.norm_placement == "sandwich" else 2)
    embeddings = (config.vocab_size + config.block_size) * C
    return config.n_layer * (matrices + biases + norms) + embeddings + norm


def training_flops_per_token(config: GPT2Config) -> int:
    """Return the floating-point operations per trained token, of matrix products only.

    A multiply-add counts as two, and the backward pass costs twice the forward pass. Attention
    counts the whole T × T square, as in Chowdhery et al. 2022 (PaLM), appendix B. The vocabulary
    size must be known.
    """
    C, T = config.d_model, config.block_size
    matrices = config.n_layer * (4 * C * C + 2 * C * config.d_ff) + C * config.vocab_size
    attention = config.n_layer * 2 * C * T
    return 6 * (matrices + attention)
