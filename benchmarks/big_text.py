r"""How fast does a large text become token ids, and in how much memory?

    python benchmarks/big_text.py big.txt [--document-separator '\n']

Each start is a process of its own. The first encodes the text into an empty cache, the second
finds it there. Memory is the sum over all processes, sampled 50 times a second (Linux only), less
what the first process has after its imports. Files that are used are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> int:
    """Return the bytes in memory of a process and its children, shared pages counted each time."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0
    return own + sum(resident(int(child)) for child in children)


class PeakMemory(threading.Thread):
    """Samples the memory of this process and its children until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.peak = resident(os.getpid())
        self._stopped = threading.Event()

    def run(self) -> None:
        """Take the samples."""
        while not self._stopped.wait(0.02):
            self.peak = max(self.peak, resident(os.getpid()))

    def stop(self) -> int:
        """Return the bytes at the peak beyond those at the start."""
        self._stopped.set()
        self.join()
        return self.peak - self.before


def start(texts: list[str], separator: str) -> None:
    """Load the corpus, and print what that took as JSON."""
    from chargpt.config import DataConfig
    from chargpt.data.corpus import load_corpus

    memory = PeakMemory()
    memory.start()
    begin, before = time.perf_counter(), sum(os.times()[:4])
    corpus = load_corpus(texts, DataConfig(document_separator=separator))
    seconds = time.perf_counter() - begin
    facts, tokens = corpus.facts, len(corpus.train) + len(corpus.validation)
    row = {"seconds": seconds, "peak_bytes": memory.stop(), "tokens": tokens}
    row["cpu_seconds"] = sum(os.times()[:4]) - before
    print(json.dumps(row | {"documents": facts.n_documents, "sha256": facts.sha256}))


def main() -> None:
    """Start twice, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--document-separator", default="")
    parser.add_argument("--one-start", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    files = [file for text in map(Path, given.texts) for file in (text, *text.rglob("*"))]
    megabytes = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    separator = given.document_separator.encode().decode("unicode_escape")
    if given.one_start:
        start(given.texts, separator)
        return
    with tempfile.TemporaryDirectory(prefix="chargpt-") as cache:
        for name in ("first start", "second start"):
            row = json.loads(
                subprocess.run(
                    [sys.executable, *sys.argv, "--one-start"],
                    env=os.environ | {"CHARGPT_CACHE_DIR": cache},
                    stdout=subprocess.PIPE,
                    check=True,
                ).stdout
            )
            print(
                f"{name}: {row['seconds']:.2f} s ({row['cpu_seconds']:.2f} s of CPU), "
                f"{megabytes / row['seconds']:,.0f} MB/s, {row['peak_bytes'] / 1e6:,.0f} MB beyond "
                f"the imports, {row['tokens']:,} tokens of {row['documents']:,} documents"
            )


if __name__ == "__main__":
    main()
