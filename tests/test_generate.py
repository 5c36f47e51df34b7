"""Texts, compared with slow implementations of drawing and of cutting at stop strings."""

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

import chargpt
from chargpt import generate as generation
from chargpt.base.errors import UserError, is_out_of_memory
from chargpt.base.seeding import SAMPLE, derive_seed
from chargpt.config import GPT2Config, SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.decoder import PyTorchDecoder
from chargpt.engine.native_decoder import NativeDecoder
from chargpt.engine.scheduler import Token
from chargpt.generate import Completion, StopStringFilter, complete, generate, sample
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
    """Compare two completions; tokens are equal to the bit with the native decoder."""
    assert (ours.prompt, ours.text, ours.finish) == (theirs.prompt, theirs.text, theirs.finish)
    for mine, other in ((ours.tokens, theirs.tokens), (ours.prompt_tokens, theirs.prompt_tokens)):
        if kernels == "on":
            assert mine == other
        assert ids_of(mine) == ids_of(other)
        assert [t.logprob for t in mine] == pytest.approx([t.logprob for t in other], abs=1e-5)


def greedy(model: GPT2, prompt: list[int], n: int) -> list[int]:
    """Continue a prompt with a full forward pass and an argmax per token."""
    new: list[int] = []
    for _ in range(n):
        new.append(int(slow.predictions(model, prompt, new)[-1].argmax()))
    return new


# --- prompts


def test_prompts_start_like_documents() -> None:
    documents = CharTokenizer("ab\n", end_of_text=True)
    assert CharTokenizer("ab\n").encode_prompt("ab") == [1, 2]
    assert documents.encode_prompt("ab") == [3, 1, 2]
    assert documents.encode_prompt("") == [3]
    assert CharTokenizer("ab?").encode_prompt("é", unknown="skip") == [0]
    assert CharTokenizer("ab?").encode_prompt("aéb", unknown="replace") == [1, 0, 2]


def test_an_unknown_character_in_a_prompt_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="never seen 'é'"):
        generate(MODEL, ONE_TEXT, ["a", "b", "é"], config_of())
    skipped = complete(MODEL, ONE_TEXT, ["aéb", "ab"], config_of(unknown="skip"))
    assert skipped[0].prompt == "aéb"
    assert skipped[0].text == skipped[1].text


def test_an_empty_prompt_starts_a_line_or_a_document(kernels: Any) -> None:
    for tokenizer, start in ((ONE_TEXT, "\n"), (CharTokenizer("abcdefghijk"), "a")):
        empty, given_ = complete(MODEL, tokenizer, ["", start], config_of(), kernels=kernels)
        assert (empty.text, empty.prompt) == (given_.text, "")
    [document] = complete(MODEL, DOCUMENTS, [""], config_of(temperature=0), kernels=kernels)
    drawn = greedy(MODEL, [10], 40)
    assert document.text == DOCUMENTS.decode(drawn[: (drawn + [10]).index(10)])


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
    values = {**config.logit_bias, **dict.fromkeys(config.forbidden, -math.inf)}
    bias = [values.get(character, 0.0) for character in tokenizer.characters]
    bias += [0.0] * (tokenizer.vocab_size - len(bias))
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "context_kept")
    return {"bias": bias} | {name: getattr(config, name) for name in names}


def cut(text: str, stop: tuple[str, ...]) -> str | None:
    """Return the text before the first complete stop string; None: no stop string."""
    for n in range(1, len(text) + 1):
        places = [text[:n].index(s) for s in stop if s in text[:n]]
        if places:
            return text[: min(places)]
    return None


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("tokenizer", [ONE_TEXT, DOCUMENTS], ids=["text", "documents"])
def test_texts_equal_the_slow_implementation(
    kernels: Any, tokenizer: CharTokenizer, changes: dict[str, Any]
) -> None:
    config = config_of(**changes)
    unstopped = config.replace(stop=())
    filters = slow_filters(config, tokenizer)
    prompts = ["", some_text(9, 1), some_text(33, 3)]
    options: dict[str, Any] = {"seeds": [4, 5], "top_logprobs": 3, "kernels": kernels}
    done = complete(MODEL, tokenizer, prompts, config, **options)
    uncut = complete(MODEL, tokenizer, prompts, unstopped, **options)
    assert [(c.index, c.number) for c in done] == [(i, n) for i in range(3) for n in range(2)]
    for ours, whole in zip(done, uncut, strict=True):
        assert ours.prompt == prompts[ours.index]
        ids = tokenizer.encode_prompt(ours.prompt)
        new = ids_of(whole.tokens)
        seed = [4, 5][ours.number]
        drawn = slow.continuation(
            MODEL, ids, new, seed=seed, end_id=tokenizer.end_of_text_id, **filters
        )
        assert new == drawn[:-1]
        text = tokenizer.decode(new)
        assert whole.text == text
        assert whole.finish == ("end_of_text" if len(new) < 40 else "length")
        assert len(new) == 40 or drawn[-1] == tokenizer.end_of_text_id
        assert not set(text) & set(config.forbidden)
        # Stop strings cut the text and its tokens.
        left = cut(text, config.stop)
        assert ours.text == (text if left is None else left)
        assert ours.finish == (whole.finish if left is None else "stop")
        assert tokenizer.decode(ids_of(ours.tokens)) == ours.text
        if kernels == "on":  # PyTorch rounds by the batch size, which depends on the stop strings
            assert ours.tokens == whole.tokens[: len(ours.text)]
        # Log-probabilities are the model's own, before the filters.
        expected = slow.predictions(MODEL, ids, new, config.context_kept)
        slow.assert_likelihoods(ours.tokens, expected, n_top=3)


