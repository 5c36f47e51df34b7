"""The file to edit: what the model is, how it is trained, how it is sampled.

Change a number here and run again, or leave the file alone and give the same name as a flag
(``d_model`` is ``--d-model``) or as a line of a TOML file (``--config my.toml``). A preset is a
function at the end of the file; a flag wins over a file, a file over the preset.

``0`` stands for "derive it" where a field says so. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from chargpt.base.checks import check, check_seed, check_types
from chargpt.base.errors import UserError

ActivationFunction = Literal[
    "gelu", "gelu_exact", "relu", "relu_squared", "silu", "tanh", "sigmoid"
]
NormPlacement = Literal["pre", "post", "sandwich"]
Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
OptimizerName = Literal["adamw", "muon"]
Cooldown = Literal["cosine", "linear"]
OnOffAuto = Literal["auto", "on", "off"]
Attention = Literal["auto", "native", "matmul", "sdpa"]
Parallel = Literal["auto", "none", "dp"]
CheckpointName = Literal["best", "last"]
"""A checkpoint: of the lowest validation loss, or where the run is."""
Tracker = Literal["none", "tensorboard", "wandb"]
Unknown = Literal["error", "skip", "replace"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GPT2Config:
    """The shape of a GPT-2 (Radford et al. 2019). The defaults are the preset ``tiny``.

    Raises:
        UserError: a size that is not positive, a ``d_model`` that ``n_head`` does not divide, a
            dropout outside [0, 1), an unknown name.
    """

    block_size: int = 128
    """Longest context the model sees, in characters."""
    vocab_size: int = 0
    """Distinct tokens. 0: as many as the text has."""
    n_layer: int = 4
    """Transformer blocks."""
    n_head: int = 4
    """Attention heads a block; must divide d_model."""
    d_model: int = 128
    """Width of the residual stream."""
    dropout: float = 0.1
    """Probability of dropping a value, after the embeddings, the attention weights, the attention
    output and the feed-forward output."""
    embedding_dropout: float | None = None
    """Of the first of these places alone. None: as dropout."""
    attention_dropout: float | None = None
    """Of the attention weights alone. None: as dropout."""
    d_ff: int = 0
    """Width of the feed-forward hidden layer. 0: 4 × d_model."""
    activation_function: ActivationFunction = "gelu"
    """Of the feed-forward layer; gelu is GPT-2's tanh form, gelu_exact the erf form."""
    norm_placement: NormPlacement = "pre"
    """LayerNorm before each sublayer (GPT-2), after the residual sum (the original Transformer),
    or before and after each sublayer (sandwich)."""
    bias: bool = True
    """Biases in the linear layers and LayerNorms."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("block_size", "n_layer", "n_head", "d_model"):
            check(getattr(self, name) >= 1, self, name, "give a whole number of at least 1")
        for name in ("vocab_size", "d_ff"):
            check(getattr(self, name) >= 0, self, name, "give a positive number, or 0 to derive it")
        if self.d_model % self.n_head:
            divisors = [h for h in range(1, min(self.d_model, 2**16) + 1) if self.d_model % h == 0]
            nearest = min(divisors, key=lambda h: abs(h - self.n_head))
            raise UserError(
                f"n_head is {self.n_head}, which does not divide d_model {self.d_model}: "
                f"give --n-head {nearest}, or a d_model that is a multiple of {self.n_head}"
            )
        for name in ("dropout", "embedding_dropout", "attention_dropout"):
            value = getattr(self, name)
            check(
                value is None or 0 <= value < 1,
                self,
                name,
                "give a number from 0 up to, not with, 1",
            )
        if self.d_ff == 0:
            object.__setattr__(self, "d_ff", 4 * self.d_model)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`; a ``d_ff`` that follows ``d_model`` still does."""
        if self.d_ff == 4 * self.d_model:
            changes.setdefault("d_ff", 0)
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How texts are read and split.

    Raises:
        UserError: a fraction outside (0, 1), an empty encoding.
    """

    encoding: str = "utf-8"
    """Of the text files. A byte-order mark in the file is honoured."""
    document_separator: str = ""
    """Text between documents in a file, e.g. '\\n' for one document a line. Empty: a file is one
    document."""
    validation_fraction: float = 0.1
    """Share held out for validation: the last characters, or the last documents."""

    def __post_init__(self) -> None:
        check_types(self)
        check(
            self.encoding.isprintable() and self.encoding != "",
            self,
            "encoding",
            "give a name such as utf-8 or latin-1",
        )
        check(
            0 < self.validation_fraction < 1,
            self,
            "validation_fraction",
            "give a share between 0 and 1, such as 0.1",
        )

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`."""
        return dataclasses.replace(self, **changes)


