"""Running a model: decoders with a cache, the scheduler of sequences, sampling, scoring.

May import: `chargpt.base`, `chargpt.config`, `chargpt.model`, `chargpt.data`, `chargpt.compute`.
"""
