"""Damage by chance: every file of a run cut short and changed in hundreds of places.

What is damaged is found, and never loaded as if it were whole: either the checkpoint before is
taken, with a warning that names the damaged one, or a line says what is wrong.
"""

import json
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import words
from safetensors.torch import load_file

import chargpt
from chargpt.base.errors import RunWarning, UserError
from chargpt.config import GPT2Config, TrainConfig
from chargpt.measure.inspect import inspect_run
from chargpt.runs.checkpoint import MANIFEST, MODEL, OPTIMIZER, STATE, find_checkpoint
from chargpt.runs.folder import CONFIG, TOKENIZER, load, read_config
from chargpt.train import train

PLACES = 500
CUTS = 64
SHAPE = GPT2Config(block_size=8, n_layer=1, n_head=1, d_model=8)
OF_A_CHECKPOINT = [
    f"{which}/{name}"
    for which, names in (("best", (MODEL, STATE)), ("last", (MODEL, OPTIMIZER, STATE)))
    for name in (*names, MANIFEST)
]
FILES = [*OF_A_CHECKPOINT, CONFIG, TOKENIZER]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; each test puts back what it damages."""
    folder = tmp_path_factory.mktemp("corruption")
    (folder / "hearts.txt").write_text(words(600), encoding="utf-8")
    training = TrainConfig(
        steps=4,
        batch_size=2,
        eval_interval=2,
        sample_length=0,
        device="cpu",
        precision="fp32",
        kernels="off",
        compile="off",
    )
    text = str(folder / "hearts.txt")
    train(text, model_config=SHAPE, train_config=training, out=folder / "run", quiet=True)
    return folder / "run"


@pytest.fixture
def whole(run: Path) -> Iterator[dict[str, bytes]]:
    """What is in each file; a test may leave something else there."""
    before = {name: (run / name).read_bytes() for name in FILES}
    yield before
    for name, data in before.items():
        (run / name).write_bytes(data)


def whatever_loads(run: Path, which: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the weights that are loaded, and the warnings.

    Raises:
        UserError: nothing is.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(run, which=which).model
    assert all(issubclass(each.category, RunWarning) for each in caught)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return weights, [str(each.message) for each in caught]


def are_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def is_harmless(name: str, before: bytes, after: bytes) -> bool:
    """Return whether a file of JSON still says the same: its seal may be lost, not its content."""
    if not name.endswith((CONFIG, TOKENIZER, MANIFEST)):
        return False
    try:
        then, now = json.loads(before), json.loads(after)
    except (ValueError, RecursionError):
        return False
    if not isinstance(now, dict):
        return False
    if name == TOKENIZER:  # a vocabulary of format 1 is the same and has no seal
        parts = ("format", "type", "end_of_text", "characters")
        return all(then[part] == now.get(part) for part in parts)
    return bool(then == now)


def check_damaged(run: Path, name: str, before: bytes, after: bytes) -> None:
    """Fail unless the damage of one file is found, and nothing that it changes is loaded."""
    harmless = is_harmless(name, before, after)
    bad = [finding for finding in inspect_run(run) if not finding.good]
    if not harmless:
        assert [finding.part for finding in bad] == [name.partition("/")[0]], "it is found"
        assert "\n" not in bad[0].remark
    which = "last" if name.startswith("last") else "best"
    try:
        weights, told = whatever_loads(run, which)
    except UserError as error:
        assert name in (CONFIG, TOKENIZER), "a checkpoint has one before it"
        assert bad, "what is refused is reported"
        assert name in str(error) or "run" in str(error)
        assert "\n" not in str(error)
        return
    assert name not in (CONFIG, TOKENIZER) or harmless
    if harmless:
        assert not told
        assert are_equal(weights, load_file(run / which / MODEL))
        return
    assert len(told) == 1
    file = name.partition("/")[2]
    assert re.search(rf"{which} is damaged .*{re.escape(file)}.*using .*{which}\.previous", told[0])
    assert are_equal(weights, load_file(run / f"{which}.previous" / MODEL))


def damage(run: Path, name: str, before: bytes, after: bytes) -> None:
    (run / name).write_bytes(after)
    check_damaged(run, name, before, after)
    (run / name).write_bytes(before)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short(run: Path, whole: dict[str, bytes], name: str) -> None:
    data = whole[name]
    # The last cut takes a line end at most, which a text may lose.
    cuts = sorted({len(data) * i // CUTS for i in range(CUTS)} | {1, 7, 8, 9, len(data) - 1})
    assert len(cuts) >= min(CUTS, len(data) - 1)
    for cut in cuts:
        damage(run, name, data, data[:cut])


@pytest.mark.parametrize("part", range(10))
def test_one_byte_changed(run: Path, whole: dict[str, bytes], part: int) -> None:
    """At 500 places, of which each file has as many as any other."""
    rng = random.Random(part)
    for i in range(PLACES // 10):
        name = FILES[(part + i) % len(FILES)]
        data = bytearray(whole[name])
        place = rng.randrange(len(data))
        data[place] ^= rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
        damage(run, name, whole[name], bytes(data))


@pytest.mark.parametrize("name", [CONFIG, TOKENIZER, "last/manifest.json"])
def test_every_character_that_stands_for_a_format_or_a_seal(
    run: Path, whole: dict[str, bytes], name: str
) -> None:
    """One changed byte must not make a sealed file pass for one that had no seal yet."""
    text = whole[name].decode()
    places = [m.start(1) for m in re.finditer(r'"format": (\d)', text)]
    places += [i for m in re.finditer('"(sha256|format)"', text) for i in range(*m.span())]
    for place in places:
        for byte in b"0123 ax":
            data = bytearray(whole[name])
            if data[place] != byte:
                data[place] = byte
                damage(run, name, whole[name], bytes(data))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: bytes(len(data)),
        lambda data: b"\xff" * len(data),
        lambda data: data + b"\0",
        lambda data: data + data,
        lambda data: data[::-1],
        lambda data: data.replace(b"\n", b"\r\n") if data.isascii() else data[:-1],
    ],
    ids=["empty", "zeros", "ones", "longer", "twice", "backwards", "line ends"],
)
def test_a_file_spoilt_as_a_whole(
    run: Path, whole: dict[str, bytes], name: str, change: Any
) -> None:
    damage(run, name, whole[name], change(whole[name]))


@pytest.mark.parametrize("name", OF_A_CHECKPOINT)
def test_a_missing_file_of_a_checkpoint(run: Path, whole: dict[str, bytes], name: str) -> None:
    (run / name).unlink()
    check_damaged(run, name, whole[name], b"")


def test_a_missing_config_or_tokenizer(run: Path, whole: dict[str, bytes]) -> None:
    (run / TOKENIZER).unlink()
    assert [f.part for f in inspect_run(run) if not f.good] == [TOKENIZER]
    with pytest.raises(UserError, match="tokenizer.json cannot be read .*damaged"):
        load(run)
    (run / CONFIG).unlink()
    for verb in (load, inspect_run):
        with pytest.raises(UserError, match="has no config.json"):
            verb(run)


def test_files_of_two_checkpoints_do_not_mix(run: Path, whole: dict[str, bytes]) -> None:
    """A file of the checkpoint before is whole, and not of this one."""
    for name in OF_A_CHECKPOINT:
        which, _, file = name.partition("/")
        older = (run / f"{which}.previous" / file).read_bytes()
        if older != whole[name]:
            damaged_file = MODEL if file == MANIFEST else file
            (run / name).write_bytes(older)
            bad = [f for f in inspect_run(run) if not f.good]
            assert [f.part for f in bad] == [which]
            with pytest.warns(RunWarning, match=f"{which} is damaged .{damaged_file}"):
                assert find_checkpoint(run, which).name == f"{which}.previous"  # type: ignore[arg-type]
            (run / name).write_bytes(whole[name])


def test_two_files_damaged_are_told_of_and_two_checkpoints_are_refused(
    run: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for which in ("last", "last.previous"):
        data = bytearray((copy / which / OPTIMIZER).read_bytes())
        data[-1] ^= 1
        (copy / which / OPTIMIZER).write_bytes(data)
    assert [f.part for f in inspect_run(copy) if not f.good] == ["last", "last.previous"]
    with pytest.raises(UserError, match=r"last is damaged .*last.previous is damaged .*backup"):
        load(copy, which="last")
    load(copy)  # the best one is whole
    sources = read_config(copy).sources
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="last is damaged"):
        train(
            sources,
            model_config=SHAPE,
            train_config=resumable(copy),
            out=copy,
            resume=True,
            quiet=True,
        )
    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert after == before, "a run that cannot go on is left as it was"


def resumable(run: Path) -> TrainConfig:
    return read_config(run).train_config


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, MANIFEST])
def test_a_run_goes_on_from_the_checkpoint_before(run: Path, tmp_path: Path, name: str) -> None:
    """The damaged state is not used, nor is it what is fallen back on the next time."""
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    shutil.rmtree(whole / "last")
    (whole / "last.previous").rename(whole / "last")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    sources = read_config(copy).sources
    config = resumable(copy).replace(steps=6)
    data = bytearray((copy / "last" / name).read_bytes())
    data[len(data) // 2] ^= 4
    (copy / "last" / name).write_bytes(data)
    expected = train(
        sources, model_config=SHAPE, train_config=config, out=whole, resume=True, quiet=True
    )
    with pytest.warns(RunWarning, match=f"last is damaged .{name}.*using .*last.previous"):
        result = train(
            sources, model_config=SHAPE, train_config=config, out=copy, resume=True, quiet=True
        )
    assert result.summary.val_loss == expected.summary.val_loss
    assert are_equal(load_file(copy / "last" / MODEL), load_file(whole / "last" / MODEL)), (
        "the same as from the checkpoint before"
    )
    bad = [f.part for f in inspect_run(copy) if not f.good]
    assert bad in ([], ["last.previous"])
    assert chargpt.load(copy, which="last").model.config.vocab_size
