"""What holds for any text, any setting and any shape: Hypothesis looks for a counterexample."""

import dataclasses
import json
import math
import types
import typing
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chargpt.base.checks import from_dict
from chargpt.base.errors import UserError
from chargpt.base.files import seal
from chargpt.base.terminal import for_stream, visible
from chargpt.compute.counts import count_parameters, parameters_of
from chargpt.config import PRESETS, DataConfig, GPT2Config, NormPlacement, SampleConfig, TrainConfig
from chargpt.data.corpus import load_corpus, split_documents, split_point
from chargpt.data.tokenizer import CharTokenizer
from chargpt.data.windows import Windows, blocks
from chargpt.engine.sampling import filter_logits
from chargpt.model import GPT2
from chargpt.runs.folder import read_tokenizer, write_tokenizer
from chargpt.training.trainer import TrainState

quick = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
more = settings(quick, max_examples=200)

ANY_CHARACTER = st.characters(exclude_categories=())  # halves of surrogate pairs, too
ANY_TEXT = st.text(ANY_CHARACTER, min_size=1, max_size=60)
REAL_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=120)  # that UTF-8 can hold
ODD = [
    "\0",
    "\ufeff",
    "\ufeffabc\ufeff",
    "\r\n\n\r\n\r",
    "\v\f\x1c\x1d\x1e\x85\u2028\u2029",
    "e\u0301\u0327\u0323 vs \u00e9",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\ud83d\ude00 is not \U0001f600",
    "\udc00\ud800",
    "\U0010ffff\uffff\ufffe",
    "\u202eabc\u202c",
    '"\\/\b\f\n\r\t',
]


# --- tokenizer


@more
@given(ANY_TEXT, st.booleans())
@example("".join(ODD), True)
def test_any_text_comes_back_through_the_file(tmp_path: Path, text: str, end: bool) -> None:
    tokenizer = CharTokenizer.fit([text], end_of_text=end)
    write_tokenizer(tmp_path, tokenizer)
    again = read_tokenizer(tmp_path)
    assert again == tokenizer
    assert again.characters == tuple(sorted(set(text)))
    assert again.vocab_size == len(set(text)) + end
    ids = again.encode(text)
    assert np.array_equal(ids, tokenizer.encode(text))
    assert again.decode(ids) == text
    assert (tmp_path / "tokenizer.json").read_bytes().isascii(), "no editor can change it"
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_texts_come_back_character_by_character(tmp_path: Path, text: str) -> None:
    tokenizer = CharTokenizer.fit([text])
    write_tokenizer(tmp_path, tokenizer)
    again = read_tokenizer(tmp_path)
    for i, character in enumerate(text):
        assert again.decode([int(again.encode(text)[i])]) == character


def test_all_of_unicode_comes_back(tmp_path: Path) -> None:
    everything = "".join(map(chr, range(0x110000)))
    tokenizer = CharTokenizer.fit([everything], end_of_text=True)
    assert tokenizer.vocab_size == 0x110001
    write_tokenizer(tmp_path, tokenizer)
    again = read_tokenizer(tmp_path)
    assert again == tokenizer
    assert np.array_equal(again.encode(everything), np.arange(0x110000))
    assert again.decode(range(0x110001)) == everything


@quick
@given(known=ANY_TEXT, text=st.text(ANY_CHARACTER, max_size=40))
def test_unknown_characters_are_refused_skipped_or_replaced(known: str, text: str) -> None:
    tokenizer = CharTokenizer.fit([known + "?"])
    kept = "".join(c for c in text if c in known + "?")
    assert tokenizer.decode(tokenizer.encode(text, unknown="skip")) == kept
    sign = next(sign for sign in "\ufffd?" if sign in known + "?")
    replaced = "".join(c if c in known + "?" else sign for c in text)
    assert tokenizer.decode(tokenizer.encode(text, unknown="replace")) == replaced
    if kept == text:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    else:
        with pytest.raises(UserError, match="the model has never seen") as caught:
            tokenizer.encode(text)
        message = str(caught.value)
        assert visible(message) == message, "a message commands no terminal"
        assert "\n" not in message


