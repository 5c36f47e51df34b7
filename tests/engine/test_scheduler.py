"""The engine beside an uncached model in float64 that draws in Python's own numbers."""

import itertools
import random
from collections.abc import Sequence as Ids
from typing import Any

import pytest
import slow
import torch
from twin import shake, untie

from chargpt.base.errors import UserError
from chargpt.config import GPT2Config
from chargpt.engine.decoder import PyTorchDecoder
from chargpt.engine.native_decoder import NativeDecoder
from chargpt.engine.scheduler import Engine, Sequence, Settings, Token
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


def run(engine: Engine) -> dict[Sequence, list[Token]]:
    """Let all sequences come to their ends; return their tokens."""
    tokens: dict[Sequence, list[Token]] = {sequence: [] for sequence in engine.active}
    while engine.active:
        for sequence, token in engine.step():
            tokens[sequence].append(token)
    return tokens


def alone(
    prompt: Ids[int], settings: Settings, seed: int, kernels: Any, model: GPT2 = MODEL
) -> tuple[list[Token], str | None]:
    """Return the tokens of a sequence by itself, and why it ended."""
    engine = engine_of(model, 1, kernels)
    [sequence] = engine.add(prompt, settings, [seed])
    return run(engine)[sequence], sequence.finish


def assert_tokens(ours: Ids[Token], theirs: Ids[Token], kernels: Any) -> None:
    """To the bit with the native decoder, alternatives and all."""
    if kernels == "on":
        assert list(ours) == list(theirs)
        return
    assert [token.id for token in ours] == [token.id for token in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
        assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-5)


def assert_likelihoods(
    tokens: Ids[Token], prompt: Ids[int], model: GPT2, kept: float = 0.5, n_top: int = 0
) -> None:
    """Hold log-probabilities against those of the model without a cache."""
    ids = [token.id for token in tokens]
    slow.assert_likelihoods(tokens, slow.predictions(model, prompt, ids, kept), n_top)


# --- past block_size


@pytest.mark.parametrize("kept", [0.25, 0.5, 1.0])
def test_a_thousand_greedy_characters(kernels: Any, kept: float) -> None:
    """Through block_size and far past it, where the model reads the last part anew."""
    settings = Settings(max_new_tokens=1000, temperature=0, context_kept=kept)
    engine = engine_of(MODEL, 5, kernels)
    for length in (1, T - 1, T, T + 1, 50):
        engine.add(some_ids(length, length), settings, [0])
    for sequence, tokens in run(engine).items():
        ids = [token.id for token in tokens]
        assert (len(ids), sequence.finish) == (1000, "length")
        assert len(set(ids)) > 8
        assert all(ids[-99:] != ids[-99 - n : -n] for n in range(1, 30)), (
            "it does not go in circles"
        )
        prompt = sequence.ids[:-1000]
        expected = slow.predictions(MODEL, prompt, ids[:-1], kept)  # (1000, V)
        assert ids == expected.argmax(-1).tolist()
        slow.assert_likelihoods(tokens, expected)


