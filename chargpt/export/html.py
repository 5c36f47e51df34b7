"""``chargpt export --to html``: a run's model as one web page, which computes in the browser.

Before the page gets its name, it is read back: its weights must predict as the run's model does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from chargpt.base.errors import UserError, VerificationError
from chargpt.base.files import replacing
from chargpt.base.terminal import visible
from chargpt.config import CheckpointName, SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.scoring import log_probabilities, mean_nats
from chargpt.export.facts import gather_facts
from chargpt.export.verify import check_logits, logits_of, probes
from chargpt.export.web_page import make_page, read_page, tolerance_for
from chargpt.generate import complete
from chargpt.model import GPT2
from chargpt.runs.folder import load_characters

MOST_PAGE_BYTES = 300_000_000  # browsers hold the text of a page several times
MOST_CHANGE_NATS = 0.02  # of the loss, for weights in 8 bits
_WRITTEN = 2000  # characters to compare the loss on


def export_html(
    run: Path,
    out: Path,
    *,
    which: CheckpointName,
    int8: bool = False,
    report: Callable[[str], None],
) -> str:
    """Write a run's model as a web page; return a line about it.

    Args:
        run: the run folder.
        out: the file; an existing one is replaced.
        which: the checkpoint.
        int8: store matrices in 8 bits instead of 16.
        report: called with lines of progress.

    Raises:
        UserError: no run, a model too large for a page, or `out` cannot be written.
        VerificationError: the page's model differs from the run's; `out` stays as it was.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder: give the name of a file, such as {out}.html")
    model, tokenizer = load_characters(run, which=which)
    refuse_large(model, int8)
    run_facts = gather_facts(run, model, tokenizer, which=which, report=report).to_json()
    report("writing a text with the model, to compare the page with it")
    written = write_text(model, tokenizer)
    name = visible(" ".join(run.resolve().name.split()))
    page = make_page(model, tokenizer, written, name=name, run_facts=run_facts, int8=int8)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as part:
            part.write_bytes(page.encode())
            report("reading the page back, to compare it with the run")
            exactness = check_page(part.read_text("utf-8"), model, written, int8=int8)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give a file") from error
    return f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB, {exactness}"


def refuse_large(model: GPT2, int8: bool) -> None:
    """Raise a UserError if the page would be too large for a browser."""
    n_params = sum(parameter.numel() for parameter in model.parameters())
    n_bytes = n_params * (1 if int8 else 2) * 4 // 3  # base64 has four characters for three bytes
    if n_bytes > MOST_PAGE_BYTES:
        remedy = "export a smaller model" if int8 else "give --int8, or export a smaller model"
        most = MOST_PAGE_BYTES // 1_000_000
        raise UserError(
            f"the page would have {n_bytes // 1_000_000} MB, more than browsers open with ease "
            f"({most} MB): {remedy}"
        )


def write_text(model: GPT2, tokenizer: CharTokenizer) -> list[list[int]]:
    """Return about 2,000 characters that the model wrote, one or more documents of token ids."""
    documents: list[list[int]] = []
    while sum(map(len, documents)) < _WRITTEN:
        left = _WRITTEN - sum(map(len, documents))
        config = SampleConfig(max_new_tokens=left, temperature=1.0, seed=len(documents))
        [completion] = complete(model, tokenizer, [""], config)
        start = tokenizer.encode_prompt("")
        documents.append([*start, *(token.id for token in completion.tokens)])
    return documents


def check_page(page: str, source: GPT2, written: Sequence[list[int]], *, int8: bool) -> str:
    """Compare the model in a page with its source; return how exact it is.

    In 16 bits, logits must agree. In 8 bits, the loss on text that the source wrote must.

    Raises:
        VerificationError: they differ by more than `tolerance_for` or `MOST_CHANGE_NATS` allows.
    """
    exported = read_page(page).model
    if not int8:
        prompts = probes(source)
        tolerance = tolerance_for(*map(logits_of(source), prompts))
        worst = check_logits(logits_of(source), logits_of(exported), prompts, tolerance)
        return f"its logits differ from the run's by at most {worst:.2g}"
    ours, theirs = (_mean_loss(model, written) for model in (source, exported))
    change = abs(theirs - ours)
    if not change <= MOST_CHANGE_NATS:  # also for NaN
        raise VerificationError(
            f"in 8 bits, the loss changes by {change:.2g} nats per character (at most "
            f"{MOST_CHANGE_NATS:g} is allowed): leave out --int8; nothing was written"
        )
    return f"its loss differs from the run's by {change:.2g} nats per character"


def _mean_loss(model: GPT2, written: Sequence[list[int]]) -> float:
    scores = [log_probabilities(model, np.array(text)) for text in written if len(text) > 1]
    return mean_nats(np.concatenate(scores))
