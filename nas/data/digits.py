"""Handwritten digits, built in: 1,797 real grey 8x8 images of 10 classes (scikit-learn), no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nas.data.image_data import ImageData
from nas.data.split import subset
from nas.randomness import generator

TEST_IMAGES = 360


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, built in: 1,797 real grey 8x8 images of 10 classes (scikit-learn), no download.

    The optical digits test set of Alpaydin & Kaynak (UCI, 1998). It has no test part of its own: a fixed
    stratified fifth (360 images) is held out.
    """

    def __call__(self) -> ImageData:
        from sklearn.datasets import load_digits

        values, labels = load_digits(return_X_y=True)  # [1797, 64] in 0..16; [1797]
        x = torch.from_numpy(np.rint(values * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
        y = torch.from_numpy(labels.astype(np.int64))
        test = torch.zeros(len(y), dtype=torch.bool)
        test[subset(y, TEST_IMAGES, generator(0, "digits test"))] = True
        return ImageData("digits", x[~test], y[~test], x[test], y[test], tuple(map(str, range(10))))


PLUGIN = Digits
