"""Write text: many prompts and samples at once, streamed.

`generate` yields text piece by piece, `complete` returns finished completions, and `sample` returns
one text as a string. For token ids, use `chargpt.engine.scheduler.Engine`.

A model reads at most block_size tokens. When the context is full, the model re-reads its last part
(the share ``context_kept``) from position 0 and continues. With 0.5, the context is between half of
block_size and all of it; with 1, always the last block_size tokens, re-read per character (slow).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from chargpt.base.callable_module import make_callable
from chargpt.base.checks import check_names
from chargpt.base.errors import UserError, is_out_of_memory
from chargpt.base.seeding import SAMPLE, derive_seed
from chargpt.compute.library import KernelsError, why_not_tried
from chargpt.config import OnOffAuto, SampleConfig
from chargpt.data import streaming
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.decoder import Decoder, PyTorchDecoder
from chargpt.engine.native_decoder import NativeDecoder, decodes
from chargpt.engine.scheduler import Engine, Finish, Token, TokenSequence
from chargpt.model import GPT2

BATCH_SIZE = 32


@dataclass(kw_only=True, eq=False)
class Completion:
    """A text that is being written, or is finished."""

    prompt: str
    index: int
    """Number of the prompt, from 0."""
    number: int
    """Number of the sample of its prompt, from 0."""
    text: str = ""
    """The new text so far, without the prompt and without stop strings."""
    tokens: list[Token] = field(default_factory=list)
    """One per character of a finished text, or one per byte if the model's tokens are bytes."""
    prompt_tokens: list[Token] = field(default_factory=list)
    """If requested, one per prompt character with a predecessor in the context, which is the end of
    the prompt. The first character has one only if documents start with end-of-text."""
    finish: Finish | None = None
    """Why it ended: ``length``, ``end_of_text`` or ``stop``; None: not finished."""


def generate(
    model: GPT2,
    tokenizer: CharTokenizer,
    prompts: Sequence[str],
    config: SampleConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    kernels: OnOffAuto = "auto",
    top_logprobs: int = 0,
    prompt_logprobs: bool = False,
) -> Iterator[tuple[Completion, str]]:
    """Continue prompts, and yield the new text piece by piece.

    A text depends on its prompt, the configuration and its seed, not on the texts beside it. The
    model stays in its mode, also between two pieces.

    Args:
        model: a GPT2 with this tokenizer's vocabulary, on any device.
        tokenizer: the model's.
        prompts: texts to continue; each gets one completion per seed.
        config: how to sample; its own prompt is not used.
        seeds: one per sample of a prompt; None: ``num_samples`` seeds, derived from the config.
        batch_size: texts to write at the same time.
        kernels: see `make_decoder`.
        top_logprobs: alternatives to return for each token.
        prompt_logprobs: return the log-probabilities of the prompts, too.

    Returns:
        An iterator of pairs: a completion (the same object for all its pieces) and its new piece.
        With the last piece, which may be empty, ``finish`` is set.

    Raises:
        UserError: an unknown character in a prompt or a bias, every character forbidden (both
            before the first piece), not enough memory, or a damaged model.
    """
    config = config or SampleConfig()
    bias = _bias(config, tokenizer)
    if seeds is None:
        seeds = [derive_seed(config.seed, SAMPLE, number) for number in range(config.num_samples)]
    encoded = [tokenizer.encode_prompt(prompt, unknown=config.unknown) for prompt in prompts]
    jobs = [
        (Completion(prompt=prompt, index=index, number=number), seed)
        for index, prompt in enumerate(prompts)
        for number, seed in enumerate(seeds)
    ]
    n_slots = max(1, min(batch_size, len(jobs)))
    with _enough_memory(n_slots):
        engine = Engine(make_decoder(model, n_slots, kernels))
    options = {"top_logprobs": top_logprobs, "prompt_logprobs": prompt_logprobs}
    return _stream(engine, encoded, jobs, config, tokenizer, bias=bias, **options)


def complete(
    model: GPT2,
    tokenizer: CharTokenizer,
    prompts: Sequence[str],
    config: SampleConfig | None = None,
    **options: Any,
) -> list[Completion]:
    """Return the finished completions: all samples of the first prompt, of the second, and so on.

    Takes the arguments of `generate`, and raises its errors.
    """
    pieces = generate(model, tokenizer, prompts, config, **options)
    done = [completion for completion, _ in pieces if completion.finish]
    return sorted(done, key=lambda completion: (completion.index, completion.number))


def sample(
    model: GPT2, tokenizer: CharTokenizer, config: SampleConfig | None = None, **changes: Any
) -> str:
    """Return one text: the prompt (unless ``echo`` is off) and its continuation.

    The configuration gives the prompt and the sampling, but not the number of texts; `changes`
    replace fields of `SampleConfig`, such as ``prompt="ROMEO: "``.

    Raises:
        UserError: an unknown field or a value out of range; see also `generate`.
    """
    check_names(changes, [each.name for each in fields(SampleConfig)])
    config = (config or SampleConfig()).replace(**changes)
    seeds = [derive_seed(config.seed, SAMPLE, 0)]
    [completion] = complete(model, tokenizer, [config.prompt], config, seeds=seeds)
    return (config.prompt if config.echo else "") + completion.text


