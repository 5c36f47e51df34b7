"""How fast does this machine write? ``chargpt bench --generate`` in Python.

All contenders take turns at the same job: from one character to as many as fit block_size, at
temperature 0.8, one text or 32 at a time, with random weights. chargpt also writes past block_size.
A speed is the median over the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from chargpt.base.seeding import own_random_state
from chargpt.base.units import human_count
from chargpt.compute.counts import count_parameters
from chargpt.compute.device import choose_device
from chargpt.config import Device, GPT2Config, OnOffAuto, SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.generate import complete, make_decoder
from chargpt.measure import contenders
from chargpt.measure.bench import SYMBOLS, BenchConfig, describe_machine
from chargpt.measure.contenders import NANOGPT, OWN, Contender, Rates
from chargpt.measure.timing import seconds_of
from chargpt.model import GPT2

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

    Args:
        model_config: the shape.
        device: where to compute.
        kernels: see `chargpt.generate.make_decoder`.
        config: rounds and peers.
        report: prints a line of progress.

    Returns:
        What ``--json`` prints: ``machine``, ``model`` and ``generate``, which has for ``batch_1``
        and ``batch_32``: ``characters_per_second`` of all texts together, its ``_min`` and
        ``_max``, ``past_block_size`` (the speed from there), ``huggingface``, ``nanogpt`` (their
        speeds) and ``vs_huggingface``, ``vs_nanogpt``; None for a contender that is missing.

    Raises:
        UserError: a setting or a peer is wrong.
    """
    config = config or BenchConfig()
    clones = contenders.parse_peers(config.peers)
    chosen = choose_device(device).device
    shape = model_config.replace(vocab_size=len(SYMBOLS))
    with own_random_state(), ExitStack() as stack:
        torch.manual_seed(0)
        model = GPT2(shape).to(chosen).eval()
        writers = {OWN: own_writer(model, kernels)}
        with suppress(ImportError):
            writers[HUGGING_FACE] = hugging_face_writer(shape, chosen)
        if clones:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            writers[NANOGPT] = nanogpt_writer(clones["nanogpt"], shape, chosen, folder)
        rows = {}
        for n_texts in BATCHES:
            report(f"texts at a time: {n_texts}")
            turns = make_contenders(writers, n_texts, shape.block_size)
            rates = contenders.take_turns(turns, config.rounds, report)
            rows[f"batch_{n_texts}"] = _row(rates)
        decoder = type(make_decoder(model, 1, kernels)).__name__
    return {
        "machine": describe_machine(chosen),
        "model": asdict(shape),
        "parameters": count_parameters(model),
        "decoder": decoder,
        "generate": rows,
    }


def make_contenders(writers: dict[str, Write], n_texts: int, block_size: int) -> list[Contender]:
    """Return a contender for each writer, and one for chargpt past block_size."""
    n_new = block_size - 1 or 1
    own = writers[OWN]

    def past() -> float:
        """Return the speed of the characters that follow the first block_size."""
        shorter, longer = own(n_texts, n_new), own(n_texts, n_new + block_size)
        return n_texts * block_size / max(longer - shorter, 1e-9)

    def within(write: Write) -> Callable[[], float]:
        return lambda: n_texts * n_new / write(n_texts, n_new)

    turns = [Contender(name, within(write)) for name, write in writers.items()]
    return [*turns, Contender(PAST, past)]


def _row(rates: Rates) -> dict[str, Any]:
    """Return the row of the report for one number of texts."""
    row: dict[str, Any] = contenders.summary(rates[OWN])
    row["past_block_size"] = statistics.median(rates[PAST])
    for key, name in (("huggingface", HUGGING_FACE), ("nanogpt", NANOGPT)):
        row[key] = statistics.median(rates[name]) if name in rates else None
        row[f"vs_{key}"] = contenders.ratio(rates, name)
    return row


# --- writers


