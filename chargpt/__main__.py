"""``python -m chargpt`` runs the command ``chargpt``."""

from chargpt.cli.main import main

main()
