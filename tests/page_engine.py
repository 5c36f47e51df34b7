"""A small model in a page's engine, and what the page writes with it."""

from __future__ import annotations

import base64
from typing import Any, Literal

from chargpt.config import GPT2Config
from chargpt.export.web_weights import pack, unpack
from chargpt.model import GPT2

# No width is a multiple of 4, the number that a SIMD instruction computes.
ODD = GPT2Config(block_size=10, vocab_size=11, n_layer=2, n_head=3, d_model=18, d_ff=22)
CHARACTERS = "\n <>&abcdé\u2028"
GREEDY = {"temperature": 0, "topK": 0, "topP": 1, "minP": 0, "seed": 0}
DRAWN = GREEDY | {"temperature": 1, "seed": 7}


def stored(
    model: GPT2, number_type: Literal["int8", "int16"] = "int16"
) -> tuple[GPT2, dict[str, Any]]:
    """Return the model with rounded weights, and what the page gets of it."""
    tensors, data = pack(model, number_type)
    listed = [tensor.to_json() for tensor in tensors]
    config = {name: getattr(model.config, name) for name in model.config.__dataclass_fields__}
    page = {"config": config, "tensors": listed, "weights": base64.b64encode(data).decode()}
    return unpack(model.config, listed, data), page


WRITE = """async ({ids, from, n, settings, simd}) => {
  globalThis.engine ??= await parts.LocalEngine.open({simd});
  const records = [];
  const onRecords = (batch) => records.push(...batch);
  const end = await engine.write({ids, from, n, settings, onRecords});
  return {end, records};
}"""


def write(page: Any, ids: list[int], n: int, settings: dict[str, Any], start: int = 0) -> Any:
    task = {"ids": ids, "from": start, "n": n, "settings": settings, "simd": True}
    return page.evaluate(WRITE, task)


INSPECT = """async (question) => {
  const engine = await parts.LocalEngine.open();
  const inside = await engine.inspect(question);
  const asList = (_, value) => ArrayBuffer.isView(value) ? [...value] : value;
  return JSON.parse(JSON.stringify(inside, asList));
}"""
