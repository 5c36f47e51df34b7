"""The message for every bad value, the derived values, the budgets and the presets."""

import dataclasses
import inspect
import json
import math
import subprocess
import sys
from typing import Any

import pytest

from chargpt.base.checks import from_dict
from chargpt.base.errors import UserError
from chargpt.config import PRESETS, DataConfig, GPT2Config, SampleConfig, TrainConfig, best

CLASSES: tuple[type[Any], ...] = (GPT2Config, DataConfig, TrainConfig, SampleConfig)
SEED = "give a whole number from 0 to 2^63 - 1"
BELOW_1 = "give a number from 0 to below 1"
BIAS = "give single characters with numbers up to 10,000, such as e=-2"
FROM_MINUS_2 = "give a number from -2 to 2, e.g. 0.5"
SHARE = "give a share from 0 to 1"
ABOVE_0 = "give a share above 0 and up to 1"
BUDGET = "give a positive number of at most 10^12"
DATA_SHARE = "give a share between 0 and 1, such as 0.1"

OUT_OF_RANGE: list[tuple[type[Any], str, Any, str]] = [
    (cls, name, value, remedy)
    for cls, names, value, remedy in [
        (GPT2Config, "block_size n_layer n_head d_model", 0, "give a whole number of at least 1"),
        (GPT2Config, "vocab_size d_ff", -1, "give a positive number, or 0 to derive it"),
        (GPT2Config, "dropout embedding_dropout attention_dropout", 1.0, BELOW_1),
        (GPT2Config, "dropout embedding_dropout attention_dropout", -0.1, BELOW_1),
        (DataConfig, "encoding", "", "give a name such as utf-8 or latin-1"),
        (DataConfig, "min_count", 0, "give a whole number of at least 1"),
        (DataConfig, "validation_fraction", 0.0, DATA_SHARE),
        (DataConfig, "validation_fraction", 1.0, DATA_SHARE),
        (TrainConfig, "batch_size log_interval", 0, "give a whole number of at least 1"),
        (TrainConfig, "gradient_accumulation_steps", -4, "give a whole number of at least 1"),
        (TrainConfig, "steps", 0, BUDGET),
        (TrainConfig, "steps", 10**12 + 1, BUDGET),
        (TrainConfig, "epochs minutes", 0.0, BUDGET),
        (TrainConfig, "eval_interval save_interval", -1, "give a whole number of at least 0"),
        (TrainConfig, "eval_characters", -1, "give a whole number of at least 0"),
        (TrainConfig, "patience sample_length", -1, "give a whole number of at least 0"),
        (TrainConfig, "seed", -1, SEED),
        (TrainConfig, "weight_decay embedding_decay", -0.1, "give a number of at least 0"),
        (TrainConfig, "grad_clip", -1.0, "give a number of at least 0"),
        (TrainConfig, "learning_rate muon_learning_rate", 0.0, "give a positive number"),
        (TrainConfig, "learning_rate_floor warmup_fraction cooldown_fraction", 1.1, SHARE),
        (TrainConfig, "learning_rate_floor warmup_fraction cooldown_fraction", -0.1, SHARE),
        (TrainConfig, "ngram_weight ngram_weight_floor", 1.1, SHARE),
        (TrainConfig, "ngram_order", 21, "give a whole number from 1 to 20"),
        (TrainConfig, "muon_momentum beta1 beta2", 1.0, BELOW_1),
        (SampleConfig, "max_new_tokens num_samples", 0, "give a whole number of at least 1"),
        (SampleConfig, "top_k", -1, "give a whole number of at least 0"),
        (SampleConfig, "seed", 2**63, SEED),
        (SampleConfig, "temperature", -0.1, "give 0 (greedy) or more, e.g. 0.8"),
        (SampleConfig, "temperature", math.inf, "give a number"),
        (SampleConfig, "top_p context_kept", 0.0, ABOVE_0),
        (SampleConfig, "top_p context_kept", 1.1, ABOVE_0),
        (SampleConfig, "min_p", -0.1, SHARE),
        (SampleConfig, "repetition_penalty", 0.0, "give a number from 0.01 to 100, e.g. 1.1"),
        (SampleConfig, "presence_penalty frequency_penalty", 2.1, FROM_MINUS_2),
        (SampleConfig, "presence_penalty frequency_penalty", -2.1, FROM_MINUS_2),
        (SampleConfig, "logit_bias", {"ee": 1.0}, BIAS),
        (SampleConfig, "logit_bias", {"e": 1e300}, BIAS),
        (SampleConfig, "stop", ("a", ""), "give strings that are not empty"),
    ]
    for name in names.split()
]
WRONG_TYPE: list[tuple[type[Any], str, Any, str]] = [
    (GPT2Config, "n_layer", True, "give a whole number"),
    (GPT2Config, "n_layer", 2.0, "give a whole number"),
    (GPT2Config, "n_layer", None, "give a whole number"),
    (GPT2Config, "dropout", "0.1", "give a number"),
    (GPT2Config, "dropout", False, "give a number"),
    (GPT2Config, "dropout", math.nan, "give a number"),
    (GPT2Config, "bias", 1, "give true or false"),
    (GPT2Config, "norm_placement", "before", "give one of pre, post, sandwich"),
    (GPT2Config, "norm_placement", ["pre"], "give one of pre, post, sandwich"),
    (DataConfig, "encoding", 8, "give a text"),
    (TrainConfig, "steps", 1.5, "give a whole number"),
    (TrainConfig, "minutes", 10**400, "give a number"),
    (SampleConfig, "logit_bias", {"e": "-2"}, "give texts with numbers, such as e=-2"),
    (SampleConfig, "logit_bias", [("e", -2)], "give texts with numbers, such as e=-2"),
    (SampleConfig, "stop", "a", "give a list of texts"),
    (SampleConfig, "stop", ["a", 1], "give a list of texts"),
]


