"""How fast does this machine write? ``chargpt bench --generate`` in Python.

All contenders take turns at the same job: from one character to as many as fit block_size, at
temperature 0.8, one text or 32 at a time, with random weights. chargpt also writes past block_size.
Figures are medians over the rounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chargpt.base.seeding import own_random_state
from chargpt.base.units import human_count
from chargpt.compute.counts import count_parameters
from chargpt.compute.device import choose_device
from chargpt.config import Device, GPT2Config, OnOffAuto, SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.native_decoder import NativeDecoder
from chargpt.generate import complete, make_decoder
from chargpt.measure import contenders
from chargpt.measure.bench import BenchConfig
from chargpt.measure.contenders import NANOGPT, OWN, PYTORCH
from chargpt.measure.timing import seconds_of
from chargpt.model import GPT2
from chargpt.training.probe import SYMBOLS

BATCHES = (1, 32)
TEMPERATURE = 0.8
HUGGING_FACE = "Hugging Face GPT-2"
PAST = "chargpt past block_size"

Write = Callable[[int, int], float]
"""Writes texts, given how many and how many characters each; returns the seconds it took."""


def bench_generation(
    *,
    model_config: GPT2Config,
    device: Device = "auto",
    kernels: OnOffAuto = "auto",
    config: BenchConfig | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure generation on this machine.

    `kernels`: see `chargpt.generate.make_decoder`. `config` gives rounds and peers.

    Returns:
        What ``--json`` prints: ``machine``, ``model``, ``parameters``, ``decoder`` and
        ``generate``, for ``batch_1`` and ``batch_32``: characters per second of all texts together,
        also past block_size, and chargpt's ratios to the others, of which ``pytorch`` is chargpt
        without its kernels; None: such a peer is missing.

    Raises:
        UserError: a setting or a peer is wrong.
        TrainingError: out of memory.
    """
    config = config or BenchConfig()
    clone = contenders.find_clone(config.peers)
    chosen = choose_device(device).device
    shape = model_config.replace(vocab_size=len(SYMBOLS))
    sizes = f"--d-model ({shape.d_model}) or --block-size ({shape.block_size})"
    with contenders.enough_memory(device, sizes), own_random_state():
        torch.manual_seed(0)
        model = GPT2(shape).to(chosen).eval()
        decoder = type(make_decoder(model, 1, kernels))
        writers = {OWN: own_writer(model, kernels)}
        if decoder is NativeDecoder:
            writers[PYTORCH] = own_writer(model, "off")
        with suppress(ImportError):
            writers[HUGGING_FACE] = hugging_face_writer(shape, chosen)
        if clone:
            writers[NANOGPT] = nanogpt_writer(clone, shape, chosen)
        rows = {}
        for n in BATCHES:
            report(f"texts at a time: {n}")
            block_size = shape.block_size
            rows[f"batch_{n}"] = compare_writers(writers, n, block_size, config.rounds, report)
    return {
        "machine": contenders.describe_machine(chosen),
        "model": asdict(shape),
        "parameters": count_parameters(model),
        "decoder": decoder.__name__,
        "generate": rows,
    }