BUDGETS = ("steps", "epochs", "minutes")
DEFAULT_MINUTES = 3.0
MAX_BUDGET = 10**12  # steps, epochs or minutes; beyond, numbers overflow


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How a model is trained. The defaults are the preset ``tiny``.

    A *step* is one optimizer update: ``batch_size × gradient_accumulation_steps`` sequences of
    ``block_size`` characters.

    Raises:
        UserError: more than one of steps, epochs, minutes, or a number outside its range.
    """

    batch_size: int = 8
    """Sequences in one forward and backward pass (over all GPUs)."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes a step."""
    steps: int | None = None
    """Budget: optimizer steps. Give one of steps, epochs, minutes."""
    epochs: float | None = None
    """Budget: passes over the training part."""
    minutes: float | None = None
    """Budget: minutes of training; evaluations come on top. With no budget at all: 3."""
    optimizer: OptimizerName = "adamw"
    """adamw for every parameter; muon for the matrices of the blocks, with adamw for the rest."""
    learning_rate: float = 6e-3
    """AdamW's peak: linear warm-up, constant, then a cool-down."""
    muon_learning_rate: float = 0.02
    """Muon's peak, on the same schedule; no effect under adamw."""
    learning_rate_floor: float = 0.1
    """Where the cool-down ends, as a share of the peak."""
    warmup_fraction: float = 0.1
    """Share of the budget spent warming up."""
    cooldown: Cooldown = "cosine"
    """How the rate falls: half a cosine, or a straight line."""
    cooldown_fraction: float = 1.0
    """Share of the budget, at its end, spent cooling down; at most what warm-up leaves. 0: the rate
    stays at its peak."""
    weight_decay: float = 0.1
    """Decoupled decay: of matrices and embeddings under adamw, of the blocks' matrices under
    muon."""
    embedding_decay: float = 0.0
    """Decoupled decay of the embeddings under muon; no effect under adamw."""
    muon_momentum: float = 0.95
    """Muon's memory of the gradient; no effect under adamw."""
    beta1: float = 0.9
    """AdamW's memory of the gradient."""
    beta2: float = 0.99
    """AdamW's memory of the squared gradient."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    eval_interval: int = 0
    """Steps between evaluations over the whole validation part. 0: once an epoch, but no more often
    than every 25 steps or than keeps evaluation cheap, and at least every 250 where it is."""
    save_interval: int = 0
    """Steps between saves of the last state, besides those at evaluations: what a crash can cost.
    0: at evaluations only."""
    patience: int = 5
    """Stop after this many evaluations in a row without a better one; 0: never."""
    log_interval: int = 10
    """Steps between lines in metrics.jsonl."""
    sample_length: int = 100
    """Characters of sample written at each evaluation; 0: none."""
    seed: int = 1337
    """Of the initial weights, the batches, dropout and the samples."""
    device: Device = "auto"
    """auto takes cuda, then mps, then cpu."""
    precision: Precision = "auto"
    """auto takes bf16 where the hardware multiplies it fast, then fp16 on CUDA, then fp32."""
    kernels: OnOffAuto = "auto"
    """C++ kernels for a CPU, compiled on first use. auto is on where that works (Linux)."""
    attention: Attention = "auto"
    """How attention is computed: native (the kernels), matmul (the textbook), sdpa (PyTorch's
    fused kernel); auto takes the fastest."""
    compile: OnOffAuto = "auto"
    """torch.compile; auto is on for CUDA, off elsewhere. Falls back to eager."""
    parallel: Parallel = "auto"
    """dp shares each batch among all GPUs (torch.nn.DataParallel, in this process); auto uses
    one."""
    deterministic: bool = False
    """Use only algorithms that give the same bits every time, or fail where there is none. A CPU
    does so anyway; a GPU gets slower."""
    track: Tracker = "none"
    """Send the metrics to a tracker as well."""

    def __post_init__(self) -> None:
        check_types(self)
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are budgets that exclude each other: give one")
        if not given:
            object.__setattr__(self, "minutes", DEFAULT_MINUTES)
        for name in given:
            good = 0 < getattr(self, name) <= MAX_BUDGET
            check(good, self, name, "give a positive number of at most 10^12")
        for name in ("batch_size", "gradient_accumulation_steps", "log_interval"):
            check(getattr(self, name) >= 1, self, name, "give a whole number of at least 1")
        for name in ("eval_interval", "save_interval", "patience", "sample_length"):
            check(getattr(self, name) >= 0, self, name, "give a whole number of at least 0")
        for name in ("weight_decay", "embedding_decay", "grad_clip"):
            check(getattr(self, name) >= 0, self, name, "give a number of at least 0")
        check_seed(self)
        for name in ("learning_rate", "muon_learning_rate"):
            check(getattr(self, name) > 0, self, name, "give a positive number")
        for name in ("learning_rate_floor", "warmup_fraction", "cooldown_fraction"):
            check(0 <= getattr(self, name) <= 1, self, name, "give a share from 0 to 1")
        for name in ("beta1", "beta2", "muon_momentum"):
            check(
                0 <= getattr(self, name) < 1, self, name, "give a number from 0 up to, not with, 1"
            )

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`; a budget among them replaces the budget that was there."""
        if any(changes.get(name) is not None for name in BUDGETS):
            changes = dict.fromkeys(BUDGETS) | changes
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """How text is drawn from a model.

    Raises:
        UserError: a number outside its range.
    """

    prompt: str = ""
    """Text to continue; empty: start as a document starts."""
    max_new_tokens: int = 500
    """Characters to write at most."""
    echo: bool = True
    """Begin with the prompt; --no-echo leaves it out."""
    temperature: float = 0.8
    """Below 1 plays safe, above 1 is wild, 0 always takes the likeliest character."""
    top_k: int = 0
    """Draw among the k likeliest characters only; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest characters that together hold this probability."""
    min_p: float = 0.0
    """Draw among characters with at least this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1 makes characters that the text has less likely; 1: does nothing."""
    logit_bias: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Make a character likelier (above 0) or less likely. May be given several times."""
    forbidden: str = ""
    """Characters never to write."""
    num_samples: int = 1
    """Texts to write, each with its own random numbers."""
    seed: int = 1337
    """The same seed writes the same text."""
    stop: tuple[str, ...] = ()
    """End the text before any of these strings. May be given several times."""
    unknown: Unknown = "error"
    """What to do with prompt characters that the model has never seen."""
    context_kept: float = 0.5
    """When block_size is full, how much of it the model reads anew to go on, as a share: less is
    faster, 1 always shows it the last block_size characters."""

    def __post_init__(self) -> None:
        check_types(self)
        check(self.num_samples >= 1, self, "num_samples", "give a whole number of at least 1")
        check_seed(self)
        check_sampling(self)
        good = all(len(c) == 1 and abs(x) <= 10_000 for c, x in self.logit_bias.items())
        remedy = "give single characters with numbers up to 10,000, such as e=-2"
        check(good, self, "logit_bias", remedy)
        check(all(self.stop), self, "stop", "give strings that are not empty")

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`."""
        return dataclasses.replace(self, **changes)


