"""Characters to ids and back, for any text, and the refusal of damaged vocabularies."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt.base.errors import UserError
from chargpt.data.tokenizer import CharTokenizer

# All of Python's characters, including those beyond 16 bits and lone surrogates.
CHARACTERS = st.characters(exclude_categories=())
TEXTS = st.text(CHARACTERS, min_size=1)
repeatable = settings(derandomize=True, deadline=None, max_examples=150)


# --- round trips


@repeatable
@given(TEXTS, st.booleans())
def test_decode_inverts_encode(text: str, end_of_text: bool) -> None:
    tokenizer = CharTokenizer.fit([text], end_of_text=end_of_text)
    ids = tokenizer.encode(text)
    assert ids.shape == (len(text),)
    assert ids.dtype == tokenizer.dtype
    assert tokenizer.decode(ids) == text
    assert ids.tolist() == [tokenizer.characters.index(character) for character in text]


@repeatable
@given(TEXTS, st.booleans())
def test_from_json_inverts_to_json(text: str, end_of_text: bool) -> None:
    tokenizer = CharTokenizer.fit([text], end_of_text=end_of_text)
    written = tokenizer.to_json()
    written.encode("utf-8")  # it can be written to a file
    again = CharTokenizer.from_json(written)
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)


@repeatable
@given(st.text(CHARACTERS), st.text(CHARACTERS, min_size=1, max_size=5), st.integers(1, 7))
def test_chunks_make_no_difference(text: str, known: str, chunk: int) -> None:
    """Texts are encoded in chunks; this one is longer than a chunk."""
    tokenizer = CharTokenizer.fit([known])
    mixed = text + known * 4 + text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chargpt.data.tokenizer._CHUNK", chunk)
        ids = tokenizer.encode(mixed, unknown="skip")
    assert tokenizer.decode(ids) == "".join(c for c in mixed if c in known)


# --- ids


def test_ids_follow_code_point_order() -> None:
    tokenizer = CharTokenizer.fit(["ba\n", "\U0001f600\uffff"])
    assert tokenizer.characters == ("\n", "a", "b", "\uffff", "\U0001f600")
    assert tokenizer.encode("\n\uffff\U0001f600ab").tolist() == [0, 3, 4, 1, 2]
    assert tokenizer.end_of_text_id is None
    assert tokenizer.vocab_size == 5
    assert tokenizer == CharTokenizer("b\na\U0001f600\uffff")


def test_end_of_text_has_the_last_id_and_decodes_to_nothing() -> None:
    tokenizer = CharTokenizer("ab", end_of_text=True)
    assert tokenizer.vocab_size == 3
    assert tokenizer.end_of_text_id == 2
    assert tokenizer.decode([2, 0, 2, 1, 2]) == "ab"
    assert tokenizer != CharTokenizer("ab")
    assert tokenizer != "ab"
    assert repr(tokenizer) == "CharTokenizer('ab', end_of_text=True)"


@pytest.mark.parametrize(
    ("size", "end_of_text", "dtype"),
    [
        *((256, False, np.uint8), (255, True, np.uint8), (256, True, np.uint16)),
        *((65_536, False, np.uint16), (65_536, True, np.uint32)),
    ],
)
def test_type_of_ids(size: int, end_of_text: bool, dtype: type) -> None:
    characters = [chr(point) for point in range(size)]
    tokenizer = CharTokenizer(reversed(characters), end_of_text=end_of_text)
    text = "".join(characters)
    ids = tokenizer.encode(text)
    assert ids.dtype == tokenizer.dtype == dtype
    assert np.array_equal(ids, np.arange(size))
    assert tokenizer.decode(ids) == text


# --- unknown characters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("aéb", "'é' (U+00E9); first at character 1 (line 1, column 2)"),
        ("ab\nb\U0001f600", "'\U0001f600' (U+1F600); first at character 4 (line 2, column 2)"),
        ("a\n\nzyz", "'z' (U+007A), 'y' (U+0079); first at character 3 (line 3, column 1)"),
        ("\ud800", r"'\ud800' (U+D800); first at character 0 (line 1, column 1)"),
        ("\t", r"'\t' (U+0009); first at character 0 (line 1, column 1)"),
    ],
)
def test_unknown_characters_are_named_with_the_first_position(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        CharTokenizer("ab\n").encode(text)
    assert str(caught.value) == (
        f"the model has never seen {message}: leave it out, "
        "or give --unknown skip or --unknown replace"
    )


def test_at_most_eight_unknown_characters_are_named() -> None:
    with pytest.raises(UserError, match=r"seen ('.' \(U\+00..\), ){8}…; first at"):
        CharTokenizer("ab").encode("abcdefghijkl")


@pytest.mark.parametrize(
    ("known", "replacement"),
    [("ab\ufffd?_ ", "\ufffd"), ("ab?_ ", "?"), ("ab_ ", "_"), ("ab ", " ")],
)
def test_replace_takes_the_first_known_replacement(known: str, replacement: str) -> None:
    tokenizer = CharTokenizer(known)
    replaced = tokenizer.decode(tokenizer.encode("aéb\U0001f600", unknown="replace"))
    assert replaced == f"a{replacement}b{replacement}"


def test_replace_needs_a_replacement() -> None:
    tokenizer = CharTokenizer("ab")
    assert tokenizer.encode("ab", unknown="replace").tolist() == [0, 1]
    with pytest.raises(UserError, match=r"^the vocabulary lacks U.FFFD.* by: give --unknown skip$"):
        tokenizer.encode("c", unknown="replace")


# --- errors


@pytest.mark.parametrize("wrong", [2, -1, 300])
def test_an_id_outside_the_vocabulary_is_refused(wrong: int) -> None:
    with pytest.raises(UserError, match=f"id {wrong} is outside the vocabulary of 2 tokens"):
        CharTokenizer("ab").decode([0, wrong, 1])


@pytest.mark.parametrize(
    ("characters", "message"),
    [
        ([], "the vocabulary is empty: give a text with at least one character"),
        (["a", "bc"], "a vocabulary entry is not one character: give single characters"),
        (["a", ""], "a vocabulary entry is not one character: give single characters"),
        (["a", "b", "a"], "the vocabulary has a character twice: give distinct characters"),
    ],
)
def test_bad_vocabularies_are_refused(characters: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CharTokenizer(characters)


@pytest.mark.parametrize(
    "damaged",
    [
        *("", "{", "[]", "null", "{}", '{"format": 1}'),
        '{"format": 1, "characters": 3, "end_of_text": false}',
        '{"format": 1, "characters": ["a", null], "end_of_text": false}',
    ],
)
def test_a_damaged_file_is_refused(damaged: str) -> None:
    with pytest.raises(UserError, match=r"^not a tokenizer file \(.+\): train the model again$"):
        CharTokenizer.from_json(damaged)


def test_another_format_is_refused() -> None:
    fields = json.loads(CharTokenizer("ab").to_json()) | {"format": 2}
    message = "^the tokenizer has format 2, this chargpt reads 1: upgrade$"
    with pytest.raises(UserError, match=message):
        CharTokenizer.from_json(json.dumps(fields))
