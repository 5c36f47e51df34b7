"""What a run was asked to be: configurations, or settings that a choice in their place keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from chargpt.config import GPT2Config, TrainConfig, tiny
from chargpt.runs.folder import CONFIG, read_config
from chargpt.runs.reserve import Resume
from chargpt.training.size import of_class
from chargpt.training.start import fixed_shape, start_config


class Asked(NamedTuple):
    """The configurations of a run, and the settings that a choice in their place keeps."""

    model_config: GPT2Config | None
    train_config: TrainConfig | None
    settings: Mapping[str, Any] | None  # None: nothing is chosen


def settle(asked: Asked, start: Path | None, folder: Path, resume: Resume) -> Asked:
    """Return configurations, and settings if others are to be chosen once the text is known."""
    model_config, train_config, settings = asked
    preset = tiny()
    if model_config or train_config:
        shape = start_config(start) if start and not model_config else preset.model_config
        return Asked(model_config or shape, train_config or preset.train_config, None)
    assert settings is not None
    if resume and (folder / CONFIG).is_file():
        before = read_config(folder)
        return Asked(
            before.model_config.replace(**of_class(GPT2Config, settings)),
            before.train_config.replace(**of_class(TrainConfig, settings)),
            None,
        )
    shape = preset.model_config.replace(vocab_size=settings.get("vocab_size", 0))
    if start:
        shape = start_config(start).replace(**of_class(GPT2Config, settings))
        settings = {**fixed_shape(shape), **settings}
    return Asked(shape, preset.train_config.replace(**of_class(TrainConfig, settings)), settings)
