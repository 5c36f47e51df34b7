"""A run becomes a page, which holds the run's model or is not written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from twin import shake

import chargpt
from chargpt.base.errors import UserError, VerificationError
from chargpt.config import GPT2Config
from chargpt.data.tokenizer import CharTokenizer
from chargpt.export import html, web_page
from chargpt.export.html import export_html, write_text
from chargpt.export.web_page import read_page
from chargpt.model import GPT2
from chargpt.train import TrainResult

TINY = GPT2Config(block_size=8, n_layer=1, n_head=1, d_model=8)


def quiet(_: str) -> None:
    pass


@pytest.fixture
def no_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the measurements of a run, which take seconds and have their own tests."""
    monkeypatch.setattr(html, "gather_facts", lambda *_, **__: SimpleNamespace(to_json=dict))


@pytest.mark.parametrize("int8", [False, True])
def test_a_page_holds_the_model_of_the_run(result: TrainResult, tmp_path: Path, int8: bool) -> None:
    out = tmp_path / "new" / "page.html"
    line = export_html(result.run, out, which="last", int8=int8, report=quiet)
    assert line.startswith(f"wrote {out}: ") and ("loss" if int8 else "logits") in line
    facts, model = read_page(out.read_text("utf-8"))
    source, tokenizer = chargpt.load(result.run, which="last")
    assert facts["characters"] == list(tokenizer.characters)
    assert facts["run"]["checkpoint"] == "last"
    for ours, theirs in zip(source.parameters(), model.parameters(), strict=True):
        step = ours.detach().abs().max() / (127 if int8 else 32767)
        torch.testing.assert_close(theirs, ours, rtol=0, atol=step.item())


@pytest.mark.usefixtures("no_facts")
def test_a_page_in_8_bits_is_smaller(result: TrainResult, tmp_path: Path) -> None:
    sizes = []
    for int8 in (False, True):
        export_html(result.run, tmp_path / "p", which="best", int8=int8, report=quiet)
        sizes.append((tmp_path / "p").stat().st_size)
    n_params = sum(p.numel() for p in chargpt.load(result.run).model.parameters())
    assert sizes[0] - sizes[1] > n_params


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.usefixtures("no_facts")
def test_a_page_that_differs_is_not_left(
    result: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, int8: bool
) -> None:
    """The weights of another model are packed, as a fault of the packing would do."""
    pack = web_page.pack
    monkeypatch.setattr(web_page, "pack", lambda model, kind: pack(shake(GPT2(model.config)), kind))
    out = tmp_path / "page.html"
    out.write_text("the old page")
    with pytest.raises(VerificationError, match="nothing was written"):
        export_html(result.run, out, which="best", int8=int8, report=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert out.read_text() == "the old page"


@pytest.mark.usefixtures("no_facts")
def test_a_place_that_cannot_be_written_is_named(result: TrainResult, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a folder"):
        export_html(result.run, tmp_path, which="best", report=quiet)
    with pytest.raises(UserError, match="page.html cannot be written"):
        export_html(result.run, tmp_path / "file" / "page.html", which="best", report=quiet)


def test_a_model_too_large_for_a_page_is_refused_before_any_work() -> None:
    with torch.device("meta"):
        large = GPT2(GPT2Config(vocab_size=100, n_layer=36, n_head=2, d_model=640))
        huge = GPT2(GPT2Config(vocab_size=100, n_layer=72, n_head=2, d_model=640))
    with pytest.raises(UserError, match="--int8"):
        html.refuse_large(large, int8=False)
    html.refuse_large(large, int8=True)
    with pytest.raises(UserError, match="smaller model"):
        html.refuse_large(huge, int8=True)


def test_written_texts_begin_like_documents_and_are_long_enough() -> None:
    for end_of_text in (False, True):
        tokenizer = CharTokenizer("ab\n", end_of_text=end_of_text)
        model = shake(GPT2(TINY.replace(vocab_size=tokenizer.vocab_size)), std=0.1)
        written = write_text(model, tokenizer)
        assert all(text[0] == tokenizer.encode_prompt("")[0] for text in written)
        assert sum(map(len, written)) >= 2000