def test_sample_returns_one_text_with_or_without_its_prompt() -> None:
    config = config_of(prompt="abc", temperature=0, num_samples=3)
    text = ONE_TEXT.decode(greedy(MODEL, [1, 2, 3], 40))
    assert sample(MODEL, ONE_TEXT, config) == "abc" + text
    options: dict[str, Any] = {"prompt": "abc", "max_new_tokens": 40, "temperature": 0}
    assert chargpt.sample(MODEL, ONE_TEXT, **options) == "abc" + text
    assert sample(MODEL, ONE_TEXT, config, echo=False) == text
    assert sample(MODEL, ONE_TEXT, config, prompt="") == ONE_TEXT.decode(greedy(MODEL, [0], 40))
    assert config.echo
    with pytest.raises(UserError, match="unknown setting 'temprature': did you mean temperature"):
        sample(MODEL, ONE_TEXT, temprature=1)
    with pytest.raises(UserError, match="temperature is -1.0: give 0"):
        sample(MODEL, ONE_TEXT, temperature=-1)


def test_samples_depend_on_the_seed_and_their_number_only(kernels: Any) -> None:
    config = config_of(prompt="ab", num_samples=4)
    texts = [c.text for c in complete(MODEL, ONE_TEXT, ["ab"], config, kernels=kernels)]
    assert len(set(texts)) == 4
    together = complete(MODEL, ONE_TEXT, ["c", "ab"], config, kernels=kernels)
    assert [c.text for c in together if c.index == 1] == texts
    for number in range(4):
        seeds = [derive_seed(3, SAMPLE, number)]
        [one] = complete(MODEL, ONE_TEXT, ["ab"], config, seeds=seeds, kernels=kernels)
        assert one.text == texts[number]
    assert sample(MODEL, ONE_TEXT, config) == "ab" + texts[0]
    other = complete(MODEL, ONE_TEXT, ["ab"], config.replace(seed=4), kernels=kernels)
    assert not {c.text for c in other} & set(texts)


def test_no_prompts_or_seeds_write_nothing() -> None:
    assert complete(MODEL, ONE_TEXT, [], config_of()) == []
    assert complete(MODEL, ONE_TEXT, ["a"], config_of(), seeds=[]) == []


# --- neighbours