def compare_writers(
    writers: dict[str, Write],
    n_texts: int,
    block_size: int,
    rounds: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Return the figures for one number of texts: the values of ``generate`` above."""
    n_new = block_size - 1 or 1

    def past() -> float:
        """Return the seconds of n_new characters after the first n_new."""
        shorter, longer = (writers[OWN](n_texts, n) for n in (n_new, n_new + block_size))
        return max(longer - shorter, 1e-9) * n_new / block_size

    jobs = {name: partial(write, n_texts, n_new) for name, write in writers.items()}
    table = contenders.compare({**jobs, PAST: past}, n_texts * n_new, rounds, report)
    row: dict[str, Any] = dict(table[OWN].speed)
    row["past_block_size"] = table[PAST].speed["characters_per_second"]
    peers = (("pytorch", PYTORCH), ("huggingface", HUGGING_FACE), ("nanogpt", NANOGPT))
    for key, name in peers:
        its = table.get(name)
        row[key] = its and its.speed["characters_per_second"]
        row[f"vs_{key}"] = its and its.times
    return row


def own_writer(model: GPT2, kernels: OnOffAuto) -> Write:
    """Return chargpt, writing as `chargpt.complete` does: each job makes a new decoder."""
    tokenizer = CharTokenizer(SYMBOLS)

    def write(n_texts: int, n_new: int) -> None:
        config = SampleConfig(num_samples=n_texts, temperature=TEMPERATURE, max_new_tokens=n_new)
        complete(model, tokenizer, ["\n"], config, batch_size=n_texts, kernels=kernels)

    return _timed(write, model.token_embedding.weight.device)


def hugging_face_writer(shape: GPT2Config, device: torch.device) -> Write:
    """Return ``generate`` of an untrained Hugging Face GPT-2 with its cache; or ImportError."""
    model = contenders.hugging_face_model(shape, device).eval()
    options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "use_cache": True}

    def write(n_texts: int, n_new: int) -> None:
        ids = torch.zeros(n_texts, 1, dtype=torch.long, device=device)  # (B, 1)
        lengths = {"max_new_tokens": n_new, "min_new_tokens": n_new, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), **options, **lengths)

    return _timed(write, device)


def _timed(write: Callable[[int, int], object], device: torch.device) -> Write:
    """Return a writer that warms up with two characters and returns the seconds it took."""

    def timed(n_texts: int, n_new: int) -> float:
        write(n_texts, 2)
        return seconds_of(lambda: write(n_texts, n_new), device)

    return timed


# Prints its time as train.py prints that of an iteration.
_DRIVER = """
import json, sys, time
import torch
from model import GPT, GPTConfig
device, shape, batch_size, n_new = json.loads(sys.argv[1])
torch.manual_seed(0)
gpt = GPT(GPTConfig(**shape)).to(device).eval()
ids = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
gpt.generate(ids, 2).tolist()  # waits for a GPU
start = time.perf_counter()
gpt.generate(ids, n_new, temperature=0.8).tolist()
print(f"iter 0: loss -, time {1000 * (time.perf_counter() - start):.9f}ms")
"""


def nanogpt_writer(clone: Path, shape: GPT2Config, device: torch.device) -> Write:
    """Return ``generate`` of a clone of nanoGPT, run by another process."""
    its = contenders.nanogpt_shape(shape) | {"vocab_size": shape.vocab_size, "bias": shape.bias}

    def write(n_texts: int, n_new: int) -> float:
        job = json.dumps([str(device), its, n_texts, n_new])
        return contenders.run_clone(clone, "model.py", ["-c", _DRIVER, job])[1][0]

    return write


def generation_table(figures: dict[str, Any]) -> str:
    """Return the figures of `bench_generation` as lines for a person."""
    model = f"{human_count(figures['parameters'])} parameters, fp32, random weights"
    lines = contenders.heading(figures["machine"], [("model", f"{model}; {figures['decoder']}")])
    lines.append(f"{'characters/s':<22}{'one text':>12}{'32 texts':>12}")
    one, many = (figures["generate"][f"batch_{n}"] for n in BATCHES)
    for key, name in (
        ("characters_per_second", OWN),
        ("past_block_size", "  past block_size"),
        ("pytorch", PYTORCH),
        ("vs_pytorch", "  chargpt is"),
        ("huggingface", HUGGING_FACE),
        ("vs_huggingface", "  chargpt is"),
        ("nanogpt", NANOGPT),
        ("vs_nanogpt", "  chargpt is"),
    ):
        if one[key] is not None:
            form = "{:.1f}×" if key.startswith("vs_") else "{:,.0f}"
            lines.append(f"{name:<22}{form.format(one[key]):>12}{form.format(many[key]):>12}")
    return "\n".join(lines)
