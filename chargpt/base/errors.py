"""The failures and warnings that a user sees, without a traceback. Others are bugs in chargpt."""

import errno
import warnings


class UserError(ValueError):
    """A mistake that the user can fix, in one line: what, the value, the remedy. Exit code 2."""


class TrainingError(RuntimeError):
    """Training cannot continue (e.g. no memory); the last good state is on disk. Exit code 1."""


class VerificationError(RuntimeError):
    """An exported model differs from its source, so nothing was written. Exit code 1."""


class ChargptWarning(UserWarning):
    """Something is wrong or has changed, but the work continues. The message is one line."""


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
