"""Exceptions that explain themselves: wrong input, and work that failed for a known reason."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class InputError(ValueError):
    """A recipe, file, flag or data set that cannot be used.

    The message is one clear line: what is wrong, where, and what to do about it. The command line
    prints it without a traceback and exits with status 2. What it repeats of the input is cut where that is endless.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= 2000 else f"{text[:1500]} [...] {text[-300:]}"


class Failure(RuntimeError):
    """Work that failed for a known reason; the message says which and what to do, and no traceback is needed."""


class Diverged(Failure):
    """A loss or a gradient stopped being a number."""


NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")
"""What torch says, on a GPU and on CPUs, and the system says."""


def of_the_machine(error: Exception) -> InputError | Failure | None:
    """What an error that is the machine's, not the program's, means to the user; None for all others."""
    if isinstance(error, OSError):
        file = error.filename or "a file"
        if error.errno in NOT_ALLOWED:
            return InputError(f"{file}: {error.strerror}; allow it, or choose another folder")
        if error.errno in FULL:
            return Failure(f"cannot write {file}: {error.strerror}; make room, then --resume continues a run")
    if isinstance(error, MemoryError) or any(said in str(error).lower() for said in NO_MEMORY):
        return Failure(
            "memory ran out; lower workers, batch sizes or channels, or search with --memory-budget; "
            "--resume continues a run"
        )
    if "does not have a deterministic implementation" in str(error):
        said = str(error).split(",")[0]
        return Failure(f"{said} on this device, which deterministic = true asks for: leave it out, or use the CPU")
    return None


def check_schema(found: object, known: int, what: object) -> None:
    """Raise ``InputError`` unless ``found`` is the version ``known`` of a file's format. what: names the file."""
    if type(found) is not int or found != known:
        newer = "; it was written by a newer program: update this one" if type(found) is int and found > known else ""
        raise InputError(f"{what} is of schema version {str(found)[:40]}, this program reads version {known}{newer}")


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt ``word``: the nearest of ``known``, or all of them where none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}" if names else "none is known"
