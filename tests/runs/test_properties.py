"""Properties of any text, any setting and any shape: Hypothesis searches for a counterexample."""

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
from chargpt.base.terminal import for_stream, visible
from chargpt.compute.counts import count_parameters, parameters_of
from chargpt.config import DataConfig, GPT2Config, NormPlacement, SampleConfig, TrainConfig
from chargpt.data.corpus import load_corpus, split_point
from chargpt.data.documents import split_documents
from chargpt.data.tokenizer import CharTokenizer
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

ANY_CHARACTER = st.characters(exclude_categories=())  # also halves of surrogate pairs
ANY_TEXT = st.text(ANY_CHARACTER, min_size=1, max_size=60)
REAL_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=120)  # fits UTF-8
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
def test_any_text_survives_the_tokenizer_file(tmp_path: Path, text: str, end: bool) -> None:
    tokenizer = CharTokenizer.fit([text], end_of_text=end)
    write_tokenizer(tmp_path, tokenizer)
    again = read_tokenizer(tmp_path)
    assert again == tokenizer
    assert again.characters == tuple(sorted(set(text)))
    assert again.vocab_size == len(set(text)) + end
    ids = again.encode(text)
    assert np.array_equal(ids, tokenizer.encode(text))
    assert again.decode(ids) == text
    assert (tmp_path / "tokenizer.json").read_bytes().isascii()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_all_of_unicode_survives_the_tokenizer_file(tmp_path: Path) -> None:
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
        assert visible(message) == message
        assert "\n" not in message


# --- data


@more
@given(REAL_TEXT, st.text(min_size=1, max_size=3))
@example("a\n\nb\n", "\n")
@example("aaaaa", "aa")
def test_documents_are_the_text_between_separators(text: str, separator: str) -> None:
    assert list(split_documents(text, "")) == [text] * bool(text)
    documents = list(split_documents(text, separator))
    if "\n" in separator:  # a file from Windows gives the same documents
        text, separator = (part.replace("\r\n", "\n") for part in (text, separator))
    assert all(documents)
    assert not any(separator in document for document in documents)
    assert "".join(documents) == text.replace(separator, "")
    assert documents == [d for d in separator.join(["", text, ""]).split(separator) if d]


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
    names = [str(tmp_path / f"{i}.txt") for i in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        Path(name).write_bytes(text.encode())
    config = DataConfig(document_separator=separator, validation_fraction=fraction)
    try:
        corpus = load_corpus(names, config)
    except UserError as error:
        assert any(word in str(error) for word in ("too few", "only document", "binary", "empty"))
        return
    # A byte order mark at the start of a file is not text.
    marked = [text.removeprefix("\ufeff") for text in texts]
    documents = [d for text in marked for d in split_documents(text, separator)]
    ids = np.concatenate([corpus.train, corpus.validation])
    assert corpus.tokenizer.decode(ids) == "".join(documents)
    assert corpus.facts.n_characters == sum(map(len, documents))
    assert corpus.facts.n_documents == len(documents)
    end = corpus.tokenizer.end_of_text_id
    assert (end is None) == (len(documents) == 1)
    if end is not None:
        assert np.array_equal(
            np.flatnonzero(ids == end), np.cumsum([len(d) + 1 for d in documents]) - 1
        )


@more
@given(
    lengths=st.lists(st.integers(1, 10_000), min_size=1, max_size=50),
    end=st.booleans(),
    fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_a_split_leaves_tokens_on_both_sides(
    lengths: list[int], end: bool, fraction: float
) -> None:
    documents = [np.append(np.zeros(length, np.uint8), [1] * end) for length in lengths]
    tokens = np.concatenate(documents)
    total = len(tokens)
    try:
        cut = split_point(tokens, 1 if end else None, fraction)
    except UserError as error:
        assert "too few" in str(error)
        return
    assert 2 <= cut <= total - 2
    share = (total - cut) / total
    assert 0.5 * fraction <= share + 1e-9
    assert share <= 2 * fraction + 1 / total + 1e-9


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
    """Return the words that a field accepts."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    if typing.get_origin(hint) is types.UnionType:
        return [word for kind in typing.get_args(hint) for word in choices(kind)]
    return []


def settings_of(cls: type, values: Any) -> Any:
    """Return settings of a configuration, some of them valid."""
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    known = {
        name: values | st.sampled_from(words) if (words := choices(hints[name])) else values
        for name in fields
    }
    return st.fixed_dictionaries({}, optional=known)


def build_or_refuse(cls: type[Any], values: dict[str, Any]) -> Any:
    """Return the configuration with these values, or None if they are refused in one line."""
    try:
        return from_dict(cls, values)
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1500
        return None


@pytest.mark.parametrize("cls", CONFIGS)
@more
@given(data=st.data())
def test_settings_are_refused_or_survive_a_file(cls: type, data: st.DataObject) -> None:
    config = build_or_refuse(cls, data.draw(settings_of(cls, VALUES)))
    if config is not None:
        saved = json.dumps(dataclasses.asdict(config), allow_nan=False)
        assert from_dict(cls, json.loads(saved)) == config


@more
@given(data=st.data())
def test_a_state_is_refused_or_has_its_types(data: st.DataObject) -> None:
    state = build_or_refuse(TrainState, data.draw(settings_of(TrainState, VALUES)))
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


# --- shapes


@more
@given(
    config=st.builds(
        lambda head_size, n_head, **shape: GPT2Config(
            d_model=n_head * head_size, n_head=n_head, **shape
        ),
        n_layer=st.integers(1, 3),
        n_head=st.integers(1, 3),
        head_size=st.integers(1, 5),
        d_ff=st.integers(0, 23),
        block_size=st.integers(1, 9),
        vocab_size=st.integers(1, 30),
        norm_placement=st.sampled_from(typing.get_args(NormPlacement)),
        bias=st.booleans(),
    )
)
def test_parameters_are_counted_without_a_model(config: GPT2Config) -> None:
    with torch.device("meta"):
        model = GPT2(config)
    assert parameters_of(config) == count_parameters(model)


# --- terminals


class Terminal:
    def isatty(self) -> bool:
        return True


CONTROLS = ("Cc", "Cf", "Cs", "Zl", "Zp")


@more
@given(st.text(ANY_CHARACTER, max_size=80))
@example("\x1b]0;title\x07\x9b2J\r\b\x7f")
@example("".join(map(chr, range(0x300))))
def test_visible_text_has_no_control_characters(text: str) -> None:
    shown = visible(text)
    assert shown == for_stream(text, Terminal())  # type: ignore[arg-type]
    shown.encode()  # a UTF-8 terminal can show it
    assert visible(shown) == shown
    kept = [c for c in text if c in "\n\t" or unicodedata.category(c) not in CONTROLS]
    rest = iter(shown)
    assert all(c in rest for c in kept), "the other characters stay, in order"
    if len(kept) == len(text):
        assert shown == text


def test_every_control_character_is_escaped_and_no_other() -> None:
    for point in range(0x110000):
        character = chr(point)
        shown = visible(character)
        if character in "\n\t" or unicodedata.category(character) not in CONTROLS:
            assert shown == character
        else:
            assert shown.isascii()
            assert shown.isprintable()
            assert shown.startswith("\\")
