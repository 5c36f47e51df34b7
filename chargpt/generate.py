"""Writing text: many texts at once, each streamed as it is written.

`generate` yields the tokens of one sequence; `write` turns the tokens of many into text, holding
back what might become a stop string; `complete` and `sample` return it whole.

A model sees what fits block_size. When that is full, it reads the last ``context_kept`` of it anew
from position 0 and goes on: learned positions are absolute, so the window cannot slide. With 0.5 it
always sees between half of block_size and all of it; with 1 exactly the last block_size
characters, which is as slow as it sounds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch

from chargpt.base.callable_module import make_callable
from chargpt.base.checks import check_names
from chargpt.base.errors import UserError
from chargpt.base.seeding import SAMPLE, derive_seed
from chargpt.compute.native import KernelsError
from chargpt.config import OnOffAuto, SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine import scheduler as engines
from chargpt.engine.decoder import Decoder, PyTorchDecoder
from chargpt.engine.native_decoder import NativeDecoder, decodes
from chargpt.engine.scheduler import Engine, Finish, Settings, Token
from chargpt.model import GPT2

BATCH_SIZE = 32


def make_decoder(model: GPT2, n_slots: int, kernels: OnOffAuto = "auto") -> Decoder:
    """Return the fastest decoder for a model.

    Args:
        model: on any device.
        n_slots: sequences at the same time.
        kernels: ``auto`` takes `NativeDecoder` on Linux where it suits and compiles.

    Raises:
        UserError: kernels were asked for, and do not suit or compile.
    """
    reason = "this model's device, type, activation or widths are not theirs"
    if kernels == "on" or (kernels == "auto" and sys.platform.startswith("linux")):
        try:
            if decodes(model):
                return NativeDecoder(model, n_slots)
        except KernelsError as error:
            reason = f"they cannot be compiled here: {error}"
    if kernels == "on":
        raise UserError(f"kernels is 'on', but {reason}: give --kernels auto")
    return PyTorchDecoder(model, n_slots)


def generate(
    model: GPT2,
    prompt: Sequence[int],
    *,
    seed: int = 0,
    kernels: OnOffAuto = "auto",
    **settings: Any,
) -> Iterator[Token]:
    """Yield new tokens of one sequence, each with its log-probability.

    The model is left in the mode it was in, also between two tokens.

    Args:
        model: any GPT2, on any device; changing it meanwhile may or may not have an effect.
        prompt: ids to continue, at least one.
        seed: the same seed yields the same tokens.
        kernels: see `make_decoder`.
        **settings: fields of `chargpt.engine.scheduler.Settings`, ``max_new_tokens`` at least.

    Raises:
        UserError: the prompt is empty or has ids out of range.
    """
    check_names(settings, [each.name for each in fields(Settings)])
    engine = Engine(make_decoder(model, 1, kernels))
    engine.add(prompt, Settings(**settings), [seed])
    while engine.active:
        for _, token in engine.step():
            yield token


# --- text


@dataclass(kw_only=True, eq=False)
class Completion:
    """A text in the making, or made."""

    prompt: str
    index: int
    """Which of the prompts it continues, from 0."""
    number: int
    """Which sample of its prompt, from 0."""
    text: str = ""
    """What the model wrote so far, without the prompt and without stop strings."""
    tokens: list[Token] = field(default_factory=list)
    """One for each character of the text, once that is finished."""
    prompt_tokens: list[Token] = field(default_factory=list)
    """One for each character of the prompt that the model had something to predict it from, if
    asked for: not for the first one, unless documents start with an end-of-text token. Of a prompt
    longer than block_size only the end is told."""
    finish: Finish | None = None
    """Why it ended: ``length``, ``end_of_text`` or ``stop``; None: it goes on."""


def write(
    model: GPT2,
    tokenizer: CharTokenizer,
    prompts: Sequence[str],
    config: SampleConfig | None = None,
    *,
    seeds: Sequence[int] | None = None,
    batch_size: int = BATCH_SIZE,
    kernels: OnOffAuto = "auto",
    top_logprobs: int = 0,
    tell_prompt: bool = False,
) -> Iterator[tuple[Completion, str]]:
    """Continue prompts, and yield new text piece by piece as it is written.

    A text depends on its prompt, the configuration and its seed, not on what is written beside it.

    Args:
        model: any GPT2 with this tokenizer's vocabulary.
        tokenizer: of the model.
        prompts: texts to continue, of any lengths; each gets a completion for each seed.
        config: how to sample; its own prompt is not used.
        seeds: of the samples of a prompt; None: ``num_samples`` of them, from the configuration's.
        batch_size: texts to write at the same time.
        kernels: see `make_decoder`.
        top_logprobs: alternatives to tell of each token.
        tell_prompt: tell the log-probabilities of the prompts, too.

    Returns:
        An iterator of a completion, the same object every time, and the text that it has just got.
        ``finish`` is set with its last piece, which may be empty.

    Raises:
        UserError: at once, characters that the model has never seen, or no character left to write.
    """
    config = config or SampleConfig()
    settings = make_settings(config, tokenizer, top_logprobs=top_logprobs)
    if seeds is None:
        seeds = [derive_seed(config.seed, SAMPLE, number) for number in range(config.num_samples)]
    encoded = [tokenizer.encode_prompt(prompt, unknown=config.unknown) for prompt in prompts]
    jobs = [
        _Job(Completion(prompt=prompt, index=index, number=number), encoded[index], seed)
        for index, prompt in enumerate(prompts)
        for number, seed in enumerate(seeds)
    ]
    engine = Engine(make_decoder(model, max(1, min(batch_size, len(jobs))), kernels))
    return _stream(engine, jobs, settings, tokenizer, config.stop, tell_prompt=tell_prompt)


class _Job(NamedTuple):
    completion: Completion
    ids: list[int]
    """Of the prompt."""
    seed: int


def _stream(
    engine: Engine,
    waiting: list[_Job],
    settings: Settings,
    tokenizer: CharTokenizer,
    stop: Sequence[str],
    *,
    tell_prompt: bool,
) -> Iterator[tuple[Completion, str]]:
    """Do what `write` says."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    writing: dict[engines.Sequence, tuple[Completion, Withheld]] = {}
    while waiting or engine.active:
        while waiting and engine.n_free:
            first = waiting[0]  # as many samples of one prompt as fit: it is read once
            jobs = [j for j in waiting[: engine.n_free] if j.completion.index == first[0].index]
            del waiting[: len(jobs)]
            seeds = [job.seed for job in jobs]
            added = engine.add(first.ids, settings, seeds, tell_prompt=tell_prompt)
            for job, sequence in zip(jobs, added, strict=True):
                job.completion.prompt_tokens = sequence.prompt_tokens
                writing[sequence] = job.completion, Withheld(stop)
        for sequence, token in engine.step():
            completion, withheld = writing[sequence]
            completion.tokens.append(token)
            piece = withheld.push(texts[token.id])
            completion.text += piece
            if withheld.found:
                engine.remove(sequence, "stop")
            finish: Finish | None = "stop" if withheld.found else sequence.finish
            if finish:
                yield _finished(writing.pop(sequence), piece, finish)
            elif piece:
                yield completion, piece
        for sequence in [s for s in writing if s.finish]:  # by end-of-text, which is no token here
            yield _finished(writing.pop(sequence), "", "end_of_text")


