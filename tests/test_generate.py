"""Text beside texts cut, counted and drawn the slow and obvious way."""

import gc
import itertools
import math
import random
import weakref
from itertools import pairwise
from typing import Any

import pytest
import slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twin import shake, untie
from variants import kernels_of

import chargpt
from chargpt import generate as generation
from chargpt.base.errors import UserError
from chargpt.base.seeding import SAMPLE, derive_seed
from chargpt.config import GPT2Config, SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.decoder import PyTorchDecoder
from chargpt.engine.native_decoder import NativeDecoder
from chargpt.engine.scheduler import Token
from chargpt.generate import (
    Completion,
    Withheld,
    complete,
    encode_prompt,
    generate,
    generate_text,
    make_settings,
    sample,
    write,
)
from chargpt.model import GPT2

T, V = 16, 11
ONE_TEXT = CharTokenizer("abcdefghij\n")
DOCUMENTS = CharTokenizer("abcdefghi\n", end_of_text=True)


def some_model(**changes: Any) -> GPT2:
    shape = {"block_size": T, "vocab_size": V, "n_layer": 1, "n_head": 2, "d_model": 32}
    config = GPT2Config(**shape | {"dropout": 0.1} | changes)
    return untie(shake(GPT2(config), seed=1, std=0.3)).eval()


MODEL = some_model()


def some_text(n: int, seed: int, characters: str = "abcdefghi\n") -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(characters) for _ in range(n))


def config_of(**changes: Any) -> SampleConfig:
    return SampleConfig(**{"max_new_tokens": 40, "temperature": 1.0, "seed": 3} | changes)


def ids_of(tokens: list[Token]) -> list[int]:
    return [token.id for token in tokens]


def assert_same(ours: Completion, theirs: Completion, kernels: Any) -> None:
    """Everything but the numbers; tokens to the bit with the native decoder."""
    assert (ours.prompt, ours.text, ours.finish) == (theirs.prompt, theirs.text, theirs.finish)
    for mine, other in ((ours.tokens, theirs.tokens), (ours.prompt_tokens, theirs.prompt_tokens)):
        if kernels == "on":
            assert mine == other
        assert ids_of(mine) == ids_of(other)
        assert [t.logprob for t in mine] == pytest.approx([t.logprob for t in other], abs=1e-5)


# --- generate: tokens


def greedy(model: GPT2, prompt: list[int], n: int) -> list[int]:
    """Continue a prompt the long way: the whole forward pass and an argmax, a token at a time."""
    new: list[int] = []
    for _ in range(n):
        new.append(int(slow.predictions(model, prompt, new)[-1].argmax()))
    return new


@pytest.mark.parametrize("length", [1, T - 1, T, T + 1, 40])
def test_greedy_text_goes_on_rightly_through_and_past_block_size(kernels: Any, length: int) -> None:
    prompt = [i % V for i in range(length)]
    tokens = list(generate(MODEL, prompt, max_new_tokens=40, temperature=0, kernels=kernels))
    assert ids_of(tokens) == greedy(MODEL, prompt, 40)


def test_the_same_seed_writes_the_same_and_another_does_not(kernels: Any) -> None:
    def draw(seed: int) -> list[Token]:
        return list(generate(MODEL, [1], max_new_tokens=30, seed=seed, kernels=kernels))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_settings_reach_the_engine(kernels: Any) -> None:
    filters: dict[str, Any] = {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.01}
    filters |= {"repetition_penalty": 1.4, "context_kept": 0.25}
    tokens = list(generate(MODEL, [1, 2], max_new_tokens=50, seed=8, kernels=kernels, **filters))
    ids = ids_of(tokens)
    assert ids == slow.continuation(MODEL, [1, 2], ids, seed=8, **filters)[:-1]


def test_generate_refuses_a_misspelt_setting() -> None:
    with pytest.raises(UserError, match="unknown setting 'temprature': did you mean temperature"):
        list(generate(MODEL, [1], max_new_tokens=1, temprature=1))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_in_its_mode_also_between_tokens(kernels: Any, training: bool) -> None:
    """The original left the model in evaluation mode, so that training went on without dropout."""
    model = some_model().train(training)
    tokens = generate(model, [1], max_new_tokens=3, kernels=kernels)
    assert [model.training for _ in tokens] == [training] * 3
    assert all(module.training is training for module in model.modules())
    for _ in write(model, ONE_TEXT, ["a", "bc"], config_of(), kernels=kernels):
        assert all(module.training is training for module in model.modules())