def test_the_windows_are_the_documented_ones() -> None:
    """1 is always the last block_size characters; 0.5 never less than half of them."""
    for length in (1, 5, T, 40):
        for (_, end), (start, _) in zip(
            slow.windows(length, 100, T, 1.0), slow.windows(length, 100, T, 1.0), strict=True
        ):
            assert start == max(0, end - T)
        seen = [end - start for start, end in slow.windows(length, 100, T, 0.5)]
        assert max(seen) == T
        assert min(seen[T:]) == T // 2
        # A quarter is read anew, then it grows until it is full again.
        quarter = [end - start for start, end in slow.windows(length, 200, T, 0.25)]
        assert quarter[quarter.index(T) + 1 :][: T - T // 4 + 1] == list(range(T // 4, T + 1))


@pytest.mark.parametrize(
    ("block_size", "kept"), [(1, 0.5), (1, 1.0), (2, 0.5), (3, 0.01), (7, 0.3), (16, 0.97)]
)
def test_odd_sizes_of_windows(kernels: Any, block_size: int, kept: float) -> None:
    """There is always something to go on from."""
    model = some_model(block_size=block_size)
    settings = Settings(max_new_tokens=60, context_kept=kept)
    for prompt in (some_ids(1, 0), some_ids(block_size, 1), some_ids(20, 2)):
        tokens, _ = alone(prompt, settings, 3, kernels, model)
        assert_likelihoods(tokens, prompt, model, kept)


def test_of_a_prompt_that_does_not_fit_the_last_block_size_are_read(kernels: Any) -> None:
    settings = Settings(max_new_tokens=60, top_logprobs=3)
    prompt = some_ids(100, 0)
    whole, _ = alone(prompt, settings, 0, kernels)
    assert_tokens(whole, alone(prompt[-T:], settings, 0, kernels)[0], kernels)
    assert whole != alone(prompt[-T + 1 :], settings, 0, kernels)[0]


# --- what is drawn

SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.6},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.15},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.5, "temperature": 2.0},
    {"bias": [2.0, -1.0, -INF, *[0.0] * 14, -INF, 1.0]},
    {"context_kept": 0.25},
    {"context_kept": 1.0, "temperature": 1.5},
    {
        "temperature": 1.8,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "bias": [-INF, 1.0, *[0.0] * 17],
    },
]


def settings_of(sampling: dict[str, Any], **more: Any) -> Settings:
    sampling = sampling | more
    if "bias" in sampling:
        sampling["bias"] = torch.tensor(sampling["bias"])
    return Settings(**sampling)


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_texts_are_those_that_the_slow_way_writes(kernels: Any, sampling: dict[str, Any]) -> None:
    """Token by token: the same windows, filters and random numbers, and no more of them."""
    for seed, (length, end_id) in enumerate([(1, None), (30, None), (T, 4), (3, 7)]):
        settings = settings_of(sampling, max_new_tokens=40, top_logprobs=2, end_id=end_id)
        prompt = some_ids(length, seed)
        tokens, finish = alone(prompt, settings, seed, kernels)
        ids = [token.id for token in tokens]
        drawn = slow.continuation(MODEL, prompt, ids, seed=seed, end_id=end_id, **sampling)
        assert ids == drawn[:-1]
        assert end_id not in ids
        if len(ids) < 40:
            assert (finish, drawn[-1]) == ("end_of_text", end_id)
        else:
            assert finish == "length"
        kept = sampling.get("context_kept", 0.5)
        assert_likelihoods(tokens, prompt, MODEL, kept, n_top=2)


def test_end_of_text_ends_at_any_place(kernels: Any) -> None:
    """At the first new token, too, and at the one after the last allowed it is not looked for."""
    greedy, _ = alone([1], Settings(max_new_tokens=30, temperature=0), 0, kernels)
    ids = [token.id for token in greedy]
    for end in sorted(set(ids)):
        first = ids.index(end)
        for n, finish in ((30, "end_of_text"), (first + 1, "end_of_text"), (first, "length")):
            if n:
                settings = Settings(max_new_tokens=n, temperature=0, end_id=end)
                tokens, why = alone([1], settings, 0, kernels)
                assert ([t.id for t in tokens], why) == (ids[:first], finish)


def test_alternatives_are_as_many_as_there_are_at_most(kernels: Any) -> None:
    for n in (0, 1, V, V + 50):
        tokens, _ = alone([1], Settings(max_new_tokens=3, top_logprobs=n, top_k=2), 0, kernels)
        assert all(len(token.top) == min(n, V) for token in tokens)
        assert_likelihoods(tokens, [1], MODEL, n_top=n)


# --- neighbours


class Wish:
    """A sequence to write."""

    def __init__(self, rng: random.Random) -> None:
        self.prompt = some_ids(rng.choice([1, 3, T - 1, T, 40]), rng.randrange(10**6))
        self.seed = rng.randrange(10**6)
        self.settings = settings_of(
            rng.choice(SAMPLING),
            max_new_tokens=rng.choice([1, 7, 30, 45]),
            end_id=rng.choice([None, 2, 11]),
            top_logprobs=rng.choice([0, 2]),
        )


