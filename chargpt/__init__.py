"""Train a character-level GPT-2 on any text, in a minute, on your own computer.

    import chargpt

    result = chargpt.train("my.txt")
    model, tokenizer = chargpt.load(result.run)
    print(chargpt.sample(model, tokenizer, prompt="Once "))

Names are imported on first use, so that ``import chargpt`` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from chargpt.base.version import __version__ as __version__

if TYPE_CHECKING:  # the same names as below
    from chargpt.base.errors import TrainingError as TrainingError
    from chargpt.base.errors import UserError as UserError
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
    from chargpt.data.corpus import load_corpus as load_corpus
    from chargpt.data.tokenizer import CharTokenizer as CharTokenizer
    from chargpt.engine.evaluation import evaluate as evaluate
    from chargpt.engine.scoring import score as score
    from chargpt.generate import complete as complete
    from chargpt.generate import generate as generate
    from chargpt.generate import sample as sample
    from chargpt.model import GPT2 as GPT2
    from chargpt.runs.folder import load as load
    from chargpt.train import train as train

_NAMES = {
    "base.errors": "TrainingError UserError",
    "config": "PRESETS DataConfig GPT2Config SampleConfig TrainConfig baby best gpt2 speedrun tiny",
    "data.corpus": "load_corpus",
    "data.tokenizer": "CharTokenizer",
    "engine.evaluation": "evaluate",
    "engine.scoring": "score",
    "generate": "complete generate sample",
    "model": "GPT2",
    "runs.folder": "load",
    "train": "train",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"chargpt.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'chargpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
