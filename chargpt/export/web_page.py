"""A web page with a model in it: made of the parts in `chargpt/web`, and read back.

The page has the code, the weights (see `web_weights`) and facts about the model as JSON, with a
self-test: logits that the browser compares its own with.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, NamedTuple

import numpy as np

from chargpt.base.files import parse_json
from chargpt.config import GPT2Config
from chargpt.data.tokenizer import CharTokenizer
from chargpt.export.verify import Floats, logits_of
from chargpt.export.web_bundle import content_policy, data_text, fill, join_modules, script_text
from chargpt.export.web_weights import pack, unpack
from chargpt.model import GPT2

TOLERANCE, RELATIVE_TOLERANCE = 1e-3, 2e-4  # of logits: see `tolerance_for`
_N_PROMPTS = 10


def make_page(
    model: GPT2,
    tokenizer: CharTokenizer,
    written: Sequence[list[int]],
    *,
    name: str,
    run_facts: dict[str, Any] | None = None,
    int8: bool = False,
    web: Traversable | None = None,
) -> str:
    """Return the page with a model.

    Args:
        model: the model.
        tokenizer: the model's.
        written: texts of the model, as token ids, for the self-test.
        name: the title.
        run_facts: the facts of the run, see `Facts.to_json`; None: not known.
        int8: store matrices in 8 bits instead of 16.
        web: the folder with the page's parts; None: the package's.
    """
    web = web or files("chargpt").joinpath("web")
    tensors, data = pack(model, "int8" if int8 else "int16")
    facts = {
        "name": name,
        "run": run_facts,
        "config": asdict(model.config),
        "characters": list(tokenizer.characters),
        "end_of_text_id": tokenizer.end_of_text_id,
        "tensors": [tensor.to_json() for tensor in tensors],
    }
    facts["self_test"] = self_test(model, unpack_json(facts, data), written, int8=int8)
    script = script_text("\n" + join_modules(web, "page/main.js"))
    style = "\n" + web.joinpath("page.css").read_text("utf-8")
    values = {
        "title": html.escape(name),
        "policy": content_policy(script, style),
        "style": style,
        "script": script,
        "worker": script_text('"use strict";\n\n' + join_modules(web, "engine/worker.js")),
        "facts": data_text(facts),
        "weights": base64.b64encode(data).decode(),
    }
    return fill(web.joinpath("page.html").read_text("utf-8"), values)


# --- the self-test


def self_test(
    source: GPT2, exported: GPT2, written: Sequence[list[int]], *, int8: bool
) -> dict[str, Any]:
    """Return contexts with the source's logits, for the browser to compare its own with.

    In 8 bits, the tolerance is what the rounded weights change, plus that of 16 bits.
    """
    prompts = contexts(written, source.config.block_size)
    wanted = np.stack([logits_of(source)(prompt)[-1] for prompt in prompts])  # (prompts, V)
    tolerance = tolerance_for(wanted)
    if int8:
        rounded = np.stack([logits_of(exported)(prompt)[-1] for prompt in prompts])
        tolerance += float(np.abs(wanted - rounded).max())
    logits = base64.b64encode(wanted.astype("<f4").tobytes()).decode()
    return {"prompts": prompts, "logits": logits, "tolerance": tolerance}


def tolerance_for(*logits: Floats) -> float:
    """Return how much logits may differ after weights were rounded to 16 bits.

    Rounding changes large logits more. These are at most 1 part in 5,000 off, or 0.001.
    """
    largest = max(float(np.abs(each).max()) for each in logits)
    return max(TOLERANCE, RELATIVE_TOLERANCE * largest)


def contexts(written: Sequence[list[int]], block_size: int) -> list[list[int]]:
    """Return ten pieces of texts, of random lengths up to block_size."""
    rng = np.random.default_rng(0)
    pieces = []
    for number in range(_N_PROMPTS):
        text = written[number % len(written)]
        length = int(rng.integers(1, min(block_size, len(text)) + 1))
        start = int(rng.integers(len(text) - length + 1))
        pieces.append(text[start : start + length])
    return pieces


# --- reading it back


class _Blocks(HTMLParser):
    """Collects the text of each script element with an id."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.texts: dict[str, str] = {}
        self._id: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._id = dict(attrs).get("id") if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._id = None

    def handle_data(self, data: str) -> None:
        if self._id:
            self.texts[self._id] = self.texts.get(self._id, "") + data


class PageModel(NamedTuple):
    """What a page holds: its facts, and the model it computes with."""

    facts: dict[str, Any]
    model: GPT2


def read_page(page: str) -> PageModel:
    """Return the facts and the model in a page."""
    blocks = _Blocks()
    blocks.feed(page)
    blocks.close()
    facts = parse_json(blocks.texts["facts"], "the page")
    data = base64.b64decode(blocks.texts["weights"], validate=True)
    return PageModel(facts, unpack_json(facts, data))


def unpack_json(facts: dict[str, Any], data: bytes) -> GPT2:
    """Return the model that a page's facts and weights describe."""
    return unpack(GPT2Config(**facts["config"]), facts["tensors"], data)