@pytest.mark.parametrize(
    ("tokenizer", "stop"),
    [(ONE_TEXT, ()), (ONE_TEXT, ("ia", "bgb")), (DOCUMENTS, ("a", "bgb"))],
    ids=["text", "stop", "documents"],
)
def test_a_text_does_not_depend_on_its_neighbours(
    kernels: Any, tokenizer: CharTokenizer, stop: tuple[str, ...]
) -> None:
    """Any batch size and order of the prompts."""
    prompts = [some_text(n, n) for n in (0, 1, 5, T, T + 1, 40, 3, 3)]
    config, seeds = config_of(stop=stop, max_new_tokens=30), [1, 2, 3]
    options: dict[str, Any] = {"top_logprobs": 2, "prompt_logprobs": True, "kernels": kernels}
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
def test_text_streams_as_early_as_possible(kernels: Any, tokenizer: CharTokenizer) -> None:
    stop = ("abc", "bbf", "fgh\n", "gif")
    config = config_of(stop=stop, num_samples=6, max_new_tokens=60, temperature=2.0, seed=2)
    prompts = ["a", some_text(20, 5)]
    texts: dict[int, str] = {}
    objects: dict[tuple[int, int], Completion] = {}
    options: dict[str, Any] = {"batch_size": 5, "kernels": kernels}
    for completion, piece in generate(MODEL, tokenizer, prompts, config, **options):
        key = completion.index, completion.number
        assert objects.setdefault(key, completion) is completion
        before = texts.get(id(completion), "")
        assert not before.endswith("END"), "no piece follows the last one"
        texts[id(completion)] = before + piece
        assert completion.text == before + piece
        if completion.finish:
            texts[id(completion)] += "END"
            continue
        assert piece
        raw = tokenizer.decode(ids_of(completion.tokens))
        # Only a possible beginning of a stop string is held back.
        starts = {s[:n] for s in stop for n in range(1, len(s))}
        held = max((n for n in range(5) if raw[len(raw) - n :] in starts), default=0)
        assert completion.text == raw[: len(raw) - held]
    assert len(objects) == 12
    ends = {"stop", "length"} if tokenizer is ONE_TEXT else {"stop", "end_of_text"}
    assert {c.finish for c in objects.values()} == ends


