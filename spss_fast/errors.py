"""The one exception whose message is meant for the person at the keyboard."""

from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: the message is one line that names the file or setting and the mend."""


def some(names: Iterable[object]) -> str:
    """The first four of ``names`` for a message, with an ellipsis where there are more."""
    texts = list(map(str, names))
    return ", ".join(texts[:4]) + ", ..." * (len(texts) > 4)


def reason(error: Exception) -> str:
    """The last telling line of an ITK or HDF5 message, without the source file it was raised in."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("sitk::ERROR: ").rstrip(".") if lines else "unknown reason"
