"""Running a trained model: decoders with a cache, the scheduler, sampling, and scoring.

May import: `chargpt.base`, `chargpt.config`, `chargpt.model`, `chargpt.data`, `chargpt.compute`.
"""
