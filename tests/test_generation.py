import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chargpt
from chargpt.config import SampleConfig
from chargpt.errors import UserError
from chargpt.generation import (
    encode_prompt,
    filter_logits,
    generate,
    generate_text,
    next_logits,
    sample_next,
    until_stop,
)
from chargpt.tokenizer import CharTokenizer

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])


def probabilities(**filters: float) -> list[float]:
    return filter_logits(LOGITS, **filters).softmax(-1).tolist()  # type: ignore[arg-type]


def test_temperature_divides_the_logits() -> None:
    weights = [math.exp(x / 0.7) for x in LOGITS.tolist()]
    assert probabilities(temperature=0.7) == pytest.approx([w / sum(weights) for w in weights])


def test_temperature_zero_takes_the_likeliest_and_tiny_ones_do_not_overflow() -> None:
    assert probabilities(temperature=0) == [1, 0, 0, 0, 0]
    assert probabilities(temperature=1e-30) == [1, 0, 0, 0, 0]


def test_top_k_keeps_exactly_k_although_all_tie() -> None:
    kept = filter_logits(torch.zeros(10), top_k=3).softmax(-1)
    assert sorted(kept.tolist()) == pytest.approx([0] * 7 + [1 / 3] * 3)


def test_top_k_larger_than_the_vocabulary_keeps_all() -> None:
    assert probabilities(top_k=99) == pytest.approx(LOGITS.softmax(-1).tolist())


def test_top_p_keeps_the_fewest_that_hold_p() -> None:
    # softmax: 0.5967, 0.2195, 0.1331, 0.0297, 0.0040, with cumulative sums 0.60, 0.82, 0.95, …
    full = LOGITS.softmax(-1).tolist()
    assert probabilities(top_p=0.5) == [1, 0, 0, 0, 0]
    held = full[0] + full[1]
    assert probabilities(top_p=0.7) == pytest.approx([full[0] / held, full[1] / held, 0, 0, 0])
    assert [p > 0 for p in probabilities(top_p=0.9)] == [True, True, True, False, False]
    assert probabilities(top_p=1e-9) == [1, 0, 0, 0, 0]


