"""GPT2 as transformers' GPT2LMHeadModel, and back: names, shapes and config.json.

transformers has a bias in each layer, so a model without biases gets zeros. Its linear layers hold
the transpose, (inputs, outputs). The head is tied in both, and in no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from chargpt.base.checks import from_dict
from chargpt.base.errors import UserError
from chargpt.config import ActivationFunction, GPT2Config
from chargpt.data.tokenizer import CharTokenizer
from chargpt.export.huggingface.tokenizer import end_of_text_text
from chargpt.runs.weights import Tensors

ACTIVATIONS: dict[ActivationFunction, str] = {
    "gelu": "gelu_new",
    "gelu_exact": "gelu",
    "relu": "relu",
    "relu_squared": "relu2",
    "silu": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
_READABLE = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
}
_OUTER = {
    "token_embedding": "wte",
    "position_embedding": "wpe",
    "final_norm": "ln_f",
}
_BLOCK = {
    "attention.norm": "ln_1",
    "attention.sublayer.qkv": "attn.c_attn",
    "attention.sublayer.projection": "attn.c_proj",
    "feed_forward.norm": "ln_2",
    "feed_forward.sublayer.expand": "mlp.c_fc",
    "feed_forward.sublayer.projection": "mlp.c_proj",
}
_NUMBERS = {
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_embd": "d_model",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_inner": "d_ff",
}
_DEFAULTS = {
    "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1,
}  # fmt: skip
"""What transformers takes for a key that config.json lacks."""
_REQUIRED = {
    "model_type": ("gpt2",),
    "architectures": (None, ["GPT2LMHeadModel"]),
    "layer_norm_epsilon": (None, 1e-5),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "add_cross_attention": (None, False),
    "tie_word_embeddings": (None, True),
}
"""The values with which a GPT2LMHeadModel computes what GPT2 does; None: the key is absent."""
OWN_KEY = "chargpt"


def refuse_inexpressible(config: GPT2Config) -> None:
    """Raise UserError for a model that transformers' GPT-2 cannot compute."""
    if config.norm_placement != "pre":
        raise UserError(
            f"norm_placement is {config.norm_placement}, transformers' GPT-2 has only pre: "
            "export to onnx or html, or train with --norm-placement pre"
        )


# --- to transformers


def to_hf_config(config: GPT2Config, tokenizer: CharTokenizer) -> dict[str, Any]:
    """Return the contents of config.json."""
    (start,) = tokenizer.encode_prompt("")
    end = tokenizer.end_of_text_id
    # The text-generation pipeline puts it before each prompt.
    prefix = {} if end is None else {"prefix": end_of_text_text(tokenizer)}
    return {
        "architectures": ["GPT2LMHeadModel"],
        **_shape(config),
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
        "dtype": "float32",
        "torch_dtype": "float32",  # the name before transformers 4.56
        **prefix,
        OWN_KEY: asdict(config),
    }


def _shape(config: GPT2Config) -> dict[str, Any]:
    def dropout(own: float | None) -> float:
        return config.dropout if own is None else own

    return {
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for theirs, ours in _NUMBERS.items()},
        "activation_function": ACTIVATIONS[config.activation_function],
        "embd_pdrop": dropout(config.embedding_dropout),
        "attn_pdrop": dropout(config.attention_dropout),
        "resid_pdrop": config.dropout,
    }


def to_hf_tensors(tensors: Tensors, n_layer: int) -> Tensors:
    """Return the parameters of a GPT2 with transformers' names and shapes, biases included."""
    result = {}
    for ours, theirs in _names(n_layer):
        weight = tensors[f"{ours}.weight"]
        result[f"transformer.{theirs}.weight"] = _turned(ours, weight).contiguous()
        if _has_bias(ours):
            bias = tensors.get(f"{ours}.bias", torch.zeros(len(weight)))
            result[f"transformer.{theirs}.bias"] = bias
    return result


# --- from transformers


def from_hf_config(values: Mapping[str, Any]) -> GPT2Config:
    """Return the configuration of the GPT2 that computes what config.json describes, with biases.

    Raises:
        UserError: it describes another model.
    """
    for key, allowed in _REQUIRED.items():
        if values.get(key) not in allowed:
            raise UserError(
                f"{key} is {values.get(key)!r:.80}, only {allowed[-1]!r} can be imported: "
                "give a folder with a GPT2LMHeadModel"
            )
    known = {**_DEFAULTS, **values}
    activation = known["activation_function"]
    if not isinstance(activation, str) or activation not in _READABLE:
        raise UserError(
            f"activation_function is {activation!r:.80}: only {', '.join(_READABLE)} can be "
            "imported"
        )
    fields = {ours: known.get(theirs) for theirs, ours in _NUMBERS.items()}
    return from_dict(
        GPT2Config,
        {
            **fields,
            "d_ff": fields["d_ff"] or 0,
            "activation_function": _READABLE[activation],
            "dropout": known["resid_pdrop"],
            "embedding_dropout": known["embd_pdrop"],
            "attention_dropout": known["attn_pdrop"],
        },
    )


def recorded_config(values: Mapping[str, Any]) -> GPT2Config | None:
    """Return the configuration that an export recorded, unless config.json has changed since."""
    try:
        recorded = from_dict(GPT2Config, values[OWN_KEY])
    except (KeyError, TypeError, AttributeError, UserError):
        return None
    unchanged = all(values.get(key) == value for key, value in _shape(recorded).items())
    return recorded if unchanged and recorded.norm_placement == "pre" else None


def hf_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the GPT2LMHeadModel that `config` describes."""
    C, F = config.d_model, config.d_ff
    weights = {
        "wte": (config.vocab_size, C), "wpe": (config.block_size, C), "ln_f": (C,), "ln_1": (C,),
        "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "ln_2": (C,), "mlp.c_fc": (C, F),
        "mlp.c_proj": (F, C),
    }  # fmt: skip
    shapes = {}
    for ours, theirs in _names(config.n_layer):
        shape = weights[theirs.split(".", 2)[2] if theirs.startswith("h.") else theirs]
        shapes[f"{theirs}.weight"] = shape
        if _has_bias(ours):
            shapes[f"{theirs}.bias"] = shape[-1:]
    return shapes


def from_hf_tensors(tensors: Mapping[str, Tensor], n_layer: int, *, bias: bool) -> Tensors:
    """Return the parameters of a GPT2; `tensors` have the names of `hf_shapes`."""
    result = {}
    for ours, theirs in _names(n_layer):
        result[f"{ours}.weight"] = _turned(ours, tensors[f"{theirs}.weight"]).contiguous()
        if bias and _has_bias(ours):
            result[f"{ours}.bias"] = tensors[f"{theirs}.bias"]
    return result


# --- both


def _names(n_layer: int) -> Iterator[tuple[str, str]]:
    """Yield the name of each layer with parameters, here and in transformers."""
    yield from _OUTER.items()
    for number in range(n_layer):
        for ours, theirs in _BLOCK.items():
            yield f"blocks.{number}.{ours}", f"h.{number}.{theirs}"


def _has_bias(ours: str) -> bool:
    return not ours.endswith("embedding")


def _turned(ours: str, weight: Tensor) -> Tensor:
    return weight.t() if "sublayer" in ours else weight
