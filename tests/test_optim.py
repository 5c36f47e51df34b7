"""AdamW against its formulas, its groups, and the learning rate as a table."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from chargpt.config import GPT2Config, TrainConfig
from chargpt.model import GPT2
from chargpt.optim import adamw, learning_rate

# --- AdamW


@pytest.mark.parametrize("bias", [True, False])
def test_groups_decay_matrices_only_and_hold_every_parameter_once(bias: bool) -> None:
    shape = GPT2Config(vocab_size=5, block_size=4, n_layer=2, n_head=1, d_model=4, bias=bias)
    model = GPT2(shape)
    optimizer = adamw(model, TrainConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(names.values())
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, share in decay.items():
        vector = name.endswith(".bias") or "norm" in name
        assert share == (0.0 if vector else 0.3), name


def test_frozen_parameters_are_left_out() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    groups = adamw(layer, TrainConfig()).param_groups
    assert [len(group["params"]) for group in groups] == [0, 1]


def test_steps_equal_the_formulas() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, in float64, over steps with different rates."""
    config = TrainConfig(learning_rate=0.1, weight_decay=0.2, beta1=0.8, beta2=0.9)
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    optimizer = adamw(layer, config)
    expected = {name: p.detach().clone() for name, p in layer.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in expected.items()}
    second = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, rate in enumerate((0.1, 0.05, 0.025), start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in layer.named_parameters():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient.clone()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            m, v = first[name] / (1 - 0.8**step), second[name] / (1 - 0.9**step)
            decay = 0.2 if name == "weight" else 0.0
            expected[name] = expected[name] - rate * (
                m / (v.sqrt() + 1e-8) + decay * expected[name]
            )
        optimizer.step()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_the_peak_is_the_configured_rate() -> None:
    groups = adamw(nn.Linear(2, 2), TrainConfig(learning_rate=0.123)).param_groups
    assert {group["lr"] for group in groups} == {0.123}


# --- the schedule


@pytest.mark.parametrize(
    ("progress", "warmup", "floor", "factor"),
    [
        (0.0, 0.2, 0.1, 0.0),
        (0.05, 0.2, 0.1, 0.25),
        (0.1, 0.2, 0.1, 0.5),
        (0.2, 0.2, 0.1, 1.0),  # the peak
        (0.4, 0.2, 0.1, 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way down
        (0.6, 0.2, 0.1, 0.55),  # the middle
        (0.8, 0.2, 0.1, 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2),
        (1.0, 0.2, 0.1, 0.1),
        (1.5, 0.2, 0.1, 0.1),  # beyond the end
        (math.inf, 0.2, 0.1, 0.1),
        (0.0, 0.0, 0.1, 1.0),  # no warm-up
        (0.5, 0.0, 0.1, 0.55),
        (0.6, 0.2, 0.0, 0.5),  # down to nothing
        (1.0, 0.2, 0.0, 0.0),
        (0.7, 0.2, 1.0, 1.0),  # constant
        (0.5, 1.0, 0.1, 0.5),  # nothing but warm-up
    ],
)
def test_schedule(progress: float, warmup: float, floor: float, factor: float) -> None:
    config = TrainConfig(learning_rate=3e-4, warmup_fraction=warmup, learning_rate_floor=floor)
    assert learning_rate(progress, config) == pytest.approx(3e-4 * factor, rel=1e-12, abs=1e-18)


def test_schedule_has_no_jump() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_fraction=0.02)
    rates = [learning_rate(i / 10000, config) for i in range(12000)]
    assert max(abs(a - b) for a, b in pairwise(rates)) < 1.01 / 200
    peak = rates.index(max(rates))
    assert peak == 200
    assert rates[:201] == sorted(rates[:201])
    assert rates[200:] == sorted(rates[200:], reverse=True)
