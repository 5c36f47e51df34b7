"""OpenAI's requests: their fields and limits, and the `SampleConfig` they mean."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from chargpt.base.errors import UserError
from chargpt.base.seeding import SAMPLE, derive_seed
from chargpt.config import SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.serve.errors import ApiError
from chargpt.serve.settings import ServeSettings

Number = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Prompt = str | list[str] | list[Id] | list[list[Id]]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(_Request):
    """Options of a stream."""

    include_usage: bool | None = None
    """End with a chunk that has the usage and no choices."""


class Sampling(_Request):
    """The fields that completions and chat share."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[str, Number], Field(max_length=10_000)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    user: str | None = None


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    prompt: Prompt
    """Texts or token ids; several are answered side by side."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """Most characters to write; 16 if left out, as OpenAI has it."""
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class TextPart(_Request):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(_Request):
    """A message of a conversation."""

    role: str
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        """The text of all parts."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``: the conversation is a text that the model continues."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None


def conversation(messages: list[Message]) -> str:
    """Return the text of a conversation, without its roles.

    An assistant's message follows directly, because it continued the text before it. Any other
    message begins a line.
    """
    text = ""
    for message in messages:
        begins = text and message.role != "assistant" and not text.endswith("\n")
        text += ("\n" if begins else "") + message.text
    return text


class Plan:
    """What the worker has to do for a request.

    Raises:
        ApiError: 400, a value that this model or this server does not accept.
    """

    def __init__(
        self, request: Sampling, prompt: Prompt, tokenizer: CharTokenizer, settings: ServeSettings
    ) -> None:
        self.n = request.n or 1
        self.own_ids = _encode(prompt, tokenizer, settings)
        """Ids of each prompt, as the client gave it."""
        self.read_ids = [_as_read(prompt, ids, tokenizer) for ids in self.own_ids]
        """What the model reads, with the token that begins a document."""
        texts = len(self.own_ids) * self.n
        if texts > settings.max_texts:
            message = f"{texts} texts in one request: give {settings.max_texts} or fewer"
            raise ApiError(400, message, param="n")
        self.stream = bool(request.stream)
        if request.stream_options is not None and not self.stream:
            message = "stream_options is given without a stream: leave it out or stream"
            raise ApiError(400, message, param="stream_options")
        options = request.stream_options
        self.include_usage = bool(options and options.include_usage)
        self.seed = secrets.randbits(53) if request.seed is None else request.seed
        self.seeds = [derive_seed(self.seed, SAMPLE, number) for number in range(self.n)]
        self.max_tokens = _max_tokens(request, settings)
        self.echo = bool(getattr(request, "echo", None))
        self.logprobs = _logprobs(request, tokenizer)
        self.config = _config(request, self.max_tokens)
        self.bias = _bias(request.logit_bias or {}, tokenizer)


def _encode(prompt: Prompt, tokenizer: CharTokenizer, settings: ServeSettings) -> list[list[int]]:
    texts: list[Any]
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        texts = [prompt]
    else:
        texts = [*prompt]
    if not texts:
        raise ApiError(400, "the prompt is an empty list: give a text", param="prompt")
    length = sum(map(len, texts))
    if length > settings.max_prompt:
        message = f"the prompt has {length} characters: give {settings.max_prompt} or fewer"
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    encoded = []
    for text in texts:
        if isinstance(text, str):
            encoded.append(encode(text, tokenizer))
            continue
        if any(i >= tokenizer.vocab_size for i in text):
            message = f"the prompt has ids out of range: give 0 to {tokenizer.vocab_size - 1}"
            raise ApiError(400, message, param="prompt")
        encoded.append(text)
    return encoded


def encode(text: str, tokenizer: CharTokenizer, param: str = "prompt") -> list[int]:
    """Return the ids of a text; unknown characters are an `ApiError` that names them."""
    try:
        ids: list[int] = tokenizer.encode(text).tolist()
    except UserError as error:
        message = str(error).partition(", or give --unknown")[0]
        raise ApiError(400, message, param=param, code="unknown_character") from error
    return ids


def _as_read(prompt: Prompt, ids: list[int], tokenizer: CharTokenizer) -> list[int]:
    """Return what the model reads: ids as they are, a text after the token that begins one."""
    is_text = isinstance(prompt, str) or any(isinstance(part, str) for part in prompt)
    if ids and (not is_text or tokenizer.end_of_text_id is None):
        return ids
    return [*tokenizer.encode_prompt(""), *ids]


def _max_tokens(request: Sampling, settings: ServeSettings) -> int:
    if isinstance(request, ChatRequest):
        given = request.max_completion_tokens
        given = request.max_tokens if given is None else given
        wanted = min(512, settings.max_tokens) if given is None else given
    else:
        given = getattr(request, "max_tokens", None)
        wanted = min(16, settings.max_tokens) if given is None else given
    if wanted > settings.max_tokens:
        message = f"max_tokens is {wanted}: give {settings.max_tokens} or fewer"
        raise ApiError(400, message, param="max_tokens")
    return wanted


def _logprobs(request: Sampling, tokenizer: CharTokenizer) -> int | None:
    """Return how many alternatives to answer for each character; None: no log-probabilities."""
    if isinstance(request, ChatRequest):
        wanted = (request.top_logprobs or 0) if request.logprobs else None
        name = "top_logprobs"
    else:
        wanted, name = getattr(request, "logprobs", None), "logprobs"
    if wanted is not None and wanted > tokenizer.vocab_size:
        message = f"{name} is {wanted}: give {tokenizer.vocab_size} or fewer"
        raise ApiError(400, message, param=name)
    return wanted


def _config(request: Sampling, max_tokens: int) -> SampleConfig:
    if isinstance(request, CompletionRequest):
        if request.suffix:
            raise ApiError(400, "suffix is not supported: leave it out", param="suffix")
        if request.best_of not in (None, request.n or 1):
            raise ApiError(400, "best_of is not supported: leave it out", param="best_of")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stop) > 16 or any(len(text) > 256 for text in stop):
        message = "stop is too long: give up to 16 strings of up to 256 characters"
        raise ApiError(400, message, param="stop")
    given: dict[str, Any] = {
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": request.top_p,
        "top_k": None if request.top_k is None else max(0, request.top_k),  # -1: off, as in vLLM
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "stop": tuple(text for text in stop if text),
        "max_new_tokens": max(1, max_tokens),
    }
    try:
        return SampleConfig(**{name: value for name, value in given.items() if value is not None})
    except UserError as error:
        raise ApiError(400, str(error).partition(" (--")[0]) from error


def _bias(given: Mapping[str, float], tokenizer: CharTokenizer) -> Tensor | None:
    """Return what to add to the logits, (V,), from ids as strings."""
    if not given:
        return None
    bias = torch.zeros(tokenizer.vocab_size)
    for name, value in given.items():
        known = name.isascii() and name.isdecimal() and len(name) < 10
        if not known or int(name) >= tokenizer.vocab_size:
            message = f"logit_bias has {name[:20]!r}: give ids from 0 to {tokenizer.vocab_size - 1}"
            raise ApiError(400, message, param="logit_bias")
        if not -100 <= value <= 100 or math.isnan(value):
            message = f"logit_bias has the value {value}: give a number from -100 to 100"
            raise ApiError(400, message, param="logit_bias")
        bias[int(name)] = value
    return bias