@quick
@given(st.recursive(st.none() | st.booleans() | st.integers() | ANY_TEXT, st.lists, max_leaves=8))
def test_any_vocabulary_is_taken_or_refused(characters: Any) -> None:
    fields = {"format": 1, "type": "character", "end_of_text": False, "characters": characters}
    try:
        tokenizer = CharTokenizer.from_json(json.dumps(fields))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert list(tokenizer.characters) == sorted(set(characters))


# --- data


@more
@given(REAL_TEXT, st.text(min_size=1, max_size=3))
@example("a\n\nb\n", "\n")
@example("aaaaa", "aa")
def test_documents_are_what_stands_between_separators(text: str, separator: str) -> None:
    documents = split_documents(text, separator)
    assert all(documents)
    assert not any(separator in document for document in documents)
    assert "".join(documents) == text.replace(separator, "")
    assert documents == [d for d in separator.join(["", text, ""]).split(separator) if d]
    assert split_documents(text, "") == [text]


@more
@given(
    texts=st.lists(
        REAL_TEXT.filter(lambda text: bool(text.strip("\0\ufeff\ufffe"))), min_size=1, max_size=4
    ),
    separator=st.sampled_from(["", "\n", "--", "\r\n"]),
    fraction=st.floats(0.01, 0.9),
)
@example(["to be or not\r\nto be\n\rthat"], "", 0.5)
def test_the_parts_of_a_corpus_join_to_the_whole(
    tmp_path: Path, texts: list[str], separator: str, fraction: float
) -> None:
    names = []
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
        names.append(str(tmp_path / f"{i}.txt"))
    config = DataConfig(document_separator=separator, validation_fraction=fraction)
    try:
        corpus = load_corpus(names, config)
    except UserError as error:
        assert any(word in str(error) for word in ("too few", "only document", "binary", "empty"))
        return
    # A mark at the start of a file is none of its characters.
    marked = [text.removeprefix("\ufeff") for text in texts]
    documents = [d for text in marked for d in split_documents(text, separator) if d]
    ids = np.concatenate([corpus.train, corpus.validation])
    assert corpus.tokenizer.decode(ids) == "".join(documents)
    assert min(len(corpus.train), len(corpus.validation)) >= 2
    assert corpus.n_characters == sum(map(len, documents))
    assert corpus.n_documents == len(documents)
    end = corpus.tokenizer.end_of_text_id
    assert (end is None) == (len(documents) == 1)
    if end is not None:
        assert int((ids == end).sum()) == len(documents)
        assert ids[-1] == end
        assert np.array_equal(
            np.flatnonzero(ids == end), np.cumsum([len(d) + 1 for d in documents]) - 1
        )