@pytest.mark.parametrize("n_slots", [1, 2, 8, 32])
def test_neighbours_do_not_matter(kernels: Any, n_slots: int) -> None:
    """Any prompts and settings beside it, coming and going, and queueing for slots."""
    rng = random.Random(n_slots)
    wishes = [Wish(rng) for _ in range(40 if kernels == "on" else 20)]
    engine = engine_of(MODEL, n_slots, kernels)
    waiting, tokens = list(wishes), {}
    owners: dict[Sequence, Wish] = {}
    while waiting or engine.active:
        while waiting and engine.n_free and rng.random() < 0.6:
            wish = waiting.pop()
            [sequence] = engine.add(wish.prompt, wish.settings, [wish.seed])
            owners[sequence], tokens[sequence] = wish, list[Token]()
        assert engine.n_free + len(engine.active) == n_slots
        assert len({sequence.slot for sequence in engine.active}) == len(engine.active)
        for sequence, token in engine.step():
            tokens[sequence].append(token)
    assert len(owners) == len(wishes)
    for sequence, wish in owners.items():
        expected, finish = alone(wish.prompt, wish.settings, wish.seed, kernels)
        assert_tokens(tokens[sequence], expected, kernels)
        assert sequence.finish == finish
        assert sequence.ids == wish.prompt + [token.id for token in expected]


@pytest.mark.parametrize("length", [1, 7, T, 33])
def test_forks_are_the_texts_of_their_seeds(kernels: Any, length: int) -> None:
    """One prompt, read once, and beside it another that was there before."""
    prompt, seeds = some_ids(length, 8), [5, 6, 7, 2**63 - 1, 5]
    for sampling in ({}, {"repetition_penalty": 1.7}, {"temperature": 0}):
        settings = settings_of(sampling, max_new_tokens=50, top_logprobs=2, end_id=3)
        engine = engine_of(MODEL, 8, kernels)
        engine.add(some_ids(11, 4), Settings(max_new_tokens=9), [0])
        engine.step()
        forks = engine.add(prompt, settings, seeds)
        tokens = run(engine)
        for fork, seed in zip(forks, seeds, strict=True):
            expected, finish = alone(prompt, settings, seed, kernels)
            assert_tokens(tokens[fork], expected, kernels)
            assert fork.finish == finish
        assert len({tuple(fork.ids) for fork in forks}) == (1 if "temperature" in sampling else 4)


def test_a_slot_that_was_left_half_way_leaves_no_trace(kernels: Any) -> None:
    settings = Settings(max_new_tokens=40, top_logprobs=2)
    expected, _ = alone([3, 1], settings, 9, kernels)
    engine = engine_of(MODEL, 2, kernels)
    for n in range(25):
        removed = engine.add(some_ids(1 + n, n), settings, [n, n + 1])
        for _ in range(n):
            engine.step()
        for sequence in removed:
            engine.remove(sequence, "stop")
            engine.remove(sequence, "length")  # which changes nothing
            assert sequence.finish == "stop"
        assert engine.n_free == 2
    [sequence] = engine.add([3, 1], settings, [9])
    assert_tokens(run(engine)[sequence], expected, kernels)


# --- the prompt


@pytest.mark.parametrize("length", [1, 2, 9, T, T + 1, 60])
def test_a_prompt_is_told_as_far_as_it_was_read(kernels: Any, length: int) -> None:
    prompt = some_ids(length, length)
    settings = Settings(max_new_tokens=20, top_logprobs=3, temperature=0.5, top_k=1)
    engine = engine_of(MODEL, 3, kernels)
    told = engine.add(prompt, settings, [1, 2], tell_prompt=True)
    read = prompt[-T:]
    for sequence in told:
        assert [token.id for token in sequence.prompt_tokens] == read[1:]
        assert_likelihoods(sequence.prompt_tokens, read[:1], MODEL, n_top=3)
    tokens = run(engine)
    for seed, sequence in enumerate(told, 1):  # the telling changes nothing
        assert_tokens(tokens[sequence], alone(prompt, settings, seed, kernels)[0], kernels)
    assert engine.add(prompt, settings, [1])[0].prompt_tokens == []


