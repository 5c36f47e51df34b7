"""The commands of ``chargpt``, a file each, named as one types them.

A file has ``make_flags`` and ``run`` (see ``chargpt.cli.Command``) and stands in the table there.
All are imported to print help, so whatever needs torch is imported inside ``run``.
"""
