"""Computation: device and precision, C++ kernels, fast layers, optimizers, several GPUs.

May import: `chargpt.base`, `chargpt.config`, `chargpt.model`, `chargpt.data`.
"""
