"""A run's model as one ONNX file, which ONNX Runtime runs on its own: no chargpt, no PyTorch.

Inputs and outputs, for B texts with T new tokens each after P earlier ones (P may be 0):

=========================  =============  =================================================
input_ids                  (B, T)         int64
position_ids               (B, T)         int64, from P on, below block_size
past_key_values.0.key …    (B, H, P, D)   keys of each layer: those that the last call returned
past_key_values.0.value …  (B, H, P, D)   values likewise
logits                     (B, T, V)      for the token after each of the new ones
present.0.key …            (B, H, P+T, D)
present.0.value …          (B, H, P+T, D)
=========================  =============  =================================================

The file's metadata has the vocabulary: ``characters``, a JSON list in which the character with id i
stands at i; ``end_of_text_id``, a number or null; ``block_size``, the most positions.

A program that writes text with nothing but the file, NumPy and ONNX Runtime::

    import json
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession("model.onnx")
    facts = session.get_modelmeta().custom_metadata_map
    characters, end, block_size = (
        json.loads(facts[name]) for name in ("characters", "end_of_text_id", "block_size")
    )
    names = [value.name for value in session.get_inputs()]
    _, H, _, D = session.get_inputs()[2].shape
    nothing = [np.zeros((1, H, 0, D), np.float32) for _ in names[2:]]  # no earlier tokens
    rng = np.random.default_rng()

    ids = ([] if end is None else [end]) + [characters.index(c) for c in "ROMEO:"]
    past, new = nothing, ids
    for _ in range(500):
        if past[0].shape[2] + len(new) > block_size:  # full: re-read the last half
            past, new = nothing, ids[-(block_size // 2) :]
        positions = past[0].shape[2] + np.arange(len(new))
        inputs = [np.array([new]), positions[None], *past]
        logits, *past = session.run(None, dict(zip(names, inputs)))
        scaled = logits[0, -1].astype(float) / 0.8  # the temperature
        p = np.exp(scaled - scaled.max())
        new = [int(rng.choice(len(p), p=p / p.sum()))]
        if new == [end]:
            break
        ids += new
    print("".join(characters[i] for i in ids if i != end))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chargpt.base.errors import UserError, VerificationError
from chargpt.base.files import write_bytes
from chargpt.base.units import human_count
from chargpt.compute.counts import count_parameters
from chargpt.config import CheckpointName, SampleConfig
from chargpt.engine.decoder import Chunk, Decoder, PyTorchDecoder
from chargpt.engine.scheduler import Engine, Token
from chargpt.export.onnx_graph import import_onnx, quantize, to_onnx
from chargpt.export.verify import Floats, check_logits, logits_of, probes
from chargpt.model import GPT2
from chargpt.runs.folder import load_characters

TOLERANCE = 1e-4
CASES = [(B, T, P) for B in (1, 2, 5) for T in (1, 2, 17) for P in (0, 1, 63)]
GREEDY_CHARACTERS = 200


def export_onnx(
    run: Path,
    out: Path,
    *,
    which: CheckpointName = "best",
    int8: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """Write a model as an ONNX file, and return a line about it.

    ONNX Runtime has run it before it is written: its logits, with the cache and without, and 200
    characters that it writes are those of the model. An existing file is replaced.

    Args:
        run: the run folder.
        out: the file.
        which: the checkpoint.
        int8: store each weight matrix as 8-bit numbers and one scale per output. They become
            float32 when the file is loaded.
        report: prints progress.

    Raises:
        UserError: no such run, a package is missing, or `out` cannot be written.
        VerificationError: ONNX Runtime computes something else; nothing was written.
    """
    import_onnx()
    if out.is_dir():
        raise UserError(f"{out} is a folder: give the name of a file, such as model.onnx")
    model, tokenizer = load_characters(run, which=which)
    report(f"writing {human_count(count_parameters(model))} parameters as ONNX")
    stored = rounded(model) if int8 else model
    data = to_onnx(model, tokenizer, int8=int8)
    report("comparing with the run in ONNX Runtime")
    session = open_session(data)
    difference = check_session(session, stored, tokenizer.encode_prompt(""))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(out, data)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give a file") from error
    line = (
        f"{out}: {human_count(len(data))}B; logits within {difference:.1e} of the "
        f"{'rounded model' if int8 else 'run'}'s, {GREEDY_CHARACTERS} greedy characters equal"
    )
    if int8:
        rounding = check_logits(logits_of(model), logits_of(stored), probes(model), np.inf)
        line += f"; rounding to 8 bits changes logits by up to {rounding:.1e}"
    return line


def rounded(model: GPT2) -> GPT2:
    """Return a copy of a model with the matrices that an int8 file holds."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.dim() == 2:
                numbers, scales = quantize(parameter)
                parameter.copy_(numbers * scales)
    return copied


