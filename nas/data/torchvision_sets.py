"""What the torchvision data sets share: fetching, messages, conversion.

torchvision is imported when a set is asked for, not before: it takes long, and listing the sets needs none of it.
"""

from __future__ import annotations

import pickle
import socket
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from nas.data.image_data import ImageData
from nas.data.pixel_layout import channels_first
from nas.errors import InputError

SILENCE_LIMIT = 30.0
"""Seconds without an answer after which a download has failed; torchvision itself would wait forever."""

DIGIT_NAMES = tuple(map(str, range(10)))

# What torchvision lets through for files that are missing or damaged and for downloads that break off.
_FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    LookupError,
    EOFError,
    HTTPException,
    tarfile.TarError,
    zlib.error,
    pickle.UnpicklingError,
)


def load(
    kind: str,
    name: str,
    *,
    root: str,
    download: bool,
    files: str,
    parts: tuple[dict[str, Any], dict[str, Any]],
    classes: tuple[str, ...] | None = None,
) -> ImageData:
    """The torchvision data set of class ``kind`` as ImageData called ``name``.

    ``parts``: the arguments that choose its training and its test part.  ``files``: where its files lie below
    ``root``.  ``classes``: the class names, where the torchvision class does not tell.
    Files are fetched only if they are not there, by one process at a time.
    Raises InputError where they are missing or damaged and cannot be fetched.
    """
    from torchvision import datasets

    folder = Path(root).expanduser()

    def both(download: bool) -> list[Any]:
        return [getattr(datasets, kind)(folder, download=download, **part) for part in parts]

    try:
        train, test = both(download=False)
    except _FAILURES as error:
        if not download:
            raise _unavailable("is not there or damaged, and downloading is off", kind, folder, files, error) from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Of the processes of one training that start together, one fetches and the others then find the files.
            with FileLock(folder / f".{kind}.lock"), _silence_limit():
                train, test = both(download=True)
        except _FAILURES as failure:
            raise _unavailable("could not be downloaded and read", kind, folder, files, failure) from failure

    return ImageData(
        name,
        channels_first(np.asarray(train.data), f"{kind} training images"),
        _labels(train),
        channels_first(np.asarray(test.data), f"{kind} test images"),
        _labels(test),
        tuple(train.classes) if classes is None else classes,
    )


def _labels(part: Any) -> torch.Tensor:
    labels = part.targets if hasattr(part, "targets") else part.labels
    return torch.from_numpy(np.asarray(labels).astype(np.int64))


def _unavailable(what: str, kind: str, folder: Path, files: str, error: BaseException) -> InputError:
    reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    if len(reason) > 200:
        reason = f"{reason[:200]}..."
    return InputError(
        f"{kind} {what} ({reason}); expected at {folder / files}: put its files there (remove damaged ones), "
        "or use the data 'arrays' with an .npz file of your own"
    )


@contextmanager
def _silence_limit() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_LIMIT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
