"""STL-10: objects, 5,000 + 8,000 colour 96x96 images of 10 classes (2.6 GB download)."""

from __future__ import annotations

from dataclasses import dataclass

from nas.data.image_data import ImageData
from nas.data.torchvision_sets import load

CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


@dataclass(frozen=True)
class Stl10:
    """STL-10: objects, 5,000 + 8,000 colour 96x96 images of 10 classes (2.6 GB download).

    Kept below ``root``; fetched once if ``download`` is on, with its unlabelled images, which are not used. The
    limits keep at most that many images, stratified and drawn with ``seed``. Raises InputError where the files cannot
    be had.
    """

    root: str = "data"
    download: bool = True
    train_limit: int | None = None
    test_limit: int | None = None
    seed: int = 0

    def __call__(self) -> ImageData:
        data = load(
            "STL10",
            "stl10",
            root=self.root,
            download=self.download,
            files="stl10_binary",
            parts=({"split": "train"}, {"split": "test"}),
            classes=CLASSES,
        )
        return data.limited(self.train_limit, self.test_limit, self.seed)


PLUGIN = Stl10
