"""From texts to batches: named data sets, reading and decoding, tokenizer, corpus, windows.

May import: `chargpt.base`, `chargpt.config`.
"""
