"""Load an exported folder with transformers, and compare it with its source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chargpt.base.errors import VerificationError
from chargpt.data.tokenizer import CharTokenizer
from chargpt.export.verify import Floats, LogitsOf, check_logits, logits_of, probes
from chargpt.model import GPT2

TOLERANCE = 1e-4
N_GREEDY = 200  # characters
_N_TEXTS = 200
_NOTHING = "nothing was written"


def verify_hf(folder: Path, model: GPT2, tokenizer: CharTokenizer) -> float:
    """Return the largest difference of the logits.

    Raises:
        VerificationError: the folder's logits, greedy text, ids or decoded texts are others.
    """
    transformers: Any = import_module("transformers")
    with _quiet(transformers):
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if any(report.values()):
            raise VerificationError(
                f"transformers does not load all weights ({report}): {_NOTHING}"
            )
        source = logits_of(model)
        worst = check_logits(source, _logits_of(theirs), probes(model), TOLERANCE)
        _check_greedy(source, theirs, tokenizer.encode_prompt(""), model.config.block_size)
        _check_tokenizer(tokenizer, their_tokenizer)
    return worst


def _logits_of(theirs: Any) -> LogitsOf:
    def compute(ids: Any) -> Floats:
        with torch.inference_mode():
            logits: Floats = theirs(torch.tensor([list(ids)])).logits[0].numpy()  # (T, V)
        return logits

    return compute


def _check_greedy(source: LogitsOf, theirs: Any, start: list[int], block_size: int) -> None:
    """Compare texts that transformers writes greedily with the likeliest tokens of the source."""
    # The defaults of the folder sample and stop at end-of-text.
    theirs.generation_config = type(theirs.generation_config)(do_sample=False, pad_token_id=0)
    written = list(start)
    while len(written) - len(start) < N_GREEDY:
        prompt = written[-max(block_size // 2, 1) :]
        n = min(block_size + 1 - len(prompt), N_GREEDY - (len(written) - len(start)))
        ids = torch.tensor([prompt])
        text = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n)[0]
        new = text[len(prompt) :].tolist()
        logits = source(text[:-1].tolist())[len(prompt) - 1 :]  # (n, V)
        # Of two equally likely tokens, either is greedy.
        behind = logits.max(axis=1) - logits[np.arange(len(new)), new]
        if len(new) != n or behind.max() > TOLERANCE:
            raise VerificationError(
                f"the exported model writes another greedy text after {prompt}: {_NOTHING}"
            )
        written += new


def _check_tokenizer(ours: CharTokenizer, theirs: Any) -> None:
    """Compare ids and decoded texts of random strings over the vocabulary, and of all of it."""
    rng = np.random.default_rng(0)
    characters = np.array(ours.characters, dtype=object)
    lengths = rng.integers(40, size=_N_TEXTS)
    texts = ["".join(rng.choice(characters, size=length)) for length in lengths]
    for text in (*texts, "".join(ours.characters)):
        ids = theirs(text)["input_ids"]
        if ids != ours.encode(text).tolist() or theirs.decode(ids) != text:
            raise VerificationError(f"the exported tokenizer changes {text!r:.120}: {_NOTHING}")


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Show no progress bars and no warnings of transformers."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
