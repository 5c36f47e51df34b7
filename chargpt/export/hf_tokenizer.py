"""CharTokenizer as transformers' tokenizer files, and back: one character, one id.

The file splits a text after each code point and looks the pieces up. It changes nothing else: no
normalization, and no token is added to a text. An unknown character is an error, because the
vocabulary has no token that could stand for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from chargpt.base.errors import UserError
from chargpt.data.tokenizer import CharTokenizer

END_OF_TEXT = "<|endoftext|>"
_ONE_CHARACTER = r"[\s\S]"  # a point would not match newlines
_SAME = (_ONE_CHARACTER, "(?s).", "(?s:.)", ".", "")  # what "." does not match stays one piece
_PRIVATE_USE = 0xE000


def end_of_text_text(tokenizer: CharTokenizer) -> str:
    """Return the text of end-of-text, which no text over the vocabulary can contain."""
    if not set(END_OF_TEXT) <= set(tokenizer.characters):
        return END_OF_TEXT
    private = map(chr, itertools.count(_PRIVATE_USE))
    unused = next(character for character in private if character not in tokenizer.characters)
    return f"<|endoftext{unused}|>"


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
    names = ("bos_token", "eos_token", "pad_token")
    has_end = tokenizer.end_of_text_id is not None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        **(dict.fromkeys(names, end_of_text_text(tokenizer)) if has_end else {}),
    }
