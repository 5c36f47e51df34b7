"""A run on disk: its folder, checkpoints, weights, reports, the loss plot.

May import: everything above it, down to `chargpt.engine`.
"""
