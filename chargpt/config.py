"""The file to edit: the model, how it is trained, how it is sampled.

Change a number here and run again. Or give it as a flag (``d_model`` is ``--d-model``) or as a line
of a TOML file (``--config my.toml``). The presets are functions at the end of this file. A flag
overrides the TOML file, which overrides the preset. A wrong value raises a UserError.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from chargpt.base.checks import Rule, check_fields
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
Parallel = Literal["auto", "none", "dp", "ddp", "fsdp"]
CheckpointName = Literal["best", "last"]  # the lowest validation loss, or the latest
Tracker = Literal["none", "tensorboard", "wandb"]
Unknown = Literal["error", "skip", "replace"]
OnError = Literal["stop", "skip-file", "replace"]
TokenizerName = Literal["char", "byte"]

PositiveInt = Annotated[int, Rule(lambda n: n >= 1, "give a whole number of at least 1")]
NonNegativeInt = Annotated[int, Rule(lambda n: n >= 0, "give a whole number of at least 0")]
DerivedInt = Annotated[int, Rule(lambda n: n >= 0, "give a positive number, or 0 to derive it")]
Seed = Annotated[int, Rule(lambda n: 0 <= n < 2**63, "give a whole number from 0 to 2^63 - 1")]
PositiveFloat = Annotated[float, Rule(lambda x: x > 0, "give a positive number")]
NonNegativeFloat = Annotated[float, Rule(lambda x: x >= 0, "give a number of at least 0")]
Share = Annotated[float, Rule(lambda x: 0 <= x <= 1, "give a share from 0 to 1")]
PositiveShare = Annotated[float, Rule(lambda x: 0 < x <= 1, "give a share above 0 and up to 1")]
BELOW_1 = Rule(lambda x: 0 <= x < 1, "give a number from 0 to below 1")
ShareBelow1 = Annotated[float, BELOW_1]


@dataclass(frozen=True, slots=True)
class _Config:
    def __post_init__(self) -> None:
        check_fields(self)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class GPT2Config(_Config):
    """The shape of a GPT-2 (Radford et al. 2019). The defaults are the preset ``tiny``."""

    block_size: PositiveInt = 128
    """Longest context the model sees, in characters."""
    vocab_size: DerivedInt = 0
    """Distinct tokens. 0: as many as the text has."""
    n_layer: PositiveInt = 4
    """Transformer blocks."""
    n_head: PositiveInt = 4
    """Attention heads per block; must divide d_model."""
    d_model: PositiveInt = 128
    """Width of the residual stream."""
    dropout: ShareBelow1 = 0.1
    """Dropout after the embeddings, attention weights, attention output and feed-forward output."""
    embedding_dropout: Annotated[float | None, BELOW_1] = None
    """Dropout after the embeddings. None: as dropout."""
    attention_dropout: Annotated[float | None, BELOW_1] = None
    """Dropout after the attention weights. None: as dropout."""
    d_ff: DerivedInt = 0
    """Width of the feed-forward hidden layer. 0: 4 × d_model."""
    activation_function: ActivationFunction = "gelu"
    """Activation of the feed-forward layer; gelu is GPT-2's tanh form, gelu_exact the erf form."""
    norm_placement: NormPlacement = "pre"
    """LayerNorm before each sublayer (GPT-2), after the residual sum (the original Transformer),
    or before and after each sublayer (sandwich)."""
    bias: bool = True
    """Biases in the linear layers and LayerNorms."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.d_model % self.n_head:
            divisors = [h for h in range(1, min(self.d_model, 2**16) + 1) if self.d_model % h == 0]
            nearest = min(divisors, key=lambda h: abs(h - self.n_head))
            raise UserError(
                f"n_head is {self.n_head}, which does not divide d_model {self.d_model}: "
                f"give --n-head {nearest}, or a d_model that is a multiple of {self.n_head}"
            )
        if self.d_ff == 0:
            object.__setattr__(self, "d_ff", 4 * self.d_model)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`; a ``d_ff`` of 4 × ``d_model`` follows ``d_model``."""
        if self.d_ff == 4 * self.d_model:
            changes.setdefault("d_ff", 0)
        return dataclasses.replace(self, **changes)


