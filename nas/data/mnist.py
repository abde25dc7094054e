"""MNIST: handwritten digits, 60,000 + 10,000 grey 28x28 images of 10 classes (12 MB download)."""

from __future__ import annotations

from dataclasses import dataclass

from nas.data.image_data import ImageData
from nas.data.torchvision_sets import DIGIT_NAMES, load


@dataclass(frozen=True)
class Mnist:
    """MNIST: handwritten digits, 60,000 + 10,000 grey 28x28 images of 10 classes (12 MB download).

    Kept below ``root``; fetched once if ``download`` is on. The limits keep at most that many images, stratified
    and drawn with ``seed``. Raises InputError where the files cannot be had.
    """

    root: str = "data"
    download: bool = True
    train_limit: int | None = None
    test_limit: int | None = None
    seed: int = 0

    def __call__(self) -> ImageData:
        data = load(
            "MNIST",
            "mnist",
            root=self.root,
            download=self.download,
            files="MNIST/raw/*-ubyte",
            parts=({"train": True}, {"train": False}),
            classes=DIGIT_NAMES,
        )
        return data.limited(self.train_limit, self.test_limit, self.seed)


PLUGIN = Mnist