def check_sampling(config: Any) -> None:
    """Refuse numbers of `SampleConfig` that a draw cannot be made with, whoever has them.

    Raises:
        UserError: a number outside its range.
    """
    check(config.max_new_tokens >= 1, config, "max_new_tokens", "give a whole number of at least 1")
    check(config.top_k >= 0, config, "top_k", "give a whole number of at least 0")
    good = 0 <= config.temperature < math.inf
    check(good, config, "temperature", "give 0 (greedy) or more, e.g. 0.8")
    check(0 < config.top_p <= 1, config, "top_p", "give a share above 0 and up to 1")
    check(0 <= config.min_p <= 1, config, "min_p", "give a share from 0 to 1")
    check(0 < config.context_kept <= 1, config, "context_kept", "give a share above 0 and up to 1")
    good = 0.01 <= config.repetition_penalty <= 100
    check(good, config, "repetition_penalty", "give a number from 0.01 to 100, e.g. 1.1")


# --- presets: each is complete, nothing leaks from one to another


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A model and the way to train it, which go together."""

    model_config: GPT2Config
    train_config: TrainConfig


def tiny() -> Preset:
    """0.82 M parameters: a laptop's three minutes. The defaults above, edit them there."""
    return Preset(model_config=GPT2Config(), train_config=TrainConfig())


