"""``python -m chargpt`` is ``chargpt``."""

from chargpt.cli import main

main()
