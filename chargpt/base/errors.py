"""The failures and warnings that a user sees. Any other exception is a bug in chargpt."""

import errno
import warnings


class UserError(ValueError):
    """A mistake that the user can fix. The message is one line: what, the value, the remedy.

    The command line prints it without a traceback and exits with 2.
    """


class TrainingError(RuntimeError):
    """Training cannot continue (out of memory, non-finite loss); the last good state is on disk.

    The command line prints it without a traceback and exits with 1.
    """


class ChargptWarning(UserWarning):
    """Something is wrong or has changed, but the work continues. The message is one line.

    The command line prints it without file name and line number.
    """


def warn(message: str) -> None:
    """Warn the user of something that is not a failure."""
    warnings.warn(message, ChargptWarning, stacklevel=3)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, which Python, PyTorch and the system report differently."""
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
