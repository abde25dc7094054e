"""Exceptions that explain themselves: wrong input, and work that failed for a known reason."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A recipe, file, flag or data set that cannot be used.

    The message is one clear line: what is wrong, where, and what to do about it. The command line
    prints it without a traceback and exits with status 2.
    """


class Failure(RuntimeError):
    """Work that failed for a known reason; the message says which and what to do, and no traceback is needed."""


class Diverged(Failure):
    """A loss or a gradient stopped being a number."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt ``word``: the nearest of ``known``, or all of them where none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}" if names else "none is known"
