"""From texts to batches: the tokenizer, reading texts, the corpus, windows, named data sets.

May import: `chargpt.base`, `chargpt.config`.
"""
