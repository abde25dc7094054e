"""SVHN: house numbers, 73,257 + 26,032 colour 32x32 images of 10 classes (246 MB download)."""

from __future__ import annotations

from dataclasses import dataclass

from nas.data.image_data import ImageData
from nas.data.torchvision_sets import DIGIT_NAMES, load


@dataclass(frozen=True)
class Svhn:
    """SVHN: house numbers, 73,257 + 26,032 colour 32x32 images of 10 classes (246 MB download).

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
            "SVHN",
            "svhn",
            root=self.root,
            download=self.download,
            files="*_32x32.mat",
            parts=({"split": "train"}, {"split": "test"}),
            classes=DIGIT_NAMES,
        )
        return data.limited(self.train_limit, self.test_limit, self.seed)


PLUGIN = Svhn
