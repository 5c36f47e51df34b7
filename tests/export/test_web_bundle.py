"""Modules become one script, and nothing in the data can break out of its place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import chargpt
from chargpt.export.web_bundle import (
    BundleError,
    data_text,
    fill,
    join_modules,
    script_text,
)


def write_modules(folder: Path, **modules: str) -> Path:
    for name, code in modules.items():
        path = folder / (name.replace("__", "/") + ".js")
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    return folder


def test_modules_come_after_those_they_import_and_only_once(tmp_path: Path) -> None:
    root = write_modules(
        tmp_path,
        page__main='import { a, f } from "../engine/a.js";\nimport { B } from "./b.js";\nf(a, B);',
        page__b='import { a } from "../engine/a.js";\nexport class B {\n  x = a;\n}\n',
        engine__a="export const a = 1;\nlet x, y;\nexport async function f() {\n  return 2;\n}\n",
    )
    script = join_modules(root, "page/main.js")
    assert script == (
        "// --- engine/a.js\n\nconst a = 1;\nlet x, y;\nasync function f() {\n  return 2;\n}\n\n"
        "// --- page/b.js\n\nclass B {\n  x = a;\n}\n\n"
        "// --- page/main.js\n\nf(a, B);\n"
    )


def test_a_file_can_be_embedded(tmp_path: Path) -> None:
    (tmp_path / "x.wasm").write_bytes(b"\0asm")
    root = write_modules(tmp_path, main='export const WASM = "{{x.wasm}}";')
    assert 'const WASM = "AGFzbQ==";' in join_modules(root, "main.js")


GOOD = "export const a = 1;\nconst [p, q] = [1, 2];\nlet r, s;\n"


@pytest.mark.parametrize(
    ("main", "problem"),
    [
        ('import * as all from "./a.js";', "another form"),
        ('import a from "./a.js";', "another form"),
        ('import { a as b } from "./a.js";', "another form"),
        ("import { a } from './a.js';", "another form"),
        ('import { a } from "a";', "another form"),
        ('import "./a.js";', "another form"),
        ('const m = await import("./a.js");', "another form"),
        ("export default 3;", "another form"),
        ("export { a };", "another form"),
        ("export let a = 1;", "another form"),
        ("var x = 1;", "another form"),
        ("const { x } = y;", "another form"),
        ('import { b } from "./a.js";', "does not export"),
        ('import { r } from "./a.js";', "does not export"),
        ('import { a } from "./b.js";', "no module b.js"),
        ('import { a } from "../a.js";', "outside"),
        ('import { a } from "./main.js";', "imports itself"),
        ('import { a } from "./a.js";\nfunction a() {}', "both declare a"),
        ('import { a } from "./a.js";\nclass q {}', "both declare q"),
        ('import { a } from "./a.js";\nlet t, s;', "both declare s"),
    ],
)  # fmt: skip
def test_what_the_joiner_does_not_understand_is_refused(
    tmp_path: Path, main: str, problem: str
) -> None:
    write_modules(tmp_path, main=main, a=GOOD)
    with pytest.raises(BundleError, match=problem):
        join_modules(tmp_path, "main.js")


def test_the_scripts_of_the_pages_use_every_module() -> None:
    web = Path(chargpt.__file__).parent / "web"
    entries = "page/main.js", "engine/worker.js", "page/remote.js", "page/compare.js"
    scripts = "\n".join(join_modules(web, entry) for entry in entries)
    joined = set(re.findall(r"^// --- (\S+\.js)$", scripts, re.MULTILINE))
    assert joined == {path.relative_to(web).as_posix() for path in web.rglob("*.js")}


def test_a_placeholder_in_a_value_is_not_filled() -> None:
    assert fill("<a>{{x}}</a>{{y}}", {"x": "{{y}}", "y": "1"}) == "<a>{{y}}</a>1"


@pytest.mark.parametrize("values", [{}, {"x": "", "y": ""}])
def test_a_page_and_its_values_must_fit(values: dict[str, str]) -> None:
    with pytest.raises(BundleError):
        fill("{{x}}", values)


@pytest.mark.parametrize("code", ["'</script>'", "x = '<!--'", "'<SCRIPT>'", "a\rb"])
def test_a_script_that_would_end_its_element_is_refused(code: str) -> None:
    with pytest.raises(BundleError):
        script_text(code)


HOSTILE = ["</script>", "<!--", "]]>", "\u2028\u2029", "\ud800", "&lt;", "\0\x1b\u202e", '"\\']


def test_data_cannot_leave_its_element_and_keeps_its_value() -> None:
    text = data_text({"x": HOSTILE})
    assert json.loads(text) == {"x": HOSTILE}
    assert text.isascii() and not set("<>&\n") & set(text)