def _finished(
    written: tuple[Completion, Withheld], piece: str, finish: Finish
) -> tuple[Completion, str]:
    """End a completion whose last `piece` it has; return it with what it has not been given yet."""
    completion, withheld = written
    rest = withheld.rest()
    completion.text += rest
    completion.finish = finish
    del completion.tokens[len(completion.text) :]
    return completion, piece + rest


def complete(
    model: GPT2,
    tokenizer: CharTokenizer,
    prompts: Sequence[str],
    config: SampleConfig | None = None,
    **options: Any,
) -> list[Completion]:
    """Return what `write` writes, whole: the samples of the first prompt, of the second, ….

    Args:
        model: see `write`.
        tokenizer: of the model.
        prompts: texts to continue.
        config: how to sample.
        **options: the keyword arguments of `write`.

    Raises:
        UserError: see `write`.
    """
    pieces = write(model, tokenizer, prompts, config, **options)
    done = [completion for completion, _ in pieces if completion.finish]
    return sorted(done, key=lambda completion: (completion.index, completion.number))


def generate_text(
    model: GPT2,
    tokenizer: CharTokenizer,
    config: SampleConfig,
    *,
    number: int = 0,
    kernels: OnOffAuto = "auto",
) -> Iterator[str]:
    """Yield one new text piece by piece as it is written, without the prompt and stop strings.

    Args:
        model: any GPT2 with this tokenizer's vocabulary.
        tokenizer: of the model.
        config: prompt and sampling; ``num_samples`` is the caller's loop.
        number: which of several samples, 0, 1, …: each has random numbers of its own.
        kernels: see `make_decoder`.

    Raises:
        UserError: the prompt has characters that the model has never seen.
    """
    seeds = [derive_seed(config.seed, SAMPLE, number)]
    pieces = write(model, tokenizer, [config.prompt], config, seeds=seeds, kernels=kernels)
    return (piece for _, piece in pieces if piece)


