"""Writing text: one character at a time, each drawn from what the model expects next.

At the bottom `generate` yields token ids; `generate_text` turns them into text, holding back
what might become a stop string. Past ``block_size`` the model sees the last ``block_size``
characters: learned positions are absolute, so the window is read afresh for every character.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from chargpt.config import SampleConfig
from chargpt.errors import UserError
from chargpt.evaluation import evaluating
from chargpt.model import GPT2
from chargpt.seeding import SAMPLE, derive_seed
from chargpt.tokenizer import CharTokenizer
from chargpt.validation import check_names


def filter_logits(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Return logits to draw from: sharpened by temperature, -inf where a filter forbids.

    The filters are applied in the order of the arguments. Exactly ``top_k`` tokens stay, ties or
    not; ``top_p`` keeps the fewest likeliest tokens that hold at least that probability (Holtzman
    et al. 2020, section 3.1).

    Args:
        logits: (..., V).
        temperature: 0 leaves only the likeliest token.
        top_k: tokens to keep; 0: all.
        top_p: probability to keep, in (0, 1].
    """
    if temperature == 0:
        top_k, temperature = 1, 1.0
    # From the largest down: dividing by a tiny temperature gives -inf at worst, never inf or NaN.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    logits = logits / max(temperature, torch.finfo(logits.dtype).tiny)
    if 0 < top_k < logits.size(-1):
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    if top_p < 1.0:
        ordered = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.values.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # held by the likelier ones
        values = ordered.values.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ordered.indices, values)
    return logits


def sample_next(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw a token from each row of filtered logits.

    Args:
        logits: (B, V).
        generator: of the random numbers; None: torch's default one.

    Returns:
        Token ids, (B,).
    """
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)


def generate(
    model: GPT2,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    end_id: int | None = None,
) -> Iterator[int]:
    """Yield the ids of new tokens, each drawn given all before it (up to block_size of them).

    The model is left in the mode it was in, also between two tokens.

    Args:
        model: any GPT2, on any device.
        prompt: ids to continue, at least one.
        max_new_tokens: yield at most this many.
        temperature: see `filter_logits`; so are top_k and top_p.
        top_k: tokens to draw among.
        top_p: probability to draw from.
        seed: the same seed yields the same tokens.
        end_id: stop before this token; None: never.

    Raises:
        UserError: the prompt is empty.
    """
    if len(prompt) == 0:
        raise UserError("the prompt has no tokens: give at least one character")
    generator = torch.Generator().manual_seed(seed)
    ids = [int(i) for i in prompt]
    for _ in range(max_new_tokens):
        logits = next_logits(model, ids[-model.config.block_size :])  # (V,)
        logits = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        next_id = int(sample_next(logits[None], generator))
        if next_id == end_id:
            return
        ids.append(next_id)
        yield next_id


@torch.inference_mode()
def next_logits(model: GPT2, ids: Sequence[int]) -> Tensor:
    """Return the logits of the token after `ids`, shape (V,), fp32, on the CPU.

    Args:
        model: any GPT2.
        ids: 1 to block_size token ids.
    """
    device = model.token_embedding.weight.device
    with evaluating(model):
        logits: Tensor = model(torch.tensor([[int(i) for i in ids]], device=device))  # (1, T, V)
    return logits[0, -1].float().cpu()


def generate_text(
    model: GPT2, tokenizer: CharTokenizer, config: SampleConfig, *, number: int = 0
) -> Iterator[str]:
    """Yield new text piece by piece as it is written, without the prompt and without stop strings.

    Args:
        model: any GPT2 with this tokenizer's vocabulary.
        tokenizer: of the model.
        config: prompt and sampling; ``num_samples`` is the caller's loop.
        number: which of several samples, 0, 1, …: each has random numbers of its own.

    Raises:
        UserError: the prompt has characters that the model has never seen.
    """
    ids = generate(
        model,
        encode_prompt(config.prompt, tokenizer, config),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=derive_seed(config.seed, SAMPLE, number),
        end_id=tokenizer.end_of_text_id,
    )
    return until_stop((tokenizer.decode([i]) for i in ids), config.stop)


def encode_prompt(prompt: str, tokenizer: CharTokenizer, config: SampleConfig) -> list[int]:
    """Return the ids to start from: the prompt, after what a document starts with.

    Raises:
        UserError: characters that the model has never seen, with ``config.unknown`` "error".
    """
    ids = [int(i) for i in tokenizer.encode(prompt, unknown=config.unknown)]
    if tokenizer.end_of_text_id is not None:
        return [tokenizer.end_of_text_id, *ids]
    # One text has no start of its own: the start of a line is the nearest thing.
    start = "\n" if "\n" in tokenizer.characters else tokenizer.characters[0]
    return ids or [int(i) for i in tokenizer.encode(start)]


def until_stop(pieces: Iterator[str], stop: Sequence[str]) -> Iterator[str]:
    """Yield text up to the first stop string, never a part of it.

    Text that might be the start of a stop string waits until it is known not to be one.

    Args:
        pieces: text, in pieces of any length.
        stop: strings that end the text; none: everything is passed on.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = min((i for i in (held.find(s) for s in stop) if i >= 0), default=-1)
        if found >= 0:
            if found:
                yield held[:found]
            return
        free = len(held) - max((_overlap(held, s) for s in stop), default=0)
        if free:
            yield held[:free]
            held = held[free:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


def sample(
    model: GPT2, tokenizer: CharTokenizer, config: SampleConfig | None = None, **changes: Any
) -> str:
    """Return one text: the prompt and what the model writes after it.

    Args:
        model: any GPT2 with this tokenizer's vocabulary.
        tokenizer: of the model.
        config: prompt and sampling.
        **changes: fields of `SampleConfig` to set otherwise, such as ``prompt="ROMEO: "``.

    Raises:
        UserError: a field out of range, or a prompt character that the model has never seen.
    """
    check_names(changes, [field.name for field in fields(SampleConfig)])
    config = (config or SampleConfig()).replace(**changes)
    return config.prompt + "".join(generate_text(model, tokenizer, config))