@settings(deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.001, 1),
)
def test_filters_always_leave_something_to_draw(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    filtered = filter_logits(
        torch.tensor(logits), temperature=temperature, top_k=top_k, top_p=top_p
    )
    p = filtered.softmax(-1)
    assert torch.isfinite(p).all()
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    if top_k:
        assert int((p > 0).sum()) <= top_k


def test_draws_follow_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 100_000
    filtered = filter_logits(LOGITS, temperature=1.3, top_k=4)
    draws = sample_next(filtered.expand(n, -1), generator)
    expected = filtered.softmax(-1).double() * n
    counts = torch.bincount(draws, minlength=5).double()
    assert counts[4] == 0
    chi_square = ((counts - expected)[:4] ** 2 / expected[:4]).sum().item()
    assert chi_square < 16.3  # 3 degrees of freedom: exceeded once in 1,000


def greedy(model: chargpt.GPT2, prompt: list[int], n: int) -> list[int]:
    """Continue a prompt the long way: the whole forward pass, cropped, and an argmax."""
    ids = list(prompt)
    for _ in range(n):
        window = torch.tensor([ids[-model.config.block_size :]])
        with torch.no_grad():
            ids.append(int(model(window)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_greedy_text_goes_on_rightly_through_and_past_block_size(
    model: chargpt.GPT2, length: int
) -> None:
    prompt = [i % 11 for i in range(length)]
    assert list(generate(model, prompt, max_new_tokens=40, temperature=0)) == greedy(
        model, prompt, 40
    )


def test_the_same_seed_writes_the_same_and_another_does_not(model: chargpt.GPT2) -> None:
    def draw(seed: int) -> list[int]:
        return list(generate(model, [1], max_new_tokens=30, temperature=2.0, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_in_its_mode_also_between_tokens(
    model: chargpt.GPT2, training: bool
) -> None:
    """The original left the model in evaluation mode, so that training went on without dropout."""
    model.train(training)
    modes = [model.training for _ in generate(model, [1], max_new_tokens=3)]
    assert modes == [training] * 3
    assert all(module.training is training for module in model.modules())


def test_dropout_is_off_while_generating_from_a_training_model(model: chargpt.GPT2) -> None:
    expected = list(generate(model.eval(), [1], max_new_tokens=20, temperature=0))
    assert list(generate(model.train(), [1], max_new_tokens=20, temperature=0)) == expected


def test_generation_draws_nothing_from_the_global_generator(model: chargpt.GPT2) -> None:
    before = torch.get_rng_state()
    list(generate(model, [1], max_new_tokens=5))
    assert torch.equal(torch.get_rng_state(), before)


def test_end_of_text_ends_and_is_not_yielded(model: chargpt.GPT2) -> None:
    """The original looked for GPT-2's own end-of-text id, 50256, which no character model has."""
    ids = greedy(model, [1], 20)
    end = ids[7]
    first = ids.index(end)
    stopped = list(generate(model, [1], max_new_tokens=20, temperature=0, end_id=end))
    assert stopped == ids[:first]


def test_ids_may_come_straight_from_the_tokenizer(model: chargpt.GPT2) -> None:
    ids = CharTokenizer("abcdefghij\n").encode("abc")
    assert torch.equal(next_logits(model, ids.tolist()), next_logits(model, ids))
    tokens = list(generate(model, ids, max_new_tokens=3, temperature=0))
    assert tokens == greedy(model, [1, 2, 3], 3)


def test_an_empty_prompt_of_ids_is_an_error(model: chargpt.GPT2) -> None:
    with pytest.raises(UserError, match="the prompt has no tokens: give at least one character"):
        list(generate(model, [], max_new_tokens=1))


# --- text


def test_prompts_start_as_documents_do() -> None:
    one_text = CharTokenizer("ab\n")
    many = CharTokenizer("ab\n", end_of_text=True)
    assert encode_prompt("ab", one_text, SampleConfig()) == [1, 2]
    assert encode_prompt("", one_text, SampleConfig()) == [0]  # as after a line break
    assert encode_prompt("", CharTokenizer("ab"), SampleConfig()) == [0]
    assert encode_prompt("ab", many, SampleConfig()) == [3, 1, 2]
    assert encode_prompt("", many, SampleConfig()) == [3]


def test_unknown_prompt_characters_follow_the_policy() -> None:
    tokenizer = CharTokenizer("ab?")
    assert encode_prompt("aéb", tokenizer, SampleConfig(unknown="skip")) == [1, 2]
    assert encode_prompt("aéb", tokenizer, SampleConfig(unknown="replace")) == [1, 0, 2]
    with pytest.raises(UserError, match="never seen 'é'"):
        encode_prompt("aéb", tokenizer, SampleConfig())


def test_text_is_the_decoded_ids(model: chargpt.GPT2) -> None:
    tokenizer = CharTokenizer("abcdefghij\n")
    config = SampleConfig(prompt="abc", max_new_tokens=50, temperature=0)
    text = "".join(generate_text(model, tokenizer, config))
    assert text == tokenizer.decode(greedy(model, [1, 2, 3], 50))
    assert chargpt.sample(model, tokenizer, config) == "abc" + text
    assert chargpt.sample(model, tokenizer, prompt="abc", max_new_tokens=50, temperature=0) == (
        "abc" + text
    )


def test_samples_of_one_seed_differ_from_each_other(model: chargpt.GPT2) -> None:
    tokenizer = CharTokenizer("abcdefghij\n")
    config = SampleConfig(max_new_tokens=30, temperature=2.0)
    texts = ["".join(generate_text(model, tokenizer, config, number=i)) for i in range(3)]
    assert len(set(texts)) == 3


def test_sample_refuses_a_misspelt_setting(model: chargpt.GPT2) -> None:
    with pytest.raises(UserError, match="unknown setting 'temprature': did you mean temperature"):
        chargpt.sample(model, CharTokenizer("abcdefghij\n"), temprature=1)


@settings(deadline=None)
@given(
    text=st.text("ab", max_size=30),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_stop_strings_never_leak_however_the_text_is_cut(
    text: str, stop: list[str], cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    yielded = list(until_stop(iter(pieces), stop))
    # Of the text up to the first piece that completes a stop string, what is before that string.
    seen = ["".join(pieces[: i + 1]) for i in range(len(pieces))]
    complete = next((s for s in seen if any(x in s for x in stop)), None)
    expected = text if complete is None else min((complete.split(x)[0] for x in stop), key=len)
    assert "".join(yielded) == expected
    assert all(yielded), "no empty pieces"


def test_text_streams_as_soon_as_it_cannot_be_a_stop_string() -> None:
    assert list(until_stop(iter("abxaby"), ["aby"])) == ["abx"]
    assert list(until_stop(iter("xyz"), ["q"])) == ["x", "y", "z"]
