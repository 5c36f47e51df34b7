"""Random damage: every file of a run cut short and changed in hundreds of places.

Damage is found and never loaded: either the checkpoint before is used, with a warning that names
the damaged one, or an error says what is wrong.
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

from chargpt.base.errors import ChargptWarning, UserError
from chargpt.config import GPT2Config, TrainConfig
from chargpt.measure.inspect import inspect_run
from chargpt.runs.checkpoint import MANIFEST, MODEL, OPTIMIZER, STATE, find_checkpoint
from chargpt.runs.folder import CONFIG, TOKENIZER, load, read_config
from chargpt.train import TrainResult, train

MANY = pytest.mark.reliability  # `make test` runs one of each kind
PLACES = 500
CUTS = 64
SHAPE = GPT2Config(block_size=8, n_layer=1, n_head=1, d_model=8)
CHECKPOINT_FILES = [
    f"{which}/{name}"
    for which, names in (("best", (MODEL, STATE)), ("last", (MODEL, OPTIMIZER, STATE)))
    for name in (*names, MANIFEST)
]
FILES = [*CHECKPOINT_FILES, CONFIG, TOKENIZER]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; each test restores what it damages."""
    folder = tmp_path_factory.mktemp("corruption")
    (folder / "hearts.txt").write_text(words(600), encoding="utf-8")
    training = TrainConfig(
        steps=4, batch_size=2, eval_interval=2, sample_length=0, device="cpu", precision="fp32",
        kernels="off", compile="off",
    )  # fmt: skip
    text = str(folder / "hearts.txt")
    train(text, model_config=SHAPE, train_config=training, out=folder / "run", quiet=True)
    return folder / "run"


@pytest.fixture
def whole(run: Path) -> Iterator[dict[str, bytes]]:
    """Return the contents of each file, and restore them after the test."""
    before = {name: (run / name).read_bytes() for name in FILES}
    yield before
    for name, data in before.items():
        (run / name).write_bytes(data)


def load_weights(run: Path, which: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the loaded weights and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(run, which=which).model
    assert all(issubclass(each.category, ChargptWarning) for each in caught)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return weights, [str(each.message) for each in caught]


def are_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def is_harmless(name: str, before: bytes, after: bytes) -> bool:
    """Return whether a sealed JSON file still has the same contents."""
    if not name.endswith((CONFIG, TOKENIZER, MANIFEST)):
        return False
    try:
        return bool(json.loads(before) == json.loads(after))
    except (ValueError, RecursionError):
        return False


def check_damaged(run: Path, name: str, before: bytes, after: bytes) -> None:
    """Fail unless the damage of one file is found and not loaded."""
    harmless = is_harmless(name, before, after)
    bad = [finding for finding in inspect_run(run) if not finding.good]
    if not harmless:
        assert [finding.part for finding in bad] == [name.partition("/")[0]]
        assert "\n" not in bad[0].remark
    which = "last" if name.startswith("last") else "best"
    try:
        weights, messages = load_weights(run, which)
    except UserError as error:
        assert name in (CONFIG, TOKENIZER)
        assert bad
        assert name in str(error) or "run" in str(error)
        assert "\n" not in str(error)
        return
    assert name not in (CONFIG, TOKENIZER) or harmless
    if harmless:
        assert not messages
        assert are_equal(weights, load_file(run / which / MODEL))
        return
    assert len(messages) == 1
    file = name.partition("/")[2]
    assert re.search(
        rf"{which} is damaged .*{re.escape(file)}.*using .*{which}\.previous", messages[0]
    )
    assert are_equal(weights, load_file(run / f"{which}.previous" / MODEL))


def damage(run: Path, name: str, before: bytes, after: bytes) -> None:
    (run / name).write_bytes(after)
    check_damaged(run, name, before, after)
    (run / name).write_bytes(before)


def resume(run: Path, steps: int) -> TrainResult:
    config = read_config(run)
    longer = config.train_config.replace(steps=steps)
    return train(
        config.sources, model_config=SHAPE, train_config=longer, out=run, resume=True, quiet=True
    )


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short(run: Path, whole: dict[str, bytes], name: str) -> None:
    data = whole[name]
    # The last cut removes one byte: of a JSON file, a harmless line end.
    cuts = sorted({len(data) * i // CUTS for i in range(CUTS)} | {1, 7, 8, 9, len(data) - 1})
    assert len(cuts) >= min(CUTS, len(data) - 1)
    for cut in cuts:
        damage(run, name, data, data[:cut])


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=MANY) for n in range(1, 10))])
def test_one_byte_changed(run: Path, whole: dict[str, bytes], part: int) -> None:
    """At 500 places, equally many in each file."""
    rng = random.Random(part)
    for i in range(PLACES // 10):
        name = FILES[(part + i) % len(FILES)]
        data = bytearray(whole[name])
        place = rng.randrange(len(data))
        data[place] ^= rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
        damage(run, name, whole[name], bytes(data))


@pytest.mark.parametrize(
    "name",
    [CONFIG, *(pytest.param(name, marks=MANY) for name in (TOKENIZER, "last/manifest.json"))],
)
def test_every_character_of_a_format_or_a_seal(
    run: Path, whole: dict[str, bytes], name: str
) -> None:
    """A changed byte must not turn off the check of the seal."""
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
def test_a_file_replaced_as_a_whole(
    run: Path, whole: dict[str, bytes], name: str, change: Any
) -> None:
    damage(run, name, whole[name], change(whole[name]))


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
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
    """A whole file of the checkpoint before is still damage here."""
    for name in CHECKPOINT_FILES:
        which, _, file = name.partition("/")
        older = (run / f"{which}.previous" / file).read_bytes()
        if older != whole[name]:
            damaged_file = MODEL if file == MANIFEST else file
            (run / name).write_bytes(older)
            bad = [f for f in inspect_run(run) if not f.good]
            assert [f.part for f in bad] == [which]
            with pytest.warns(ChargptWarning, match=f"{which} is damaged .{damaged_file}"):
                assert find_checkpoint(run, which).name == f"{which}.previous"  # type: ignore[arg-type]
            (run / name).write_bytes(whole[name])


def test_two_damaged_checkpoints_are_named_and_refused(
    run: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for which in ("last", "last.previous"):
        flip(copy / which / OPTIMIZER, -1)
    assert [f.part for f in inspect_run(copy) if not f.good] == ["last", "last.previous"]
    with pytest.raises(UserError, match=r"last is damaged .*last.previous is damaged .*backup"):
        load(copy, which="last")
    load(copy)  # the best one is whole
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="last is damaged"):
        resume(copy, 4)
    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert after == before  # a run that cannot resume is unchanged


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, MANIFEST])
def test_a_run_resumes_from_the_checkpoint_before(run: Path, tmp_path: Path, name: str) -> None:
    """The damaged state is not used, and it does not become the checkpoint before."""
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    shutil.rmtree(whole / "last")
    (whole / "last.previous").rename(whole / "last")
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    flip(copy / "last" / name, (copy / "last" / name).stat().st_size // 2)
    expected = resume(whole, 6)
    with pytest.warns(ChargptWarning, match=f"last is damaged .{name}.*using .*last.previous"):
        result = resume(copy, 6)
    assert result.summary.val_loss == expected.summary.val_loss
    assert are_equal(load_file(copy / "last" / MODEL), load_file(whole / "last" / MODEL))
    assert {f.part for f in inspect_run(copy) if not f.good} <= {"last.previous"}