def sample(
    model: GPT2, tokenizer: CharTokenizer, config: SampleConfig | None = None, **changes: Any
) -> str:
    """Return one text: the prompt (unless ``echo`` is off) and what the model writes after it.

    Args:
        model: any GPT2 with this tokenizer's vocabulary.
        tokenizer: of the model.
        config: prompt and sampling.
        **changes: fields of `SampleConfig` to set otherwise, such as ``prompt="ROMEO: "``.

    Raises:
        UserError: a field out of range, or a prompt character that the model has never seen.
    """
    check_names(changes, [each.name for each in fields(SampleConfig)])
    config = (config or SampleConfig()).replace(**changes)
    text = "".join(generate_text(model, tokenizer, config))
    return config.prompt + text if config.echo else text


def make_settings(
    config: SampleConfig, tokenizer: CharTokenizer, *, top_logprobs: int = 0
) -> Settings:
    """Return a sampling configuration in terms of token ids.

    Raises:
        UserError: a bias of a character that the model has never seen, or every character is
            forbidden.
    """
    return Settings(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        bias=_bias(config, tokenizer),
        end_id=tokenizer.end_of_text_id,
        context_kept=config.context_kept,
        top_logprobs=top_logprobs,
    )


def _bias(config: SampleConfig, tokenizer: CharTokenizer) -> torch.Tensor | None:
    """Return what is added to the logits, (V,): -inf for a forbidden character."""
    if not config.logit_bias and not config.forbidden:
        return None
    bias = torch.zeros(tokenizer.vocab_size)
    for character, value in config.logit_bias.items():
        if character not in tokenizer.characters:
            raise UserError(
                f"logit_bias names {character!r}, which the model has never seen: leave it out"
            )
        bias[int(tokenizer.encode(character)[0])] = value
    bias[tokenizer.encode(config.forbidden, unknown="skip").tolist()] = -torch.inf
    if not torch.isfinite(bias[: len(tokenizer.characters)]).any():
        raise UserError("every character of the model is forbidden: leave it at least one")
    return bias


class Withheld:
    """Text that is let out as soon as it cannot be part of a stop string.

    Args:
        stop: strings that end the text; none: everything is let out at once.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = False
        """Whether a stop string has come; all before it has been let out, nothing after it is."""
        self._stop = stop
        self._held = ""

    def push(self, piece: str) -> str:
        """Add text of any length; return what is free to go."""
        if not self._stop or self.found:
            return "" if self.found else piece
        self._held += piece
        places = [i for i in map(self._held.find, self._stop) if i >= 0]
        if places:
            self.found = True
            return self._let_out(min(places), keep=False)
        return self._let_out(len(self._held) - max(_overlap(self._held, s) for s in self._stop))

    def rest(self) -> str:
        """Return what is held back, for a text that has ended without a stop string."""
        return self._let_out(len(self._held))

    def _let_out(self, n: int, *, keep: bool = True) -> str:
        out, self._held = self._held[:n], self._held[n:] if keep else ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


make_callable(__name__, generate)
