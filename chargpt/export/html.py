"""``chargpt export --to html``: a model in one web page, which computes in the browser, offline.

The page holds the code of `chargpt/web`, the weights (see `web_weights`) and a self-test. Before it
gets its name, it is read back: its weights must predict as the run's model does.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from chargpt.base.errors import UserError, VerificationError
from chargpt.base.files import parse_json, replacing
from chargpt.base.terminal import visible
from chargpt.config import CheckpointName, GPT2Config, SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.scoring import log_probabilities, mean_nats
from chargpt.export.facts import gather_facts
from chargpt.export.verify import Floats, check_logits, logits_of, probes
from chargpt.export.web_bundle import content_policy, data_text, fill, join_modules, script_text
from chargpt.export.web_weights import pack, unpack
from chargpt.generate import complete
from chargpt.model import GPT2
from chargpt.runs.folder import load

MOST_PAGE_BYTES = 300_000_000  # browsers hold the text of a page several times
TOLERANCE, RELATIVE_TOLERANCE = 1e-3, 2e-4  # of logits, for weights in 16 bits: see `tolerance_for`
MOST_CHANGE_NATS = 0.02  # of the loss, for weights in 8 bits
_WRITTEN = 2000  # characters to compare the loss on
_N_PROMPTS = 10


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
    model, tokenizer = load(run, which=which)
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
    return f"wrote {out}: {len(page) / 1e6:.1f} MB, {exactness}"


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


# --- the page


def make_page(
    model: GPT2,
    tokenizer: CharTokenizer,
    written: Sequence[list[int]],
    *,
    name: str,
    run_facts: dict[str, Any] | None = None,
    int8: bool = False,
    web: Traversable | None = None,
) -> str:
    """Return the page with a model.

    Args:
        model: the model.
        tokenizer: the model's.
        written: texts of the model, as token ids, for the self-test.
        name: the title.
        run_facts: the facts of the run, see `Facts.to_json`; None: not known.
        int8: see `export_html`.
        web: the folder with the page's parts; None: the package's.
    """
    web = web or files("chargpt").joinpath("web")
    tensors, data = pack(model, "int8" if int8 else "int16")
    facts = {
        "name": name,
        "run": run_facts,
        "config": asdict(model.config),
        "characters": list(tokenizer.characters),
        "end_of_text_id": tokenizer.end_of_text_id,
        "tensors": [tensor.to_json() for tensor in tensors],
    }
    facts["self_test"] = self_test(model, unpack_json(facts, data), written, int8=int8)
    script = script_text("\n" + join_modules(web, "page/main.js"))
    style = "\n" + web.joinpath("page.css").read_text("utf-8")
    values = {
        "title": html.escape(name),
        "policy": content_policy(script, style),
        "style": style,
        "script": script,
        "worker": script_text('"use strict";\n\n' + join_modules(web, "engine/worker.js")),
        "facts": data_text(facts),
        "weights": base64.b64encode(data).decode(),
    }
    return fill(web.joinpath("page.html").read_text("utf-8"), values)


def self_test(
    source: GPT2, exported: GPT2, written: Sequence[list[int]], *, int8: bool
) -> dict[str, Any]:
    """Return contexts with the source's logits, for the browser to compare its own with.

    In 8 bits, the tolerance is what the rounded weights change, plus that of 16 bits.
    """
    prompts = contexts(written, source.config.block_size)
    wanted = np.stack([logits_of(source)(prompt)[-1] for prompt in prompts])  # (prompts, V)
    tolerance = tolerance_for(wanted)
    if int8:
        rounded = np.stack([logits_of(exported)(prompt)[-1] for prompt in prompts])
        tolerance += float(np.abs(wanted - rounded).max())
    logits = base64.b64encode(wanted.astype("<f4").tobytes()).decode()
    return {"prompts": prompts, "logits": logits, "tolerance": tolerance}


def tolerance_for(*logits: Floats) -> float:
    """Return how much logits may differ after weights were rounded to 16 bits.

    Rounding changes large logits more. These are at most 1 part in 5,000 off, or 0.001.
    """
    largest = max(float(np.abs(each).max()) for each in logits)
    return max(TOLERANCE, RELATIVE_TOLERANCE * largest)


def contexts(written: Sequence[list[int]], block_size: int) -> list[list[int]]:
    """Return ten pieces of texts, of random lengths up to block_size."""
    rng = np.random.default_rng(0)
    pieces = []
    for number in range(_N_PROMPTS):
        text = written[number % len(written)]
        length = int(rng.integers(1, min(block_size, len(text)) + 1))
        start = int(rng.integers(len(text) - length + 1))
        pieces.append(text[start : start + length])
    return pieces


# --- reading it back


class _Blocks(HTMLParser):
    """Collects the text of each script element with an id."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.texts: dict[str, str] = {}
        self._id: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._id = dict(attrs).get("id") if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._id = None

    def handle_data(self, data: str) -> None:
        if self._id:
            self.texts[self._id] = self.texts.get(self._id, "") + data


class PageModel(NamedTuple):
    """What a page holds: its facts, and the model it computes with."""

    facts: dict[str, Any]
    model: GPT2


def read_page(page: str) -> PageModel:
    """Return the facts and the model in a page."""
    blocks = _Blocks()
    blocks.feed(page)
    blocks.close()
    facts = parse_json(blocks.texts["facts"], "the page")
    data = base64.b64decode(blocks.texts["weights"], validate=True)
    return PageModel(facts, unpack_json(facts, data))


def unpack_json(facts: dict[str, Any], data: bytes) -> GPT2:
    """Return the model that a page's facts and weights describe."""
    return unpack(GPT2Config(**facts["config"]), facts["tensors"], data)


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
        return f"logits within {worst:.1g} of the run's"
    ours, theirs = (_mean_loss(model, written) for model in (source, exported))
    change = abs(theirs - ours)
    if not change <= MOST_CHANGE_NATS:  # also for NaN
        raise VerificationError(
            f"in 8 bits, the loss changes by {change:.2g} nats per character (at most "
            f"{MOST_CHANGE_NATS:g} is allowed): leave out --int8; nothing was written"
        )
    return f"loss within {change:.1g} nats per character of the run's"


def _mean_loss(model: GPT2, written: Sequence[list[int]]) -> float:
    scores = [log_probabilities(model, np.array(text)) for text in written if len(text) > 1]
    return mean_nats(np.concatenate(scores))
