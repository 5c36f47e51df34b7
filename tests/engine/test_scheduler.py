"""The engine, compared with an uncached model in float64 and draws in plain Python."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import slow
import torch
from twin import shake, untie

from chargpt.base.errors import UserError
from chargpt.config import GPT2Config, SampleConfig
from chargpt.engine.decoder import PyTorchDecoder
from chargpt.engine.native_decoder import NativeDecoder
from chargpt.engine.scheduler import Engine, Token, TokenSequence
from chargpt.generate import make_decoder
from chargpt.model import GPT2

T, V = 16, 19
INF = float("inf")


def some_model(**changes: Any) -> GPT2:
    shape = {"block_size": T, "vocab_size": V, "n_layer": 1, "n_head": 2, "d_model": 32}
    config = GPT2Config(**shape | {"dropout": 0.1} | changes)
    return untie(shake(GPT2(config), seed=1, std=0.4)).eval()


MODEL = some_model()


def some_ids(n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(V) for _ in range(n)]


def engine_of(model: GPT2, n_slots: int, kernels: Any) -> Engine:
    decoder = make_decoder(model, n_slots, kernels)
    assert type(decoder) is (NativeDecoder if kernels == "on" else PyTorchDecoder)
    return Engine(decoder)


def request(**settings: Any) -> dict[str, Any]:
    """Return keyword arguments of `Engine.add`; settings are fields of SampleConfig or options."""
    names = ("bias", "end_id", "top_logprobs", "prompt_logprobs")
    options = {name: settings.pop(name) for name in names if name in settings}
    if "bias" in options:
        options["bias"] = torch.tensor(options["bias"])
    return {"config": SampleConfig(**{"temperature": 1.0} | settings), **options}


def run(engine: Engine) -> dict[TokenSequence, list[Token]]:
    """Finish all sequences; return their tokens."""
    tokens: dict[TokenSequence, list[Token]] = {sequence: [] for sequence in engine.active}
    while engine.active:
        for sequence, token in engine.step():
            if token is None:
                assert sequence.finish == "end_of_text"
            else:
                tokens[sequence].append(token)
    return tokens


def alone(
    prompt: Sequence[int], request: dict[str, Any], seed: int, kernels: Any, model: GPT2 = MODEL
) -> tuple[list[Token], str | None]:
    """Return the tokens of a sequence without neighbours, and why it ended."""
    engine = engine_of(model, 1, kernels)
    [sequence] = engine.add(prompt, seeds=[seed], **request)
    return run(engine)[sequence], sequence.finish


def assert_tokens(ours: Sequence[Token], theirs: Sequence[Token], kernels: Any) -> None:
    """To the bit with the native decoder, alternatives included."""
    if kernels == "on":
        assert list(ours) == list(theirs)
        return
    assert [token.id for token in ours] == [token.id for token in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
        assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-5)


def assert_likelihoods(
    tokens: Sequence[Token], prompt: Sequence[int], model: GPT2, kept: float = 0.5, n_top: int = 0
) -> None:
    """Compare log-probabilities with those of the model without a cache."""
    ids = [token.id for token in tokens]
    slow.assert_likelihoods(tokens, slow.predictions(model, prompt, ids, kept), n_top)


# --- past block_size


@pytest.mark.parametrize("kept", [0.25, 0.5, 1.0])
def test_a_thousand_greedy_characters(kernels: Any, kept: float) -> None:
    """Far past block_size, where the model re-reads the last part of the text."""
    greedy = request(max_new_tokens=1000, temperature=0, context_kept=kept)
    engine = engine_of(MODEL, 5, kernels)
    for length in (1, T - 1, T, T + 1, 50):
        engine.add(some_ids(length, length), seeds=[0], **greedy)
    for sequence, tokens in run(engine).items():
        ids = [token.id for token in tokens]
        assert (len(ids), sequence.finish) == (1000, "length")
        assert len(set(ids)) > 8
        assert all(ids[-99:] != ids[-99 - n : -n] for n in range(1, 30)), "the text repeats"
        prompt = sequence.ids[:-1000]
        expected = slow.predictions(MODEL, prompt, ids[:-1], kept)  # (1000, V)
        assert ids == expected.argmax(-1).tolist()
        slow.assert_likelihoods(tokens, expected)


def test_the_reference_has_the_documented_windows() -> None:
    """With 1: the last block_size tokens; with 0.5: never less than half of them."""
    for length in (1, 5, T, 40):
        assert all(a == max(0, b - T) for a, b in slow.windows(length, 100, T, 1.0))
        seen = [end - start for start, end in slow.windows(length, 100, T, 0.5)]
        assert max(seen) == T
        assert min(seen[T:]) == T // 2
        # A quarter is kept, then the context grows until it is full again.
        quarter = [end - start for start, end in slow.windows(length, 200, T, 0.25)]
        assert quarter[quarter.index(T) + 1 :][: T - T // 4 + 1] == list(range(T // 4, T + 1))


@pytest.mark.parametrize(
    ("block_size", "kept"), [(1, 0.5), (1, 1.0), (2, 0.5), (3, 0.01), (7, 0.3), (16, 0.97)]
)
def test_unusual_window_sizes(kernels: Any, block_size: int, kept: float) -> None:
    """At least one token is kept."""
    model = some_model(block_size=block_size)
    for prompt in (some_ids(1, 0), some_ids(block_size, 1), some_ids(20, 2)):
        asked = request(max_new_tokens=60, context_kept=kept)
        tokens, _ = alone(prompt, asked, 3, kernels, model)
        assert_likelihoods(tokens, prompt, model, kept)


def test_only_the_end_of_a_long_prompt_is_read(kernels: Any) -> None:
    asked, prompt = request(max_new_tokens=60, top_logprobs=3), some_ids(100, 0)
    whole, _ = alone(prompt, asked, 0, kernels)
    assert_tokens(whole, alone(prompt[-T:], asked, 0, kernels)[0], kernels)
    assert whole != alone(prompt[-T + 1 :], asked, 0, kernels)[0]


# --- draws

SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.15},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.5, "temperature": 2.0},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7, "temperature": 0},
    {"frequency_penalty": -0.5, "presence_penalty": 1.0, "top_k": 5},
    {"bias": [2.0, -1.0, -INF, *[0.0] * 14, -INF, 1.0]},
    {"context_kept": 0.25},
    {"context_kept": 1.0, "temperature": 1.5},
    {"temperature": 1.8, "top_k": 9, "top_p": 0.9, "min_p": 0.02, "bias": [-INF, *[0.5] * 18]},
]
SAMPLING.append(SAMPLING[-1] | {"repetition_penalty": 1.2, "frequency_penalty": 0.2})


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_tokens_equal_the_slow_implementation(kernels: Any, sampling: dict[str, Any]) -> None:
    """Token by token: the same windows, filters and random numbers."""
    for seed, (length, end_id) in enumerate([(1, None), (30, None), (T, 4), (3, 7)]):
        asked = request(**sampling, max_new_tokens=40, top_logprobs=2, end_id=end_id)
        prompt = some_ids(length, seed)
        tokens, finish = alone(prompt, asked, seed, kernels)
        ids = [token.id for token in tokens]
        drawn = slow.continuation(MODEL, prompt, ids, seed=seed, end_id=end_id, **sampling)
        assert ids == drawn[:-1]
        assert end_id not in ids
        assert finish == ("end_of_text" if len(ids) < 40 else "length")
        assert len(ids) == 40 or drawn[-1] == end_id
        kept = sampling.get("context_kept", 0.5)
        assert_likelihoods(tokens, prompt, MODEL, kept, n_top=2)


def test_end_of_text_ends_a_sequence_at_any_place(kernels: Any) -> None:
    """Also as the first new token; a limit that is reached earlier wins."""
    greedy, _ = alone([1], request(max_new_tokens=30, temperature=0), 0, kernels)
    ids = [token.id for token in greedy]
    for end in sorted(set(ids)):
        first = ids.index(end)
        for n, finish in ((30, "end_of_text"), (first + 1, "end_of_text"), (first, "length")):
            if n:
                asked = request(max_new_tokens=n, temperature=0, end_id=end)
                tokens, why = alone([1], asked, 0, kernels)
                assert ([t.id for t in tokens], why) == (ids[:first], finish)


def test_alternatives_are_limited_by_the_vocabulary(kernels: Any) -> None:
    for n in (0, 1, V, V + 50):
        asked = request(max_new_tokens=3, top_logprobs=n, top_k=2)
        tokens, _ = alone([1], asked, 0, kernels)
        assert all(len(token.top) == min(n, V) for token in tokens)
        assert_likelihoods(tokens, [1], MODEL, n_top=n)


# --- neighbours


class Job:
    """A random sequence to write."""

    def __init__(self, rng: random.Random) -> None:
        self.prompt = some_ids(rng.choice([1, 3, T - 1, T, 40]), rng.randrange(10**6))
        self.seed = rng.randrange(10**6)
        self.request = request(
            **rng.choice(SAMPLING),
            max_new_tokens=rng.choice([1, 7, 30, 45]),
            end_id=rng.choice([None, 2, 11]),
            top_logprobs=rng.choice([0, 2]),
        )


@pytest.mark.parametrize("n_slots", [1, 2, 8, 32])
def test_neighbours_do_not_matter(kernels: Any, n_slots: int) -> None:
    """Neighbours with any prompts and settings join and leave; sequences wait for slots."""
    rng = random.Random(n_slots)
    waiting = [Job(rng) for _ in range(40 if kernels == "on" else 20)]
    jobs: dict[TokenSequence, Job] = {}
    tokens: dict[TokenSequence, list[Token]] = {}
    engine, n_jobs = engine_of(MODEL, n_slots, kernels), len(waiting)
    while waiting or engine.active:
        while waiting and engine.n_free and rng.random() < 0.6:
            job = waiting.pop()
            [sequence] = engine.add(job.prompt, seeds=[job.seed], **job.request)
            jobs[sequence], tokens[sequence] = job, []
        assert engine.n_free + len(engine.active) == n_slots
        assert len({sequence.slot for sequence in engine.active}) == len(engine.active)
        for sequence, token in engine.step():
            if token is not None:
                tokens[sequence].append(token)
    assert len(jobs) == n_jobs
    for sequence, job in jobs.items():
        expected, finish = alone(job.prompt, job.request, job.seed, kernels)
        assert_tokens(tokens[sequence], expected, kernels)
        assert sequence.finish == finish
        assert sequence.ids == job.prompt + [token.id for token in expected]


def test_neighbours_that_differ_in_one_option_are_drawn_apart(kernels: Any) -> None:
    """One configuration object, different biases and numbers of alternatives."""
    options: list[dict[str, Any]] = [{}, {"top_logprobs": 3}]
    options += [{"bias": [9.0 * (i == best) for i in range(V)]} for best in (3, 3, 5)]
    config, engine = SampleConfig(max_new_tokens=9), engine_of(MODEL, 5, kernels)
    requests = [request(**each) | {"config": config} for each in options]
    sequences = [engine.add([1], seeds=[2], **each)[0] for each in requests]
    tokens = run(engine)
    for each, sequence in zip(requests, sequences, strict=True):
        assert_tokens(tokens[sequence], alone([1], each, 2, kernels)[0], kernels)


@pytest.mark.parametrize("length", [1, 7, T, 33])
def test_samples_of_one_prompt_depend_on_their_seeds(kernels: Any, length: int) -> None:
    """The prompt is read once, beside another sequence that was there before."""
    prompt, seeds = some_ids(length, 8), [5, 6, 7, 2**63 - 1, 5]
    for sampling in ({}, {"repetition_penalty": 1.7}, {"temperature": 0}):
        asked = request(**sampling, max_new_tokens=50, top_logprobs=2, end_id=3)
        engine = engine_of(MODEL, 8, kernels)
        engine.add(some_ids(11, 4), seeds=[0], **request(max_new_tokens=9))
        engine.step()
        forks = engine.add(prompt, seeds=seeds, **asked)
        tokens = run(engine)
        for fork, seed in zip(forks, seeds, strict=True):
            expected, finish = alone(prompt, asked, seed, kernels)
            assert_tokens(tokens[fork], expected, kernels)
            assert fork.finish == finish
        assert len({tuple(fork.ids) for fork in forks}) == (1 if "temperature" in sampling else 4)


def test_a_removed_sequence_leaves_no_trace_in_its_slot(kernels: Any) -> None:
    asked = request(max_new_tokens=40, top_logprobs=2)
    expected, _ = alone([3, 1], asked, 9, kernels)
    engine = engine_of(MODEL, 2, kernels)
    for n in range(25):
        removed = engine.add(some_ids(1 + n, n), seeds=[n, n + 1], **asked)
        for _ in range(n):
            engine.step()
        for sequence in removed:
            engine.remove(sequence, "stop")
            engine.remove(sequence, "length")  # no effect: it has ended
            assert sequence.finish == "stop"
        assert engine.n_free == 2
    [sequence] = engine.add([3, 1], seeds=[9], **asked)
    assert_tokens(run(engine)[sequence], expected, kernels)


# --- the prompt


@pytest.mark.parametrize("length", [1, 2, 9, T, T + 1, 60])
def test_prompt_logprobs_cover_the_part_that_was_read(kernels: Any, length: int) -> None:
    prompt = some_ids(length, length)
    asked = request(max_new_tokens=20, top_logprobs=3, temperature=0.5, top_k=1)
    engine = engine_of(MODEL, 3, kernels)
    sequences = engine.add(prompt, seeds=[1, 2], prompt_logprobs=True, **asked)
    read = prompt[-T:]
    for sequence in sequences:
        assert [token.id for token in sequence.prompt_tokens] == read[1:]
        assert_likelihoods(sequence.prompt_tokens, read[:1], MODEL, n_top=3)
    tokens = run(engine)
    for seed, sequence in enumerate(sequences, 1):  # the new tokens stay the same
        assert_tokens(tokens[sequence], alone(prompt, asked, seed, kernels)[0], kernels)
    assert engine.add(prompt, seeds=[1], **asked)[0].prompt_tokens == []


def test_bad_input_is_refused_and_takes_no_slot(kernels: Any) -> None:
    engine, asked = engine_of(MODEL, 2, kernels), request(max_new_tokens=3)
    with pytest.raises(UserError, match="the prompt has no tokens: give at least one character"):
        engine.add([], seeds=[0], **asked)
    for bad in ([V], [0, -1], [3, 10**9]):
        with pytest.raises(UserError, match="out of range: give ids from 0 to 18"):
            engine.add(bad, seeds=[0], **asked)
    for seed in (-1, 2**63):
        with pytest.raises(UserError, match=r"a seed is out of range .*: give 0 to 2\^63 - 1"):
            engine.add([1], seeds=[0, seed], **asked)
    with pytest.raises(UserError, match="top_logprobs is -1: give a whole number of at least 0"):
        engine.add([1], seeds=[0], top_logprobs=-1, **asked)
    assert engine.n_free == 2
    assert engine.step() == []
    engine.add([1], seeds=[0, 1], **asked)
    assert {len(tokens) for tokens in run(engine).values()} == {3}


# --- damaged models


def damaged(value: float, where: str) -> GPT2:
    model = some_model()
    with torch.no_grad():
        model.get_parameter(where).view(-1)[-1] = value
    return model


PLACES = (
    "blocks.0.attention.sublayer.qkv.weight",
    "blocks.0.feed_forward.sublayer.projection.bias",
    "final_norm.weight",
)
DAMAGES = [(torch.nan, "head.weight"), *itertools.product((torch.nan, INF, -INF), PLACES)]


@pytest.mark.parametrize(("value", "where"), DAMAGES)
def test_nan_is_reported(kernels: Any, value: float, where: str) -> None:
    model = damaged(value, where)
    message = "^the model gives NaN: its weights are damaged, train it again$"
    for sampling in ({}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}):
        engine = engine_of(model, 2, kernels)
        engine.add([1], seeds=[0], **request(**sampling, max_new_tokens=3))
        with pytest.raises(UserError, match=message):
            run(engine)
    if math.isnan(value):
        engine = engine_of(model, 2, kernels)
        with pytest.raises(UserError, match=message):
            engine.add([1, 2], seeds=[0, 1], prompt_logprobs=True, **request())
        assert engine.n_free == 2


def test_nan_is_reported_at_the_step_that_reaches_it(kernels: Any) -> None:
    model = damaged(torch.nan, "position_embedding.weight")
    asked = request(max_new_tokens=40)
    expected, _ = alone([1], asked, 0, kernels)
    engine = engine_of(model, 1, kernels)
    engine.add([1], seeds=[0], **asked)
    tokens: list[Token] = []
    with pytest.raises(UserError, match="the model gives NaN"):
        while engine.active:
            tokens += [token for _, token in engine.step() if token]
    assert_tokens(tokens, expected[: T - 1], kernels)
