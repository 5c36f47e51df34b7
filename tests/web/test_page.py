"""The page as people use it: write, look, branch, share; with hostile texts and without a mouse."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsers import settled, write
from conftest import QUICK, SMALL

import chargpt
from chargpt.config import DataConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.export.html import export_html
from chargpt.runs.report import read_samples
from chargpt.train import TrainResult, train

OpenPage = Callable[..., Any]
CHECKED = re.compile("This device computes")


@pytest.fixture(scope="module")
def exported(result: TrainResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small run."""
    page = tmp_path_factory.mktemp("page") / "hearts.html"
    export_html(result.run, page, which="best", report=lambda line: None)
    return page


@pytest.fixture
def page(exported: Path, open_page: OpenPage) -> Any:
    return ready(open_page(exported))


def ready(page: Any) -> Any:
    """Wait until the first text is written and checked."""
    page.get_by_text(CHECKED).wait_for()
    return page


def text_of(page: Any) -> str:
    return str(page.locator("#text").text_content())


def status_of(page: Any) -> str:
    return str(page.locator("#status").text_content())


def test_it_continues_a_prompt_and_the_same_seed_writes_the_same(page: Any) -> None:
    first = write(page, "the king", seed=5, length=300, temperature=1)
    assert first.startswith("the king")
    assert len(first) == len("the king") + 300
    page.click("#go")
    assert settled(page) == first
    page.click("#another")
    other = settled(page)
    assert other.startswith("the king")
    assert other != first


def test_its_odds_are_those_of_pytorch(page: Any, result: TrainResult) -> None:
    write(page, "the king", length=1)
    page.locator("#pick").fill("8")
    model, tokenizer = chargpt.load(result.run)
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer.encode("the king").tolist()]))[0, -1]
    best = float(100 * logits.softmax(-1).max())
    shown = page.locator(".bars .number").first.text_content()
    assert float(shown.removesuffix("\u00a0%")) == pytest.approx(best, abs=0.06)


def test_a_link_and_a_refresh_repeat_a_branched_text(
    page: Any, exported: Path, open_page: OpenPage
) -> None:
    before = write(page, "the king", seed=2, length=80, temperature=1)
    page.locator("#pick").fill("30")
    page.locator("#odds-body .bars button").nth(2).click()
    branched = settled(page)
    assert branched[:30] == before[:30]
    assert branched[30] != before[30]
    assert len(branched) == 31 + 80
    page.click("#more")
    longer = settled(page)
    assert longer.startswith(branched)
    assert len(longer) == len(branched) + 80
    page.locator("nav a").nth(1).click()
    link = page.url
    page.reload()
    assert text_of(ready(page)) == longer
    other = open_page(exported)
    other.goto(link)
    other.reload()
    assert text_of(ready(other)) == longer
    assert other.locator("#text .chosen").text_content() == branched[30]


# Writes, and presses Stop at once when there are more than 20 characters.
WRITE_AND_STOP = """(button) => {
  document.getElementById(button).click();
  const text = document.getElementById("text");
  new MutationObserver((_, observer) => {
    if (text.childElementCount <= 20) return;
    observer.disconnect();
    document.getElementById("stop").click();
  }).observe(text, { childList: true });
}"""


def test_stop_ends_the_writing(page: Any) -> None:
    page.fill("#prompt", "O")
    page.locator("#settings").evaluate("details => { details.open = true; }")
    page.fill("#length", "20000")
    page.evaluate(WRITE_AND_STOP, "go")
    page.locator("#status", has_text="then stopped").wait_for()
    stopped = settled(page)
    assert 20 < len(stopped) < 20_000
    page.reload()
    assert text_of(ready(page)) == stopped
    page.evaluate(WRITE_AND_STOP, "more")
    page.locator("#status", has_text="then stopped").wait_for()
    assert settled(page).startswith(stopped)
    assert len(text_of(page)) > len(stopped)


def test_an_unknown_character_explains_itself(page: Any) -> None:
    text = write(page, "the qüeen", length=10)
    assert text.startswith("the qeen")
    assert "“ü” (U+00FC)" in page.locator("#unknown").text_content()
    page.fill("#prompt", "the queen")
    assert page.locator("#unknown").text_content() == ""


def test_inside_shows_each_head_and_ends_with_the_odds(page: Any) -> None:
    write(page, "the king", length=40)
    page.locator("#pick").fill("20")
    page.locator('#inside-body[data-index="20"]').wait_for()
    assert page.locator("button.head").count() == SMALL.n_layer * SMALL.n_head
    last = page.locator(".lens tbody tr").last.locator("td .number").all_text_contents()
    odds = page.locator("#odds-body .number").all_text_contents()
    assert last == odds[:5]
    page.locator("button.head").nth(1).click()
    assert page.locator("button.head[aria-pressed=true]").count() == 1
    assert "head 2" in page.locator(".large-head p").text_content()


def test_the_curve_has_a_sample_for_each_evaluation(page: Any, result: TrainResult) -> None:
    samples = read_samples(result.run)
    slider = page.locator(".scrub input")
    for number, sample in enumerate(samples):
        slider.fill(str(number))
        assert page.locator(".sample").text_content() == sample.text
        assert f"After {sample.step} steps" in page.locator(".at").text_content()


