"""Train a character-level GPT-2 on any text, in a minute, on your own computer.

    import chargpt

    result = chargpt.train("my.txt")
    model, tokenizer = chargpt.load(result.run)
    print(chargpt.sample(model, tokenizer, prompt="Once "))

Names are imported on first use, so that ``import chargpt`` does not import torch.
"""

from typing import TYPE_CHECKING, Any

from chargpt.base.version import __version__ as __version__

if TYPE_CHECKING:
    from chargpt.base.errors import TrainingError, UserError
    from chargpt.config import (
        PRESETS,
        DataConfig,
        GPT2Config,
        SampleConfig,
        TrainConfig,
        baby,
        best,
        gpt2,
        speedrun,
        tiny,
    )
    from chargpt.data.corpus import load_corpus
    from chargpt.data.tokenizer import CharTokenizer
    from chargpt.engine.scoring import evaluate, score
    from chargpt.generate import complete, generate, sample
    from chargpt.model import GPT2
    from chargpt.runs.folder import load
    from chargpt.train import train

__all__ = [
    "GPT2",
    "PRESETS",
    "CharTokenizer",
    "DataConfig",
    "GPT2Config",
    "SampleConfig",
    "TrainConfig",
    "TrainingError",
    "UserError",
    "baby",
    "best",
    "complete",
    "evaluate",
    "generate",
    "gpt2",
    "load",
    "load_corpus",
    "sample",
    "score",
    "speedrun",
    "tiny",
    "train",
]

_NAMES = {
    "base.errors": "TrainingError UserError",
    "config": "PRESETS DataConfig GPT2Config SampleConfig TrainConfig baby best gpt2 speedrun tiny",
    "data.corpus": "load_corpus",
    "data.tokenizer": "CharTokenizer",
    "engine.scoring": "evaluate score",
    "generate": "complete generate sample",
    "model": "GPT2",
    "runs.folder": "load",
    "train": "train",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _NAMES.items():
        if name in names.split():
            return getattr(import_module(f"chargpt.{module}"), name)
    raise AttributeError(f"module 'chargpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