def test_a_bad_prompt_is_refused_and_the_engine_goes_on(kernels: Any) -> None:
    engine = engine_of(MODEL, 2, kernels)
    settings = Settings(max_new_tokens=3)
    with pytest.raises(UserError, match="the prompt has no tokens: give at least one character"):
        engine.add([], settings, [0])
    for bad in ([V], [0, -1], [3, 10**9]):
        with pytest.raises(UserError, match="out of range: give ids from 0 to 18"):
            engine.add(bad, settings, [0])
    assert engine.n_free == 2
    assert engine.step() == []
    engine.add([1], settings, [0, 1])
    assert {len(tokens) for tokens in run(engine).values()} == {3}


# --- damaged models


def damaged(value: float, where: str) -> GPT2:
    model = some_model()
    with torch.no_grad():
        model.get_parameter(where).view(-1)[-1] = value
    return model


NAN_PLACES = (
    "head.weight",
    "blocks.0.attention.sublayer.qkv.weight",
    "blocks.0.feed_forward.sublayer.projection.bias",
    "final_norm.weight",
)


@pytest.mark.parametrize("where", NAN_PLACES)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}])
def test_nan_is_refused(kernels: Any, where: str, sampling: dict[str, Any]) -> None:
    model = damaged(torch.nan, where)
    engine = engine_of(model, 2, kernels)
    engine.add([1], settings_of(sampling, max_new_tokens=3, end_id=0), [0])
    with pytest.raises(UserError, match="^the model gives NaN: its weights are damaged, train"):
        engine.step()
    with pytest.raises(UserError, match="^the model gives NaN: its weights are damaged, train"):
        engine.add([1, 2], Settings(max_new_tokens=3), [0], tell_prompt=True)


def test_a_refused_prompt_takes_no_slot(kernels: Any) -> None:
    engine = engine_of(damaged(torch.nan, NAN_PLACES[0]), 2, kernels)
    with pytest.raises(UserError):
        engine.add([1, 2], Settings(max_new_tokens=3), [0, 1], tell_prompt=True)
    assert engine.n_free == 2


def test_a_position_that_is_damaged_is_refused_when_it_is_reached(kernels: Any) -> None:
    model = damaged(torch.nan, "position_embedding.weight")
    settings = Settings(max_new_tokens=40)
    expected, _ = alone([1], settings, 0, kernels)
    engine = engine_of(model, 1, kernels)
    engine.add([1], settings, [0])
    tokens = []
    with pytest.raises(UserError, match="the model gives NaN"):
        while engine.active:
            tokens += [token for _, token in engine.step()]
    assert_tokens(tokens, expected[: T - 1], kernels)


@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("where", NAN_PLACES[1:])
def test_infinity_is_refused_too(kernels: Any, where: str, value: float) -> None:
    model = damaged(value, where)
    for seed in range(3):
        engine = engine_of(model, 1, kernels)
        engine.add([1], Settings(max_new_tokens=3), [seed])
        with pytest.raises(UserError, match="the model gives NaN"):
            run(engine)


# --- what stays as it was


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_torch_stay_as_they_were(kernels: Any, training: bool) -> None:
    model = some_model().train(training)
    state = torch.get_rng_state()
    engine = engine_of(model, 2, kernels)
    engine.add([1], Settings(max_new_tokens=30, repetition_penalty=1.1), [0, 1])
    while engine.active:
        engine.step()
        assert model.training is training
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    assert all(module.training is training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()


def test_engines_of_one_model_do_not_disturb_each_other(kernels: Any) -> None:
    settings = Settings(max_new_tokens=40)
    expected = [alone(some_ids(5, seed), settings, seed, kernels)[0] for seed in range(3)]
    engines = [engine_of(MODEL, 1, kernels) for _ in range(3)]
    for seed, engine in enumerate(engines):
        engine.add(some_ids(5, seed), settings, [seed])
    tokens: list[list[Token]] = [[], [], []]
    for _, (seed, engine) in itertools.product(range(40), enumerate(engines)):
        tokens[seed] += [token for _, token in engine.step()]
    for ours, theirs in zip(tokens, expected, strict=True):
        assert_tokens(ours, theirs, kernels)
