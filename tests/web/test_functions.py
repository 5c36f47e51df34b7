"""Random numbers and filters of the page, in Chromium, against published and Python's values."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from chargpt.config import GPT2Config, SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.sampling import filter_logits, sample_next
from chargpt.model import GPT2

TINY = GPT2Config(block_size=2, vocab_size=2, n_layer=1, n_head=1, d_model=2)


@pytest.fixture
def page(open_engine: Callable[..., Any]) -> Any:
    return open_engine(GPT2(TINY), CharTokenizer("ab"))


# counter, key and result of philox4x32-10 in Random123's kat_vectors
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def test_philox_gives_the_known_answers(page: Any) -> None:
    call = """([counter, key]) => {
      const numbers = (text) => text.trim().split(" ").map((digits) => BigInt("0x" + digits));
      const hex = (n) => n.toString(16).padStart(8, "0");
      return parts.philox(numbers(counter), numbers(key)).map(hex).join(" ");
    }"""
    for counter, key, expected in KNOWN_ANSWERS:
        assert page.evaluate(call, [counter, key]) == expected


def test_uniform_numbers_have_53_bits_of_philox(page: Any) -> None:
    seeds = [0, 1, 2**32, 2**53 - 1]
    call = "(seeds) => seeds.map((seed) => [0, 1, 2].map((index) => parts.uniform(seed, index)))"
    numbers = np.array(page.evaluate(call, seeds))
    assert numbers[0, 0] == (0x6627E8D5 << 21 | 0xE169C58D >> 11) / 2**53
    assert len(set(numbers.ravel())) == numbers.size
    assert ((numbers >= 0) & (numbers < 1)).all()


CHOICES = {
    "temperature": (0.0, 1e-38, 0.7, 1.0, 3.0),
    "top_k": (0, 1, 5, 99),
    "top_p": (1.0, 0.6, 0.01),
    "min_p": (0.0, 0.1, 1.0),
}
SETTINGS = [
    dict(zip(CHOICES, values, strict=True)) for values in itertools.product(*CHOICES.values())
]


def test_filters_equal_python(page: Any) -> None:
    logits = torch.randn(20, 17, generator=torch.Generator().manual_seed(0)) * 3
    call = """([rows, settings]) => settings.map(({temperature, top_k, top_p, min_p}) => {
      const each = {temperature, topK: top_k, topP: top_p, minP: min_p};
      return rows.map((row) => [...parts.filterLogits(Float32Array.from(row), each)]
        .map((x) => x === -Infinity ? null : x));
    })"""
    computed = page.evaluate(call, [logits.tolist(), SETTINGS])
    for settings, rows in zip(SETTINGS, computed, strict=True):
        expected = filter_logits(logits, SampleConfig(**settings)).numpy()
        ours = np.array([[-np.inf if x is None else x for x in row] for row in rows])
        # A tiny temperature takes float32 to -inf, but not float64.
        ours[ours < np.finfo(np.float32).min] = -np.inf
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5, err_msg=str(settings))


def test_top_k_keeps_exactly_k_of_equal_logits(page: Any) -> None:
    call = """() => [...parts.filterLogits(new Float32Array(9),
      {temperature: 1, topK: 4, topP: 1, minP: 0})].filter((x) => x === 0).length"""
    assert page.evaluate(call) == 4


def test_one_token_is_left_by_any_filter(page: Any) -> None:
    call = """() => [...parts.filterLogits(new Float32Array([1, 3, 2]),
      {temperature: 1, topK: 0, topP: 0, minP: 1})].map((x) => x === -Infinity ? null : x)"""
    assert page.evaluate(call) == [None, 0, None]


def test_draws_equal_python(page: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, 13, generator=generator) * 2
    logits[:, 3] = -torch.inf
    uniforms = torch.rand(50, generator=generator, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, 1 - 2.0**-53
    call = """([rows, uniforms]) => rows.map((row, i) =>
      parts.draw(parts.softmax(row.map((x) => x ?? -Infinity)), uniforms[i]))"""
    rows = [[None if x == -np.inf else x for x in row] for row in logits.tolist()]
    expected = sample_next(logits, uniforms).tolist()
    assert page.evaluate(call, [rows, uniforms.tolist()]) == expected


def test_the_likeliest_are_sorted_and_possible(page: Any) -> None:
    call = "(p) => [parts.likeliest(p, 3), parts.likeliest(p)]"
    three, all_of_them = page.evaluate(call, [0.1, 0, 0.4, 0.1, 0.3, 0.1])
    assert three == {"ids": [2, 4, 0], "p": [0.4, 0.3, 0.1]}
    assert all_of_them["ids"] == [2, 4, 0, 3, 5]


def test_a_browser_without_simd_gets_plain_javascript(page: Any) -> None:
    call = "(bytes) => parts.openProducts(64, Uint8Array.from(bytes)).backend"
    assert page.evaluate(call, [0, 97, 115, 109, 2, 0, 0, 0]) == "javascript"


def test_text_becomes_ids_by_code_points(page: Any) -> None:
    call = """() => {
      const tokenizer = new parts.Tokenizer(["a", "é", "😀"], 3);
      return [tokenizer.encode("😀aéx😀y x"), tokenizer.decode([2, 3, 0])];
    }"""
    encoded, decoded = page.evaluate(call)
    assert encoded == {"ids": [2, 0, 1, 2], "unknown": ["x", "y", " "]}
    assert decoded == "😀a"
