"""The engine of the page, in Chromium, computes what PyTorch does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from page_engine import CHARACTERS, DRAWN, GREEDY, INSPECT, ODD, stored, write
from twin import shake

from chargpt.config import ActivationFunction, NormPlacement, SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.decoder import PyTorchDecoder
from chargpt.engine.scheduler import Engine
from chargpt.model import GPT2, attention_weights, split_heads

LOGITS = """({config, tensors, weights, ids}) => {
  const logits = (wasm) => {
    const bytes = parts.fromBase64(weights);
    const model = new parts.GPT2(config, tensors, bytes, wasm && parts.fromBase64(parts.WASM));
    const rows = ids.map((id, t) => (model.read(id, t), [...model.predict()]));
    return {rows, backend: model.backend};
  };
  return [logits(true), logits(null)];
}"""


def test_logits_equal_pytorch_for_all_kinds_of_model(open_engine: Callable[..., Any]) -> None:
    page = open_engine(GPT2(ODD), CharTokenizer(CHARACTERS))
    kinds = itertools.product(get_args(NormPlacement), get_args(ActivationFunction), [True, False])
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 10, 0]
    for placement, activation, bias in kinds:
        config = ODD.replace(norm_placement=placement, activation_function=activation, bias=bias)
        model, facts = stored(shake(GPT2(config)).eval())
        with torch.inference_mode():
            expected = model(torch.tensor([ids]))[0].numpy()  # (T, V)
        wasm, plain = page.evaluate(LOGITS, facts | {"ids": ids})
        assert (wasm["backend"], plain["backend"]) == ("wasm simd", "javascript")
        scale = np.abs(expected).max()
        for computed in (wasm["rows"], plain["rows"]):
            np.testing.assert_allclose(
                computed, expected, rtol=0, atol=2e-6 * scale, err_msg=str(config)
            )


def test_weights_in_8_bits_are_decoded(open_engine: Callable[..., Any]) -> None:
    model, facts = stored(shake(GPT2(ODD)), "int8")
    page = open_engine(GPT2(ODD), CharTokenizer(CHARACTERS))
    wasm, _ = page.evaluate(LOGITS, facts | {"ids": [1, 2, 3]})
    with torch.inference_mode():
        expected = model(torch.tensor([[1, 2, 3]]))[0].numpy()
    np.testing.assert_allclose(wasm["rows"], expected, rtol=1e-4, atol=1e-4)


# --- writing


def ids_of(written: Any) -> list[int]:
    return [record["id"] for record in written["records"]]


@pytest.fixture(params=[False, True], ids=["plain", "end_of_text"])
def tokenizer(request: pytest.FixtureRequest) -> CharTokenizer:
    return CharTokenizer(CHARACTERS, end_of_text=request.param)


@pytest.fixture
def opened(
    open_engine: Callable[..., Any], tokenizer: CharTokenizer
) -> tuple[Any, GPT2, CharTokenizer]:
    """A page with a model, and the model with the page's weights."""
    source = shake(GPT2(ODD.replace(vocab_size=tokenizer.vocab_size)), std=0.2).eval()
    return open_engine(source, tokenizer), stored(source)[0], tokenizer


def probabilities(model: GPT2, context: list[int]) -> Any:
    with torch.inference_mode():
        return model(torch.tensor([context]))[0, -1].double().softmax(-1).numpy()


def test_records_hold_the_probabilities_of_pytorch(opened: Any) -> None:
    page, model, tokenizer = opened
    given = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 1]
    written = write(page, given, 30, DRAWN)
    text = given + ids_of(written)[len(given) - (tokenizer.end_of_text_id is None) :]
    start = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    indices = [record["index"] for record in written["records"]]
    assert indices == list(range(0 if start else 1, len(text)))
    for record in written["records"]:
        index, first = record["index"], record["first"]
        context = (start if first == 0 else []) + text[first:index]
        assert ODD.block_size // 2 <= len(context) <= ODD.block_size or first == 0
        expected = probabilities(model, context)
        assert record["p"] == pytest.approx(expected[text[index]], abs=1e-5)
        assert record["top"]["p"] == pytest.approx(sorted(expected)[::-1][:12], abs=1e-5)
        assert expected[record["top"]["ids"]] == pytest.approx(record["top"]["p"], abs=1e-5)
        assert record["given"] == (index < len(given)) == (record["drawn"] is None)
        if record["drawn"]:  # temperature 1 without filters changes nothing
            assert record["drawn"]["p"] == pytest.approx(record["p"], abs=1e-5)
            assert record["drawn"]["top"] == pytest.approx(record["top"]["p"], abs=1e-5)


