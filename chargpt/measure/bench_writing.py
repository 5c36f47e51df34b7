"""How fast does this machine write? ``chargpt bench --generate`` in Python.

Everyone does the same job, in turns: from one character to as many as fit block_size, at
temperature 0.8, one text or 32 at a time, with random weights. Then chargpt goes on past
block_size. A speed is the median over the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch

from chargpt.base.errors import UserError
from chargpt.base.seeding import own_random_state
from chargpt.base.units import human_count
from chargpt.compute.counts import count_parameters
from chargpt.compute.device import choose_device, synchronize
from chargpt.config import Device, GPT2Config, OnOffAuto, SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.generate import complete, make_decoder
from chargpt.measure.bench import SYMBOLS, BenchConfig, Tell, describe_machine
from chargpt.measure.peers import copy_clone, hugging_face_model, parse_peers
from chargpt.model import GPT2

BATCHES = (1, 32)
TEMPERATURE = 0.8


class Writer(Protocol):
    """Something that writes text."""

    name: str

    def seconds(self, batch_size: int, n_new: int) -> float | None:
        """Return how long `batch_size` texts of `n_new` characters take; None: it cannot."""


def bench_generation(
    *,
    model_config: GPT2Config,
    device: Device = "auto",
    kernels: OnOffAuto = "auto",
    config: BenchConfig | None = None,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Measure generation on this machine.

    Args:
        model_config: the shape.
        device: where to write.
        kernels: see `chargpt.generate.make_decoder`.
        config: rounds and peers.
        tell: is given a line now and then.

    Returns:
        What ``--json`` prints: ``machine``, ``model`` and ``generate``, which has for ``batch_1``
        and ``batch_32``: ``characters_per_second`` of all texts together, ``_min`` and ``_max`` of
        it, ``past_block_size`` (the rate from there on), ``huggingface``, ``nanogpt`` (their
        rates) and ``vs_huggingface``, ``vs_nanogpt``; None for who is not there.

    Raises:
        UserError: anything wrong with the settings or a peer.
    """
    config = config or BenchConfig()
    clones = parse_peers(config.peers)
    chosen = choose_device(device).device
    shape = model_config.replace(vocab_size=len(SYMBOLS))
    with own_random_state(), ExitStack() as stack:
        torch.manual_seed(0)
        gpt2 = GPT2(shape).to(chosen).eval()
        own = Own(gpt2, kernels)
        writers: list[Writer] = [own, *_hugging_face(shape, chosen)]
        for clone in clones.values():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            writers.append(NanoGPT(clone, shape, chosen, folder))
        rows = {f"batch_{n}": _measure(writers, n, shape, config, tell) for n in BATCHES}
        decoder = type(make_decoder(gpt2, 1, kernels)).__name__
    return {
        "machine": describe_machine(chosen),
        "model": asdict(shape),
        "parameters": count_parameters(gpt2),
        "decoder": decoder,
        "generate": rows,
    }


def _measure(
    writers: Sequence[Writer], batch_size: int, shape: GPT2Config, config: BenchConfig, tell: Tell
) -> dict[str, Any]:
    """Return one batch size's row of the report."""
    n_new = shape.block_size - 1 or 1
    rates: dict[str, list[float]] = {}
    for number in range(1, config.rounds + 1):
        for writer in writers:
            seconds = writer.seconds(batch_size, n_new)
            assert seconds is not None
            rates.setdefault(writer.name, []).append(batch_size * n_new / seconds)
            longer = writer.seconds(batch_size, n_new + shape.block_size)
            if longer is not None:
                past = batch_size * shape.block_size / max(longer - seconds, 1e-9)
                rates.setdefault(f"{writer.name}, past", []).append(past)
            rate = human_count(rates[writer.name][-1])
            tell(f"round {number} of {config.rounds}: {writer.name}, {batch_size}: {rate}/s")
    own = rates[Own.name]
    row: dict[str, Any] = {
        "characters_per_second": statistics.median(own),
        "characters_per_second_min": min(own),
        "characters_per_second_max": max(own),
        "past_block_size": statistics.median(rates[f"{Own.name}, past"]),
    }
    for key, name in (("huggingface", HuggingFace.name), ("nanogpt", NanoGPT.name)):
        theirs = rates.get(name)
        row[key] = statistics.median(theirs) if theirs else None
        ratios = [a / b for a, b in zip(own, theirs or [], strict=False)]
        row[f"vs_{key}"] = statistics.median(ratios) if ratios else None
    return row


# --- who writes


