"""A run folder for a model that was trained elsewhere: a best checkpoint, no text, no optimizer."""

from __future__ import annotations

from pathlib import Path

import torch

from chargpt.base.errors import UserError
from chargpt.base.files import new_folder
from chargpt.base.version import __version__
from chargpt.config import DataConfig, TrainConfig
from chargpt.data.passes import TextFacts
from chargpt.data.tokenizer import CharTokenizer
from chargpt.model import GPT2
from chargpt.runs.checkpoint import MODEL, save_checkpoint
from chargpt.runs.folder import RunConfig, write_config, write_tokenizer
from chargpt.runs.weights import model_tensors

UNKNOWN_TEXT = TextFacts(sha256="", boundaries="", n_characters=0, n_documents=0)


def write_imported_run(
    out: Path,
    model: GPT2,
    tokenizer: CharTokenizer,
    *,
    origin: str,
    step: int = 0,
    val_loss: float | None = None,
) -> None:
    """Write a run folder, which appears when it is complete.

    Args:
        out: a folder that does not exist, or is empty.
        model: in float32.
        tokenizer: the model's.
        origin: the program that trained the model, such as "nanoGPT"; users see it.
        step: optimizer steps that the model was trained for; 0: unknown.
        val_loss: its validation loss, in nats a token; None: unknown.

    Raises:
        UserError: `out` is taken or cannot be written, the tokenizer is not the model's, or a
            weight is NaN or infinite.
    """
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the model has {model.config.vocab_size} tokens and the vocabulary "
            f"{tokenizer.vocab_size}: give the vocabulary that it was trained with"
        )
    tensors = model_tensors(model)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} of the model is not finite: import an earlier checkpoint")
    config = RunConfig(
        model_config=model.config,
        train_config=TrainConfig(),
        data_config=DataConfig(),
        sources=(),
        text=UNKNOWN_TEXT,
        environment={"chargpt": __version__, "imported_from": origin},
    )
    with new_folder(out) as folder:
        save_checkpoint(folder, "best", {MODEL: tensors}, {"step": step, "val_loss": val_loss})
        write_tokenizer(folder, tokenizer)
        write_config(folder, config)
