"""``python -m chargpt`` is ``chargpt``."""

from chargpt.cli.main import main

main()
