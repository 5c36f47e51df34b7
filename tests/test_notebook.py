"""gpt2.ipynb runs from top to bottom, and the committed copy shows a complete run."""

import math
import os
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest

import chargpt
from chargpt.data import datasets

nbformat = pytest.importorskip("nbformat", reason="pip install 'chargpt[notebook]'")
nbclient = pytest.importorskip("nbclient", reason="pip install 'chargpt[notebook]'")
kernelspec = pytest.importorskip("ipykernel.kernelspec", reason="pip install 'chargpt[notebook]'")

NOTEBOOK = Path(__file__).parents[1] / "gpt2.ipynb"
PICTURES = ["frequencies", "mask-picture", "curves", "expect", "look"]  # cells that end in one
PROMPT = "ROMEO:\n"

pytestmark = pytest.mark.skipif(not NOTEBOOK.exists(), reason="tested from an installed package")


def read_notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> dict[str, Any]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell: Any) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


def outputs(cells: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, output) for name, cell in cells.items() for output in cell.outputs]


def with_picture(cells: dict[str, Any]) -> list[str]:
    return [name for name, output in outputs(cells) if "image/png" in output.get("data", {})]


def with_errors(cells: dict[str, Any]) -> list[str]:
    return [
        name
        for name, output in outputs(cells)
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def available_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return Tiny Shakespeare if it needs no network, else the path of a generated play."""
    for network in ("download", "package index"):
        monkeypatch.delitem(datasets.SOURCES, network)
    try:
        datasets.load_dataset("tiny-shakespeare")
    except chargpt.UserError:
        rng = random.Random(0)
        words = ["thou", "art", "a", "king", "no", "more", *string.ascii_letters, "$3", "_{", "&c."]
        lines = (" ".join(rng.choices(words, k=6)) for _ in range(1000))
        path = folder / "play.txt"
        path.write_text("".join(f"{PROMPT}{line}\n\n" for line in lines), encoding="utf-8")
        return str(path)
    return "tiny-shakespeare"


def execute(notebook: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all cells in `folder` with this Python; the user's kernels and settings do not matter."""
    kernelspec.write_kernel_spec(folder / "jupyter" / "kernels" / "this-python")
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    packages = [str(Path(chargpt.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, packages)))
    nbclient.NotebookClient(
        notebook,
        kernel_name="this-python",
        timeout=300,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def test_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = available_text(tmp_path, monkeypatch)
    notebook = read_notebook()
    cells = code_cells(notebook)
    parameters = {"TEXT": text, "PROMPT": PROMPT, "MINUTES": 0.02}
    names = re.findall(r"^(\w+) = ", cells["parameters"].source, flags=re.MULTILINE)
    assert names == list(parameters), "the test replaces exactly the notebook's parameters"
    cells["parameters"].source = "\n".join(f"{k} = {v!r}" for k, v in parameters.items())

    execute(notebook, tmp_path, monkeypatch)

    assert with_picture(cells) == PICTURES
    assert with_errors(cells) == []
    for by_hand in ("tokenizer", "attention", "block", "gpt2"):
        assert printed(cells[by_hand]).rstrip().endswith(": True"), by_hand
    untrained = re.search(
        r"untrained: ([\d.]+) .* ln \d+ = ([\d.]+)", printed(cells["untrained-loss"])
    )
    assert untrained is not None
    assert math.isclose(float(untrained[1]), float(untrained[2]), abs_tol=0.05)
    assert re.match(r"val \d\.\d{3} nats/char", printed(cells["verdict"]))
    samples = printed(cells["samples"]).split("--- ")[1:]
    assert len(samples) == 4
    for sample in samples:
        options, _, written = sample.partition("\n")
        assert written.startswith(PROMPT), options
        assert len(written) >= len(PROMPT) + 200, options
    [run] = (tmp_path / "runs").iterdir()
    model, tokenizer = chargpt.load(run)
    assert chargpt.sample(model, tokenizer, prompt=PROMPT, max_new_tokens=1).startswith(PROMPT)


def test_committed_copy_shows_a_whole_run() -> None:
    cells = code_cells(read_notebook())
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    assert with_picture(cells) == PICTURES
    assert with_errors(cells) == []
    assert printed(cells["verdict"]).startswith("val ")


def test_committed_copy_is_small_and_has_no_local_paths() -> None:
    content = NOTEBOOK.read_text(encoding="utf-8")
    assert len(content) < 400_000
    found = re.search(r"(/home/|/Users/|/root/|/tmp/|/work/|\b[A-Z]:\\\\)[\w.-]*", content)
    assert found is None, found
    assert read_notebook().metadata.kernelspec.name == "python3"