@pytest.mark.parametrize(("cls", "name", "value", "remedy"), OUT_OF_RANGE + WRONG_TYPE)
def test_the_message_for_a_bad_value_has_the_remedy_and_the_flag(
    cls: type[Any], name: str, value: object, remedy: str
) -> None:
    with pytest.raises(UserError) as caught:
        cls(**{name: value})
    assert str(caught.value) == f"{name} is {value!r:.80}: {remedy} (--{name.replace('_', '-')})"


def test_every_number_has_a_range() -> None:
    """Fails for a new field without a rule."""
    ruled = {(cls, name) for cls, name, *_ in OUT_OF_RANGE}
    for cls in CLASSES:
        for field in dataclasses.fields(cls):
            if field.type not in ("bool", "str") and not isinstance(field.default, str | bool):
                assert (cls, field.name) in ruled, field.name


@pytest.mark.parametrize(
    ("n_head", "d_model", "nearest"), [(5, 128, 4), (7, 12, 6), (200, 128, 128), (3, 7, 1)]
)
def test_n_head_must_divide_d_model(n_head: int, d_model: int, nearest: int) -> None:
    with pytest.raises(UserError) as caught:
        GPT2Config(n_head=n_head, d_model=d_model)
    assert str(caught.value) == (
        f"n_head is {n_head}, which does not divide d_model {d_model}: give --n-head {nearest}, "
        f"or a d_model that is a multiple of {n_head}"
    )
    GPT2Config(n_head=nearest, d_model=d_model)


def test_an_int_becomes_a_float_and_a_list_a_tuple() -> None:
    for stored in (GPT2Config(dropout=0).dropout, TrainConfig(epochs=2).epochs):
        assert type(stored) is float
    assert SampleConfig(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


# --- derived values


def test_d_ff_follows_d_model_unless_given() -> None:
    assert GPT2Config(d_model=64).d_ff == 256
    assert GPT2Config(d_model=64).replace(d_model=32).d_ff == 128
    assert GPT2Config(d_model=64).replace(n_layer=1).d_ff == 256
    explicit = GPT2Config(d_model=64, d_ff=100)
    assert explicit.d_ff == 100
    assert explicit.replace(d_model=32).d_ff == 100
    assert explicit.replace(d_ff=0).d_ff == 256
    assert GPT2Config(d_model=64).replace(d_model=32, d_ff=50).d_ff == 50


@pytest.mark.parametrize("cls", [GPT2Config, DataConfig, TrainConfig])
def test_replace_checks_and_does_not_change_the_original(cls: type[Any]) -> None:
    original = cls()
    names = [field.name for field in dataclasses.fields(cls)]
    assert original.replace() == original
    with pytest.raises(UserError):
        original.replace(**{names[0]: b"?"})
    with pytest.raises(TypeError):
        original.replace(no_such_name=1)
    assert original == cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(original, names[0], None)


# --- budgets


@pytest.mark.parametrize(
    "given",
    [
        *({}, {"steps": 5}, {"epochs": 1.5}, {"minutes": 1.0}),
        *({"steps": 5, "minutes": 1.0}, {"epochs": 1.5, "minutes": 1.0}),
    ],
)
def test_a_budget_replaces_the_other_budgets(given: dict[str, Any]) -> None:
    direct = TrainConfig(**given)
    replaced = TrainConfig(steps=7, minutes=2.0).replace(**given) if given else TrainConfig()
    for config in (direct, replaced, direct.replace(batch_size=4)):
        budgets = {"steps": config.steps, "epochs": config.epochs, "minutes": config.minutes}
        assert budgets == dict.fromkeys(budgets) | (given or {"minutes": 3.0})


@pytest.mark.parametrize("make", [TrainConfig, TrainConfig().replace])
def test_steps_and_epochs_exclude_each_other(make: Any) -> None:
    message = "^steps and epochs are budgets that exclude each other: give one$"
    for limit in (None, 1.0):
        with pytest.raises(UserError, match=message):
            make(steps=5, epochs=1.0, minutes=limit)


def test_a_limit_can_be_removed() -> None:
    assert TrainConfig(steps=5, minutes=1.0).replace(minutes=None) == TrainConfig(steps=5)


# --- presets


def test_editing_one_preset_leaves_the_others_alone() -> None:
    """No preset uses another one or a shared value."""
    assert list(PRESETS) == [make.__name__ for make in PRESETS.values()]
    for make in PRESETS.values():
        used = inspect.getclosurevars(make).globals.keys()
        assert used == {"Preset", "GPT2Config", "TrainConfig"}
    with pytest.raises(TypeError):
        PRESETS["tiny"] = best  # type: ignore[index]


# --- from plain values


@pytest.mark.parametrize(
    "config",
    [
        *(part for make in PRESETS.values() for part in (make().model_config, make().train_config)),
        DataConfig(document_separator="\n"),
        SampleConfig(stop=("a", "b")),
    ],
)
def test_a_configuration_survives_json(config: Any) -> None:
    saved = json.dumps(dataclasses.asdict(config))
    assert from_dict(type(config), json.loads(saved)) == config


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^unknown setting 'n_heads': did you mean n_head\?$"):
        from_dict(GPT2Config, {"n_layer": 2, "n_heads": 4})
    known = ", ".join(field.name for field in dataclasses.fields(DataConfig))
    with pytest.raises(UserError, match=f"^unknown setting 'zzz': give one of {known}$"):
        from_dict(DataConfig, {"zzz": 4})


def test_importing_the_configuration_does_not_import_torch() -> None:
    program = "import sys, chargpt.config; sys.exit(str({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, check=False)
    assert done.stderr.split() == [b"set()"]
