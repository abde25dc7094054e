"""A data set in memory: uint8 images, labels and class names."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nas.data.split import subset
from nas.errors import InputError
from nas.randomness import generator

SMALLEST_SIDE = 8
"""Pixels; networks halve the resolution twice and need something left to look at."""

STD_FLOOR = 1e-3
"""In [0, 1] pixel units: a constant channel must not divide by zero when images are normalised."""

_CHUNK_PIXELS = 1 << 22


@dataclass(frozen=True, eq=False)
class ImageData:
    """Training and test images of one classification task, checked on construction.

    x_train, x_test: [N, C, H, W] uint8;  y_train, y_test: [N] int64 in 0 .. len(classes) - 1.
    Raises InputError where they do not fit together.
    """

    name: str
    x_train: Tensor = field(repr=False)
    y_train: Tensor = field(repr=False)
    x_test: Tensor = field(repr=False)
    y_test: Tensor = field(repr=False)
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise InputError(f"data '{self.name}' has {len(self.classes)} class(es); classification needs at least 2")
        self._check_part("train", self.x_train, self.y_train)
        self._check_part("test", self.x_test, self.y_test)
        train, test = tuple(self.x_train.shape[1:]), tuple(self.x_test.shape[1:])
        if train != test:
            raise InputError(
                f"data '{self.name}': x_train has images of (channels, height, width) {train} but x_test of {test}; "
                "bring both to one shape"
            )

    def _check_part(self, part: str, x: Tensor, y: Tensor) -> None:
        where = f"data '{self.name}'"
        if x.dtype != torch.uint8 or x.ndim != 4:
            raise InputError(
                f"{where}: x_{part} is {x.dtype} of shape {tuple(x.shape)}; "
                "it must be uint8 [images, channels, height, width] with values 0..255"
            )
        if y.dtype != torch.int64 or y.ndim != 1:
            raise InputError(
                f"{where}: y_{part} is {y.dtype} of shape {tuple(y.shape)}; it must be int64 [images], one class each"
            )
        if len(x) != len(y):
            raise InputError(f"{where}: x_{part} has {len(x)} images but y_{part} has {len(y)} labels; give one each")
        if len(x) == 0:
            raise InputError(f"{where}: x_{part} has no images; at least one is needed")
        if x.shape[1] == 0 or min(x.shape[2:]) < SMALLEST_SIDE:
            raise InputError(
                f"{where}: x_{part} has images of {x.shape[1]} channel(s) and {x.shape[2]}x{x.shape[3]} pixels; at "
                f"least 1 channel and {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels are needed: enlarge or pad the images"
            )
        lowest, highest = int(y.min()), int(y.max())
        if lowest < 0 or highest >= len(self.classes):
            raise InputError(
                f"{where}: y_{part} has labels {lowest}..{highest}, but {len(self.classes)} classes are labelled "
                f"0..{len(self.classes) - 1}; renumber the labels or name more classes"
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel over all training pixels, in [0, 1] pixel units."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel over all training pixels, in [0, 1] pixel units, at least STD_FLOOR."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        # Integer sums are exact, so every device and every chunk size gives the same bits.
        channels = self.x_train.shape[1]
        totals, squares = [0] * channels, [0] * channels
        for chunk in _chunks(self.x_train):
            values = chunk.to(torch.int32)
            total = values.sum(dim=(0, 2, 3), dtype=torch.int64).tolist()
            square = values.square().sum(dim=(0, 2, 3), dtype=torch.int64).tolist()
            totals = [a + b for a, b in zip(totals, total, strict=True)]
            squares = [a + b for a, b in zip(squares, square, strict=True)]
        count = self.x_train.numel() // channels
        mean = tuple(total / (255 * count) for total in totals)
        # The difference is taken in whole numbers: no cancellation for nearly constant channels.
        std = tuple(
            max(math.sqrt(count * square - total * total) / (255 * count), STD_FLOOR)
            for total, square in zip(totals, squares, strict=True)
        )
        return mean, std

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the content (images, labels, class names; not the name): equal content, equal digest."""
        content = hashlib.blake2b(digest_size=8)
        content.update(repr(self.classes).encode())
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test):
            content.update(repr(tuple(tensor.shape)).encode())
            for chunk in _chunks(tensor):
                content.update(chunk.cpu().contiguous().numpy().data)
        return content.hexdigest()

    def to(self, device: torch.device | str) -> ImageData:
        """The same data with its tensors on ``device``."""
        return replace(
            self,
            x_train=self.x_train.to(device),
            y_train=self.y_train.to(device),
            x_test=self.x_test.to(device),
            y_test=self.y_test.to(device),
        )

    def to_data(self) -> dict[str, Any]:
        """What a record says of it: name, shape of an image, classes, number of images, digest."""
        return {
            "name": self.name,
            "input_shape": list(self.input_shape),
            "classes": list(self.classes),
            "train": len(self.y_train),
            "test": len(self.y_test),
            "digest": self.digest,
        }

    def limited(self, train: int | None, test: int | None, seed: int) -> ImageData:
        """At most ``train`` training and ``test`` test images: a random part that keeps the shares of the classes.

        None, or a limit that is not below the size, keeps all. The images stay in their order.
        Raises InputError for a limit below 1 and for a training limit that would leave a class without image.
        """
        present = len(self.y_train.unique())
        if train is not None and train < present:
            raise InputError(
                f"data '{self.name}': a limit of {train} training images leaves some of the {present} classes without "
                f"any; use at least {present}"
            )
        if test is not None and test < 1:
            raise InputError(f"data '{self.name}': a limit of {test} test images leaves nothing; use at least 1")
        x_train, y_train = _limited(self.x_train, self.y_train, train, generator(seed, "train limit"))
        x_test, y_test = _limited(self.x_test, self.y_test, test, generator(seed, "test limit"))
        return replace(self, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def _limited(x: Tensor, y: Tensor, limit: int | None, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    if limit is None or limit >= len(y):
        return x, y
    rows = subset(y, limit, stream).to(x.device)
    return x[rows], y[rows]


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Consecutive rows of ``tensor``, each chunk about _CHUNK_PIXELS values, so that copies stay small."""
    row = tensor[0].numel()
    yield from tensor.split(max(1, _CHUNK_PIXELS // row))
