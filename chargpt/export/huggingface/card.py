"""The README.md of an exported folder: what the model is, how good it is, how to use it.

Names and texts of a run may come from a stranger. They are escaped, so that they can neither end
their line nor be Markdown or HTML. The YAML at the top has no text of the run.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterable
from itertools import groupby

from chargpt.base.terminal import visible
from chargpt.config import GPT2Config
from chargpt.data.tokenizer import CharTokenizer
from chargpt.export.facts import Facts
from chargpt.export.huggingface.tokenizer import end_of_text_text

_MOST_SAMPLE_CHARACTERS = 400
_MOST_VOCABULARY_CHARACTERS = 400
_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- chargpt
- character-level
- gpt2
---
"""
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def model_card(
    facts: Facts, config: GPT2Config, tokenizer: CharTokenizer, *, place: str = "this/folder"
) -> str:
    """Return the card; `place` is the name that loads the model."""
    sections = [
        _HEAD + f"\n# {escaped(facts.name)}\n\n{_what(facts, config, tokenizer)}",
        _results(facts),
        _sample(facts),
        _use(tokenizer, place),
        _limits(config, tokenizer),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def escaped(text: str) -> str:
    """Return a text in one line, as Markdown that shows it and does nothing else."""
    line = " ".join(visible(text).split())
    return "".join(
        _HTML.get(c, f"\\{c}" if c in string.punctuation else c)  # also breaks up addresses
        for c in line
    )


def code_block(text: str, language: str = "") -> str:
    """Return a code block that `text` cannot end."""
    text = visible(text)
    longest = max((len(list(run)) for c, run in groupby(text) if c == "`"), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _what(facts: Facts, config: GPT2Config, tokenizer: CharTokenizer) -> str:
    texts = ", ".join(map(escaped, facts.texts[:3])) + (", …" if len(facts.texts) > 3 else "")
    text = f", trained on {texts} ({facts.n_characters:,} characters)" if texts else ""
    rows = [
        ("parameters", f"{facts.n_params:,}"),
        ("layers, heads, width", f"{config.n_layer}, {config.n_head}, {config.d_model}"),
        ("context", f"{config.block_size} characters"),
        ("vocabulary", f"{len(tokenizer.characters)} characters{_and_end(tokenizer)}"),
    ]
    return (
        f"A GPT-2 that reads and writes text character by character{text}. It was exported by "
        f"chargpt.\n\n{_table(('size', ''), rows)}"
    )


def _and_end(tokenizer: CharTokenizer) -> str:
    return "" if tokenizer.end_of_text_id is None else " and end-of-text"


def _results(facts: Facts) -> str:
    rows = [(method.name, f"{method.bits_per_char:.2f}") for method in facts.baselines]
    if facts.val_loss is not None and math.isfinite(facts.val_loss):
        rows.insert(0, ("**this model**", f"{facts.val_loss / math.log(2):.2f}"))
    if not rows:
        return ""
    results = (
        "## Results\n\nOn the part of the text that was held out for validation; less is better.\n"
        f"\n{_table(('method', 'bits per character'), rows)}"
    )
    return results if facts.novelty is None else f"{results}\n\n{facts.novelty.verdict}"


def _sample(facts: Facts) -> str:
    if not facts.samples or not facts.samples[-1].text.strip():
        return ""
    text = facts.samples[-1].text[:_MOST_SAMPLE_CHARACTERS]
    return f"## A text that it wrote during training\n\n{code_block(text)}"


def _use(tokenizer: CharTokenizer, place: str) -> str:
    words = ("The ", "The", "the", "an", "a", "A")
    prompt = next((word for word in words if set(word) <= set(tokenizer.characters)), "")
    pipeline = f"""from transformers import pipeline

write = pipeline("text-generation", model="{place}")
print(write("{prompt}")[0]["generated_text"])"""
    start = ""
    if tokenizer.end_of_text_id is not None:
        start = (
            "\n\nA document begins after end-of-text. The pipeline puts it before a prompt by "
            "itself; for `generate`, begin the text with `tokenizer.bos_token`."
        )
    return (
        f"## Use\n\n{code_block(pipeline, 'python')}{start}\n\nBack to a run of chargpt, which can "
        "write texts of any length:\n\n"
        + code_block("chargpt import hf this/folder --out runs/imported", "sh")
    )


def _limits(config: GPT2Config, tokenizer: CharTokenizer) -> str:
    known = "".join(tokenizer.characters[:_MOST_VOCABULARY_CHARACTERS])
    more = "" if len(known) == len(tokenizer.characters) else ", which begin with these"
    limits = [
        "One character is one token. A character that is not in the vocabulary is an error "
        "(`Missing [UNK] token`): the model has no token for it, and leaving it out would change "
        "the text.",
        f"Prompt and new text have at most {config.block_size} characters together. transformers "
        "fails beyond it: leave `max_new_tokens` out, or keep it below what the prompt leaves.",
        "It imitates its training text. What it says is made up.",
    ]
    end = ""
    if tokenizer.end_of_text_id is not None:
        end = f"\n\nEnd-of-text is written {escaped(end_of_text_text(tokenizer))}."
    return (
        "## Limits\n\n"
        + "\n".join(f"- {limit}" for limit in limits)
        + f"\n\nThe characters of the vocabulary{more}, in the order of their ids:\n\n"
        + code_block(re.sub(r"[\n\t]", lambda c: repr(c[0])[1:-1], known))
        + end
    )


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in (head, ("---", "---:"), *rows))