NAME = Rule(lambda name: name and name.isprintable(), "give a name such as utf-8 or latin-1")
BETWEEN = Rule(lambda x: 0 < x < 1, "give a share between 0 and 1, such as 0.1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(_Config):
    """How texts are read and split."""

    encoding: Annotated[str, NAME] = "utf-8"
    """Encoding of the text files. A byte-order mark in a file takes precedence."""
    on_error: OnError = "stop"
    """What to do with a file that is not of the encoding: stop, leave it out (skip-file), or put
    U+FFFD in place of what is wrong (replace)."""
    document_separator: str = ""
    """Text between documents: '\\n' for one per line (also \\r\\n). Empty: a file is a document."""
    text_column: str = ""
    """Take the texts from this column of .parquet and .jsonl files; each row is a document. Empty:
    .jsonl files are plain text."""
    tokenizer: TokenizerName = "char"
    """A token is a character of the text, or a byte of its UTF-8: 256 tokens for any text."""
    min_count: PositiveInt = 1
    """Characters that the text has fewer times are replaced by U+FFFD."""
    validation_fraction: Annotated[float, BETWEEN] = 0.1
    """Share held out for validation: the last characters, or the last documents."""


ORDER = Rule(lambda n: 1 <= n <= 20, "give a whole number from 1 to 20")
BUDGETS = ("steps", "epochs", "minutes")  # beyond 10^12, numbers overflow
BUDGET = Rule(lambda n: 0 < n <= 10**12, "give a positive number of at most 10^12")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(_Config):
    """How a model is trained. The defaults are the preset ``tiny``.

    A *step* is one optimizer update: ``batch_size × gradient_accumulation_steps`` sequences of
    ``block_size`` characters.
    """

    batch_size: PositiveInt = 8
    """Sequences in one forward and backward pass (over all GPUs)."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forward and backward passes per step."""
    steps: Annotated[int | None, BUDGET] = None
    """Budget: optimizer steps. Give steps or epochs, minutes, or minutes beside one of them."""
    epochs: Annotated[float | None, BUDGET] = None
    """Budget: passes over the training part."""
    minutes: Annotated[float | None, BUDGET] = None
    """Budget: minutes of training, not counting evaluations. Beside steps or epochs, a limit: the
    run and its schedule end at what comes first. Once the clock is ahead of the steps, the run
    cannot be repeated exactly. With no budget at all: 3."""
    optimizer: OptimizerName = "adamw"
    """adamw for every parameter; muon for the matrices of the blocks, with adamw for the rest."""
    learning_rate: PositiveFloat = 6e-3
    """AdamW's peak learning rate: linear warm-up, constant, then a cool-down."""
    muon_learning_rate: PositiveFloat = 0.02
    """Muon's peak learning rate, on the same schedule; no effect under adamw."""
    learning_rate_floor: Share = 0.1
    """Learning rate at the end of the cool-down, as a share of the peak."""
    warmup_fraction: Share = 0.1
    """Share of the budget spent warming up."""
    cooldown: Cooldown = "cosine"
    """Shape of the cool-down: half a cosine, or a straight line."""
    cooldown_fraction: Share = 1.0
    """Share of the budget, at its end, for the cool-down; at most what warm-up leaves. 0: none."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices and embeddings (adamw) or the blocks' matrices (muon)."""
    embedding_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the embeddings under muon; no effect under adamw."""
    muon_momentum: ShareBelow1 = 0.95
    """Muon's momentum; no effect under adamw."""
    ngram_weight: Share = 0.0
    """Share of the loss, at the start, that compares with what an n-gram of the training text
    expects, instead of with the one character that follows. Both shares 0: no n-gram."""
    ngram_weight_floor: Share = 0.0
    """The same share from 35 % of the budget on, to which it falls in a straight line."""
    ngram_order: Annotated[int, ORDER] = 5
    """Characters before a position from which the n-gram expects the next one."""
    beta1: ShareBelow1 = 0.9
    """AdamW's decay rate of the mean gradient."""
    beta2: ShareBelow1 = 0.99
    """AdamW's decay rate of the mean squared gradient."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest norm of the gradient of all parameters together; 0: no clipping."""
    eval_interval: NonNegativeInt = 0
    """Steps between evaluations. 0: once per epoch, but at least 25 steps apart and more where
    evaluation is slow, and at most 250 where it is fast."""
    eval_characters: NonNegativeInt = 0
    """Most characters of the validation part that an evaluation scores, spread evenly over it. 0:
    all, if they are at most 131,072, else up to a million, for a tenth of the time. The first
    evaluation decides. `chargpt eval` scores all of them."""
    save_interval: NonNegativeInt = 0
    """Steps between saves besides those at evaluations: the most a crash can lose. 0: no others."""
    patience: NonNegativeInt = 5
    """Stop after this many evaluations in a row without improvement; 0: never."""
    log_interval: PositiveInt = 10
    """Steps between lines in metrics.jsonl."""
    sample_length: NonNegativeInt = 100
    """Characters of sample text written at each evaluation; 0: no sample."""
    seed: Seed = 1337
    """Seed of the initial weights, the batches, dropout and the samples."""
    device: Device = "auto"
    """Where to train: auto takes cuda, then mps, then cpu."""
    precision: Precision = "auto"
    """auto takes bf16 where the hardware multiplies it fast, then fp16 on CUDA, then fp32."""
    kernels: OnOffAuto = "auto"
    """C++ kernels for a CPU, prebuilt or (on Linux) compiled on first use. auto: if they work."""
    attention: Attention = "auto"
    """Attention by native (the kernels), matmul or sdpa (PyTorch's fused kernel); auto: fastest."""
    compile: OnOffAuto = "auto"
    """torch.compile; auto: on for CUDA, off elsewhere. Falls back to eager mode."""
    parallel: Parallel = "auto"
    """How several devices share each batch. Under torchrun: ddp (DistributedDataParallel), or fsdp
    (FSDP2), which also shares the weights, for a model that does not fit. In one process: dp
    (DataParallel). auto: ddp under torchrun; dp where GPUs have enough to do; else one device."""
    deterministic: bool = False
    """Give the same bits every time, or fail. A CPU always gives them; a GPU becomes slower."""
    track: Tracker = "none"
    """Send the metrics to a tracker as well."""

    def __post_init__(self) -> None:
        check_fields(self)
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if {"steps", "epochs"} <= {*given}:
            raise UserError("steps and epochs are budgets that exclude each other: give one")
        if not given:
            object.__setattr__(self, "minutes", 3.0)

    @property
    def has_ngram(self) -> bool:
        """Whether targets of an n-gram have a weight at any time."""
        return bool(self.ngram_weight or self.ngram_weight_floor)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`; a budget among them replaces every old one."""
        if any(changes.get(name) is not None for name in BUDGETS):
            changes = dict.fromkeys(BUDGETS) | changes
        return dataclasses.replace(self, **changes)


TEMPERATURE = Rule(lambda x: x >= 0, "give 0 (greedy) or more, e.g. 0.8")
SUBTRACTED = Rule(lambda x: -2 <= x <= 2, "give a number from -2 to 2, e.g. 0.5")
PENALTY = Rule(lambda x: 0.01 <= x <= 100, "give a number from 0.01 to 100, e.g. 1.1")
NOT_EMPTY = Rule(all, "give strings that are not empty")
BIAS = Rule(
    lambda bias: all(len(c) == 1 and abs(x) <= 10_000 for c, x in bias.items()),
    "give single characters with numbers up to 10,000, such as e=-2",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig(_Config):
    """How text is sampled from a model."""

    prompt: str = ""
    """Text to continue; empty: start as a document starts."""
    max_new_tokens: PositiveInt = 500
    """Most characters to write."""
    echo: bool = True
    """Print the prompt before the new text; --no-echo leaves it out."""
    temperature: Annotated[float, TEMPERATURE] = 0.8
    """Below 1: more predictable; above 1: more random; 0: always the likeliest character."""
    top_k: NonNegativeInt = 0
    """Sample only from the k likeliest characters; 0: from all."""
    top_p: PositiveShare = 1.0
    """Sample only from the likeliest characters that together have this probability."""
    min_p: Share = 0.0
    """Sample only from characters with at least this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, PENALTY] = 1.0
    """Above 1, characters that already occur in the text become less likely; 1: no effect."""
    presence_penalty: Annotated[float, SUBTRACTED] = 0.0
    """Subtracted from the logits of characters that occur in the new text."""
    frequency_penalty: Annotated[float, SUBTRACTED] = 0.0
    """Subtracted from the logit of a character once per time that it occurs in the new text."""
    logit_bias: Annotated[Mapping[str, float], BIAS] = field(default_factory=dict, hash=False)
    """Make a character likelier (above 0) or less likely (below 0). May be given several times."""
    forbidden: str = ""
    """Characters never to write."""
    num_samples: PositiveInt = 1
    """Number of texts, each with its own random numbers."""
    seed: Seed = 1337
    """The same seed writes the same text."""
    stop: Annotated[tuple[str, ...], NOT_EMPTY] = ()
    """End the text before any of these strings. May be given several times."""
    unknown: Unknown = "error"
    """What to do with prompt characters that the model has never seen."""
    context_kept: PositiveShare = 0.5
    """When the context is full, the share of it to re-read before continuing: less is faster, 1
    always shows the model the last block_size characters."""


# --- presets: each is complete, so that editing one leaves the others alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A model and how to train it."""

    model_config: GPT2Config
    train_config: TrainConfig


def tiny() -> Preset:
    """0.82 M parameters: three minutes on a laptop. The defaults above; edit them there."""
    return Preset(model_config=GPT2Config(), train_config=TrainConfig())


def speedrun() -> Preset:
    """0.81 M parameters: nanoGPT's published loss in the shortest time; four minutes at most."""
    return Preset(
        model_config=GPT2Config(dropout=0.0, bias=False),
        train_config=TrainConfig(
            batch_size=16,
            steps=2050,
            minutes=4.0,
            optimizer="muon",
            learning_rate=4e-3,
            muon_learning_rate=0.02,
            learning_rate_floor=0.0,
            warmup_fraction=0.02,
            cooldown="linear",
            cooldown_fraction=0.6,
            embedding_decay=0.3,
            ngram_weight=0.95,
            ngram_weight_floor=0.3,
            eval_interval=100,
        ),
    )


def best() -> Preset:
    """4.9 M parameters and dropout: 46 minutes on a fast core; 1.36 on Tiny Shakespeare."""
    return Preset(
        model_config=GPT2Config(
            block_size=512,
            n_layer=6,
            n_head=4,
            d_model=256,
            dropout=0.12,
            embedding_dropout=0.0,
            attention_dropout=0.0,
            bias=False,
        ),
        train_config=TrainConfig(
            batch_size=8,
            steps=6000,
            optimizer="muon",
            learning_rate=4e-3,
            muon_learning_rate=0.02,
            learning_rate_floor=0.0,
            warmup_fraction=0.02,
            cooldown="linear",
            cooldown_fraction=0.6,
            embedding_decay=0.3,
            ngram_weight=0.95,
            ngram_weight_floor=0.3,
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
