"""`auto`: what is chosen for a text, some minutes and a machine."""

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from conftest import words

from chargpt.base.errors import UserError
from chargpt.base.units import human_count
from chargpt.compute.counts import parameters_of, training_flops_per_token
from chargpt.config import DataConfig, GPT2Config, TrainConfig
from chargpt.data.corpus import load_corpus
from chargpt.runs.folder import read_config
from chargpt.train import train
from chargpt.training.probe import text_size
from chargpt.training.size import MOST_PASSES, Rates, TextSize, choose

LAPTOP = Rates(2e11, 3e11)
SHAKESPEARE = TextSize(1_003_854, 65)


def parameters(*arguments: Any, **settings: Any) -> int:
    return parameters_of(choose(*arguments, settings).model_config)


def test_more_time_a_faster_machine_and_a_longer_text_never_give_a_smaller_model() -> None:
    minutes = (0.1, 0.5, 1, 3, 10, 60)
    speeds = [Rates(x, 1.4 * x) for x in (1e10, 5e10, 2e11, 1e12, 1e13)]
    texts = [TextSize(n, 65) for n in (3_000, 100_000, 1_000_000, 50_000_000)]
    by_minutes = [
        [parameters(text, speed, minutes=m) for m in minutes]
        for text, speed in product(texts, speeds)
    ]
    by_speed = [
        [parameters(text, speed, minutes=m) for speed in speeds]
        for text, m in product(texts, minutes)
    ]
    for sizes in (*by_minutes, *by_speed):
        assert all(a <= b for a, b in pairwise(sizes)), sizes
    assert len({size for sizes in by_minutes for size in sizes}) > 4
    assert parameters(texts[0], LAPTOP, minutes=10) < parameters(texts[2], LAPTOP, minutes=10)


def test_a_text_whose_context_tells_less_never_gets_a_larger_model() -> None:
    texts = [SHAKESPEARE._replace(context_gain=gain) for gain in (0.0, 0.4, 0.8, 1.7, 2.8)]
    sizes = [parameters(text, LAPTOP, minutes=10) for text in texts]
    assert sizes == sorted(sizes) and sizes[0] < sizes[3] == sizes[4]


def test_the_same_inputs_give_the_same_choice_and_all_of_it_is_explained() -> None:
    first, second = (choose(SHAKESPEARE, LAPTOP, {"minutes": 3}) for _ in range(2))
    assert first == second
    model, lines = first.model_config, "\n".join(first.reasons)
    for said in (f"{model.n_layer} layers of {model.d_model}", f"context {model.block_size}"):
        assert said in lines


@pytest.mark.parametrize(
    "settings",
    [
        {"d_model": 96, "n_head": 6},
        {"n_head": 6, "steps": 100},
        {"n_layer": 7, "dropout": 0.3, "minutes": 20.0},
        {"optimizer": "adamw", "learning_rate": 1e-3, "epochs": 2.0},
        {"block_size": 32, "batch_size": 3, "gradient_accumulation_steps": 2},
    ],
)
def test_what_is_given_is_kept(settings: dict[str, Any]) -> None:
    choice = choose(SHAKESPEARE, LAPTOP, settings)
    for name, value in settings.items():
        owner = choice.model_config if hasattr(choice.model_config, name) else choice.train_config
        assert getattr(owner, name) == value
    assert choice.model_config.d_model % choice.model_config.n_head == 0


@pytest.mark.parametrize("steps", [1, 30, 2_600, 1_000_000])
def test_of_steps_the_characters_are_known(steps: int) -> None:
    choice = choose(SHAKESPEARE, None, {"steps": steps})
    tokens = steps * choice.train_config.batch_size * choice.model_config.block_size
    assert f"{human_count(tokens)} characters" in choice.reasons[0]


def test_an_n_gram_can_be_refused() -> None:
    assert choose(SHAKESPEARE, LAPTOP, {}).train_config.ngram_weight_floor > 0
    refused = choose(SHAKESPEARE, LAPTOP, {"ngram_weight": 0.0}).train_config
    assert refused.ngram_weight == refused.ngram_weight_floor == 0


def test_a_given_width_changes_what_follows_from_it() -> None:
    narrow, wide = (choose(SHAKESPEARE, LAPTOP, {"d_model": d}).model_config for d in (64, 512))
    assert narrow.n_layer < wide.n_layer and narrow.n_head < wide.n_head


def test_a_short_text_is_not_seen_forever() -> None:
    choice = choose(TextSize(20_000, 60), LAPTOP, {"minutes": 10})
    assert choice.train_config.epochs == MOST_PASSES and choice.train_config.minutes == 10
    assert choice.model_config.dropout > 0
    assert "more would add nothing" in choice.reasons[-1]
    long = choose(TextSize(10**9, 60), LAPTOP, {"minutes": 10})
    assert long.train_config.epochs is None and long.model_config.dropout == 0


@pytest.mark.parametrize("n_tokens", [200, 300, 2_700, 10**10])
@pytest.mark.parametrize("vocab_size", [1, 4, 65, 8_000])
def test_any_text_gets_a_model_that_can_be_trained(n_tokens: int, vocab_size: int) -> None:
    model, train_config, _, _ = choose(TextSize(n_tokens, vocab_size), LAPTOP, {})
    assert model.block_size < n_tokens
    assert train_config.minutes == 3
    seconds = training_flops_per_token(model) * train_config.batch_size * model.block_size / 2e11
    assert seconds < 3  # a step


def test_each_device_gets_a_sequence() -> None:
    choice = choose(SHAKESPEARE, Rates(1e9, 1e9), {}, devices=6)
    assert choice.train_config.batch_size % 6 == 0


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match="n_head is 5, which does not divide d_model 96"):
        choose(SHAKESPEARE, LAPTOP, {"d_model": 96, "n_head": 5})
    with pytest.raises(UserError, match="dropout is 2"):
        choose(SHAKESPEARE, LAPTOP, {"dropout": 2.0})


def test_a_run_records_the_choice_and_a_resumed_one_keeps_it(tmp_path: Path) -> None:
    text, out, lines = tmp_path / "text.txt", tmp_path / "run", []
    text.write_text(words(3000), encoding="utf-8")
    settings = {
        "steps": 4,
        "minutes": 1.0,
        "device": "cpu",
        "precision": "fp32",
        "sample_length": 0,
    }
    train(str(text), settings=settings, out=out, quiet=True)
    before = read_config(out)
    rates = Rates(*before.environment["rates"])
    size = text_size(load_corpus([str(text)], DataConfig()))
    choice = choose(size, rates, settings)
    assert choice.model_config == before.model_config
    assert choice.train_config == before.train_config
    train(str(text), settings={"steps": 6}, out=out, resume=True, quiet=True)
    after = read_config(out)
    assert after.model_config == before.model_config
    assert after.train_config == before.train_config.replace(steps=6)
    assert after.environment["rates"] == before.environment["rates"], lines


def test_settings_do_not_stand_beside_configurations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="settings are for a choice"):
        train("x", model_config=GPT2Config(), settings={"steps": 1}, out=tmp_path / "run")
    with pytest.raises(UserError, match="settings are for a choice"):
        train("x", train_config=TrainConfig(), settings={"steps": 1}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
