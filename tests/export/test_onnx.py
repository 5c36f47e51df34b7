"""ONNX files: ONNX Runtime computes the paper's formulas, from the file alone."""

import inspect
import json
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from twin import reference_logits, shake

import chargpt
import chargpt.export.onnx as onnx_export
from chargpt.base.errors import UserError, VerificationError
from chargpt.cli import main as cli
from chargpt.config import ActivationFunction, GPT2Config, NormPlacement
from chargpt.data.tokenizer import CharTokenizer
from chargpt.export.onnx import export_onnx
from chargpt.runs.folder import load
from chargpt.runs.imported import write_imported_run
from chargpt.train import TrainResult

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

LONG = GPT2Config(block_size=96, n_layer=2, n_head=2, d_model=8, vocab_size=7)
TOKENIZER = CharTokenizer('\n\\"é𝄞b', end_of_text=True)


def write_run(folder: Path, config: GPT2Config) -> tuple[Path, chargpt.GPT2]:
    """Write a run with random weights, all of which matter."""
    model = shake(chargpt.GPT2(config)).eval()
    write_imported_run(folder / "run", model, TOKENIZER, origin="a test")
    return folder / "run", model


def call(path: Path, ids: np.ndarray, past: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """Run a file on ids, (B, T); return the logits and the cache."""
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_inputs()]
    assert names[:2] == ["input_ids", "position_ids"]
    _, n_head, _, size = session.get_inputs()[2].shape
    start = past[0].shape[2] if past else 0
    past = past or [np.zeros((len(ids), n_head, 0, size), np.float32) for _ in names[2:]]
    positions = np.tile(np.arange(start, start + ids.shape[1]), (len(ids), 1))
    return session.run(None, dict(zip(names, [ids, positions, *past], strict=True)))


def check(path: Path, model: chargpt.GPT2, tolerance: float = 1e-4) -> None:
    """Compare three ways of reading 90 tokens of 2 texts with the formulas in double precision."""
    weights = {name: value.detach().double() for name, value in model.named_parameters()}
    ids = np.random.default_rng(1).integers(model.config.vocab_size, size=(2, 90))
    expected = reference_logits(model.config, weights, torch.from_numpy(ids)).numpy()
    whole, *cache = call(path, ids)
    np.testing.assert_allclose(whole, expected, atol=tolerance)
    assert all(value.shape[2] == 90 for value in cache)
    first, *past = call(path, ids[:, :70])
    middle, *past = call(path, ids[:, 70:89], past)
    last, *again = call(path, ids[:, 89:], past)
    np.testing.assert_allclose(np.concatenate([first, middle, last], 1), expected, atol=tolerance)
    for ours, others in zip(again, cache, strict=True):
        np.testing.assert_allclose(ours, others, atol=tolerance)