def test_dropout_is_off_while_generating_from_a_training_model(kernels: Any) -> None:
    model = some_model(dropout=0.5).train()
    tokens = generate(model, [1], max_new_tokens=20, temperature=0, kernels=kernels)
    assert ids_of(list(tokens)) == greedy(model, [1], 20)


def test_generation_draws_nothing_from_the_global_generators(kernels: Any) -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    list(generate(MODEL, [1], max_new_tokens=5, kernels=kernels))
    complete(MODEL, ONE_TEXT, ["a", "b"], config_of(num_samples=2), kernels=kernels)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_end_of_text_ends_and_is_not_yielded(kernels: Any) -> None:
    """The original looked for GPT-2's own end-of-text id, 50256, which no character model has."""
    ids = greedy(MODEL, [1], 20)
    end = ids[7]
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0, "kernels": kernels}
    assert ids_of(list(generate(MODEL, [1], end_id=end, **options))) == ids[: ids.index(end)]


def test_ids_may_come_straight_from_the_tokenizer(kernels: Any) -> None:
    ids = ONE_TEXT.encode("abc")
    tokens = generate(MODEL, ids, max_new_tokens=3, temperature=0, kernels=kernels)  # type: ignore[arg-type]
    assert ids_of(list(tokens)) == greedy(MODEL, [1, 2, 3], 3)


def test_bad_prompts_of_ids_are_errors(kernels: Any) -> None:
    with pytest.raises(UserError, match="the prompt has no tokens: give at least one character"):
        list(generate(MODEL, [], max_new_tokens=1, kernels=kernels))
    for bad in ([V], [-1]):
        with pytest.raises(UserError, match="ids out of range: give ids from 0 to 10"):
            list(generate(MODEL, bad, max_new_tokens=1, kernels=kernels))


def test_no_new_tokens_are_none_or_refused() -> None:
    try:
        tokens = list(itertools.islice(generate(MODEL, [1], max_new_tokens=0), 5))
    except UserError:
        return
    assert tokens == []


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
    ids=str,
)
def test_generate_refuses_what_the_configuration_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        list(generate(MODEL, [1], max_new_tokens=5, **bad))


# --- prompts


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
    assert encode_prompt("é", tokenizer, SampleConfig(unknown="skip")) == [0]
    assert encode_prompt("aéb", tokenizer, SampleConfig(unknown="replace")) == [1, 0, 2]
    with pytest.raises(UserError, match="never seen 'é'"):
        encode_prompt("aéb", tokenizer, SampleConfig())


def test_an_unknown_character_in_any_prompt_is_an_error_before_anything_is_written() -> None:
    with pytest.raises(UserError, match="never seen 'é'"):
        next(write(MODEL, ONE_TEXT, ["a", "b", "é"], config_of()))
    with pytest.raises(UserError, match="never seen 'é'"):
        sample(MODEL, ONE_TEXT, prompt="é")
    skipped = complete(MODEL, ONE_TEXT, ["aéb", "ab"], config_of(unknown="skip"))
    assert skipped[0].prompt == "aéb"
    assert skipped[0].text == skipped[1].text


def test_an_empty_prompt_is_the_start_of_a_line_or_of_a_document(kernels: Any) -> None:
    for tokenizer, start in ((ONE_TEXT, "\n"), (CharTokenizer("abcdefghijk"), "a")):
        empty, given_ = complete(MODEL, tokenizer, ["", start], config_of(), kernels=kernels)
        assert (empty.text, empty.prompt) == (given_.text, "")
    [document] = complete(MODEL, DOCUMENTS, [""], config_of(temperature=0), kernels=kernels)
    drawn = greedy(MODEL, [10], 40)
    assert document.text == DOCUMENTS.decode(drawn[: (drawn + [10]).index(10)])


def test_of_a_prompt_that_does_not_fit_the_end_is_read(kernels: Any) -> None:
    prompt = some_text(100, 0)
    for tokenizer in (ONE_TEXT, DOCUMENTS):
        # A document's prompt of block_size characters has no room for the end-of-text before it.
        prompts = [prompt, prompt[-T:]]
        long, short = complete(MODEL, tokenizer, prompts, config_of(), kernels=kernels)
        assert long.text == short.text
        assert long.prompt == prompt


# --- texts

CONFIGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"repetition_penalty": 1.3},
    {"logit_bias": {"a": 2.0, "e": -3}},
    {"forbidden": "abc\n"},
    {"logit_bias": {"b": 5.0, "c": 1.0}, "forbidden": "bd"},
    {"context_kept": 0.25},
    {"context_kept": 1.0, "temperature": 2.0},
    {"stop": ("ab", "c", "gg")},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.95, "min_p": 0.01, "forbidden": "j"},
]


