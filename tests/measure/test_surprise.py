"""Coloured texts, read back: the page by an HTML parser, the terminal text by its escapes."""

import math
import re
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt.base.errors import UserError
from chargpt.measure.surprise import HEAT_BITS, surprise_ansi, surprise_page

ODD = "a <b>\"&amp;' &\n\n\tJürgen  「東京」 é🙂 </main> $title {x}\n  "
SGR = re.compile(r"\x1b\[[0-9;]*m")
RAW = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]"
)
VOID = {"meta", "link", "br"}


def log_p(*bits: float) -> np.ndarray:
    return np.array(bits) * -math.log(2)


def random_scores(n: int, seed: int = 0) -> np.ndarray:
    """About half of them below one bit, some without a score."""
    rng = np.random.default_rng(seed)
    scores = log_p(*rng.exponential(2.5, n))
    scores[rng.random(n) < 0.02] = np.nan
    return scores.astype(np.float32) if n > 1 else log_p(3)


class Page(HTMLParser):
    """A parsed page: the text of <main>, its spans, every tag; all tags must be closed."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.heading = "", ""
        self.spans: list[tuple[str, str, str]] = []  # class, tooltip, text
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if "main" in self.open and tag == "span":
            self.spans.append((dict(attrs).get("class") or "", dict(attrs)["title"] or "", ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "main" in self.open:
            self.text += data
            assert self.open[-1] == "span"  # no text between the spans
            kind, tooltip, before = self.spans[-1]
            self.spans[-1] = (kind, tooltip, before + data)
        if "h1" in self.open:
            self.heading += data


def body_of(coloured: str) -> str:
    """Return a coloured text without colours and legend."""
    return SGR.sub("", coloured).rpartition("bits per character")[0]


# --- both


@pytest.mark.parametrize("show", [surprise_ansi, surprise_page])
def test_mistakes_are_named(show: Callable[[str, np.ndarray], str]) -> None:
    with pytest.raises(UserError, match="text to colour is empty: give at least one"):
        show("", log_p())
    with pytest.raises(UserError, match=r"3 characters have scores of shape \(2,\): give one per"):
        show("abc", log_p(1, 2))
    with pytest.raises(UserError, match="no character of the text has a score: give a text"):
        show("ab", np.array([np.nan, np.nan]))


@pytest.mark.parametrize("text", [ODD, "\n", "\n\nx", "x", " "])
def test_the_text_is_unchanged(text: str) -> None:
    scores = random_scores(len(text))
    coloured = body_of(surprise_ansi(text, scores))
    assert coloured == (text if text.endswith("\n") else text + "\n")
    marked = surprise_ansi(text, scores, colour=False).split("\n")
    assert "\n".join(marked[:-1:2]) == text.removesuffix("\n")
    assert Page(surprise_page(text, scores)).text == text


@given(st.text(min_size=1, max_size=40), st.integers(0, 9))
def test_no_control_character_reaches_the_reader(text: str, seed: int) -> None:
    scores = random_scores(len(text), seed)
    coloured, marked = (surprise_ansi(text, scores, colour=colour) for colour in (True, False))
    for written in (SGR.sub("", coloured), marked, surprise_page(text, scores)):
        assert not RAW.search(written)
        written.encode("utf-8")
    for line in coloured.split("\n"):
        resets = [style == "\x1b[0m" for style in SGR.findall(line)]
        assert resets == [False, True] * (len(resets) // 2)


@pytest.mark.parametrize(
    ("character", "seen"), [("\x1b", r"\x1b"), ("\r", r"\r"), ("\u202e", r"\u202e")]
)
def test_control_characters_are_escaped(character: str, seen: str) -> None:
    text, scores = f"a{character}[2Jb", log_p(0, 5, 0, 0, 0, 0)
    assert body_of(surprise_ansi(text, scores)) == f"a{seen}[2Jb\n"
    assert surprise_ansi(text, scores, colour=False).startswith(f"a{seen}[2Jb\n 5\n")
    page = Page(surprise_page(text, scores, title=f"{character}|\n|"))
    assert (page.text, page.heading) == (f"a{seen}[2Jb", f"{seen}| |")
    assert page.spans[1] == ("h4", f"{seen}: 5.0 bits, p = 0.031", seen)


# --- the terminal


def test_colours_begin_at_their_bits() -> None:
    bits = [b + d for b in HEAT_BITS for d in (-0.01, 0.01)]
    coloured = surprise_ansi("x" * len(bits), log_p(*bits))
    line, legend = coloured.split("\n")
    palette = re.findall(r"\x1b\[38;5;16;48;5;\d+m", legend)
    assert len(set(palette)) == len(HEAT_BITS)
    runs = [f"{style}xx\x1b[0m" for style in palette[:-1]]
    assert line == "".join(["x", *runs, f"{palette[-1]}x\x1b[0m"])
    labels = "bits per character: under 1  1   2   3   4   6   8   10 or more ; mean"
    assert SGR.sub("", legend).startswith(labels)


def test_line_ends_and_unscored_characters_have_their_own_styles() -> None:
    scores = log_p(7, 7, 0, 7)
    scores[2] = np.nan
    line, second, legend = surprise_ansi("a\nbc", scores).split("\n")
    hot = "\x1b[38;5;16;48;5;208m"
    assert (line, second) == (f"{hot}a\x1b[0m", f"\x1b[4mb\x1b[0m{hot}c\x1b[0m")
    assert legend.endswith("\x1b[4mnot scored\x1b[0m; mean 7.00 bits over 4 characters")
    assert "not scored" not in surprise_ansi("ab", log_p(1, 2))


def test_without_colour_digits_stand_below_their_characters() -> None:
    text = "to be\n東京!\n\n\tx\x1by"
    bits = [0.9, 1.9, 2, 9, 1e9, 3, 4, 5, math.inf, 0, 0, 1, 6, 7, 8]
    scores = log_p(*bits)
    scores[2] = np.nan
    *lines, legend = surprise_ansi(text, scores, colour=False).split("\n")
    assert lines == ["to be", " 1?993", "東京!", "4 5 9", "", "", "\tx\\x1by", "\t67   8"]
    assert legend.startswith("bits per character below each line: blank under 1, 9 for 9 or more")


# --- the page


def test_each_unexpected_character_has_a_tooltip_and_calm_runs_share_one() -> None:
    scores = log_p(3.2, 0.25, 0.5, 0.25, 1, 4, 0.5, 12, 0, 5)
    scores[8] = np.nan
    page = Page(surprise_page('ehe <\n"&xe', scores))
    assert page.spans == [
        ("h3", "e: 3.2 bits, p = 0.11", "e"),
        ("", "3 characters: 1.0 bits", "he "),
        ("h1", "<: 1.0 bits, p = 0.5", "<"),
        ("h4 n", "newline: 4.0 bits, p = 0.062", "\n"),
        ("", '": 0.5 bits, p = 0.71', '"'),
        ("h7", "&: 12.0 bits, p = 0.00024", "&"),
        ("u", "not scored", "x"),
        ("h4", "e: 5.0 bits, p = 0.031", "e"),
    ]
    spans = Page(surprise_page(" \t\n", log_p(2, 2, 0))).spans
    assert [tooltip.split(":")[0] for _, tooltip, _ in spans] == ["space", "tab", "newline"]


def test_the_page_stands_alone() -> None:
    written = surprise_page(ODD, random_scores(len(ODD)), title="<Odd> & $title")
    page = Page(written)
    assert page.heading == "<Odd> & $title"
    assert written.startswith("<!DOCTYPE html>")
    assert '<meta charset="utf-8">' in written[:1024]
    assert "Content-Security-Policy\" content=\"default-src 'none'" in written
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object"})
    assert not {name for _, attrs in page.tags for name in attrs} & {"src", "href", "style"}
    assert "url(" not in written and "@import" not in written
    assert "$" not in surprise_page("a", log_p(1))  # the template is filled


def test_the_header_counts() -> None:
    scores = np.append(log_p(*[2.0] * 1499, *[4.0] * 500), np.nan)
    written = surprise_page("ab" * 1000, scores)
    assert "2,000 characters, 2.50 bits per character on average" in written
    assert '<span class="h3">3</span><span class="h4">4</span><span class="h5">6</span>' in written
    assert '<span class="u">not scored</span>' in written


def luminance(colour: str) -> float:
    """Return the luminance of #rrggbb as WCAG 2.2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_legible_and_colours_are_ordered() -> None:
    light, dark = surprise_page("a", log_p(1)).split("@media (prefers-color-scheme: dark)")
    for style, direction in ((light, -1), (dark, 1)):
        rules = re.findall(r"background: (#\w{6}); color: (#\w{6});", style)
        assert len(rules) == 1 + len(HEAT_BITS)  # the page, then from few bits to many
        assert min(contrast(*rule) for rule in rules) >= 4.5
        assert (np.diff([luminance(rule[0]) for rule in rules]) * direction > 0).all()
    codes = re.findall(r"48;5;(\d+)m", surprise_ansi("a", log_p(1)).split("\n")[1])
    levels = ["00", "5f", "87", "af", "d7", "ff"]  # xterm's colour cube
    cube = [[levels[(int(n) - 16) // base % 6] for base in (36, 6, 1)] for n in codes]
    colours = ["#" + "".join(triple) for triple in cube]
    assert min(contrast(colour, "#000000") for colour in colours) >= 4.5
    assert (np.diff([luminance(colour) for colour in colours]) < 0).all()


def test_a_long_text_is_cut_after_newlines() -> None:
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("aeiou tnrs\n"), 50_000))
    written = surprise_page(text, random_scores(len(text)))
    assert len(written) < 60 * len(text)
    assert Page(written).text == text
    parts = written[written.index("<main") :].split("</div>")[:-1]
    assert len(parts) in (12, 13)
    assert all(part.endswith("\n</span>") for part in parts[:-1])
    line = surprise_page("x" * 9000, log_p(*[0] * 9000))  # no newline to cut at
    assert (line.count("<div>"), len(Page(line).spans)) == (1, 1)