def speedrun() -> Preset:
    """0.81 M parameters: on Tiny Shakespeare, nanoGPT's published loss in the shortest time."""
    return Preset(
        model_config=GPT2Config(dropout=0.0, bias=False),
        train_config=TrainConfig(
            batch_size=16,
            steps=2600,
            optimizer="muon",
            learning_rate=4e-3,
            muon_learning_rate=0.02,
            learning_rate_floor=0.0,
            warmup_fraction=0.02,
            cooldown="linear",
            cooldown_fraction=0.6,
            embedding_decay=0.3,
            eval_interval=100,
        ),
    )


def best() -> Preset:
    """4.8 M parameters and dropout: half an hour on two fast cores; 1.40 on Tiny Shakespeare."""
    return Preset(
        model_config=GPT2Config(
            block_size=256,
            n_layer=6,
            n_head=4,
            d_model=256,
            dropout=0.2,
            embedding_dropout=0.0,
            attention_dropout=0.0,
            bias=False,
        ),
        train_config=TrainConfig(
            batch_size=16,
            steps=6000,
            optimizer="muon",
            learning_rate=4e-3,
            muon_learning_rate=0.02,
            learning_rate_floor=0.0,
            warmup_fraction=0.02,
            cooldown="linear",
            cooldown_fraction=0.6,
            embedding_decay=0.3,
            eval_interval=500,
            patience=0,
        ),
    )


def baby() -> Preset:
    """10.8 M parameters, the shape of nanoGPT's Shakespeare model: for a GPU."""
    return Preset(
        model_config=GPT2Config(block_size=256, n_layer=6, n_head=6, d_model=384, dropout=0.2),
        train_config=TrainConfig(
            batch_size=64, learning_rate=1e-3, warmup_fraction=0.02, eval_interval=250, steps=5000
        ),
    )


def gpt2() -> Preset:
    """86 M parameters with a character vocabulary (124 M with GPT-2's own): for a large text."""
    return Preset(
        model_config=GPT2Config(block_size=1024, n_layer=12, n_head=12, d_model=768, dropout=0.1),
        train_config=TrainConfig(
            batch_size=12,
            gradient_accumulation_steps=8,
            learning_rate=6e-4,
            beta2=0.95,
            warmup_fraction=0.02,
            epochs=3.0,
        ),
    )


PRESETS: Mapping[str, Callable[[], Preset]] = types.MappingProxyType(
    {"tiny": tiny, "speedrun": speedrun, "best": best, "baby": baby, "gpt2": gpt2}
)