@pytest.mark.parametrize("block_size", [1, 2, 5, 7, 10])
def test_text_past_block_size_is_read_as_python_reads_it(
    open_engine: Callable[..., Any], tokenizer: CharTokenizer, block_size: int
) -> None:
    config = ODD.replace(vocab_size=tokenizer.vocab_size, block_size=block_size)
    source = shake(GPT2(config), std=0.2)
    written = write(open_engine(source, tokenizer), [1], 50, GREEDY, start=1)
    engine = Engine(PyTorchDecoder(stored(source)[0], 1))
    start = tokenizer.encode_prompt("")[:1] if tokenizer.end_of_text_id is not None else []
    options = SampleConfig(temperature=0, max_new_tokens=50)
    [sequence] = engine.add([*start, 1], options, [0], end_id=tokenizer.end_of_text_id)
    firsts = []
    while engine.active:
        engine.step()
        firsts.append(max(0, sequence.first - len(start)))
    end = [tokenizer.end_of_text_id] if sequence.finish == "end_of_text" else []
    assert sequence.ids[len(start) + 1 :] + end == ids_of(written)
    assert [record["first"] for record in written["records"]] == firsts
    assert written["end"] == sequence.finish


def test_a_text_depends_on_what_is_before_and_on_the_seed(opened: Any) -> None:
    page = opened[0]
    once, again = write(page, [], 40, DRAWN), write(page, [], 40, DRAWN)
    assert once == again
    assert ids_of(write(page, [], 40, DRAWN | {"seed": 8})) != ids_of(once)
    text = ids_of(once)
    for at in range(1, len(text), 7):
        branch = write(page, text[:at], len(text) - at, DRAWN, start=at)
        assert branch["records"] == once["records"][at:], "it continues with the same characters"


def test_the_first_character_follows_the_start_of_a_document(opened: Any) -> None:
    page, model, tokenizer = opened
    [record] = write(page, [], 1, GREEDY | {"temperature": 1, "seed": 1})["records"]
    assert record["p"] == pytest.approx(
        probabilities(model, tokenizer.encode_prompt(""))[record["id"]], abs=1e-5
    )


def test_end_of_text_ends_a_text(open_engine: Callable[..., Any]) -> None:
    tokenizer = CharTokenizer("ab", end_of_text=True)
    model = shake(GPT2(ODD.replace(vocab_size=3)), std=0.1)
    page = open_engine(model, tokenizer)
    written = write(page, [0], 1000, DRAWN, start=1)
    assert written["end"] == "end_of_text"
    assert ids_of(written).index(tokenizer.end_of_text_id) == len(ids_of(written)) - 1


# --- stopping, and several jobs at the same time

STOP_WRITER = """async ({facts, at, ids, settings}) => {
  const {config, tensors, weights} = facts;
  const model = new parts.GPT2(config, tensors, parts.fromBase64(weights), null);
  const stop = new AbortController();
  let reads = 0;
  const read = model.read;
  model.read = (...task) => { read.apply(model, task); if (++reads === at) stop.abort(); };
  const tokenizer = new parts.Tokenizer([...'abcdefghijk'], null);
  const writer = new parts.Writer(new parts.Reader(model), tokenizer, config.block_size);
  const task = {ids, from: ids.length, n: 1000, settings};
  try {
    for await (const _ of writer.write(task, stop.signal));
  } catch { return reads; }
}"""


@pytest.mark.parametrize(("at", "ids"), [(3, [0]), (4, [0] * 9)], ids=["writing", "reading"])
def test_a_stop_takes_effect_before_the_next_token(
    open_engine: Callable[..., Any], at: int, ids: list[int]
) -> None:
    model, facts = stored(GPT2(ODD))
    page = open_engine(model, CharTokenizer(CHARACTERS))
    task = {"facts": facts, "at": at, "ids": ids, "settings": DRAWN}
    assert page.evaluate(STOP_WRITER, task) == at


TOGETHER = """async ({ids, settings, questions}) => {
  const engine = await parts.LocalEngine.open();
  const stop = new AbortController();
  const seen = [];
  const task = {ids, from: ids.length, n: 1e6, settings};
  let atStop = null;
  const end = await engine.write({...task, signal: stop.signal, onRecords: (records) => {
    seen.push(...records);
    atStop ??= seen.length;
    stop.abort();
  }});
  let started;
  const running = new Promise((resolve) => (started = resolve));
  const replaced = engine.write({...task, onRecords: () => started()});
  await running;
  const inspectAll = () => Promise.all(questions.map((question) => engine.inspect(question)));
  const inspected = [await inspectAll()]; // while a text is written
  const last = [];
  const next = engine.write({...task, n: 60, onRecords: (records) => last.push(...records)});
  inspected.push(await inspectAll());
  const refused = await engine.write({...task, signal: stop.signal});
  const ends = [end, await replaced, await next, refused];
  const alone = [];
  for (const question of questions) alone.push(await engine.inspect(question));
  inspected.push(alone);
  return {ends, seen, atStop, last, inspected: inspected.map((each) => JSON.stringify(each))};
}"""


