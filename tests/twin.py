"""Two independent GPT-2s that take the weights of a `chargpt.GPT2`, as references.

`hugging_face` is the field's reference for pre-norm. `reference_logits` computes the paper's
formulas with loops over sequences and heads; it uses no module of chargpt or torch.nn.
"""

import math

import torch
from torch import Tensor

from chargpt.config import GPT2Config
from chargpt.model import GPT2

HF_ACTIVATIONS = {
    "gelu": "gelu_new",
    "gelu_exact": "gelu",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}

# chargpt's names and Hugging Face's, whose linear layers hold the transpose, (inputs, outputs).
OUTER_NAMES = {
    "token_embedding.weight": "transformer.wte.weight",
    "position_embedding.weight": "transformer.wpe.weight",
    "final_norm.weight": "transformer.ln_f.weight",
    "final_norm.bias": "transformer.ln_f.bias",
}
BLOCK_NAMES = {
    "attention.norm": "ln_1",
    "attention.sublayer.qkv": "attn.c_attn",
    "attention.sublayer.projection": "attn.c_proj",
    "feed_forward.norm": "ln_2",
    "feed_forward.sublayer.expand": "mlp.c_fc",
    "feed_forward.sublayer.projection": "mlp.c_proj",
}


def hf_names(n_layer: int, bias: bool) -> dict[str, str]:
    """Return the Hugging Face name of every parameter of a pre-norm GPT2."""
    names = dict(OUTER_NAMES)
    for layer in range(n_layer):
        for ours, theirs in BLOCK_NAMES.items():
            for kind in ("weight", "bias"):
                names[f"blocks.{layer}.{ours}.{kind}"] = f"transformer.h.{layer}.{theirs}.{kind}"
    return {ours: theirs for ours, theirs in names.items() if bias or not ours.endswith(".bias")}


def as_hf(name: str, value: Tensor) -> Tensor:
    """Return a weight or its gradient in Hugging Face's layout."""
    linear = "sublayer" in name and name.endswith(".weight")
    return value.t() if linear else value


def hugging_face(model: GPT2) -> torch.nn.Module:
    """Return a GPT2LMHeadModel with the weights of `model`, in evaluation mode."""
    import transformers

    config = model.config
    twin = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.d_model,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_inner=config.d_ff,
            activation_function=HF_ACTIVATIONS[config.activation_function],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    theirs = dict(twin.named_parameters())
    ours = dict(model.named_parameters())
    names = hf_names(config.n_layer, config.bias)
    assert ours.keys() == names.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            if name.endswith(".bias"):
                parameter.zero_()  # they stay 0 if `model` has no biases
        for name, parameter in ours.items():
            assert theirs[names[name]].shape == as_hf(name, parameter).shape
            theirs[names[name]].copy_(as_hf(name, parameter))
    return twin


def shake(model: GPT2, seed: int = 0, std: float = 0.3) -> GPT2:
    """Give every parameter large random values, biases and gains too, so that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = "norm" in name and name.endswith(".weight")
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(float(gain) + std * noise)
    return model


def untie(model: GPT2) -> GPT2:
    """Separate the head from the embedding: with tied weights, greedy text soon repeats itself."""
    head = model.token_embedding.weight.detach().flip(0).roll(3, 0)
    model.head.weight = torch.nn.Parameter(head.clone())
    return model


# --- the formulas


def _activation(name: str, x: Tensor) -> Tensor:
    match name:
        case "gelu":
            return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
        case "gelu_exact":
            return 0.5 * x * (1 + (x / math.sqrt(2)).erf())
        case "relu":
            return x.clamp(min=0)
        case "relu_squared":
            return x.clamp(min=0) ** 2
        case "silu":
            return x / (1 + (-x).exp())
        case "tanh":
            return (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())
        case "sigmoid":
            return 1 / (1 + (-x).exp())
    raise AssertionError(name)


def _softmax(row: Tensor) -> Tensor:
    e = (row - row.max()).exp()
    return e / e.sum()


def reference_logits(
    config: GPT2Config, weights: dict[str, Tensor], ids: Tensor, zeroed: str = ""
) -> Tensor:
    """Return logits (B, T, V) in the precision of `weights`.

    `zeroed` names one place of dropout that drops all its values: embeddings, weights (those of
    attention), attention or feed_forward.
    """
    C, D = config.d_model, config.d_model // config.n_head

    def linear(name: str, x: Tensor) -> Tensor:  # (T, in) -> (T, out)
        y = x @ weights[f"{name}.weight"].t()
        return y + weights[f"{name}.bias"] if config.bias else y

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = (centred**2).mean(dim=-1, keepdim=True)
        y = centred / (variance + 1e-5).sqrt() * weights[f"{name}.weight"]
        return y + weights[f"{name}.bias"] if config.bias else y

    def drop(place: str, x: Tensor) -> Tensor:
        return x * 0.0 if place == zeroed else x

    def attend(name: str, x: Tensor) -> Tensor:
        qkv = linear(f"{name}.qkv", x)  # (T, 3C): all queries, then all keys, then all values
        heads = []
        for head in range(config.n_head):
            q, k, v = (qkv[:, i * C + head * D : i * C + (head + 1) * D] for i in range(3))
            rows = []
            for t in range(len(x)):
                scores = torch.stack([q[t] @ k[s] / math.sqrt(D) for s in range(t + 1)])
                rows.append(drop("weights", _softmax(scores)) @ v[: t + 1])
            heads.append(torch.stack(rows))
        return linear(f"{name}.projection", torch.cat(heads, dim=-1))

    def feed_forward(name: str, x: Tensor) -> Tensor:
        hidden = _activation(config.activation_function, linear(f"{name}.expand", x))
        return linear(f"{name}.projection", hidden)

    def residual(name: str, x: Tensor) -> Tensor:
        place = name.rsplit(".", 1)[1]
        f = attend if place == "attention" else feed_forward
        match config.norm_placement:
            case "pre":
                return x + drop(place, f(f"{name}.sublayer", norm(f"{name}.norm", x)))
            case "post":
                return norm(f"{name}.sum_norm", x + drop(place, f(f"{name}.sublayer", x)))
            case "sandwich":
                update = f(f"{name}.sublayer", norm(f"{name}.norm", x))
                return x + drop(place, norm(f"{name}.sublayer_norm", update))

    sequences = []
    for sequence in ids:
        table, places = weights["token_embedding.weight"], weights["position_embedding.weight"]
        x = torch.stack([table[int(token)] + places[t] for t, token in enumerate(sequence)])
        x = drop("embeddings", x)
        for layer in range(config.n_layer):
            x = residual(f"blocks.{layer}.attention", x)
            x = residual(f"blocks.{layer}.feed_forward", x)
        sequences.append(norm("final_norm", x) @ table.t())
    return torch.stack(sequences)