@pytest.mark.parametrize("seed", range(8))
def test_stop_strings_cut_the_text(kernels: Any, seed: int) -> None:
    """They overlap, begin or contain each other, and never appear in the text."""
    rng = random.Random(seed)
    config = config_of(max_new_tokens=60, seed=seed)
    [uncut] = complete(MODEL, ONE_TEXT, ["a"], config, kernels=kernels)
    stop = []
    for _ in range(rng.randint(1, 3)):
        start, n = rng.randrange(50), rng.randint(1, 6)
        stop += [uncut.text[start : start + n], uncut.text[start : start + rng.randint(1, n)] + "z"]
        stop += [uncut.text[start + n // 2 : start + n + 3]]
    for some in (tuple(stop), *((s,) for s in stop)):
        pieces = list(generate(MODEL, ONE_TEXT, ["a"], config.replace(stop=some), kernels=kernels))
        completion = pieces[-1][0]
        expected = cut(uncut.text, some)
        assert completion.text == (uncut.text if expected is None else expected)
        assert completion.finish == ("length" if expected is None else "stop")
        assert "".join(piece for _, piece in pieces) == completion.text
        assert len(completion.tokens) == len(completion.text)
        assert not any(s in completion.text for s in some)


def test_a_stop_string_completed_by_the_last_character(kernels: Any) -> None:
    """A stop string that needs one more character does not stop the text."""
    [uncut] = complete(MODEL, ONE_TEXT, ["a"], config_of(temperature=0), kernels=kernels)
    text = uncut.text
    for end in range(4, 16):
        stop = (text[end - 3 : end],)
        before = text.index(stop[0])
        for n in (before + 3, before + 2, before + 1):
            config = config_of(temperature=0, max_new_tokens=n, stop=stop)
            [ours] = complete(MODEL, ONE_TEXT, ["a"], config, kernels=kernels)
            expected = (text[:before], "stop") if n == before + 3 else (text[:n], "length")
            assert (ours.text, ours.finish) == expected
            assert len(ours.tokens) == len(ours.text)


def test_a_stop_string_at_the_start_leaves_an_empty_text(kernels: Any) -> None:
    [uncut] = complete(MODEL, ONE_TEXT, ["a"], config_of(temperature=0), kernels=kernels)
    config = config_of(temperature=0, stop=(uncut.text[0],), prompt="a")
    [(completion, piece)] = generate(MODEL, ONE_TEXT, ["a"], config, kernels=kernels)
    assert (completion.text, completion.finish, completion.tokens, piece) == ("", "stop", [], "")
    assert sample(MODEL, ONE_TEXT, config) == "a"


def test_stop_strings_in_the_prompt_have_no_effect(kernels: Any) -> None:
    """Also those that begin there."""
    [uncut] = complete(MODEL, ONE_TEXT, ["ab"], config_of(temperature=0), kernels=kernels)
    for stop in ("ab", "b" + uncut.text[0]):
        config = config_of(temperature=0, stop=(stop,))
        [ours] = complete(MODEL, ONE_TEXT, ["ab"], config, kernels=kernels)
        expected = cut(uncut.text, (stop,))
        assert ours.text == (uncut.text if expected is None else expected)


def test_end_of_text_releases_the_text_held_back(kernels: Any) -> None:
    [uncut] = complete(MODEL, DOCUMENTS, [""], config_of(seed=5), kernels=kernels)
    assert uncut.finish == "end_of_text"
    assert len(uncut.text) > 3
    config = config_of(seed=5, stop=(uncut.text[-3:] + "z",))
    pieces = list(generate(MODEL, DOCUMENTS, [""], config, kernels=kernels))
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
def test_the_filter_works_for_any_pieces(text: str, stop: list[str], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stop_filter = StopStringFilter(stop)
    out, seen = "", ""
    # The text up to the first piece that completes a stop string: what precedes the string is out.
    for piece in (text[a:b] for a, b in pairwise(edges)):
        out += stop_filter.push(piece)
        seen += piece if not any(s in seen for s in stop) else ""
        assert stop_filter.found == any(s in seen for s in stop)
        if stop_filter.found:
            assert out == min((seen.split(s)[0] for s in stop), key=len)
        else:
            starts = {s[:n] for s in stop for n in range(1, len(s))}
            held = [n for n in range(1, 5) if n <= len(seen) and seen[-n:] in starts]
            assert out == seen[: len(seen) - max(held, default=0)]
    rest = stop_filter.rest()
    assert stop_filter.rest() == ""
    assert rest == "" if stop_filter.found else out + rest == text


# --- prompt log-probabilities


@pytest.mark.parametrize("tokenizer", [ONE_TEXT, DOCUMENTS], ids=["text", "documents"])
def test_prompt_logprobs(kernels: Any, tokenizer: CharTokenizer) -> None:
    prompts = ["", "a", some_text(9, 1), some_text(T - 1, 2), some_text(T, 2), some_text(50, 3)]
    options: dict[str, Any] = {"seeds": [1, 2], "kernels": kernels, "top_logprobs": 2}
    done = complete(MODEL, tokenizer, prompts, config_of(), prompt_logprobs=True, **options)
    without = complete(MODEL, tokenizer, prompts, config_of(), **options)
    for ours, theirs in zip(done, without, strict=True):
        assert theirs.prompt_tokens == []
        assert ours.text == theirs.text
        read = tokenizer.encode_prompt(ours.prompt)[-T:]
        if tokenizer is DOCUMENTS and len(ours.prompt) < T:
            assert tokenizer.decode(ids_of(ours.prompt_tokens)) == ours.prompt
        elif ours.prompt:
            assert tokenizer.decode(ids_of(ours.prompt_tokens)) == ours.prompt[-T:][1:]
        assert ids_of(ours.prompt_tokens) == read[1:]
        expected = slow.predictions(MODEL, read[:1], read[1:])
        slow.assert_likelihoods(ours.prompt_tokens, expected, n_top=2)


# --- bias and forbidden characters


def test_forbidden_characters_are_never_written(kernels: Any) -> None:
    """Also if the other filters would leave nothing else; end-of-text stays allowed."""
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


def test_unusable_biases_are_refused_at_once() -> None:
    everything = "abcdefghi\n"
    for tokenizer, forbidden in ((DOCUMENTS, everything), (ONE_TEXT, everything + "j")):
        with pytest.raises(UserError, match="every character of the model is forbidden: allow"):
            generate(MODEL, tokenizer, ["a"], config_of(forbidden=forbidden))
    with pytest.raises(UserError, match="names 'é', which is no token of the model: leave it out"):
        generate(MODEL, ONE_TEXT, ["a"], config_of(logit_bias={"é": 1.0}))


def test_forbidding_an_unknown_character_has_no_effect() -> None:
    """One list of characters may serve several models."""
    [ours] = complete(MODEL, ONE_TEXT, ["a"], config_of(forbidden="éz"))
    [theirs] = complete(MODEL, ONE_TEXT, ["a"], config_of())
    assert ours.text == theirs.text


# --- failures


def test_a_damaged_model_is_reported() -> None:
    model = some_model()
    with torch.no_grad():
        model.final_norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="^the model gives NaN: its weights are damaged, train it"):
        sample(model, ONE_TEXT)


OUT_OF_MEMORY = [
    MemoryError("the cache does not fit"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["__init__", "read"])
def test_out_of_memory_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(PyTorchDecoder, place, fail)
    for n, message in (
        (100, "32 texts at the same time: give --num-samples 16 (batch_size in Python)"),
        (3, "3 texts at the same time: give --num-samples 1 (batch_size in Python)"),
        (1, "a text: use a smaller model"),
    ):
        with pytest.raises(UserError) as refused:
            complete(MODEL, ONE_TEXT, ["a"], config_of(num_samples=n), kernels="off")
        assert str(refused.value) == f"not enough memory to write {message}"
        assert is_out_of_memory(refused.value), "training reports it as its own failure"


def test_other_errors_are_not_taken_for_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("expected scalar type Float")

    monkeypatch.setattr(PyTorchDecoder, "read", fail)
    with pytest.raises(RuntimeError, match="^expected scalar type Float$"):
        complete(MODEL, ONE_TEXT, ["a"], config_of(), kernels="off")


# --- iterators


def test_iterators_do_not_disturb_each_other(kernels: Any) -> None:
    """Four iterators over one model take turns; one stops early."""
    configs = [config_of(seed=seed, stop=("ab",)) for seed in range(4)]
    prompts = ["a", some_text(20, 1)]
    expected = [complete(MODEL, ONE_TEXT, prompts, config, kernels=kernels) for config in configs]
    writers = [generate(MODEL, ONE_TEXT, prompts, config, kernels=kernels) for config in configs]
    turns = itertools.zip_longest(*writers[:3], itertools.islice(writers[3], 5))
    done = {
        (i, piece[0].index): piece[0] for turn in turns for i, piece in enumerate(turn) if piece
    }
    for i, j in itertools.product(range(3), range(2)):
        assert_same(done[i, j], expected[i][j], kernels)


def test_an_abandoned_iterator_frees_its_decoder(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders: list[weakref.ref[Any]] = []
    make = generation.make_decoder

    def recorded(*arguments: Any) -> Any:
        decoder = make(*arguments)
        assert type(decoder) is (NativeDecoder if kernels == "on" else PyTorchDecoder)
        decoders.append(weakref.ref(decoder))
        return decoder

    monkeypatch.setattr(generation, "make_decoder", recorded)
    model = some_model().train()
    expected = complete(model, ONE_TEXT, ["ab"], config_of(), kernels=kernels)
    for n in (0, 1, 7):
        prompts = ["a", "b", "c"]
        pieces = generate(model, ONE_TEXT, prompts, config_of(), batch_size=2, kernels=kernels)
        for _ in range(n):
            next(pieces)
        del pieces
    gc.collect()
    assert [decoder() for decoder in decoders] == [None] * 4
    assert not torch.is_inference_mode_enabled()
    [again] = complete(model, ONE_TEXT, ["ab"], config_of(), kernels=kernels)
    assert_same(again, expected[0], kernels)


@pytest.mark.parametrize("training", [True, False])
def test_writing_changes_neither_the_model_nor_random_states(kernels: Any, training: bool) -> None:
    """Also between two pieces; dropout is off while the model writes."""
    model = some_model(dropout=0.5).train(training)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    last: dict[int, str] = {}
    pieces = generate(model, ONE_TEXT, ["a", "bc"], config_of(), kernels=kernels)
    for completion, _ in pieces:
        last[completion.index] = completion.text
        assert all(module.training is training for module in model.modules())
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    expected = complete(MODEL, ONE_TEXT, ["a", "bc"], config_of(), kernels=kernels)
    assert [last[0], last[1]] == [c.text for c in expected]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_a_model_may_change_between_two_texts(kernels: Any) -> None:
    """Training changes it: no weights are kept."""
    model, config = some_model(), config_of(max_new_tokens=20, temperature=0)
    for seed in range(3):
        shake(model, seed=seed, std=0.4)
        [ours] = complete(model, ONE_TEXT, ["a"], config, kernels=kernels)
        assert ids_of(ours.tokens) == greedy(model, [1], 20)


def test_writing_under_autocast_computes_in_float32(kernels: Any) -> None:
    [expected] = complete(MODEL, ONE_TEXT, ["a"], config_of(), kernels=kernels)
    with torch.autocast("cpu", torch.bfloat16):
        [ours] = complete(MODEL, ONE_TEXT, ["a"], config_of(), kernels=kernels)
    assert_same(ours, expected, kernels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_writes_with_every_filter() -> None:
    model = some_model().cuda()
    biases = {"logit_bias": {"a": 1.0}, "forbidden": "b"}
    config = config_of(**biases, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    options: dict[str, Any] = {"top_logprobs": 2, "prompt_logprobs": True}
    [ours] = complete(model, ONE_TEXT, ["a"], config, **options)
    [theirs] = complete(MODEL, ONE_TEXT, ["a"], config, **options)
    assert ours.text == theirs.text
