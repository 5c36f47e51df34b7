"""Measurements of a model, a run or this machine: scores, baselines, novelty, surprise, speed.

May import: everything but `chargpt.cli`.
"""
