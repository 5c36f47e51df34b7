"""Train a character-level GPT-2 on any text, in a minute, on the computer you have.

    import chargpt

    result = chargpt.train("my.txt")
    model, tokenizer = chargpt.load(result.run)
    print(chargpt.sample(model, tokenizer, prompt="Once "))

Names are imported when they are first used, so that ``import chargpt`` does not import torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from chargpt.config import PRESETS as PRESETS
    from chargpt.config import DataConfig as DataConfig
    from chargpt.config import GPT2Config as GPT2Config
    from chargpt.config import SampleConfig as SampleConfig
    from chargpt.config import TrainConfig as TrainConfig
    from chargpt.config import baby as baby
    from chargpt.config import best as best
    from chargpt.config import gpt2 as gpt2
    from chargpt.config import speedrun as speedrun
    from chargpt.config import tiny as tiny
    from chargpt.data import load_corpus as load_corpus
    from chargpt.errors import TrainingError as TrainingError
    from chargpt.errors import UserError as UserError
    from chargpt.evaluation import evaluate as evaluate
    from chargpt.generation import complete as complete
    from chargpt.generation import generate as generate
    from chargpt.generation import generate_text as generate_text
    from chargpt.generation import sample as sample
    from chargpt.generation import write as write
    from chargpt.model import GPT2 as GPT2
    from chargpt.run import train as train
    from chargpt.run_folder import load as load
    from chargpt.scoring import score as score
    from chargpt.tokenizer import CharTokenizer as CharTokenizer

_HOME = {
    "load": "run_folder",
    "PRESETS": "config",
    "DataConfig": "config",
    "GPT2Config": "config",
    "SampleConfig": "config",
    "TrainConfig": "config",
    "baby": "config",
    "best": "config",
    "gpt2": "config",
    "speedrun": "config",
    "tiny": "config",
    "load_corpus": "data",
    "TrainingError": "errors",
    "UserError": "errors",
    "evaluate": "evaluation",
    "complete": "generation",
    "generate": "generation",
    "generate_text": "generation",
    "sample": "generation",
    "write": "generation",
    "GPT2": "model",
    "train": "run",
    "score": "scoring",
    "CharTokenizer": "tokenizer",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chargpt' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"chargpt.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
