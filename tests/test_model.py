"""The model against two other GPT-2s; its initial weights, dropout and causality."""

import itertools
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from twin import HF_ACTIVATIONS, as_hf, hf_names, hugging_face, reference_logits, shake

from chargpt.base.errors import UserError
from chargpt.compute.counts import count_parameters, parameters_of
from chargpt.compute.fast_layers import set_attention
from chargpt.config import PRESETS, GPT2Config
from chargpt.model import ACTIVATIONS, GPT2, AttentionBackend

VOCAB = 11
DROPOUT_PLACES = ("embeddings", "weights", "attention", "feed_forward")  # in order of execution


def config(**changes: Any) -> GPT2Config:
    """Return a tiny shape whose d_ff is not 4 × d_model."""
    shape: dict[str, Any] = {"block_size": 7, "vocab_size": VOCAB, "d_model": 12, "d_ff": 20}
    return GPT2Config(**{"n_layer": 2, "n_head": 3, "dropout": 0.0} | shape | changes)


def some_ids(seed: int, *shape: int, vocab_size: int = VOCAB) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    targets = some_ids(2, *logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# --- Hugging Face's GPT-2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", HF_ACTIVATIONS)
def test_logits_and_gradients_equal_hugging_faces(activation: str, bias: bool) -> None:
    pytest.importorskip("transformers")
    shape = config(activation_function=activation, bias=bias)
    model = shake(GPT2(shape)).eval()
    twin = hugging_face(model)
    ids = some_ids(1, 3, 7)
    ours, theirs = model(ids), twin(ids).logits
    assert ours.std() > 0.5  # the values to compare are not all zero
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    loss_of(ours).backward()
    loss_of(theirs).backward()
    their_gradients = {name: p.grad for name, p in twin.named_parameters()}
    for name, theirs_name in hf_names(shape.n_layer, bias).items():
        gradient = as_hf(name, model.get_parameter(name).grad)
        torch.testing.assert_close(gradient, their_gradients[theirs_name], rtol=1e-4, atol=1e-5)


# --- the formulas


@pytest.mark.parametrize(
    ("placement", "activation", "bias"),
    [
        *itertools.product(("pre", "post", "sandwich"), ("gelu",), (True, False)),
        *itertools.product(("pre",), sorted(ACTIVATIONS.keys() - {"gelu"}), (True,)),
    ],
)
def test_logits_and_gradients_equal_the_formulas(
    placement: str, activation: str, bias: bool
) -> None:
    shape = config(norm_placement=placement, activation_function=activation, bias=bias)
    model = shake(GPT2(shape).double()).eval()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    ids = some_ids(1, 2, 6)
    logits, expected = model(ids), reference_logits(shape, weights, ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)

    loss_of(logits).backward()
    loss_of(expected).backward()
    for name, weight in weights.items():
        gradient = model.get_parameter(name).grad
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-8, atol=1e-10)


# --- causality


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("backend", ["sdpa", "matmul"])
def test_a_token_changes_only_its_own_and_later_logits(
    backend: AttentionBackend, placement: str
) -> None:
    model = shake(GPT2(config(norm_placement=placement))).eval()
    set_attention(model, backend)
    ids = some_ids(1, 2, 7)
    with torch.no_grad():
        logits = model(ids)
        for changed in range(7):
            others = ids.clone()
            others[:, changed] = (others[:, changed] + 1) % VOCAB
            new = model(others)
            assert torch.equal(new[:, :changed], logits[:, :changed])
            for later in range(changed, 7):
                assert not torch.equal(new[:, later], logits[:, later])


# --- initial weights


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_initial_weights(placement: str) -> None:
    torch.manual_seed(0)
    model = GPT2(config(n_layer=3, d_model=96, d_ff=0, vocab_size=65, norm_placement=placement))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            gain = "norm" in name and name.endswith(".weight")
            assert (parameter == float(gain)).all(), name
            continue
        std = 0.02 / math.sqrt(2 * 3) if "projection" in name else 0.02
        n = parameter.numel()
        assert abs(parameter.std().item() / std - 1) < 5 / math.sqrt(2 * n), name
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(n), name


def test_initial_weights_do_not_depend_on_the_processor() -> None:
    """PyTorch computes with vectors of other widths, or none; its float32 numbers then differ."""
    program = """
import hashlib, torch
from chargpt.config import GPT2Config
from chargpt.model import GPT2
torch.manual_seed(1)
weights = GPT2(GPT2Config(vocab_size=11, n_layer=1, d_model=32, n_head=2)).parameters()
print(hashlib.sha256(b"".join(w.detach().numpy().tobytes() for w in weights)).hexdigest())
"""
    printed = {
        subprocess.check_output(
            [sys.executable, "-c", program],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": threads},
        )
        for capability, threads in (("default", "1"), ("avx2", "1"), ("avx2", "2"))
    }
    assert len(printed) == 1


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_the_initial_loss_is_close_to_a_uniform_guess(placement: str) -> None:
    torch.manual_seed(0)
    shape = PRESETS["tiny"]().model_config.replace(vocab_size=65, norm_placement=placement)
    model = GPT2(shape).eval()
    ids, targets = some_ids(1, 8, 64, vocab_size=65), some_ids(2, 8, 64, vocab_size=65)
    with torch.no_grad():
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).item()
    assert abs(loss - math.log(65)) < 0.1


@pytest.mark.parametrize(
    ("preset", "vocab_size", "published"),
    [("gpt2", 50257, 124_439_808), ("tiny", 65, 818_048), ("baby", 65, 10_770_816)],
)
def test_number_of_parameters(preset: str, vocab_size: int, published: int) -> None:
    shape = PRESETS[preset]().model_config.replace(vocab_size=vocab_size)
    with torch.device("meta"):
        model = GPT2(shape)
    assert count_parameters(model) == parameters_of(shape) == published  # the head is tied


# --- dropout


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("place", DROPOUT_PLACES)
def test_dropout_acts_at_the_right_places_in_training_mode(
    place: str, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One place drops all its values, the others none: the logits must match the formulas."""
    shape = config(dropout=0.3, norm_placement=placement, n_layer=2)
    calls = itertools.cycle(DROPOUT_PLACES[1:])
    seen = []

    def fake(x: torch.Tensor, p: float, training: bool, inplace: bool) -> torch.Tensor:
        if not training:
            return x
        seen.append(next(calls) if seen else "embeddings")
        assert p == 0.3
        return x * 0.0 if seen[-1] == place else x

    monkeypatch.setattr(F, "dropout", fake)
    model = shake(GPT2(shape).double()).train()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    ids = some_ids(1, 2, 7)
    expected = reference_logits(shape, weights, ids, zeroed=place)
    torch.testing.assert_close(model(ids).detach(), expected, rtol=1e-10, atol=1e-10)
    assert len(seen) == 1 + 3 * 2
    model.eval()(ids)
    assert len(seen) == 1 + 3 * 2  # none in evaluation


def test_errors() -> None:
    with pytest.raises(UserError, match="^vocab_size is 0: give the number of distinct tokens"):
        GPT2(config(vocab_size=0))
    with pytest.raises(UserError, match="^8 tokens do not fit block_size 7: crop them$"):
        GPT2(config())(some_ids(1, 1, 8))
