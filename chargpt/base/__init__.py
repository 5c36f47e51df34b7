"""What knows nothing of models: errors, checks, durable files, units, seeds, the terminal, interrupts.

May import: the standard library, numpy, torch.
"""
