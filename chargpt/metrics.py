"""Counting and units: nats and bits, parameters, and a line a person can read."""

from __future__ import annotations

import math

from torch import nn

from chargpt.config import GPT2Config


def bits_per_char(nats_per_char: float) -> float:
    """Convert a loss in nats a character to bits a character."""
    return nats_per_char / math.log(2)


def perplexity(nats_per_char: float) -> float:
    """Convert a loss in nats a character to the number of equally likely choices it equals."""
    return math.exp(nats_per_char)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; the tied embedding counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_of(config: GPT2Config) -> int:
    """Return the number of parameters of a model that need not exist.

    Args:
        config: with its vocabulary size.
    """
    C, F = config.d_model, config.d_ff
    matrices = 4 * C * C + 2 * C * F
    biases = (3 * C + C) + (F + C) if config.bias else 0
    norm = 2 * C if config.bias else C
    norms = norm * (4 if config.norm_placement == "sandwich" else 2)
    embeddings = (config.vocab_size + config.block_size) * C
    return config.n_layer * (matrices + biases + norms) + embeddings + norm


def training_flops_per_token(config: GPT2Config) -> int:
    """Return the floating-point operations of one trained token: matrix products only.

    A multiply-add is two, the backward pass costs twice the forward pass. Attention counts the
    whole T × T square (Chowdhery et al. 2022 (PaLM), appendix B).

    Args:
        config: with its vocabulary size.
    """
    C, T = config.d_model, config.block_size
    matrices = config.n_layer * (4 * C * C + 2 * C * config.d_ff) + C * config.vocab_size
    attention = config.n_layer * 2 * C * T
    return 6 * (matrices + attention)


def human_count(number: float) -> str:
    """Return a count with three digits: 818048 is "818 k", 10.7e6 is "10.7 M"."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * limit:  # 999,500 is 1 M, not 1e+03 k
            return f"{number / limit:.3g}{unit}" if number < 1000 * limit else f"{number:.3g}"
    return f"{number:.3g}"


def human_time(seconds: float) -> str:
    """Return a duration: 5 is "5 s", 65 is "1 min 05 s", 3700 is "1 h 01 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"
