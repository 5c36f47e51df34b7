"""Hugging Face transformers: a run as a folder with a GPT2LMHeadModel, and such a folder as a run.

    model.safetensors  config.json  generation_config.json     the model
    tokenizer.json  tokenizer_config.json                      one character, one token
    README.md                                                  the model card

transformers 4 and 5 load it, and need no code of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from chargpt.base.errors import UserError
from chargpt.base.files import new_folder, write_bytes, write_json, write_text
from chargpt.compute.counts import count_parameters
from chargpt.config import CheckpointName, SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.export.facts import gather_facts
from chargpt.export.huggingface import mapping
from chargpt.export.huggingface import tokenizer as hf_tokenizer
from chargpt.export.huggingface.card import model_card
from chargpt.export.huggingface.hub import check_push
from chargpt.export.huggingface.hub import push as upload
from chargpt.export.huggingface.reading import load_hf
from chargpt.export.huggingface.verify import N_GREEDY, verify_hf
from chargpt.model import GPT2
from chargpt.runs.folder import load_characters
from chargpt.runs.imported import write_imported_run
from chargpt.runs.weights import model_tensors, to_bytes


def export_hf(
    run: Path,
    out: Path,
    *,
    which: CheckpointName = "best",
    push: str | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """Write a run's model for transformers, compare it with the run, and upload it if asked.

    Args:
        run: the run folder.
        out: a folder that does not exist, or is empty.
        which: the checkpoint.
        push: a repository of the Hugging Face Hub, ``USER/NAME``; None: do not upload.
        report: receives lines of progress.

    Returns:
        A line: what was written, how large, how exact.

    Raises:
        UserError: transformers is missing or cannot compute this model, `out` is taken, or the
            upload failed; then `out` stays.
        VerificationError: transformers computes something else. Nothing is left.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"transformers cannot be imported ({error}): pip install 'chargpt[hf]'"
        ) from error
    if push is not None:
        check_push(push)
    model, tokenizer = load_characters(run, which=which)
    mapping.refuse_inexpressible(model.config)
    with new_folder(out) as folder:
        _write_model(folder, model, tokenizer)
        report(f"comparing with the run under transformers {transformers.__version__}")
        worst = verify_hf(folder, model, tokenizer)
        facts = gather_facts(run, model, tokenizer, which=which, report=report)
        card = model_card(facts, model.config, tokenizer, place=push or "this/folder")
        write_text(folder / "README.md", card)
    size = sum(file.stat().st_size for file in out.iterdir())
    line = (
        f"{out}: {count_parameters(model):,} parameters, {size / 1e6:.1f} MB; the logits differ by "
        f"at most {worst:.1g}, and {N_GREEDY} greedy characters are the same"
    )
    if push is not None:
        report(f"uploading to {push}")
        line += f"; uploaded to {upload(out, push)}"
    return line


def _write_model(folder: Path, model: GPT2, tokenizer: CharTokenizer) -> None:
    """Write all files but the card."""
    config = model.config
    tensors = mapping.to_hf_tensors(model_tensors(model), config.n_layer)
    write_bytes(folder / "model.safetensors", to_bytes(tensors))
    write_json(folder / "config.json", mapping.to_hf_config(config, tokenizer))
    write_json(folder / "generation_config.json", _generation_config(model, tokenizer))
    text = hf_tokenizer.to_hf_tokenizer(tokenizer).to_str(pretty=True)
    write_text(folder / "tokenizer.json", text + "\n")
    settings = hf_tokenizer.to_hf_tokenizer_config(tokenizer, config.block_size)
    write_json(folder / "tokenizer_config.json", settings)


def _generation_config(model: GPT2, tokenizer: CharTokenizer) -> dict[str, Any]:
    """Return the defaults of `generate`: those of ``chargpt sample``, within the context."""
    defaults = SampleConfig()
    end = {} if tokenizer.end_of_text_id is None else dict.fromkeys(
        ("eos_token_id", "pad_token_id"), tokenizer.end_of_text_id
    )  # fmt: skip
    return {
        "do_sample": True,
        "temperature": defaults.temperature,
        "top_k": defaults.top_k,
        "top_p": defaults.top_p,
        "max_length": model.config.block_size,
        "bos_token_id": tokenizer.encode_prompt("")[0],
        **end,
    }


def import_hf(path: Path, out: Path) -> str:
    """Make a run of a folder of transformers, which may come from a stranger.

    Args:
        path: a folder that `export_hf` wrote, or another GPT2LMHeadModel in safetensors whose
            tokenizer has one token per character.
        out: the new run folder.

    Returns:
        A line: what was written.

    Raises:
        UserError: the folder holds another kind of model or is damaged, or `out` is taken.
    """
    model, tokenizer = load_hf(path)
    write_imported_run(out, model, tokenizer, origin="Hugging Face transformers")
    return (
        f"{out}: {count_parameters(model):,} parameters and {tokenizer.vocab_size} tokens from "
        f"{path}; write with `chargpt sample {out}`"
    )
