"""The two kinds of failure a person sees; every other exception is a bug of ours."""


class UserError(ValueError):
    """A mistake the user can mend. The message is one line: what, the value, the remedy.

    The command line prints it without a traceback and exits with 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on (out of memory, non-finite loss); what was learned is on disk.

    The command line prints it without a traceback and exits with 1.
    """
