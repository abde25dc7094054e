"""Your own images in one .npz file: arrays x_train, y_train, x_test, y_test."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nas.data.image_data import ImageData
from nas.data.pixel_layout import channels_first
from nas.errors import InputError

_KEYS = ("x_train", "y_train", "x_test", "y_test")
# Of a damaged archive; RuntimeError stands for what zipfile cannot do, such as encryption.
_BROKEN = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Arrays:
    """Your own images in one .npz file: arrays x_train, y_train, x_test, y_test.

    Images are uint8 [N, H, W, C], [N, C, H, W] or (grey) [N, H, W]; labels are whole numbers 0 .. K - 1, [N] or
    [N, 1]. ``classes`` names the classes in the order of their labels; without it they are named by their numbers.
    The limits keep at most that many images, stratified and drawn with ``seed``. Nothing pickled is ever loaded.
    Raises InputError that names file, array and remedy.
    """

    path: str
    train_limit: int | None = None
    test_limit: int | None = None
    classes: tuple[str, ...] | None = None
    seed: int = 0

    def __call__(self) -> ImageData:
        path = Path(self.path).expanduser()
        arrays = read_npz(path, _KEYS)
        x_train, x_test = (images_of(arrays[key], f"{path}: {key}") for key in ("x_train", "x_test"))
        y_train, y_test = (labels_of(arrays[key], f"{path}: {key}") for key in ("y_train", "y_test"))
        classes = self.classes if self.classes is not None else _numbered(y_train, path)
        try:
            data = ImageData(path.stem, x_train, y_train, x_test, y_test, classes)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        _check_every_class(data, path)
        return data.limited(self.train_limit, self.test_limit, self.seed)


def read_npz(path: Path, *choices: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file under the names of the first of ``choices`` that it has all of.

    Raises ``InputError`` that names file, what is wrong and the remedy; nothing pickled is ever loaded.
    """
    keys = choices[0]
    remedy = f"write it with numpy.savez(path, {', '.join(f'{key}=...' for key in keys)})"
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; give the path of an .npz file with {', '.join(keys)}")
    try:
        file = path.open("rb")  # not left to numpy, which keeps a damaged file open
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from error
    with file:
        try:
            archive = np.load(file, allow_pickle=False)
        except _BROKEN as error:
            raise InputError(f"{path}: cannot be read as an .npz file ({error}); {remedy}") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path}: holds a single array, not an .npz archive; {remedy}")
        there = [choice for choice in choices if all(key in archive.files for key in choice)]
        if not there:
            missing = [key for key in keys if key not in archive.files]
            found = ", ".join(archive.files) or "nothing"
            raise InputError(f"{path}: lacks {', '.join(missing)} (found: {found}); {remedy}")
        return {key: _member(archive, key, path, remedy) for key in there[0]}


def _member(archive: np.lib.npyio.NpzFile, key: str, path: Path, remedy: str) -> np.ndarray:
    try:
        array = archive[key]
    except _BROKEN as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: {key} cannot be read ({reason}); save it as a plain number array, not of objects, "
            "and check that the file was copied as a whole"
        ) from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: {key} is not a NumPy array; {remedy}")
    return array


def images_of(array: np.ndarray, what: str) -> Tensor:
    """Images [N, C, H, W] uint8 of an array in any of the layouts of ``Arrays``; what: its name in ``InputError``."""
    if array.dtype.kind == "f":
        raise InputError(
            f"{what} is {array.dtype}; images must be uint8 in 0..255: "
            "for values in 0..1 multiply by 255, round, and convert with .astype('uint8')"
        )
    if array.dtype != np.uint8:
        raise InputError(f"{what} is {array.dtype}; images must be uint8 in 0..255: convert with .astype('uint8')")
    return channels_first(array, what)


def labels_of(array: np.ndarray, what: str) -> Tensor:
    """Labels [N] int64 of an array; what: its name in ``InputError``."""
    if array.dtype.kind not in "iu":
        raise InputError(f"{what} is {array.dtype}; labels must be whole numbers 0..K-1: convert with .astype('int64')")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise InputError(f"{what} has shape {array.shape}; give one class number an image, [N] (not one-hot)")
    if len(array) and int(array.min()) < 0:
        raise InputError(f"{what} has the negative label {int(array.min())}; number the classes 0..K-1")
    if len(array) and int(array.max()) > np.iinfo(np.int64).max:
        raise InputError(f"{what} has the label {int(array.max())}; number the classes 0..K-1")
    return torch.from_numpy(array.astype(np.int64))


def _numbered(y_train: Tensor, path: Path) -> tuple[str, ...]:
    present = y_train.unique().tolist()
    for expected, label in enumerate(present):
        # Looked at before naming them all: one stray label of a billion must not make a billion names.
        if label != expected:
            raise InputError(
                f"{path}: y_train has labels up to {present[-1]} but none is {expected}; "
                "number the classes 0..K-1 without gaps"
            )
    return tuple(map(str, present))


def _check_every_class(data: ImageData, path: Path) -> None:
    """Named classes may still be without images; numbered ones cannot be."""
    counts = data.y_train.bincount(minlength=len(data.classes)).tolist()
    absent = [f"{label} ('{data.classes[label]}')" for label, count in enumerate(counts) if count == 0]
    if absent:
        raise InputError(
            f"{path}: y_train has no sample of class {', '.join(absent[:5])}; add some, or renumber the classes"
        )


PLUGIN = Arrays