def test_jobs_stop_and_interleave_without_mixing(open_engine: Callable[..., Any]) -> None:
    page = open_engine(shake(GPT2(ODD), std=0.2), CharTokenizer(CHARACTERS))
    ids = [1, 2, 3]
    settings = DRAWN | {"topK": 3}
    alone = write(page, ids, 60, settings, start=3)
    questions = [{"ids": each, "index": 9, "first": 0} for each in ([1] * 9, [2] * 9, [3] * 9)]
    task = {"ids": ids, "settings": settings, "questions": questions}
    done = page.evaluate(TOGETHER, task)
    assert done["ends"] == ["stopped", "stopped", "length", "stopped"]
    assert len(done["seen"]) == done["atStop"], "no record arrives after the stop"
    assert done["seen"][:60] == alone["records"][: len(done["seen"])]
    assert done["last"] == alone["records"]
    assert len(set(done["inspected"])) == 1


# --- looking inside


@pytest.mark.parametrize("placement", get_args(NormPlacement))
def test_inspect_shows_what_pytorch_computes(
    open_engine: Callable[..., Any], placement: NormPlacement
) -> None:
    source = shake(GPT2(ODD.replace(norm_placement=placement)), std=0.2).eval()
    model, _ = stored(source)
    page = open_engine(source, CharTokenizer(CHARACTERS))
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    inside = page.evaluate(INSPECT, {"ids": text, "index": 8, "first": 2})
    context = text[2:8]
    assert inside["context"] == context
    with torch.inference_mode():
        ids, positions = torch.tensor([context]), torch.arange(len(context))
        x = model.embed(ids, positions)
        token, position = model.token_embedding.weight[7 + 1], model.position_embedding.weight[5]
        for name, expected in (("token", token), ("position", position), ("sum", x[0, -1])):
            np.testing.assert_allclose(inside["embedding"][name], expected, atol=1e-6)
        assert_lens(model, inside["lens0"], x)
        assert len(inside["layers"]) == len(model.blocks)
        for block, layer in zip(model.blocks, inside["layers"], strict=True):
            attention = block.attention
            q, k, _ = split_heads(attention.sublayer.qkv(attention.norm(x)), ODD.n_head)
            weights = attention_weights(q, k)[0, :, -1]  # (H, T)
            np.testing.assert_allclose(layer["attention"], weights, atol=1e-5)
            for name, part in (
                ("attentionNorm", block.attention),
                ("feedForwardNorm", block.feed_forward),
            ):
                update = part.sublayer_norm(part.sublayer(part.norm(x)))[0, -1]
                share = float(update.norm() / x[0, -1].norm())
                assert layer[name] == pytest.approx(share, rel=1e-4)
                x = part(x)
            assert_lens(model, layer["lens"], x)
        assert_lens(model, inside["odds"], x)


def assert_lens(model: GPT2, lens: dict[str, list[float]], x: torch.Tensor) -> None:
    expected = model.head(model.final_norm(x))[0, -1].softmax(-1).numpy()
    assert lens["ids"] == np.argsort(-expected)[:12].tolist()
    np.testing.assert_allclose(lens["p"], np.sort(expected)[::-1][:12], atol=1e-5)


# --- the self-test

SELF_TEST = """async (simd) => (await parts.LocalEngine.open({simd})).selfTest()"""


@pytest.mark.parametrize(("simd", "backend"), [(True, "wasm simd"), (False, "javascript")])
def test_the_self_test_passes(opened: Any, simd: bool, backend: str) -> None:
    result = opened[0].evaluate(SELF_TEST, simd)
    assert result["passed"] and 0 < result["largestDifference"] <= result["tolerance"]
    assert result["backend"] == backend
    assert result["charactersPerSecond"] > 0


def test_the_self_test_waits_for_a_text_that_is_written(opened: Any) -> None:
    page, _, _ = opened
    together = """async (settings) => {
      const engine = await parts.LocalEngine.open();
      const ends = [];
      const task = {ids: [1], from: 1, n: 300, settings, onRecords: () => {}};
      const text = engine.write(task).then(() => ends.push("text"));
      const test = engine.selfTest().then(({passed}) => ends.push(passed));
      await Promise.all([text, test]);
      return ends;
    }"""
    assert page.evaluate(together, DRAWN) == ["text", True]


def test_the_self_test_finds_a_damaged_page(opened: Any) -> None:
    page, _, _ = opened
    damage = """() => {
      const block = document.getElementById("weights");
      const text = block.textContent;
      block.textContent = "AAAA".repeat(20) + text.slice(80); // scales of the embedding
    }"""
    page.evaluate(damage)
    result = page.evaluate(SELF_TEST, True)
    assert not result["passed"] and result["largestDifference"] > result["tolerance"]
