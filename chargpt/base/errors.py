"""The two kinds of failure a person sees; every other exception is a bug of ours.

What a person should know, but is no failure, is a `RunWarning`.
"""

import warnings


class UserError(ValueError):
    """A mistake the user can mend. The message is one line: what, the value, the remedy.

    The command line prints it without a traceback and exits with 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on (out of memory, non-finite loss); what was learned is on disk.

    The command line prints it without a traceback and exits with 1.
    """


class RunWarning(UserWarning):
    """Something is not as it was or should be, and the work goes on; one line.

    The command line prints it without a place in the code.
    """


def warn(message: str) -> None:
    """Tell a person something that is no failure."""
    warnings.warn(message, RunWarning, stacklevel=3)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; PyTorch says so in several ways."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