def slow_filters(config: SampleConfig, tokenizer: CharTokenizer) -> dict[str, Any]:
    bias = [0.0] * tokenizer.vocab_size
    for i, character in enumerate(tokenizer.characters):
        bias[i] = -math.inf if character in config.forbidden else 0.0
        if character not in config.forbidden:
            bias[i] = config.logit_bias.get(character, 0.0)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "context_kept")
    return {"bias": bias} | {name: getattr(config, name) for name in names}


def cut(text: str, stop: tuple[str, ...]) -> str | None:
    """Return what is before the first stop string to be complete; None: there is none."""
    for n in range(1, len(text) + 1):
        places = [text[:n].index(s) for s in stop if s in text[:n]]
        if places:
            return text[: min(places)]
    return None


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("tokenizer", [ONE_TEXT, DOCUMENTS], ids=["text", "documents"])
def test_texts_are_those_that_the_slow_way_writes(
    kernels: Any, tokenizer: CharTokenizer, changes: dict[str, Any]
) -> None:
    config = config_of(**changes)
    whole = config.replace(stop=())
    filters = slow_filters(config, tokenizer)
    prompts = ["", some_text(9, 1), some_text(33, 3)]
    options: dict[str, Any] = {"seeds": [4, 5], "top_logprobs": 3, "kernels": kernels}
    done = complete(MODEL, tokenizer, prompts, config, **options)
    uncut = complete(MODEL, tokenizer, prompts, whole, **options)
    assert [(c.index, c.number) for c in done] == [(i, n) for i in range(3) for n in range(2)]
    for ours, all_of_it in zip(done, uncut, strict=True):
        assert ours.prompt == prompts[ours.index]
        ids = encode_prompt(ours.prompt, tokenizer, config)
        new = ids_of(all_of_it.tokens)
        seed = [4, 5][ours.number]
        drawn = slow.continuation(
            MODEL, ids, new, seed=seed, end_id=tokenizer.end_of_text_id, **filters
        )
        assert new == drawn[:-1]
        text = tokenizer.decode(new)
        assert all_of_it.text == text
        if len(new) < 40:
            assert (all_of_it.finish, drawn[-1]) == ("end_of_text", tokenizer.end_of_text_id)
        else:
            assert all_of_it.finish == "length"
        assert not set(text) & set(config.forbidden)
        # The stop strings, and one token a character of what they leave.
        left = cut(text, config.stop)
        assert ours.text == (text if left is None else left)
        assert ours.finish == (all_of_it.finish if left is None else "stop")
        assert tokenizer.decode(ids_of(ours.tokens)) == ours.text
        assert_same_tokens(ours.tokens, all_of_it.tokens[: len(ours.text)], kernels)
        # Log-probabilities are the model's own, whatever the filters.
        expected = slow.predictions(MODEL, ids, new, config.context_kept)
        slow.assert_likelihoods(ours.tokens, expected, n_top=3)


def assert_same_tokens(ours: list[Token], theirs: list[Token], kernels: Any) -> None:
    """A batch that sequences leave earlier may round otherwise without the native decoder."""
    if kernels == "on":
        assert ours == theirs
    assert ids_of(ours) == ids_of(theirs)


def test_greedy_text_is_the_decoded_ids_with_or_without_the_prompt() -> None:
    config = config_of(prompt="abc", temperature=0)
    text = ONE_TEXT.decode(greedy(MODEL, [1, 2, 3], 40))
    assert "".join(generate_text(MODEL, ONE_TEXT, config)) == text
    assert sample(MODEL, ONE_TEXT, config) == "abc" + text
    assert chargpt.sample(MODEL, ONE_TEXT, prompt="abc", max_new_tokens=40, temperature=0) == (
        "abc" + text
    )
    assert sample(MODEL, ONE_TEXT, config, echo=False) == text
    assert sample(MODEL, ONE_TEXT, config, prompt="", echo=True) == (
        ONE_TEXT.decode(greedy(MODEL, [0], 40))
    )
    assert config.echo