def own_writer(model: GPT2, kernels: OnOffAuto) -> Write:
    """Return chargpt, writing as `chargpt.complete` does: each job makes a new decoder."""
    tokenizer = CharTokenizer(SYMBOLS)

    def write(n_texts: int, n_new: int) -> None:
        config = SampleConfig(num_samples=n_texts, temperature=TEMPERATURE, max_new_tokens=n_new)
        complete(model, tokenizer, ["\n"], config, batch_size=n_texts, kernels=kernels)

    return _timed(write, model.token_embedding.weight.device)


def hugging_face_writer(shape: GPT2Config, device: torch.device) -> Write:
    """Return ``generate`` of an untrained Hugging Face GPT-2, with its cache.

    Raises:
        ImportError: the package transformers is not installed.
    """
    model = contenders.hugging_face_model(shape, device).eval()
    options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "use_cache": True}

    def write(n_texts: int, n_new: int) -> None:
        ids = torch.zeros(n_texts, 1, dtype=torch.long, device=device)  # (B, 1)
        lengths = {"max_new_tokens": n_new, "min_new_tokens": n_new}
        model.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options, **lengths
        )

    return _timed(write, device)


def _timed(write: Callable[[int, int], object], device: torch.device) -> Write:
    """Return a writer that warms up with two characters and returns the seconds it took."""

    def timed(n_texts: int, n_new: int) -> float:
        write(n_texts, 2)
        return seconds_of(lambda: write(n_texts, n_new), device)

    return timed


_DRIVER = """
import json, sys, time
import torch
from model import GPT, GPTConfig
device, shape, batch_size, n_new = json.loads(sys.argv[1])
torch.manual_seed(0)
gpt = GPT(GPTConfig(**shape)).to(device).eval()
def wait():
    if device.startswith("cuda"):
        torch.cuda.synchronize()
ids = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
gpt.generate(ids, 2)
wait()
start = time.perf_counter()
gpt.generate(ids, n_new, temperature=0.8)
wait()
print("seconds", time.perf_counter() - start)
"""


def nanogpt_writer(clone: Path, shape: GPT2Config, device: torch.device, folder: Path) -> Write:
    """Return ``generate`` of a clone of nanoGPT, run in an empty folder by another process."""
    copy = contenders.Clone(clone, folder)
    its_shape = {
        "vocab_size": shape.vocab_size,
        "block_size": shape.block_size,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_embd": shape.d_model,
        "bias": shape.bias,
    }

    def write(n_texts: int, n_new: int) -> float:
        job = json.dumps([str(device), its_shape, n_texts, n_new])
        lines = copy.run("model.py", ["-c", _DRIVER, job]).splitlines()
        times = [line.split()[1] for line in lines if line.startswith("seconds ")]
        if not times:
            raise copy.failure("model.py", "it printed no time")
        return float(times[0])

    return write


# --- for people


def generation_table(figures: dict[str, Any]) -> str:
    """Return the figures of `bench_generation` as lines for a person."""
    machine = figures["machine"]
    lines = [
        f"{'device':<15}{machine['device']} ({machine['cpu']})",
        f"{'torch':<15}{machine['torch']}",
        f"{'model':<15}{human_count(figures['parameters'])} parameters, fp32, random weights; "
        f"{figures['decoder']}",
        "",
        f"{'characters/s':<22}{'one text':>12}{'32 texts':>12}",
    ]
    one, many = (figures["generate"][f"batch_{n}"] for n in BATCHES)
    for key, name in (
        ("characters_per_second", OWN),
        ("past_block_size", "  past block_size"),
        ("huggingface", HUGGING_FACE),
        ("vs_huggingface", "  chargpt is"),
        ("nanogpt", NANOGPT),
        ("vs_nanogpt", "  chargpt is"),
    ):
        if one[key] is not None:
            form = "{:.1f}×" if key.startswith("vs_") else "{:,.0f}"
            lines.append(f"{name:<22}{form.format(one[key]):>12}{form.format(many[key]):>12}")
    return "\n".join(lines)
