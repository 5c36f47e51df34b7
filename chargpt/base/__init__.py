"""Helpers that know nothing about models: errors, checks, files, units, seeds, terminal, signals.

May import: the standard library, numpy, torch.
"""