# --- running the file


def open_session(data: bytes, n_threads: int = 0) -> Any:
    """Return ONNX Runtime's session for a file, on the CPU; 0 threads: as many as it chooses."""
    _, onnxruntime = import_onnx()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = n_threads
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def forward(
    session: Any, ids: npt.NDArray[np.int64], past: Sequence[Floats] = ()
) -> tuple[Floats, list[Floats]]:
    """Read ids, (B, T), after those in `past`; return the logits, (B, T, V), and the next `past`.

    `past` has the keys and values of each layer in turn, (B, H, P, D); empty: P is 0.
    """
    names = [value.name for value in session.get_inputs()]
    _, H, _, D = session.get_inputs()[2].shape
    past = past or [np.zeros((len(ids), H, 0, D), np.float32) for _ in names[2:]]
    start, T = past[0].shape[2], ids.shape[1]
    positions = np.broadcast_to(np.arange(start, start + T), ids.shape)  # (B, T)
    logits, *present = session.run(None, dict(zip(names, [ids, positions, *past], strict=True)))
    return logits, present


class OnnxDecoder:
    """A session as a decoder of one text."""

    n_slots = 1

    def __init__(self, session: Any, block_size: int, vocab_size: int) -> None:
        self.block_size, self.vocab_size = block_size, vocab_size
        self._session = session
        self._past: list[Floats] = []

    def read(self, chunks: Sequence[Chunk], *, every: bool = False) -> Tensor:
        """See `chargpt.engine.decoder.Decoder`."""
        [chunk] = chunks
        past = [value[:, :, : chunk.start] for value in self._past]
        logits, self._past = forward(self._session, np.array([chunk.ids]), past)
        return torch.from_numpy(logits[0] if every else logits[0, -1:])

    def copy(self, source: int, target: int, length: int) -> None:
        """See `chargpt.engine.decoder.Decoder`; there is only one slot."""


# --- checks


def check_session(session: Any, model: GPT2, start: Sequence[int]) -> float:
    """Return the largest difference between the logits of a session and of a model.

    Raises:
        VerificationError: it is above `TOLERANCE`, or the two write different texts after `start`.
    """
    config, source, largest = model.config, logits_of(model), 0.0
    rng = np.random.default_rng(0)
    for B, T, P in CASES:
        if config.block_size < P + T:
            continue
        ids = rng.integers(config.vocab_size, size=(B, P + T))
        logits, past = forward(session, ids[:, : P or T])
        if P:
            logits = np.concatenate([logits, forward(session, ids[:, P:], past)[0]], axis=1)
        rows = {tuple(row): its for row, its in zip(ids.tolist(), logits, strict=True)}
        target: Callable[[Any], Floats] = partial(_look_up, rows)
        largest = max(largest, check_logits(source, target, ids.tolist(), TOLERANCE))
    _check_writing(session, model, start)
    return largest


def _look_up(rows: dict[tuple[int, ...], Floats], ids: Sequence[int]) -> Floats:
    return rows[tuple(ids)]


def _check_writing(session: Any, model: GPT2, start: Sequence[int]) -> None:
    config = model.config
    ours = _write(PyTorchDecoder(model, 1), start)
    theirs = _write(OnnxDecoder(session, config.block_size, config.vocab_size), start)
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True), start=1):
        if our.id != their.id:
            (_, best), (_, second) = our.top
            if best - second < 2 * TOLERANCE:
                return  # rounding decides between two equally likely characters
            raise VerificationError(
                f"the exported model writes another text, from character {number} on: nothing was "
                "written"
            )


def _write(decoder: Decoder, start: Sequence[int]) -> list[Token]:
    engine, tokens = Engine(decoder), []
    config = SampleConfig(temperature=0, max_new_tokens=GREEDY_CHARACTERS)
    engine.add(start, config, [0], top_logprobs=2)
    while engine.active:
        tokens += [token for _, token in engine.step() if token]
    return tokens
