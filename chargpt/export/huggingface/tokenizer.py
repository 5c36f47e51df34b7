"""CharTokenizer as transformers' tokenizer files, and back: one character, one id.

The file splits a text after each code point and looks the pieces up. It changes nothing else: no
normalization, and no token is added to a text. An unknown character is an error, because the
vocabulary has no token that could stand for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from chargpt.base.errors import UserError
from chargpt.data.tokenizer import CharTokenizer

END_OF_TEXT = "<|endoftext|>"
_ONE_CHARACTER = r"[\s\S]"  # a point would not match newlines
_SPLITS = [{"Regex": _ONE_CHARACTER}, {"Regex": "(?s)."}, {"Regex": "(?s:.)"}, {"String": ""}]
_PRIVATE_USE = 0xE000


def end_of_text_text(tokenizer: CharTokenizer) -> str:
    """Return the text of end-of-text, which no text over the vocabulary can contain."""
    if not set(END_OF_TEXT) <= set(tokenizer.characters):
        return END_OF_TEXT
    private = map(chr, itertools.count(_PRIVATE_USE))
    unused = next(character for character in private if character not in tokenizer.characters)
    return f"<|endoftext{unused}|>"


# --- to transformers


def to_hf_tokenizer(tokenizer: CharTokenizer) -> Any:
    """Return a `tokenizers.Tokenizer` with the same ids.

    Raises:
        UserError: the vocabulary has half of a surrogate pair, which UTF-8 cannot hold.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    for character in tokenizer.characters:
        if "\ud800" <= character <= "\udfff":
            raise UserError(
                f"the vocabulary has U+{ord(character):04X}, which is not a character: remove it "
                "from the text and train again"
            )
    vocabulary = {character: i for i, character in enumerate(tokenizer.characters)}
    end = tokenizer.end_of_text_id
    if end is not None:
        vocabulary[end_of_text_text(tokenizer)] = end
    result = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    result.pre_tokenizer = pre_tokenizers.Split(Regex(_ONE_CHARACTER), "isolated")
    result.decoder = decoders.Fuse()
    if end is not None:
        special = AddedToken(end_of_text_text(tokenizer), special=True, normalized=False)
        result.add_special_tokens([special])
    return result


def to_hf_tokenizer_config(tokenizer: CharTokenizer, block_size: int) -> dict[str, Any]:
    """Return the contents of tokenizer_config.json."""
    # Without input names, transformers 4 gives GPT-2 token types, which it adds to the embedding.
    names = ("bos_token", "eos_token", "pad_token")
    has_end = tokenizer.end_of_text_id is not None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        **(dict.fromkeys(names, end_of_text_text(tokenizer)) if has_end else {}),
    }


# --- from transformers


class ImportedTokenizer(NamedTuple):
    """A tokenizer, and where its tokens were."""

    tokenizer: CharTokenizer
    order: list[int]
    """The id that each token had in the file; ours are sorted by character."""


def from_hf_tokenizer(values: Mapping[str, Any], end_id: int | None) -> ImportedTokenizer:
    """Return the tokenizer that does what a tokenizer.json says.

    Args:
        values: the contents of tokenizer.json.
        end_id: the id of end-of-text in config.json; None: the model has none.

    Raises:
        UserError: a token is not one character, or a text is changed before it is encoded.
    """
    try:
        _refuse_other_kinds(values)
        ids = _token_ids(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"it is not a tokenizer file ({error!r:.80})") from error
    others = [token for token in ids if len(token) != 1]
    if len(others) > 1 or (others and ids[others[0]] != end_id):
        raise UserError(
            f"the token {others[0]!r:.40} is neither one character nor the eos_token_id of "
            "config.json: give a model with a token for each character"
        )
    tokenizer = CharTokenizer(ids.keys() - set(others), end_of_text=bool(others))
    return ImportedTokenizer(tokenizer, [ids[token] for token in (*tokenizer.characters, *others)])


def _refuse_other_kinds(values: Mapping[str, Any]) -> None:
    """Raise UserError for a tokenizer that does more than split a text into characters."""
    model, split = values["model"], values.get("pre_tokenizer")
    if values.get("normalizer") is not None:
        raise UserError(f"it changes a text first (normalizer {values['normalizer']!r:.80})")
    joins = model["type"] == "BPE" and (
        model["merges"] or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    )
    if model["type"] not in ("WordLevel", "BPE") or joins:
        raise UserError(f"it joins characters into longer tokens (model {model['type']!r:.40})")
    splits_all = (
        split is not None
        and split["type"] == "Split"
        and split["pattern"] in _SPLITS
        and (split["behavior"], split["invert"]) == ("Isolated", False)
    )
    if not (splits_all or (split is None and model["type"] == "BPE")):
        raise UserError(f"it does not split a text after each character ({split!r:.120})")


def _token_ids(values: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of each token; the ids are 0, 1, 2 and so on."""
    ids = dict(values["model"]["vocab"].items())
    ids |= {token["content"]: token["id"] for token in values.get("added_tokens") or []}
    "".join(ids)  # a TypeError, unless all are strings
    if not all(type(i) is int for i in ids.values()) or sorted(ids.values()) != [*range(len(ids))]:
        raise UserError(f"the ids of its {len(ids)} tokens are not 0 to {len(ids) - 1}")
    return ids
