"""Your own images in folders: train/<class>/* and test/<class>/*, or <class>/* alone."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError

TEST_SHARE = 0.2

_LAYOUT = "put the images into train/<class>/ and test/<class>/, or into <class>/ alone"
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_NOT_8_BIT = ("I", "F")


@dataclass(frozen=True)
class Folder:
    """Your own images in folders: train/<class>/* and test/<class>/*, or <class>/* alone.

    Without train and test folders a fixed stratified fifth is held out as the test part. Every file that is not
    hidden must be an image that Pillow reads. ``size``: each image is scaled until its shorter side has that many
    pixels and cropped around its centre; without it all images must have the same size. ``grey``: one channel
    instead of three. The limits keep at most that many images, stratified and drawn with ``seed``. Raises InputError
    that names file or folder and remedy.
    """

    path: str
    size: int | None = None
    grey: bool = False
    train_limit: int | None = None
    test_limit: int | None = None
    seed: int = 0

    def __call__(self) -> ImageData:
        return self._whole().limited(self.train_limit, self.test_limit, self.seed)

    def _whole(self) -> ImageData:
        if self.size is not None and self.size < 1:
            raise InputError(f"the image size is {self.size}; it must be a number of pixels above 0")
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise InputError(f"{root}: there is no such folder; {_LAYOUT}")
        parts = [root / name for name in ("train", "test") if (root / name).is_dir()]
        if len(parts) == 1:
            raise InputError(f"{root}: has a folder '{parts[0].name}' but not both 'train' and 'test'; {_LAYOUT}")
        if parts:
            return self._given_parts(root, *parts)
        return self._held_out_part(root)

    def _given_parts(self, root: Path, train: Path, test: Path) -> ImageData:
        train_files, test_files = _class_files(train), _class_files(test)
        if train_files.keys() != test_files.keys():
            odd = sorted(train_files.keys() ^ test_files.keys())[0]
            present, absent = (train, test) if odd in train_files else (test, train)
            raise InputError(f"{present / odd}: there is no such class in {absent}; both parts need the same classes")
        x, y = self._read([*train_files.values(), *test_files.values()])
        count = sum(map(len, train_files.values()))
        y = y % len(train_files)  # both parts number the same classes
        return self._image_data(root, x[:count], y[:count], x[count:], y[count:], tuple(train_files))

    def _held_out_part(self, root: Path) -> ImageData:
        files = _class_files(root)
        for name, images in files.items():
            if len(images) < 2:
                raise InputError(
                    f"{root / name}: holds one image; at least 2 are needed, one to train and one to test with"
                )
        x, y = self._read([*files.values()])
        rows = split(y, architecture=0, validation=TEST_SHARE, seed=0)
        train, test = rows.training, rows.validation
        return self._image_data(root, x[train], y[train], x[test], y[test], tuple(files))

    def _image_data(
        self, root: Path, x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor, classes: tuple[str, ...]
    ) -> ImageData:
        try:
            return ImageData(root.resolve().name, x_train, y_train, x_test, y_test, classes)
        except InputError as error:
            raise InputError(f"{root}: {error}") from error

    def _read(self, groups: list[list[Path]]) -> tuple[Tensor, Tensor]:
        """Images of all groups in order, [N, C, H, W] uint8, and the number of each image's group, [N] int64."""
        files = [file for group in groups for file in group]
        first = self._decoded(files[0])
        images = np.empty((len(files), *first.shape), np.uint8)
        for row, file in enumerate(files):
            image = self._decoded(file)
            if image.shape != first.shape:
                raise InputError(
                    f"{file}: has {image.shape[1]}x{image.shape[0]} pixels but {files[0]} has "
                    f"{first.shape[1]}x{first.shape[0]}; set 'size' to bring all images to one size"
                )
            images[row] = image
        numbers = [number for number, group in enumerate(groups) for _ in group]
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(numbers)

    def _decoded(self, file: Path) -> np.ndarray:
        """[H, W, C] uint8"""
        try:
            with Image.open(file) as opened:
                # Pillow would silently clip such pixels to 255.
                deep = opened.mode.split(";")[0] in _NOT_8_BIT
                # Cameras store the upright position as a tag.
                image = ImageOps.exif_transpose(opened).convert("L" if self.grey else "RGB")
        except _BROKEN as error:
            raise InputError(f"{file}: cannot be read as an image ({error}); repair, remove or hide it") from error
        if deep:
            raise InputError(f"{file}: has more than 8 bits a pixel; convert it to an 8-bit image first")
        if self.size is not None:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
        return pixels[:, :, None] if self.grey else pixels


def _class_files(part: Path) -> dict[str, list[Path]]:
    """The image files of each class folder of ``part``; classes and files in the order of their names."""
    folders = [entry for entry in _visible(part) if entry.is_dir()]
    if len(folders) < 2:
        raise InputError(f"{part}: has {len(folders)} class folder(s); at least 2 are needed: {_LAYOUT}")
    classes = {}
    for folder in folders:
        files = _visible(folder)
        if not files:
            raise InputError(f"{folder}: holds no images; add some or remove the folder")
        for file in files:
            if file.is_dir():
                raise InputError(f"{file}: is a folder inside a class folder; {_LAYOUT}")
        classes[folder.name] = files
    return classes


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


PLUGIN = Folder
