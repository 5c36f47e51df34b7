"""The rules of the house: imports run down the list of folders, and the core stays small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "chargpt"
FLOORS = [
    *("base", "config", "model", "data", "compute", "engine", "runs", "training"),
    *("generate", "train", "measure", "export", "serve", "cli"),
]
EXEMPT = {Path("__init__.py"), Path("__main__.py")}  # the front doors import lazily from anywhere
CORE = """config.py model.py train.py generate.py data/tokenizer.py data/corpus.py data/windows.py
engine/sampling.py engine/scoring.py runs/checkpoint.py runs/weights.py compute/optimizers.py"""
MOST_CORE_LINES = 2700


def floor_of(part: str) -> int:
    return FLOORS.index(part)


def imported_parts(code: str) -> Iterator[str]:
    """Yield the part of chargpt that each import names, wherever in the code it is."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *parts = name.split(".")
            if package == "chargpt" and parts and parts[0] != "__version__":
                yield parts[0]


def wrong_imports(package: Path) -> list[str]:
    """Return a line for each import that does not run down the list, or to a missing floor."""
    found = []
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        if path in EXEMPT:
            continue
        own = path.parts[0].removesuffix(".py")
        for part in imported_parts(file.read_text("utf-8")):
            if own != part and floor_of(own) <= floor_of(part):
                found.append(f"{path} imports chargpt.{part}")
    return found


def full_inits(package: Path) -> list[Path]:
    """Return each folder's ``__init__.py`` that is more or less than one docstring."""
    return [
        file.relative_to(package)
        for file in sorted(package.glob("*/**/__init__.py"))
        if len(body := ast.parse(file.read_text("utf-8")).body) != 1
        or not isinstance(body[0], ast.Expr)
    ]


def count_lines(package: Path, files: str) -> int:
    return sum(len((package / file).read_text("utf-8").splitlines()) for file in files.split())


def test_imports_run_one_way_and_folders_run_no_code() -> None:
    assert wrong_imports(PACKAGE) == []
    assert full_inits(PACKAGE) == []


def test_the_core_is_an_evening_of_reading() -> None:
    assert count_lines(PACKAGE, CORE) <= MOST_CORE_LINES


@pytest.mark.parametrize(
    ("file", "code", "wrong"),
    [
        ("data/a.py", "from chargpt.base import errors\nimport chargpt.config", False),
        ("data/a.py", "from chargpt.data.b import c", False),
        ("data/a.py", "from chargpt.engine import scoring", True),
        ("data/a.py", "import chargpt.cli.main as cli", True),
        ("config.py", "from chargpt import model", True),
        ("data/a.py", "def f():\n    from chargpt.train import train", True),
        ("data/a.py", "if TYPE_CHECKING:\n    from chargpt.model import GPT2", False),
        ("base/a.py", "if TYPE_CHECKING:\n    from chargpt.model import GPT2", True),
        ("serve/a.py", "from chargpt.export import facts", False),
        ("export/a.py", "from chargpt.serve import app", True),
        ("cli/a.py", "from chargpt.serve import app", False),
        ("__init__.py", "from chargpt.cli import main", False),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, code: str, wrong: bool) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(code)
    assert bool(wrong_imports(tmp_path)) == wrong


def test_code_in_an_init_and_a_long_core_are_found(tmp_path: Path) -> None:
    for folder, code in (("a", '"""One docstring."""'), ("b", '"""Doc."""\nX = 1'), ("c", "")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(code)
    assert full_inits(tmp_path) == [Path("b/__init__.py"), Path("c/__init__.py")]
    assert count_lines(tmp_path, "b/__init__.py a/__init__.py") == 3
