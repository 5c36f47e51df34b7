"""What the training loop needs: the trainer, saving, the plan, speed, the summary.

May import: everything above it, down to `chargpt.runs`.
"""
