r"""Put the parts of a web page into one file: JavaScript modules, styles and data.

A page opened as a file cannot load modules from other files, so they become one script. Our modules
keep to a style that needs no parser: imports and exports begin their line and look like these.

    import { a, b } from "./x.js";
    export function f() {        export class C {        export const N = 3;

Other top-level names are declared so, or as `const [A, B] = …` or `let a, b;`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath
from typing import Any

_IMPORT = re.compile(r'import \{ (?P<names>\w+(?:, \w+)*) \} from "(?P<path>\.{1,2}/[\w./]+\.js)";')
_EXPORT = re.compile(r"export (?=(?:async )?(?:function\*? |class |const )\w)")
_DECLARATION = re.compile(r"(?:export )?(?:async )?(?:function\*?|class|const|let) (?P<names>.*)")
_NAMES = re.compile(r"\w+(?= =|[({; ])|\[(\w+(?:, \w+)*)\] =|(\w+(?:, \w+)*);")
_EMBEDDED = re.compile(r'"\{\{(?P<file>[\w.]+)\}\}"')
_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")


class BundleError(RuntimeError):
    """A module or a page breaks the rules of this file: a bug in chargpt."""


def join_modules(root: Traversable, entry: str) -> str:
    """Return one script with a module, such as ``page/main.js``, and all that it imports.

    A module comes after those it imports. ``"{{file}}"`` becomes that file's base64.

    Raises:
        BundleError: an import or export of another form, a missing or circular import, or a
            top-level name of two modules.
    """
    modules: dict[str, _Module] = {}
    _load(root, entry, modules, importers=())
    owners: dict[str, str] = {}
    for path, module in modules.items():
        for name in module.declared:
            if owners.setdefault(name, path) != path:
                raise BundleError(f"{owners[name]} and {path} both declare {name}")
    return "\n".join(f"// --- {path}\n\n{module.code}" for path, module in modules.items())


class _Module:
    """The code of a module without imports and exports, and its top-level names."""

    def __init__(self, code: str, path: str) -> None:
        self.declared: list[str] = []
        self.exported: set[str] = set()
        self.imports: list[tuple[str, list[str]]] = []  # (path, names)
        lines = (self._read(line, path) for line in code.splitlines())
        code = "\n".join(line for line in lines if line is not None)
        self.code = re.sub(r"\n{3,}", "\n\n", code).strip() + "\n"  # imports leave gaps

    def _read(self, line: str, path: str) -> str | None:
        """Return a line as it is in the script; None: it is not."""
        if found := _IMPORT.fullmatch(line):
            self.imports.append((found["path"], found["names"].split(", ")))
            return None
        stripped, n_exports = _EXPORT.subn("", line)
        if re.match(r"(import|export|var)\b", stripped) or re.search(r"\bimport\(", line):
            raise BundleError(f"{path} has a line of another form: {line}")
        if declaration := _DECLARATION.match(line):
            names = _NAMES.match(declaration["names"])
            if names is None:
                raise BundleError(f"{path} has a line of another form: {line}")
            new = (names[1] or names[2] or names[0]).split(", ")
            self.declared += new
            self.exported.update(new if n_exports else ())
        return stripped


def _load(
    root: Traversable, path: str, modules: dict[str, _Module], importers: tuple[str, ...]
) -> _Module:
    """Add a module and those it imports to `modules`, in the order of the script."""
    if path in importers:
        raise BundleError(f"{path} imports itself, through {importers[-1]}")
    if path in modules:
        return modules[path]
    module = _Module(_embed(root, path, _read_text(root, path)), path)
    for target, names in module.imports:
        imported = _resolve(path, target)
        exported = _load(root, imported, modules, (*importers, path)).exported
        if missing := set(names) - exported:
            raise BundleError(f"{path} imports {min(missing)}, which {imported} does not export")
    modules[path] = module
    return module


def _embed(root: Traversable, path: str, code: str) -> str:
    """Replace each ``"{{file}}"`` by the base64 of the file beside the module."""

    def encoded(found: re.Match[str]) -> str:
        data = root.joinpath(_resolve(path, found["file"])).read_bytes()
        return f'"{base64.b64encode(data).decode()}"'

    return _EMBEDDED.sub(encoded, code)


def _resolve(path: str, target: str) -> str:
    """Return the path that `target` names in the module `path`; both are relative to the root."""
    parts = list(PurePosixPath(path).parent.parts)
    for part in PurePosixPath(target).parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            raise BundleError(f"{path} imports {target}, outside the folder of the page")
    return "/".join(parts)


def _read_text(root: Traversable, path: str) -> str:
    try:
        return root.joinpath(path).read_text("utf-8")
    except FileNotFoundError as error:
        raise BundleError(f"there is no module {path}") from error


# --- the page


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace each ``{{name}}``; a name without value, or a value without place, is an error."""
    names = set(_PLACEHOLDER.findall(template))
    if names != values.keys():
        raise BundleError(f"the page and its values differ in {sorted(names ^ values.keys())}")
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)


def script_text(code: str) -> str:
    """Return code for a script element, if nothing in it could end the element."""
    if re.search(r"<!--|</?script|\r", code, re.IGNORECASE):
        raise BundleError("a script contains text that would end its element")
    return code


def data_text(value: Any) -> str:
    """Return JSON for a script element: ASCII, and no character that means something in HTML."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def content_policy(script: str, style: str) -> str:
    """Return a Content-Security-Policy that allows this script and style, and no connection."""
    return (
        f"default-src 'none'; script-src {_hash(script)} 'wasm-unsafe-eval'; worker-src blob:; "
        f"style-src {_hash(style)}; img-src data:; connect-src 'none'; base-uri 'none'; "
        "form-action 'none'"
    )


def served_policy(script: str, style: str) -> str:
    """Return one that also allows connections to, and frames of, the server of the page."""
    return (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; "
        "img-src data:; connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
