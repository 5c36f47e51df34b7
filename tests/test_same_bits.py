"""On the kernels in fp32, threads and the variant of the kernels do not change a bit.

Each test selects both as a user does, for the whole process.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK
from twin import shake
from variants import COMPILERS, VARIANTS

from chargpt.compute import library, native
from chargpt.compute.library import CHOICE, capabilities
from chargpt.config import GPT2Config, SampleConfig, TrainConfig
from chargpt.engine import native_decoder
from chargpt.generate import complete
from chargpt.model import GPT2
from chargpt.train import TrainResult, train

if not COMPILERS:
    pytest.skip("no C++ compiler here", allow_module_level=True)

RUNNABLE = [name for name, variant in VARIANTS.items() if variant.needs <= capabilities()]
# Every number of threads once, and every variant once, on two threads.
PLACES = [(RUNNABLE[-1], threads) for threads in (1, 2, 4)] + [(name, 2) for name in RUNNABLE[:-1]]
BF16 = [name for name in RUNNABLE if "bf16" in name or name == "amx"]
# More than one block of rows, heads of 16, and a vocabulary that is no multiple of 16.
SHAPE = GPT2Config(block_size=40, n_layer=2, n_head=2, d_model=32, d_ff=80, dropout=0.0)
RUN = QUICK.replace(
    steps=4, eval_interval=2, save_interval=1, batch_size=5, kernels="on", learning_rate=0.01
)
RUNS: dict[str, tuple[GPT2Config, TrainConfig]] = {
    "AdamW": (SHAPE.replace(dropout=0.2), RUN.replace(gradient_accumulation_steps=2)),
    "Muon": (SHAPE.replace(bias=False), RUN.replace(optimizer="muon", grad_clip=0.1)),
    "post": (SHAPE.replace(norm_placement="post"), RUN),
    "sandwich": (SHAPE.replace(norm_placement="sandwich"), RUN),
}
FILTERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "bias": {"logit_bias": {"e": 2.0}, "forbidden": "k"},
}

Use = Callable[[str, int], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Return a function that selects a variant and a number of threads."""
    threads_before = torch.get_num_threads()

    def load_again() -> None:
        library._find_once.cache_clear()
        native.load_kernels.cache_clear()
        native.bf16_gain.cache_clear()

    def select(variant: str, threads: int) -> None:
        monkeypatch.setenv(CHOICE, variant)
        load_again()
        torch.set_num_threads(threads)
        assert library.get_library().variant.name == variant

    yield select
    monkeypatch.undo()
    load_again()
    torch.set_num_threads(threads_before)


def digests(run: Path) -> dict[str, Any]:
    """Return what must have the same bits: weights, moments, and each row but its times."""
    files = [
        f"{name}/{file}.safetensors"
        for name, file in (("last", "model"), ("last", "optimizer"), ("best", "model"))
    ]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "rows": [
            {name: value for name, value in row.items() if "second" not in name} for row in rows
        ],
        "samples": (run / "samples.txt").read_text("utf-8"),
        **{file: hashlib.sha256((run / file).read_bytes()).hexdigest() for file in files},
    }


def trained(
    text_file: Path, out: Path, name: str, resume: bool = False, **changes: Any
) -> TrainResult:
    model_config, train_config = RUNS[name]
    configs: Any = {"model_config": model_config, "train_config": train_config.replace(**changes)}
    return train(str(text_file), **configs, out=out, resume=resume, quiet=not resume)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_same_bits_with_any_threads_and_variant(
    use: Use, tmp_path: Path, text_file: Path, name: str
) -> None:
    results = {}
    for variant, threads in PLACES:
        use(variant, threads)
        run = trained(text_file, tmp_path / f"{variant}-{threads}", name).run
        results[variant, threads] = digests(run)
    expected = results[PLACES[0]]
    losses = [row.get("loss", row.get("val_loss")) for row in expected["rows"]]
    assert len(losses) == 6 and len(set(losses)) == 6  # four steps and two evaluations
    for place in PLACES:
        assert results[place] == expected, place


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_a_run_resumed_elsewhere(
    use: Use, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str], kernels: Any
) -> None:
    """It continues with the same bits, or says that it may not."""
    changes: Any = {"kernels": kernels, "cooldown_fraction": 0.0, "warmup_fraction": 0.0}
    use(RUNNABLE[-1], 1)
    expected = digests(trained(text_file, tmp_path / "whole", "AdamW", **changes).run)
    cut = trained(text_file, tmp_path / "cut", "AdamW", steps=2, **changes).run
    use(RUNNABLE[0], 2)
    changes["precision"] = "auto"  # it stays as the run started
    resumed = digests(trained(text_file, cut, "AdamW", resume=True, **changes).run)
    printed = capsys.readouterr().err
    assert "resuming   after step 2" in printed and "precision  fp32" in printed
    if kernels == "on":
        assert resumed == expected and "may differ" not in printed
    else:
        assert "resuming   threads was 1, is 2: losses may differ by rounding" in printed


@pytest.mark.parametrize("filters", FILTERS)
def test_written_text_has_the_same_bits(
    use: Use, monkeypatch: pytest.MonkeyPatch, result: TrainResult, filters: str
) -> None:
    """The tokens and their log-probabilities; every read is shared by all threads."""
    monkeypatch.setattr(native_decoder, "THREADS_FROM", 0)
    config = SampleConfig(max_new_tokens=40, num_samples=3, seed=5, **FILTERS[filters])
    model = shake(GPT2(SHAPE.replace(vocab_size=result.tokenizer.vocab_size)), seed=1, std=0.2)
    written = []
    for variant, threads in PLACES:
        use(variant, threads)
        options: Any = {"kernels": "on", "top_logprobs": 2}
        completions = complete(model, result.tokenizer, ["the", "queen of"], config, **options)
        written.append([completion.tokens for completion in completions])
    assert len(written[0]) == 6 and all(len(tokens) == 40 for tokens in written[0])
    for place, tokens in zip(PLACES, written, strict=True):
        assert tokens == written[0], place


@pytest.mark.skipif(not BF16, reason="this processor has no bf16 products")
def test_bf16_has_the_same_bits_with_any_threads(use: Use, tmp_path: Path, text_file: Path) -> None:
    for name, variant in product(RUNS, BF16):
        results = []
        for threads in (1, 2):
            use(variant, threads)
            out = tmp_path / f"{name}-{variant}-{threads}"
            results.append(digests(trained(text_file, out, name, precision="bf16").run))
        assert results[0] == results[1], (name, variant)