SHAPES = [
    *({"activation_function": name} for name in get_args(ActivationFunction)),
    *(
        {"norm_placement": name, "bias": b}
        for name in get_args(NormPlacement)
        for b in (True, False)
    ),
    {"n_layer": 1, "n_head": 1, "d_model": 12, "d_ff": 5},
    {"n_layer": 11, "n_head": 8},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_file_computes_the_formulas(tmp_path: Path, shape: dict[str, Any]) -> None:
    run, model = write_run(tmp_path, LONG.replace(**shape))
    line = export_onnx(run, tmp_path / "model.onnx")
    assert "200 greedy characters equal" in line
    check(tmp_path / "model.onnx", model)


def test_int8_stores_rounded_matrices(tmp_path: Path) -> None:
    run, model = write_run(tmp_path, LONG.replace(d_model=32))
    line = export_onnx(run, tmp_path / "model.onnx", int8=True)
    export_onnx(run, tmp_path / "large.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("model.onnx", "large.onnx")]
    assert sizes[0] < 0.4 * sizes[1]
    file = onnx.load(tmp_path / "model.onnx")
    arrays = {a.name: onnx.numpy_helper.to_array(a) for a in file.graph.initializer}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                numbers, scale = arrays[f"{name}.int8"], arrays[f"{name}.scale"]
                assert numbers.dtype == np.int8
                restored = numbers * scale
                assert (np.abs(restored - parameter.numpy()) <= 0.501 * scale).all()
                parameter.copy_(torch.from_numpy(restored))
    check(tmp_path / "model.onnx", model)
    original = load(run).model
    ids = torch.randint(7, (4, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        change = float((original(ids) - model(ids)).abs().max())
    said = float(line.rpartition("up to ")[2])
    assert 0.3 * change < said < 3 * change


def test_the_file_has_what_a_reader_needs(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path, LONG)
    export_onnx(run, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(facts["characters"])) == TOKENIZER.characters
    assert json.loads(facts["end_of_text_id"]) == TOKENIZER.end_of_text_id == 6
    assert json.loads(facts["block_size"]) == 96
    assert [value.name for value in session.get_outputs()] == [
        "logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value",
    ]  # fmt: skip


def test_the_example_writes_what_chargpt_writes(
    tmp_path: Path,
    result: TrainResult,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The program in the module's docstring, at a temperature of almost 0, past block_size."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(result.run), "model.onnx", "--to", "onnx"])
    assert not stop.value.code
    example = inspect.cleandoc(onnx_export.__doc__ or "").partition("::\n\n")[2]
    for old, new in (("ROMEO:", "the king"), ("0.8", "1e-5"), ("500", "60")):
        assert old in example
        example = example.replace(old, new)
    capsys.readouterr()
    exec(inspect.cleandoc(example), {})
    options = {"prompt": "the king", "temperature": 0.0, "max_new_tokens": 60}
    model, tokenizer = load(result.run)
    assert capsys.readouterr().out == chargpt.sample(model, tokenizer, **options) + "\n"


# --- what goes wrong


@pytest.mark.parametrize("existing", [None, b"the old model"])
@pytest.mark.parametrize("int8", [False, True])
def test_a_file_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bytes | None, int8: bool
) -> None:
    run, _ = write_run(tmp_path, LONG)
    out = tmp_path / "out" / "model.onnx"
    out.parent.mkdir()
    if existing:
        out.write_bytes(existing)

    def changed(model: chargpt.GPT2, *arguments: Any, **options: Any) -> bytes:
        bias = model.blocks[1].feed_forward.sublayer.expand.bias  # type: ignore[union-attr]
        with torch.no_grad():
            bias[3] += 0.1  # type: ignore[index, operator]
        data = to_onnx(model, *arguments, **options)
        with torch.no_grad():
            bias[3] -= 0.1  # type: ignore[index, operator]
        return data

    to_onnx = onnx_export.to_onnx
    monkeypatch.setattr(onnx_export, "to_onnx", changed)
    with pytest.raises(VerificationError, match="differs by .* nothing was written"):
        export_onnx(run, out, int8=int8)
    assert [path.name for path in out.parent.iterdir()] == (["model.onnx"] if existing else [])
    assert not existing or out.read_bytes() == existing


def test_a_cache_that_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call alone is right: only the keys that are returned are those of another layer."""
    run, _ = write_run(tmp_path, LONG)
    to_onnx = onnx_export.to_onnx

    def swapped(*arguments: Any, **options: Any) -> bytes:
        file = onnx.load_from_string(to_onnx(*arguments, **options))
        outputs = file.graph.output
        outputs[1].name, outputs[3].name = outputs[3].name, outputs[1].name
        data: bytes = file.SerializeToString()
        return data

    monkeypatch.setattr(onnx_export, "to_onnx", swapped)
    with pytest.raises(VerificationError):
        export_onnx(run, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    run, _ = write_run(tmp_path, LONG)
    with pytest.raises(UserError, match="run is a folder: give the name of a file"):
        export_onnx(run, run)
    with pytest.raises(UserError, match="cannot be written"):
        export_onnx(run, run / "config.json" / "model.onnx")
    export_onnx(run, tmp_path / "new" / "model.onnx")
    first = (tmp_path / "new" / "model.onnx").read_bytes()
    export_onnx(run, tmp_path / "new" / "model.onnx", int8=True)
    assert 0 < (tmp_path / "new" / "model.onnx").stat().st_size < len(first)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    run, _ = write_run(tmp_path, LONG)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}, .*: pip install 'chargpt\[onnx\]'"):
        export_onnx(run, tmp_path / "model.onnx")
