"""Weights as integers: what comes back is near, and nothing else is lost."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from twin import shake

from chargpt.base.errors import UserError
from chargpt.config import GPT2Config
from chargpt.export.web_weights import pack, unpack
from chargpt.model import GPT2

CONFIG = GPT2Config(block_size=3, vocab_size=5, n_layer=1, n_head=1, d_model=7, d_ff=9)


def round_trip(model: GPT2, number_type: Literal["int8", "int16"]) -> GPT2:
    tensors, data = pack(model, number_type)
    return unpack(model.config, [tensor.to_json() for tensor in tensors], data)


@pytest.mark.parametrize(("number_type", "steps"), [("int8", 127), ("int16", 32767)])
def test_each_row_is_off_by_at_most_half_a_step(number_type: Any, steps: int) -> None:
    model = shake(GPT2(CONFIG))
    for ours, theirs in zip(
        model.parameters(), round_trip(model, number_type).parameters(), strict=True
    ):
        if ours.dim() == 1:
            assert torch.equal(ours, theirs)
            continue
        largest = ours.abs().amax(dim=1, keepdim=True)
        assert ((ours - theirs).abs() <= largest / steps * 0.5001).all()
        assert not torch.equal(ours, theirs)


def test_int16_is_several_times_as_exact_as_fp16() -> None:
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    model = GPT2(CONFIG.replace(vocab_size=64, d_model=128))
    with torch.no_grad():
        model.token_embedding.weight.copy_(matrix)
    rounded = round_trip(model, "int16").token_embedding.weight
    error, error_of_half = ((m - matrix).square().mean().sqrt() for m in (rounded, matrix.half()))
    assert 5 * error < error_of_half


@pytest.mark.parametrize("number_type", ["int8", "int16"])
def test_rows_of_zeros_and_of_extreme_numbers_stay_finite(number_type: Any) -> None:
    model = shake(GPT2(CONFIG))
    extremes = [0.0, 1e-45, 1e-38, 3e38, -3.4e38]
    with torch.no_grad():
        for row, value in zip(model.token_embedding.weight, extremes, strict=True):
            row.fill_(value)
    back = round_trip(model, number_type).token_embedding.weight
    torch.testing.assert_close(back, model.token_embedding.weight, rtol=1e-2, atol=1e-36)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_refused(value: float) -> None:
    model = GPT2(CONFIG)
    with torch.no_grad():
        model.final_norm.weight[2] = value
    with pytest.raises(UserError, match="final_norm.weight is NaN or infinite"):
        pack(model, "int16")