def test_samples_of_one_seed_differ_from_each_other_and_not_by_how_they_are_asked_for(
    kernels: Any,
) -> None:
    config = config_of(prompt="ab", num_samples=4)
    texts = [
        "".join(generate_text(MODEL, ONE_TEXT, config, number=i, kernels=kernels)) for i in range(4)
    ]
    assert len(set(texts)) == 4
    together = complete(MODEL, ONE_TEXT, ["c", "ab"], config, kernels=kernels)
    assert [c.text for c in together if c.index == 1] == texts
    seeds = [derive_seed(3, SAMPLE, number) for number in range(4)]
    given_ = complete(MODEL, ONE_TEXT, ["ab"], config, seeds=seeds, kernels=kernels)
    assert [c.text for c in given_] == texts
    assert texts[0] in sample(MODEL, ONE_TEXT, config)
    other = complete(MODEL, ONE_TEXT, ["ab"], config.replace(seed=4), kernels=kernels)
    assert not {c.text for c in other} & set(texts)


def test_sample_refuses_a_misspelt_setting() -> None:
    with pytest.raises(UserError, match="unknown setting 'temprature': did you mean temperature"):
        chargpt.sample(MODEL, ONE_TEXT, temprature=1)


def test_nothing_to_write_is_nothing() -> None:
    assert complete(MODEL, ONE_TEXT, [], config_of()) == []
    assert complete(MODEL, ONE_TEXT, ["a"], config_of(), seeds=[]) == []


# --- neighbours


@pytest.mark.parametrize(
    ("tokenizer", "stop"),
    [(ONE_TEXT, ()), (ONE_TEXT, ("ia", "bgb")), (DOCUMENTS, ("a", "bgb"))],
    ids=["text", "stop", "documents"],
)
def test_a_text_does_not_depend_on_the_batch(
    kernels: Any, tokenizer: CharTokenizer, stop: tuple[str, ...]
) -> None:
    """Any neighbours, queueing or not, ending when they like; the prompts told or not."""
    prompts = [some_text(n, n) for n in (0, 1, 5, T, T + 1, 40, 3, 3)]
    config, seeds = config_of(stop=stop, max_new_tokens=30), [1, 2, 3]
    options: dict[str, Any] = {"top_logprobs": 2, "tell_prompt": True, "kernels": kernels}
    alone = [
        complete(MODEL, tokenizer, [prompt], config, seeds=[seed], **options)[0]
        for prompt in prompts
        for seed in seeds
    ]
    options["seeds"] = seeds
    for batch_size in (1, 2, 8, 32) if kernels == "on" else (8,):
        together = complete(MODEL, tokenizer, prompts, config, batch_size=batch_size, **options)
        for ours, theirs in zip(together, alone, strict=True):
            assert_same(ours, theirs, kernels)
    shuffled = random.Random(0).sample(range(len(prompts)), len(prompts))
    together = complete(MODEL, tokenizer, [prompts[i] for i in shuffled], config, **options)
    for place, i in enumerate(shuffled):
        for number in range(3):
            assert_same(together[3 * place + number], alone[3 * i + number], kernels)


# --- streaming


@pytest.mark.parametrize("tokenizer", [ONE_TEXT, DOCUMENTS], ids=["text", "documents"])
def test_pieces_are_the_text_as_early_as_it_can_be_told(
    kernels: Any, tokenizer: CharTokenizer
) -> None:
    stop = ("abc", "bbf", "fgh\n", "gif")
    config = config_of(stop=stop, num_samples=6, max_new_tokens=60, temperature=2.0, seed=2)
    prompts = ["a", some_text(20, 5)]
    told: dict[int, str] = {}
    objects: dict[tuple[int, int], Completion] = {}
    for completion, piece in write(
        MODEL, tokenizer, prompts, config, batch_size=5, kernels=kernels
    ):
        key = completion.index, completion.number
        assert objects.setdefault(key, completion) is completion
        before = told.get(id(completion), "")
        assert not before.endswith("END"), "nothing comes after the last piece"
        told[id(completion)] = before + piece
        assert completion.text == before + piece
        if completion.finish:
            told[id(completion)] += "END"
            continue
        assert piece
        raw = tokenizer.decode(ids_of(completion.tokens))
        # What could still become a stop string, and nothing else, is held back.
        starts = {s[:n] for s in stop for n in range(1, len(s))}
        held = max((n for n in range(5) if raw[len(raw) - n :] in starts), default=0)
        assert completion.text == raw[: len(raw) - held]
    assert len(objects) == 12
    ends = {"stop", "length"} if tokenizer is ONE_TEXT else {"stop", "end_of_text"}
    assert {c.finish for c in objects.values()} == ends


def test_without_stop_strings_every_character_comes_at_once(kernels: Any) -> None:
    config = config_of(max_new_tokens=50)
    pieces = list(generate_text(MODEL, ONE_TEXT, config, kernels=kernels))
    assert len(pieces) == 50
    assert {len(piece) for piece in pieces} == {1}