def make_decoder(model: GPT2, n_slots: int, kernels: OnOffAuto = "auto") -> Decoder:
    """Return the fastest decoder for a model, for `n_slots` sequences at the same time.

    With kernels "auto", `NativeDecoder` if it supports the model and the kernels work; with "on",
    it or a `UserError`.
    """
    reason = "they do not support this model's device, type, activation or widths"
    if kernels != "off":
        try:
            if (kernels == "on" or not why_not_tried()) and decodes(model):
                return NativeDecoder(model, n_slots)
        except KernelsError as error:
            reason = f"they do not work here: {error}"
    if kernels == "on":
        raise UserError(f"kernels is 'on', but {reason}: give --kernels auto")
    return PyTorchDecoder(model, n_slots)


class NotEnoughMemoryError(UserError, MemoryError):
    """Memory ran out while writing texts."""


@contextmanager
def _enough_memory(n: int) -> Iterator[None]:
    """Turn "out of memory" with a batch of `n` texts into a `NotEnoughMemoryError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = "a text: use a smaller model"
        if n > 1:
            what = f"{n} texts at the same time: give --num-samples {n // 2} (batch_size in Python)"
        raise NotEnoughMemoryError(f"not enough memory to write {what}") from error


def _bias(config: SampleConfig, tokenizer: CharTokenizer) -> torch.Tensor | None:
    """Return what to add to the logits, (V,): -inf for a forbidden character."""
    if not config.logit_bias and not config.forbidden:
        return None
    bias = torch.zeros(tokenizer.vocab_size)
    for character, value in config.logit_bias.items():
        if character not in tokenizer.characters or tokenizer.n_tokens(character) != 1:
            raise UserError(
                f"logit_bias names {character!r}, which is no token of the model: leave it out"
            )
        bias[int(tokenizer.encode(character)[0])] = value
    if long := next((c for c in config.forbidden if tokenizer.n_tokens(c) != 1), ""):
        raise UserError(
            f"forbidden has {long!r}, which is several tokens of the model: leave it out"
        )
    bias[tokenizer.encode(config.forbidden, unknown="skip").tolist()] = -torch.inf
    if not torch.isfinite(bias[: len(tokenizer.characters)]).any():
        raise UserError("every character of the model is forbidden: allow at least one")
    return bias


# --- streaming


def _stream(
    engine: Engine,
    encoded: list[list[int]],
    waiting: list[tuple[Completion, int]],
    config: SampleConfig,
    tokenizer: CharTokenizer,
    **options: Any,
) -> Iterator[tuple[Completion, str]]:
    """Yield the pieces of `generate`; `waiting` has the seeds, `options` are for `Engine.add`."""
    writing: dict[TokenSequence, tuple[Completion, StopStringFilter, streaming.Decoder]] = {}
    with _enough_memory(engine.decoder.n_slots):
        while waiting or engine.active:
            while waiting and engine.n_free:
                index = waiting[0][0].index  # read a prompt once for as many samples as fit
                jobs = [job for job in waiting[: engine.n_free] if job[0].index == index]
                del waiting[: len(jobs)]
                seeds, end_id = [seed for _, seed in jobs], tokenizer.end_of_text_id
                added = engine.add(encoded[index], config, seeds, end_id=end_id, **options)
                for (completion, _), sequence in zip(jobs, added, strict=True):
                    completion.prompt_tokens = sequence.prompt_tokens
                    writing[sequence] = (
                        completion,
                        StopStringFilter(config.stop),
                        tokenizer.decoder(),
                    )
            for sequence, token in engine.step():
                completion, stop_filter, decoder = writing[sequence]
                piece = ""
                if token is not None:
                    completion.tokens.append(token)
                    piece = stop_filter.push(decoder.push(token.id))
                if sequence.finish:
                    piece += stop_filter.push(decoder.rest())
                completion.finish = "stop" if stop_filter.found else sequence.finish
                if completion.finish:
                    engine.remove(sequence, completion.finish)
                    piece += stop_filter.rest()
                    n_tokens = tokenizer.n_tokens(completion.text + piece)
                    del writing[sequence], completion.tokens[n_tokens:]
                completion.text += piece
                if piece or completion.finish:
                    yield completion, piece


class StopStringFilter:
    """Hold back text that may be part of a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = False
        """Whether a stop string was found; the text before it was returned, the rest is lost."""
        self._stop = stop
        self._held = ""

    def push(self, piece: str) -> str:
        """Add text of any length; return the text that cannot be part of a stop string."""
        if self.found:
            return ""
        text = self._held + piece
        places = [i for i in map(text.find, self._stop) if i >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        starts = (s[:n] for s in self._stop for n in range(1, len(s)))
        n = len(text) - max((len(start) for start in starts if text.endswith(start)), default=0)
        self._held = text[n:]
        return text[:n]

    def rest(self) -> str:
        """Return the text held back, when the text has ended without a stop string."""
        free, self._held = self._held, ""
        return free


make_callable(__name__, generate)
