"""Opens pages in Chromium, from a file, and records everything that they should not do."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import watched

import chargpt
from chargpt.data.tokenizer import CharTokenizer
from chargpt.export.web_page import make_page
from chargpt.model import GPT2

WEB = Path(chargpt.__file__).parent / "web"


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[[Path], Any]]:
    """Return a function that opens a file; afterwards, no page has failed or used the network."""
    with watched(browser, "file://", "blob:") as (context, _):

        def open_file(path: Path) -> Any:
            page = context.new_page()
            page.goto(path.as_uri())
            return page

        yield open_file


MODULES = {
    "gpt2": ["GPT2"],
    "local_engine": ["LocalEngine"],
    "philox": ["philox", "uniform"],
    "products": ["WASM", "openProducts"],
    "reader": ["Reader"],
    "sampling": ["draw", "filterLogits", "likeliest", "softmax"],
    "tokenizer": ["Tokenizer"],
    "weights": ["fromBase64"],
    "writer": ["Writer"],
}


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the page's parts whose main script only hands the engine to the tests."""
    web = tmp_path_factory.mktemp("parts") / "web"
    shutil.copytree(WEB, web)
    shutil.rmtree(web / "page")
    (web / "page").mkdir()
    imports = [
        f'import {{ {", ".join(names)} }} from "../engine/{module}.js";'
        for module, names in MODULES.items()
    ]
    everything = ", ".join(name for names in MODULES.values() for name in names)
    (web / "page" / "main.js").write_text(
        "\n".join([*imports, f"globalThis.parts = {{ {everything} }};"])
    )
    (web / "page.html").write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="{{policy}}">'
        "<title>{{title}}</title><style>{{style}}</style></head><body>"
        '<script type="application/json" id="facts">{{facts}}</script>'
        '<script type="application/octet-stream" id="weights">{{weights}}</script>'
        '<script type="text/plain" id="worker">{{worker}}</script>'
        '<script type="module">{{script}}</script></body></html>'
    )
    return web


@pytest.fixture
def open_engine(
    open_page: Callable[[Path], Any], parts: Path, tmp_path: Path
) -> Callable[..., Any]:
    """Return a function that opens a page with a model, whose script hands out the engine."""

    def open_model(
        model: GPT2,
        tokenizer: CharTokenizer,
        written: list[list[int]] | None = None,
        name: str = "parts",
    ) -> Any:
        written = written or [tokenizer.encode_prompt("")]
        text = make_page(model, tokenizer, written, name=name, web=parts)
        path = tmp_path / "parts.html"
        path.write_text(text, encoding="utf-8")
        return open_page(path)

    return open_model
