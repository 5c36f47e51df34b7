"""The engine of the server gives the page what the engine in the page gives it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from page_engine import CHARACTERS, GREEDY, INSPECT, ODD, stored, write
from twin import shake

from chargpt.config import NormPlacement
from chargpt.data.tokenizer import CharTokenizer
from chargpt.model import GPT2

pytest.importorskip("fastapi", reason="the extra chargpt[serve] is not installed")
from chargpt.serve.bridge import Bridge
from chargpt.serve.inside import inspect
from chargpt.serve.models import Served, exact_decoder
from chargpt.serve.worker import Worker
from chargpt.serve.writing import PageText, Task


def close_to(value: Any) -> Any:
    """Return what equals `value` up to the rounding of float32, in all its parts."""
    if isinstance(value, dict):
        return {name: close_to(each) for name, each in value.items()}
    if isinstance(value, list):
        return [close_to(each) for each in value]
    return pytest.approx(value, abs=2e-5, rel=1e-4) if isinstance(value, float) else value


@pytest.mark.parametrize("placement", get_args(NormPlacement))
def test_inside_is_the_same(open_engine: Callable[..., Any], placement: NormPlacement) -> None:
    source = shake(GPT2(ODD.replace(norm_placement=placement)), std=0.2).eval()
    page = open_engine(source, CharTokenizer(CHARACTERS))
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    expected = page.evaluate(INSPECT, {"ids": text, "index": 8, "first": 2})
    assert inspect(stored(source)[0], text[2:8]) == close_to(expected)


def records_of(model: GPT2, tokenizer: CharTokenizer, task: dict[str, Any]) -> list[Any]:
    """Return what the server sends for a task."""

    async def collect() -> list[Any]:
        worker = Worker(exact_decoder(model, 2))
        worker.pace = Bridge(asyncio.get_running_loop())
        text = PageText(Served("m", Path(), model, tokenizer, worker, "best"), Task(**task))
        text.start()
        records = [record async for record in text.records()]
        await asyncio.to_thread(worker.stop)
        return records

    with ThreadPoolExecutor() as pool:  # Playwright has an event loop in this thread
        return pool.submit(lambda: asyncio.run(collect())).result()


@pytest.mark.parametrize("end_of_text", [False, True])
@pytest.mark.parametrize("n_given", [0, 1, 10, 27])
def test_records_are_the_same(
    open_engine: Callable[..., Any], end_of_text: bool, n_given: int
) -> None:
    """With the likeliest character each time, because their random numbers differ."""
    tokenizer = CharTokenizer(CHARACTERS, end_of_text=end_of_text)
    source = shake(GPT2(ODD.replace(vocab_size=tokenizer.vocab_size)), std=0.2).eval()
    if end_of_text:
        with torch.no_grad():
            end = source.token_embedding.weight[-1]
            source.final_norm.bias += 4 * end / end.norm()  # so that texts end
    page = open_engine(source, tokenizer)
    ids, settings = [i % 7 for i in range(n_given)], GREEDY | {"temperature": 1, "topK": 1}
    expected = write(page, ids, 30, settings)
    task = {"ids": ids, "from": 0, "n": 30, "settings": settings}
    *records, last = records_of(stored(source)[0], tokenizer, task)
    assert records == close_to(expected["records"])
    assert last == {"reason": expected["end"]}
    assert (last["reason"] == "end_of_text") == end_of_text


def test_filters_show_in_the_odds(open_engine: Callable[..., Any]) -> None:
    """`drawn` has the probabilities that decided."""
    tokenizer = CharTokenizer(CHARACTERS)
    source = shake(GPT2(ODD.replace(vocab_size=tokenizer.vocab_size)), std=0.2).eval()
    page = open_engine(source, tokenizer)
    settings = {"temperature": 1.3, "topK": 6, "topP": 0.8, "minP": 0.1, "seed": 3}
    expected = write(page, [1, 2], 1, settings, start=2)["records"][0]
    task = {"ids": [1, 2], "from": 2, "n": 1, "settings": settings}
    record, _ = records_of(stored(source)[0], tokenizer, task)
    assert record["top"] == close_to(expected["top"])
    assert record["drawn"]["top"] == close_to(expected["drawn"]["top"])
    assert 0.0 in record["drawn"]["top"]
