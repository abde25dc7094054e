"""CIFAR-10: objects, 50,000 + 10,000 colour 32x32 images of 10 classes (170 MB download)."""

from __future__ import annotations

from dataclasses import dataclass

from nas.data.image_data import ImageData
from nas.data.torchvision_sets import load


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10: objects, 50,000 + 10,000 colour 32x32 images of 10 classes (170 MB download).

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
            "CIFAR10",
            "cifar10",
            root=self.root,
            download=self.download,
            files="cifar-10-batches-py",
            parts=({"train": True}, {"train": False}),
        )
        return data.limited(self.train_limit, self.test_limit, self.seed)


PLUGIN = Cifar10