@pytest.mark.parametrize("seed", range(8))
def test_stop_strings_of_all_kinds(kernels: Any, seed: int) -> None:
    """Overlapping, one the beginning or a part of another, none of them ever leaked."""
    rng = random.Random(seed)
    config = config_of(max_new_tokens=60, seed=seed)
    [uncut] = complete(MODEL, ONE_TEXT, ["a"], config, kernels=kernels)
    stop = []
    for _ in range(rng.randint(1, 3)):
        start, n = rng.randrange(50), rng.randint(1, 6)
        stop += [uncut.text[start : start + n], uncut.text[start : start + rng.randint(1, n)] + "z"]
        stop += [uncut.text[start + n // 2 : start + n + 3]]
    for some in (tuple(stop), *((s,) for s in stop)):
        pieces = list(write(MODEL, ONE_TEXT, ["a"], config.replace(stop=some), kernels=kernels))
        completion = pieces[-1][0]
        expected = cut(uncut.text, some)
        assert completion.text == (uncut.text if expected is None else expected)
        assert completion.finish == ("length" if expected is None else "stop")
        assert "".join(piece for _, piece in pieces) == completion.text
        assert len(completion.tokens) == len(completion.text)
        assert not any(s in completion.text for s in some)


def test_a_stop_string_that_the_last_character_completes(kernels: Any) -> None:
    """And one that would need one more."""
    [uncut] = complete(MODEL, ONE_TEXT, ["a"], config_of(temperature=0), kernels=kernels)
    text = uncut.text
    for end in range(4, 16):
        stop = (text[end - 3 : end],)
        before = text.index(stop[0])
        for n in (before + 3, before + 2, before + 1):
            config = config_of(temperature=0, max_new_tokens=n, stop=stop)
            [ours] = complete(MODEL, ONE_TEXT, ["a"], config, kernels=kernels)
            if n == before + 3:
                assert (ours.text, ours.finish) == (text[:before], "stop")
            else:
                assert (ours.text, ours.finish) == (text[:n], "length")
            assert len(ours.tokens) == len(ours.text)


def test_a_stop_string_right_at_the_start_leaves_an_empty_text(kernels: Any) -> None:
    [uncut] = complete(MODEL, ONE_TEXT, ["a"], config_of(temperature=0), kernels=kernels)
    config = config_of(temperature=0, stop=(uncut.text[0],), prompt="a")
    pieces = list(write(MODEL, ONE_TEXT, ["a"], config, kernels=kernels))
    [(completion, piece)] = pieces
    assert (completion.text, completion.finish, completion.tokens, piece) == ("", "stop", [], "")
    assert list(generate_text(MODEL, ONE_TEXT, config, kernels=kernels)) == []
    assert sample(MODEL, ONE_TEXT, config) == "a"


def test_stop_strings_are_looked_for_in_what_is_new(kernels: Any) -> None:
    """One in the prompt, or begun there, ends nothing."""
    [uncut] = complete(MODEL, ONE_TEXT, ["ab"], config_of(temperature=0), kernels=kernels)
    for stop in ("ab", "b" + uncut.text[0]):
        config = config_of(temperature=0, stop=(stop,))
        [ours] = complete(MODEL, ONE_TEXT, ["ab"], config, kernels=kernels)
        expected = cut(uncut.text, (stop,))
        assert ours.text == (uncut.text if expected is None else expected)


def test_end_of_text_lets_out_what_was_held_back(kernels: Any) -> None:
    [uncut] = complete(MODEL, DOCUMENTS, [""], config_of(seed=5), kernels=kernels)
    assert uncut.finish == "end_of_text"
    assert len(uncut.text) > 3
    config = config_of(seed=5, stop=(uncut.text[-3:] + "z",))
    pieces = list(write(MODEL, DOCUMENTS, [""], config, kernels=kernels))
    completion, last = pieces[-1]
    assert (completion.text, completion.finish) == (uncut.text, "end_of_text")
    assert last == uncut.text[-3:]
    assert len(completion.tokens) == len(uncut.text)


@settings(deadline=None, derandomize=True)
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
    withheld = Withheld(stop)
    out, seen = "", ""
    # Of the text up to the first piece that completes a stop string, what is before that string.
    for piece in pieces:
        out += withheld.push(piece)
        seen += piece if not any(s in seen for s in stop) else ""
        found = any(s in seen for s in stop)
        assert withheld.found == found
        if found:
            assert out == min((seen.split(s)[0] for s in stop), key=len)
        else:
            starts = {s[:n] for s in stop for n in range(1, len(s))}
            held = max(
                (n for n in range(1, 5) if n <= len(seen) and seen[-n:] in starts), default=0
            )
            assert out == seen[: len(seen) - held]
    rest = withheld.rest()
    assert withheld.rest() == ""
    if withheld.found:
        assert rest == ""
    else:
        assert out + rest == text


def test_text_streams_as_soon_as_it_cannot_be_a_stop_string() -> None:
    def let_out(text: str, *stop: str) -> list[str]:
        withheld = Withheld(stop)
        return [withheld.push(character) for character in text]

    assert let_out("abxaby", "aby") == ["", "", "abx", "", "", ""]
    assert let_out("xyz", "q") == ["x", "y", "z"]
    assert let_out("aab", "ab") == ["", "a", ""]
    assert let_out("abab!", "ababc", "b!") == ["", "", "", "", "aba"]


# --- what the model says of the prompt


@pytest.mark.parametrize("tokenizer", [ONE_TEXT, DOCUMENTS], ids=["text", "documents"])
def test_prompts_are_told(kernels: Any, tokenizer: CharTokenizer) -> None:
    prompts = ["", "a", some_text(9, 1), some_text(T - 1, 2), some_text(T, 2), some_text(50, 3)]
    options: dict[str, Any] = {"seeds": [1, 2], "kernels": kernels, "top_logprobs": 2}
    told = complete(MODEL, tokenizer, prompts, config_of(), tell_prompt=True, **options)
    silent = complete(MODEL, tokenizer, prompts, config_of(), **options)
    for ours, theirs in zip(told, silent, strict=True):
        assert theirs.prompt_tokens == []
        assert ours.text == theirs.text
        read = encode_prompt(ours.prompt, tokenizer, config_of())[-T:]
        if tokenizer is DOCUMENTS and len(ours.prompt) < T:
            assert tokenizer.decode(ids_of(ours.prompt_tokens)) == ours.prompt
        elif ours.prompt:
            assert tokenizer.decode(ids_of(ours.prompt_tokens)) == ours.prompt[-T:][1:]
        assert ids_of(ours.prompt_tokens) == read[1:]
        expected = slow.predictions(MODEL, read[:1], read[1:])
        slow.assert_likelihoods(ours.prompt_tokens, expected, n_top=2)


# --- bias and bans


def test_a_large_bias_decides(kernels: Any) -> None:
    config = config_of(logit_bias={"c": 1000})
    assert complete(MODEL, ONE_TEXT, ["a"], config, kernels=kernels)[0].text == "c" * 40
    config = config_of(logit_bias={"c": -1000, "d": -1000.0}, temperature=5)
    assert not set("cd") & set(complete(MODEL, ONE_TEXT, ["a"], config, kernels=kernels)[0].text)


def test_what_is_forbidden_is_never_written(kernels: Any) -> None:
    """Also when it is all that the other filters would leave; end-of-text is no character."""
    for ban in ("abcdefghi", "\n", "aabb"):
        for changes in ({"temperature": 0}, {"top_k": 1}, {"top_p": 0.01}, {"min_p": 1}, {}):
            config = config_of(forbidden=ban, **changes)
            [ours] = complete(MODEL, ONE_TEXT, ["a"], config, kernels=kernels)
            assert not set(ban) & set(ours.text)
            assert len(ours.text) == 40
    config = config_of(forbidden="abcdefghi", logit_bias={"a": 1000}, num_samples=5)
    documents = complete(MODEL, DOCUMENTS, ["a"], config, kernels=kernels)
    assert {c.finish for c in documents} == {"end_of_text"}
    assert set("".join(c.text for c in documents)) <= {"\n"}


def test_a_ban_on_everything_is_refused() -> None:
    everything = "abcdefghi\n"
    for tokenizer, forbidden in ((DOCUMENTS, everything), (ONE_TEXT, everything + "j")):
        with pytest.raises(UserError, match="every character of the model is forbidden: leave it"):
            complete(MODEL, tokenizer, ["a"], config_of(forbidden=forbidden))
        with pytest.raises(UserError, match="every character of the model is forbidden: leave it"):
            sample(MODEL, tokenizer, forbidden=forbidden)


def test_a_bias_of_an_unknown_character_is_refused() -> None:
    with pytest.raises(UserError, match="names 'é', which the model has never seen: leave it out"):
        complete(MODEL, ONE_TEXT, ["a"], config_of(logit_bias={"é": 1.0}))


def test_a_ban_of_an_unknown_character_is_no_mistake() -> None:
    """It will never be written; a list of banned characters may serve several models."""
    assert make_settings(config_of(forbidden="éz"), ONE_TEXT).bias is not None
    [ours] = complete(MODEL, ONE_TEXT, ["a"], config_of(forbidden="éz"))
    [theirs] = complete(MODEL, ONE_TEXT, ["a"], config_of())
    assert ours.text == theirs.text


@pytest.mark.parametrize("value", [1e300, -1e300])
def test_a_bias_beyond_float32_is_refused_or_decides(value: float) -> None:
    try:
        config = config_of(logit_bias={"c": value}, temperature=0)
        [ours] = complete(MODEL, ONE_TEXT, ["a"], config)
    except UserError:
        return
    assert ("c" in ours.text) == (value > 0)


def test_the_repetition_penalty_does_not_forbid_the_end() -> None:
    """End-of-text is no character of the text, so that it cannot be repeated."""
    config = config_of(repetition_penalty=100.0, temperature=0)
    [ours] = complete(MODEL, DOCUMENTS, ["a"], config)
    ids, new = encode_prompt("a", DOCUMENTS, config), ids_of(ours.tokens)
    rows = slow.predictions(MODEL, ids, new).tolist()
    drawn = []
    for i, row in enumerate(rows):
        seen = {*ids[1:], *new[:i]}
        p = slow.probabilities(row, temperature=0, repetition_penalty=100.0, seen=seen)
        drawn.append(p.index(1.0))
    assert drawn[: len(new)] == new


# --- mistakes

BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature is -1.0: give 0 (greedy) or more, e.g. 0.8"),
    ({"temperature": math.nan}, "temperature is nan: give a number"),
    ({"temperature": math.inf}, "temperature is inf: give a number"),
    ({"temperature": "hot"}, "temperature is 'hot': give a number"),
    ({"top_p": 0}, "top_p is 0.0: give a share above 0 and up to 1"),
    ({"top_p": 1.5}, "top_p is 1.5: give a share above 0 and up to 1"),
    ({"top_p": math.nan}, "top_p is nan: give a number"),
    ({"min_p": 2}, "min_p is 2.0: give a share from 0 to 1"),
    ({"min_p": -0.1}, "min_p is -0.1: give a share from 0 to 1"),
    ({"min_p": math.nan}, "min_p is nan: give a number"),
    ({"top_k": -1}, "top_k is -1: give a whole number of at least 0"),
    ({"top_k": 2.5}, "top_k is 2.5: give a whole number"),
    (
        {"repetition_penalty": 0},
        "repetition_penalty is 0.0: give a number from 0.01 to 100, e.g. 1.1",
    ),
    (
        {"repetition_penalty": -2},
        "repetition_penalty is -2.0: give a number from 0.01 to 100, e.g. 1.1",
    ),
    ({"repetition_penalty": math.inf}, "repetition_penalty is inf: give a number"),
    ({"context_kept": 0}, "context_kept is 0.0: give a share above 0 and up to 1"),
    ({"context_kept": 1.1}, "context_kept is 1.1: give a share above 0 and up to 1"),
    ({"logit_bias": {"ab": 1}}, "logit_bias is {'ab': 1.0}: give single characters"),
    ({"logit_bias": {"": 1}}, "logit_bias is {'': 1.0}: give single characters"),
    ({"logit_bias": {"a": math.nan}}, "logit_bias is {'a': nan}: give texts with numbers"),
    ({"logit_bias": {"a": math.inf}}, "logit_bias is {'a': inf}: give texts with numbers"),
    ({"logit_bias": {"a": "1"}}, "logit_bias is {'a': '1'}: give texts with numbers"),
    ({"logit_bias": {1: 1.0}}, "logit_bias is {1: 1.0}: give texts with numbers"),
    ({"logit_bias": "a"}, "logit_bias is 'a': give texts with numbers"),
    ({"forbidden": ("a",)}, "forbidden is ('a',): give a text"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0: give a whole number of at least 1"),
    ({"num_samples": 0}, "num_samples is 0: give a whole number of at least 1"),
    ({"stop": ("a", "")}, "stop is ('a', ''): give strings that are not empty"),
    ({"stop": "a"}, "stop is 'a': give a list of texts"),
    ({"echo": 1}, "echo is 1: give true or false"),
    ({"seed": -1}, "seed is -1: give a whole number"),
    ({"unknown": "ignore"}, "unknown is 'ignore': give one of error, skip, replace"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_values_are_one_clear_line(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        SampleConfig(**bad)
    with pytest.raises(UserError) as again:
        sample(MODEL, ONE_TEXT, **bad)
    assert str(refused.value) == str(again.value)
    [name] = bad
    assert str(refused.value).startswith(message)
    assert str(refused.value).endswith(f" (--{name.replace('_', '-')})")
    assert "\n" not in str(refused.value)


def test_a_damaged_model_is_refused_not_believed(kernels: Any) -> None:
    model = some_model()
    with torch.no_grad():
        model.final_norm.weight.fill_(torch.nan)
    message = "^the model gives NaN: its weights are damaged, train it again$"
    for changes in ({}, {"temperature": 0}, {"top_k": 1}, {"forbidden": "b"}, {"stop": ("a",)}):
        with pytest.raises(UserError, match=message):
            complete(model, ONE_TEXT, ["a"], config_of(**changes), kernels=kernels)
    with pytest.raises(UserError, match=message):
        sample(model, ONE_TEXT)
    with pytest.raises(UserError, match=message):
        list(generate(model, [1], max_new_tokens=1, kernels=kernels))


# --- iterators


def test_iterators_do_not_disturb_each_other(kernels: Any) -> None:
    """Three writers of one model, a piece of each in turn; one of them is dropped on the way."""
    configs = [config_of(seed=seed, stop=("ab",)) for seed in range(4)]
    prompts = ["a", some_text(20, 1)]
    expected = [complete(MODEL, ONE_TEXT, prompts, config, kernels=kernels) for config in configs]
    writers: dict[int, Any] = {
        i: write(MODEL, ONE_TEXT, prompts, config, kernels=kernels)
        for i, config in enumerate(configs)
    }
    done: dict[tuple[int, int], Completion] = {}
    for turn in itertools.count():
        if turn == 5:
            writers.pop(3).close()
        if not writers:
            break
        for i in list(writers):
            try:
                completion, _ = next(writers[i])
            except StopIteration:
                del writers[i]
                continue
            if completion.finish and i < 3:
                done[i, completion.index] = completion
    for i, j in itertools.product(range(3), range(2)):
        assert_same(done[i, j], expected[i][j], kernels)


def test_an_abandoned_iterator_leaves_nothing_behind(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders: list[weakref.ref[Any]] = []
    freed: list[int] = []
    make = generation.make_decoder

    def noting(*arguments: Any) -> Any:
        decoder = make(*arguments)
        assert type(decoder) is (NativeDecoder if kernels == "on" else PyTorchDecoder)
        weakref.finalize(decoder, freed.append, 1)
        decoders.append(weakref.ref(decoder))
        return decoder

    monkeypatch.setattr(generation, "make_decoder", noting)
    model = some_model().train()
    expected = complete(model, ONE_TEXT, ["ab"], config_of(), kernels=kernels)
    for n in (0, 1, 7):
        pieces = write(model, ONE_TEXT, ["a", "b", "c"], config_of(), batch_size=2, kernels=kernels)
        for _ in range(n):
            next(pieces)
        tokens = generate(model, [1], max_new_tokens=20, kernels=kernels)
        for _ in range(n):
            next(tokens)
        del pieces, tokens
    gc.collect()
    assert [decoder() for decoder in decoders] == [None] * len(decoders)
    assert len(freed) == len(decoders) >= 6
    assert all(module.training for module in model.modules())
    assert not torch.is_inference_mode_enabled()
    [again] = complete(model, ONE_TEXT, ["ab"], config_of(), kernels=kernels)
    assert_same(again, expected[0], kernels)


def test_a_model_may_change_between_two_texts(kernels: Any) -> None:
    """As it does while it is trained: nothing of it is kept."""
    model = some_model()
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0, "kernels": kernels}
    for seed in range(3):
        shake(model, seed=seed, std=0.4)
        assert ids_of(list(generate(model, [1], **options))) == greedy(model, [1], 20)


@pytest.mark.parametrize(
    "kernels",
    [
        "on",
        "off",
    ],
)
def test_writing_under_autocast(kernels: Any) -> None:
    if kernels == "on":
        kernels_of("native")
    with torch.autocast("cpu", torch.bfloat16):
        [ours] = complete(MODEL, ONE_TEXT, ["a"], config_of(), kernels=kernels)
    assert len(ours.text) == 40


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_writes_with_every_filter() -> None:
    model = some_model().cuda()
    config = config_of(
        logit_bias={"a": 1.0}, forbidden="b", top_p=0.9, min_p=0.01, repetition_penalty=1.1
    )
    [ours] = complete(model, ONE_TEXT, ["a"], config, top_logprobs=2, tell_prompt=True)
    [theirs] = complete(MODEL, ONE_TEXT, ["a"], config, top_logprobs=2, tell_prompt=True)
    assert ours.text == theirs.text