def test_the_keyboard_selects(page: Any) -> None:
    write(page, "the king", length=40)
    page.locator("#text").focus()
    page.keyboard.press("Home")
    assert page.locator("#pick").input_value() == "0"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#pick").input_value() == "2"
    assert page.locator("#text .selected").text_content() == "e"
    assert "character 3: e" in page.locator("#pick").get_attribute("aria-valuetext")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(page: Any, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page.emulate_media(color_scheme=scheme)
    write(page, "the qüeen", temperature=2)
    page.check("#colour")
    page.click("#another")
    settled(page)
    page.locator("#inside-body .lens").wait_for()
    page.locator("#earlier").evaluate("details => { details.open = true; }")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("width", [320, 390, 800])
def test_nothing_is_wider_than_the_screen(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.reload()
    ready(page)
    page.locator("#inside-body .lens").wait_for()
    size = "document.documentElement.scrollWidth"
    assert page.evaluate(size) <= width


# --- texts of all kinds

HOSTILE = [
    "<script>hacked=1</script>", "</script><img src=x onerror=hacked=1>", "&amp;", "\"'`", "]]>",
    "<!--", "-->", "\u2028", "\u2029", "\u202e", "\u2066", "\x1b[31m", "{{facts}}", "${hacked=1}",
]  # fmt: skip


def make(tmp_path: Path, name: str, text: str, **data: object) -> TrainResult:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return train(
        str(file), model_config=SMALL, train_config=QUICK, data_config=DataConfig(**data),
        out=tmp_path / f"run {name}", quiet=True,
    )  # fmt: skip


def export(result: TrainResult, tmp_path: Path) -> Path:
    page = tmp_path / "page.html"
    export_html(result.run, page, which="best", report=lambda line: None)
    return page


def test_hostile_texts_and_names_are_only_text(tmp_path: Path, open_page: OpenPage) -> None:
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(HOSTILE) + "\n" for _ in range(400))
    result = make(tmp_path, "a<b onclick=hacked=1>&'\u202e.txt", text)
    page = ready(open_page(export(result, tmp_path)))
    page.locator("#settings").evaluate("details => { details.open = true; }")
    prompt = "".join(HOSTILE)
    written = write(page, prompt, length=100, temperature=2)
    assert written.startswith(prompt.replace("\u202e", "U+202E")[:20])
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("img, #text script, h1 b").count() == 0
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", page.locator("#text").text_content())
    page.reload()
    assert text_of(ready(page)) == written


def test_a_text_that_ends_is_followed_by_the_next_one(tmp_path: Path, open_page: OpenPage) -> None:
    result = make(tmp_path, "names.txt", "ann\nbob\ncy\n" * 200, document_separator="\n")
    page = ready(open_page(export(result, tmp_path)))
    text = write(page, "a", temperature=1, length=200, seed=1)
    n_ends = text.count("∎\n")
    assert n_ends > 2
    assert f"{200 - n_ends} characters written in {n_ends + 1} texts" in status_of(page)
    end = text.replace("∎\n", "∎").index("∎")
    page.locator("#pick").fill(str(end))
    page.locator(f'#inside-body[data-index="{end}"]').wait_for()
    assert "ended the text here" in page.locator("#odds-body").text_content()
    assert "end-of-text" in page.locator("#inside-body").text_content()
    page.reload()
    assert text_of(ready(page)) == text


def test_choices_while_a_text_changes_do_no_harm(page: Any) -> None:
    write(page, "the king", length=300)
    for _ in range(5):
        page.click("#another")
        page.locator("#odds-body").evaluate("box => box.querySelector('button')?.click()")
        page.click("#more", force=True)
    page.evaluate(
        "location.hash = 'prompt=the&path=99999.3_5.x_-1&at=1e9&length=-5&top_p=z&end=-3'"
    )
    page.locator("#status", has_text="1 character written").wait_for()
    assert text_of(page).startswith("the")
    assert page.locator("#trouble").is_hidden()


@pytest.mark.parametrize(
    ("text", "prompt", "direction"),
    [
        ("春天我在花园里看书。\n夏天你在河边散步。\n" * 40, "春天", 1),
        ("בבוקר הילד קורא ספר.\nבערב אמא שרה שיר.\n" * 40, "בבוקר", -1),
    ],
    ids=["chinese", "hebrew"],
)
def test_any_script_is_shown_in_its_direction(
    tmp_path: Path, open_page: OpenPage, text: str, prompt: str, direction: int
) -> None:
    page = ready(open_page(export(make(tmp_path, "text.txt", text), tmp_path)))
    assert write(page, prompt, length=30).startswith(prompt)
    first, second = (page.locator("#text span").nth(i).bounding_box()["x"] for i in (0, 1))
    assert np.sign(second - first) == direction


def test_a_model_that_was_imported_has_a_page(tmp_path: Path, open_page: OpenPage) -> None:
    from chargpt.runs.imported import write_imported_run

    torch.manual_seed(0)
    tokenizer = CharTokenizer("abc\n")
    model = chargpt.GPT2(SMALL.replace(vocab_size=tokenizer.vocab_size))
    write_imported_run(tmp_path / "run", model, tokenizer, origin="a test")
    export_html(tmp_path / "run", tmp_path / "page.html", which="best", report=lambda line: None)
    page = ready(open_page(tmp_path / "page.html"))
    assert "made by another program" in page.locator("#learned-body").text_content()
