"""Hostile names and vocabularies stay text, and the page of a run opens without trouble."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chargpt.base.terminal import visible
from chargpt.config import GPT2Config
from chargpt.data.tokenizer import CharTokenizer
from chargpt.export.html import export_html
from chargpt.model import GPT2
from chargpt.train import TrainResult

TINY = GPT2Config(block_size=8, n_layer=1, n_head=1, d_model=8)
NAME = "</title><script>document.title = 'taken'</script><!-- &amp; \u202e]]> {{weights}}"
CHARACTERS = "\0\n\x1b <>&'\"\\/!-{}\u2028\u2029\u202e\ud800\ufffd😀"


def test_a_hostile_name_and_vocabulary_stay_text(open_engine: Callable[..., Any]) -> None:
    tokenizer = CharTokenizer(CHARACTERS)
    model = GPT2(TINY.replace(vocab_size=tokenizer.vocab_size))
    page = open_engine(model, tokenizer, name=NAME)
    assert page.title() == NAME
    points = page.evaluate(
        "async () => (await parts.LocalEngine.open()).facts.characters.map((c) => c.codePointAt(0))"
    )
    assert points == [ord(character) for character in tokenizer.characters]


def test_the_page_of_a_run_opens_without_trouble(
    result: TrainResult, tmp_path: Path, open_page: Callable[[Path], Any]
) -> None:
    run = tmp_path / "<!--<script>\u202e&amp;"
    shutil.copytree(result.run, run)
    out = tmp_path / "page #1?.html"
    export_html(run, out, which="best", report=lambda line: None)
    page = open_page(out)
    assert page.title() == visible(run.name)