@more
@given(
    lengths=st.lists(st.integers(1, 10_000), min_size=1, max_size=50),
    end=st.booleans(),
    fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_a_split_leaves_something_on_both_sides(
    lengths: list[int], end: bool, fraction: float
) -> None:
    total = sum(lengths) + end * len(lengths)
    try:
        cut = split_point(lengths, end, fraction)
    except UserError as error:
        assert "too few" in str(error)
        return
    assert 2 <= cut <= total - 2
    share = (total - cut) / total
    assert 0.5 * fraction <= share + 1e-9
    assert share <= 2 * fraction + 1 / total + 1e-9


@more
@given(
    block_size=st.integers(1, 12),
    extra=st.integers(1, 100),
    seed=st.integers(0, 2**63 - 1),
    epochs=st.integers(1, 3),
    batch_size=st.integers(1, 7),
)
def test_batches_of_an_epoch_cover_the_text(
    block_size: int, extra: int, seed: int, epochs: int, batch_size: int
) -> None:
    """Every position once an epoch, but for the two ends, however the epoch is cut into batches."""
    T = block_size
    tokens = np.arange(T + extra, dtype=np.uint32)
    windows = Windows(tokens, T, seed)
    n = windows.per_epoch
    numbers = range(0, epochs * n, batch_size)
    batches = [windows.batch(i, min(batch_size, epochs * n - i)) for i in numbers]
    inputs = torch.cat([batch.inputs for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    assert torch.equal(inputs + 1, targets)
    assert int(targets.max()) < len(tokens)
    for epoch in range(epochs):
        seen = inputs[epoch * n : (epoch + 1) * n].flatten().sort().values
        start = int(seen[0])
        assert torch.equal(seen, torch.arange(start, start + n * T))
        assert len(tokens) - 1 - n * T < 2 * T, "the ends"


@quick
@given(st.integers(2, 80), st.integers(1, 12), st.integers(1, 5))
def test_evaluation_sees_every_token_but_the_first_once(
    n: int, block_size: int, batch_size: int
) -> None:
    batches = list(blocks(np.arange(n, dtype=np.uint8), block_size, batch_size))
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    assert targets.tolist() == list(range(1, n))
    assert all(batch.inputs.shape[0] <= batch_size for batch in batches)
    assert all(batch.inputs.shape[1] <= block_size for batch in batches)


# --- settings

NUMBERS = (
    st.integers(-3, 300)
    | st.sampled_from([0, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**19, 10**400])
    | st.floats()
    | st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e-320, 1.7976931348623157e308, math.inf, math.nan])
)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
CONFIGS = (GPT2Config, TrainConfig, DataConfig, SampleConfig)


def choices(hint: Any) -> list[Any]:
    """Return the words that a field knows."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) is types.UnionType:
        return [word for kind in typing.get_args(hint) for word in choices(kind)]
    return []


def settings_of(cls: type, values: Any) -> Any:
    """Return any settings of a configuration, some of them good."""
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    known = {
        name: values | st.sampled_from(words) if (words := choices(hints[name])) else values
        for name in fields
    }
    return st.fixed_dictionaries({}, optional=known)


def must_build_or_refuse(cls: type[Any], values: dict[str, Any]) -> Any:
    """Return the configuration that the values make, or None if they are refused as they should."""
    try:
        config = from_dict(cls, values)
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 1500, f"{message[:80]}…"
        return None
    return config


def must_come_back(config: Any) -> None:
    saved = json.dumps(dataclasses.asdict(config), allow_nan=False)
    assert from_dict(type(config), json.loads(saved)) == config
    assert seal(json.loads(saved)) == seal(json.loads(json.dumps(json.loads(saved))))


# A width that no number of heads divides is looked at for very long; see the test below.
def is_endless(cls: type, values: dict[str, Any]) -> bool:
    width, heads = values.get("d_model", 128), values.get("n_head", 4)
    if cls is not GPT2Config or type(width) is not int or type(heads) is not int:
        return False
    return width > 10**6 and heads > 0 and width % heads != 0


@pytest.mark.parametrize("cls", CONFIGS)
@more
@given(data=st.data())
def test_any_settings_make_a_configuration_or_are_refused(cls: type, data: st.DataObject) -> None:
    values = data.draw(settings_of(cls, VALUES))
    if is_endless(cls, values):
        values["n_head"] = 1
    config = must_build_or_refuse(cls, values)
    if config is not None:
        must_come_back(config)


@pytest.mark.parametrize("cls", CONFIGS)
@more
@given(data=st.data())
def test_one_setting_of_any_value(cls: type, data: st.DataObject) -> None:
    """One alone is refused for itself, and for nothing else."""
    name = data.draw(st.sampled_from([f.name for f in dataclasses.fields(cls)]))  # type: ignore[arg-type]
    value = data.draw(VALUES)
    if is_endless(cls, {name: value}):
        return
    try:
        config = cls(**{name: value})
    except UserError as error:
        assert name in str(error), "the setting is named"
        assert "\n" not in str(error)
    else:
        must_come_back(config)
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value) or (
            name in ("d_ff", "minutes")
        )


@quick
@given(st.dictionaries(st.text(max_size=12), VALUES, min_size=1, max_size=3))
def test_unknown_settings_are_refused(values: dict[str, Any]) -> None:
    for cls in CONFIGS:
        known = {field.name for field in dataclasses.fields(cls)}
        if not values.keys() <= known:
            with pytest.raises(UserError, match="unknown setting"):
                from_dict(cls, values)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back_by_way_of_a_file(name: str) -> None:
    preset = PRESETS[name]()
    must_come_back(preset.model_config)
    must_come_back(preset.train_config)


@more
@given(data=st.data())
def test_any_state_is_taken_or_refused(data: st.DataObject) -> None:
    """A state that is taken has the types that it says."""
    values = data.draw(settings_of(TrainState, VALUES))
    state = must_build_or_refuse(TrainState, values)
    if state is None:
        return
    assert type(state.step) is int
    assert state.step >= 0
    for name in ("train_seconds", "compile_seconds", "eval_seconds"):
        assert isinstance(getattr(state, name), int | float)
        assert math.isfinite(getattr(state, name))
    for name in ("train_loss", "val_loss", "best_val_loss", "usual_grad_norm"):
        assert isinstance(getattr(state, name), int | float | None)
    for name in ("evaluations_since_best", "skipped_steps", "skipped_in_a_row"):
        assert type(getattr(state, name)) is int
    assert isinstance(state.scaler, dict)


# --- sampling


LOGITS = st.lists(
    st.floats(-100, 100, width=32) | st.sampled_from([0.0, -1e30, 1e30, 88.0]),
    min_size=1,
    max_size=20,
)


@more
@given(
    logits=LOGITS,
    temperature=st.floats(0, 1e4),
    top_k=st.integers(0, 25),
    top_p=st.floats(1e-6, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    data=st.data(),
)
def test_what_a_configuration_lets_through_leaves_something(
    logits: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    data: st.DataObject,
) -> None:
    given_settings = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    config = SampleConfig(**given_settings)  # all of them are allowed
    n = len(logits)
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    banned = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    banned[data.draw(st.integers(0, n - 1))] = False
    bias = torch.tensor([-math.inf if ban else 0.0 for ban in banned])
    filtered = filter_logits(torch.tensor(logits), config, seen=seen, bias=bias)
    assert not torch.isnan(filtered).any()
    left = torch.isfinite(filtered)
    assert left.any()
    assert not (left & torch.isinf(bias)).any(), "what is forbidden stays so"
    if top_k:
        assert int(left.sum()) <= top_k
    if temperature == 0:
        assert int(left.sum()) == 1


# --- shapes


@more
@given(
    n_layer=st.integers(1, 3),
    n_head=st.integers(1, 3),
    head_size=st.integers(1, 5),
    d_ff=st.integers(0, 23),
    block_size=st.integers(1, 9),
    vocab_size=st.integers(1, 30),
    norm_placement=st.sampled_from(typing.get_args(NormPlacement)),
    bias=st.booleans(),
)
def test_parameters_are_counted_without_a_model(
    n_layer: int,
    n_head: int,
    head_size: int,
    d_ff: int,
    block_size: int,
    vocab_size: int,
    norm_placement: NormPlacement,
    bias: bool,
) -> None:
    config = GPT2Config(
        n_layer=n_layer,
        n_head=n_head,
        d_model=n_head * head_size,
        d_ff=d_ff,
        block_size=block_size,
        vocab_size=vocab_size,
        norm_placement=norm_placement,
        bias=bias,
    )
    with torch.device("meta"):
        model = GPT2(config)
    assert parameters_of(config) == count_parameters(model)


# --- terminals


class Terminal:
    def isatty(self) -> bool:
        return True


OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")


@more
@given(st.text(ANY_CHARACTER, max_size=80))
@example("\x1b]0;title\x07\x9b2J\r\b\x7f")
@example("".join(map(chr, range(0x300))))
def test_what_is_shown_commands_nothing(text: str) -> None:
    shown = visible(text)
    assert shown == for_stream(text, Terminal())  # type: ignore[arg-type]
    assert all(c in "\n\t" or unicodedata.category(c) not in OBEYED for c in shown)
    shown.encode()  # a terminal of UTF-8 can show it
    assert visible(shown) == shown
    kept = [c for c in text if c in "\n\t" or unicodedata.category(c) not in OBEYED]
    rest = iter(shown)
    assert all(c in rest for c in kept), "what can be shown is there, in order"
    if len(kept) == len(text):
        assert shown == text


def test_every_character_is_shown_or_kept() -> None:
    """Each alone: a control as Python writes it, anything else as it is."""
    for point in range(0x110000):
        character = chr(point)
        shown = visible(character)
        if character in "\n\t" or unicodedata.category(character) not in OBEYED:
            assert shown == character
        else:
            assert shown.isascii()
            assert shown.isprintable()
            assert shown.startswith("\\")
        if character.isprintable():
            assert shown == character