class Own:
    """chargpt, as `chargpt.complete` writes: the decoder is made anew each time.

    Args:
        model: untrained.
        kernels: see `chargpt.generate.make_decoder`.
    """

    name = "chargpt"

    def __init__(self, model: GPT2, kernels: OnOffAuto) -> None:
        self.model, self.kernels = model, kernels
        self.tokenizer = CharTokenizer(SYMBOLS)

    def seconds(self, batch_size: int, n_new: int) -> float | None:
        """See `Writer`."""
        config = SampleConfig(num_samples=batch_size, temperature=TEMPERATURE)

        def job(n: int) -> None:
            complete(
                self.model,
                self.tokenizer,
                ["\n"],
                config.replace(max_new_tokens=n),
                batch_size=batch_size,
                kernels=self.kernels,
            )

        return _timed(job, n_new, self.model.token_embedding.weight.device)


def _hugging_face(shape: GPT2Config, device: torch.device) -> list[Writer]:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        return []
    return [HuggingFace(hugging_face_model(shape, transformers).to(device).eval(), device)]


class HuggingFace:
    """``generate`` of Hugging Face's GPT-2, with its cache.

    Args:
        model: a ``GPT2LMHeadModel``.
        device: where it is.
    """

    name = "Hugging Face GPT-2"

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device

    def seconds(self, batch_size: int, n_new: int) -> float | None:
        """See `Writer`."""
        if n_new >= self.model.config.n_positions:
            return None
        ids = torch.zeros(batch_size, 1, dtype=torch.long, device=self.device)  # (B, 1)
        options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "use_cache": True}

        def job(n: int) -> None:
            lengths = {"max_new_tokens": n, "min_new_tokens": n}
            mask = torch.ones_like(ids)
            self.model.generate(ids, attention_mask=mask, pad_token_id=0, **options, **lengths)

        return _timed(job, n_new, self.device)


_DRIVER = """
import json, sys, time
import torch
from model import GPT, GPTConfig
device, shape, jobs = json.loads(sys.argv[1])
torch.manual_seed(0)
gpt = GPT(GPTConfig(**shape)).to(device).eval()
def wait():
    if device.startswith("cuda"):
        torch.cuda.synchronize()
for batch_size, n_new in jobs:
    ids = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
    gpt.generate(ids, 2)
    wait()
    start = time.perf_counter()
    gpt.generate(ids, n_new, temperature=0.8)
    wait()
    print("seconds", time.perf_counter() - start)
"""


class NanoGPT:
    """``generate`` of a clone of nanoGPT, in a process of its own; the clone stays as it is.

    Args:
        clone: the folder with its ``model.py``.
        shape: of the model.
        device: where to write.
        folder: an empty one to run it in.
    """

    name = "nanoGPT"

    def __init__(self, clone: Path, shape: GPT2Config, device: torch.device, folder: Path) -> None:
        self.clone, self.device, self.folder = clone, device, folder
        self.shape = {
            "vocab_size": shape.vocab_size,
            "block_size": shape.block_size,
            "n_layer": shape.n_layer,
            "n_head": shape.n_head,
            "n_embd": shape.d_model,
            "bias": shape.bias,
        }
        copy_clone(clone, folder)

    def seconds(self, batch_size: int, n_new: int) -> float | None:
        """See `Writer`.

        Raises:
            UserError: the clone does not write.
        """
        if n_new >= self.shape["block_size"]:
            return None  # it reads block_size characters anew for each: known without waiting
        job = json.dumps([str(self.device), self.shape, [[batch_size, n_new]]])
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, job],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
            capture_output=True,
            text=True,
            check=False,
        )
        times = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("seconds")]
        if done.returncode or not times:
            said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
            raise UserError(f"{self.clone / 'model.py'} failed ({said}): see whether it runs alone")
        return float(times[0])


def _timed(job: Callable[[int], object], n_new: int, device: torch.device) -> float:
    """Return the seconds of a job over `n_new` characters, after a short one."""
    job(2)
    synchronize(device)
    start = time.perf_counter()
    job(n_new)
    synchronize(device)
    return time.perf_counter() - start


# --- for people


def generation_table(report: dict[str, Any]) -> str:
    """Return what `bench_generation` returned as lines for a person."""
    machine = report["machine"]
    lines = [
        f"{'device':<15}{machine['device']} ({machine['cpu']})",
        f"{'torch':<15}{machine['torch']}",
        f"{'model':<15}{human_count(report['parameters'])} parameters, fp32, random weights; "
        f"{report['decoder']}",
        "",
        f"{'characters/s':<22}{'one text':>12}{'32 texts':>12}",
    ]
    one, many = (report["generate"][f"batch_{n}"] for n in BATCHES)
    for key, name in (
        ("characters_per_second", "chargpt"),
        ("past_block_size", "  past block_size"),
        ("huggingface", HuggingFace.name),
        ("vs_huggingface", "  chargpt is"),
        ("nanogpt", NanoGPT.name),
        ("vs_nanogpt", "  chargpt is"),
    ):
        if one[key] is not None:
            cells = (_cell(key, row[key]) for row in (one, many))
            lines.append(f"{name:<22}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _cell(key: str, value: float) -> str:
    return f"{value:.1f}×" if key.startswith("vs_") else f"{value:,.0f}"
