"""ImageData: what it refuses, its statistics against NumPy, limits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from nas.data import image_data
from nas.data.image_data import ImageData
from nas.errors import InputError


def make(**changes: Any) -> ImageData:
    stream = torch.Generator().manual_seed(0)
    fields: dict[str, Any] = {
        "name": "toy",
        "x_train": torch.randint(256, (60, 3, 9, 8), dtype=torch.uint8, generator=stream),
        "y_train": torch.arange(60) % 3,
        "x_test": torch.randint(256, (20, 3, 9, 8), dtype=torch.uint8, generator=stream),
        "y_test": torch.arange(20) % 3,
        "classes": ("a", "b", "c"),
    }
    return ImageData(**(fields | changes))


def test_describes_itself() -> None:
    data = make()
    assert data.input_shape == (3, 9, 8)
    assert "tensor" not in repr(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": torch.zeros(60, 3, 9, 8)}, "x_train is torch.float32.*must be uint8"),
        ({"x_test": torch.zeros(20, 9, 8, dtype=torch.uint8)}, r"x_test is .*\(20, 9, 8\)"),
        ({"y_train": torch.zeros(60)}, "y_train is torch.float32.*int64"),
        ({"y_test": torch.zeros(20, 1, dtype=torch.int64)}, "y_test"),
        ({"y_test": torch.zeros(19, dtype=torch.int64)}, "20 images but y_test has 19 labels"),
        ({"y_train": torch.arange(60) % 4}, r"labels 0\.\.3, but 3 classes"),
        ({"y_test": torch.arange(20) % 3 - 1}, r"labels -1\.\.1"),
        ({"classes": ("a",)}, "at least 2"),
        ({"x_test": torch.zeros(20, 1, 9, 8, dtype=torch.uint8)}, r"\(3, 9, 8\) but x_test of \(1, 9, 8\)"),
        (
            {"x_test": torch.zeros(0, 3, 9, 8, dtype=torch.uint8), "y_test": torch.zeros(0, dtype=torch.int64)},
            "x_test has no images",
        ),
        ({"x_train": torch.zeros(60, 3, 9, 7, dtype=torch.uint8)}, "9x7 pixels.*8x8.*enlarge or pad"),
        ({"x_train": torch.zeros(60, 0, 9, 8, dtype=torch.uint8)}, "0 channel"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**changes)


@pytest.mark.parametrize("chunk_pixels", [1, 1000, 1 << 22])
def test_statistics_equal_numpys(monkeypatch: pytest.MonkeyPatch, chunk_pixels: int) -> None:
    monkeypatch.setattr(image_data, "_CHUNK_PIXELS", chunk_pixels)
    data = make()
    pixels = data.x_train.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(data.mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(data.std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)
    assert data.mean is data.mean, "the statistics are kept"


def test_a_constant_channel_has_a_positive_deviation() -> None:
    x = make().x_train.clone()
    x[:, 1] = 77
    data = make(x_train=x)
    assert data.mean[1] == pytest.approx(77 / 255, rel=1e-15)
    assert data.std[1] == image_data.STD_FLOOR


def test_digest_follows_the_content_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = make()
    assert len(data.digest) == 16 and int(data.digest, 16) >= 0
    assert replace(data, name="other").digest == data.digest
    changed = data.x_test.clone()
    changed[3, 2, 1, 0] ^= 1
    others = [replace(data, x_test=changed), replace(data, classes=("a", "b", "d"))]
    others.append(replace(data, y_train=(data.y_train + 1) % 3))
    assert len({other.digest for other in [data, *others]}) == 4
    transposed = data.x_train.transpose(2, 3).contiguous().transpose(2, 3)
    assert replace(data, x_train=transposed).digest == data.digest, "memory order is not content"
    monkeypatch.setattr(image_data, "_CHUNK_PIXELS", 100)
    assert make().digest == data.digest


def test_to_keeps_everything_else() -> None:
    data = make()
    moved = data.to("cpu")
    assert (moved.digest, moved.name, moved.classes) == (data.digest, data.name, data.classes)


def test_limited_is_stratified_seeded_and_ordered() -> None:
    data = replace(make(), x_train=make().x_train.clone())
    data.x_train[:, 0, 0, 0] = torch.arange(60)  # each image tells its row
    small = data.limited(30, 7, seed=1)
    rows = small.x_train[:, 0, 0, 0].long()
    assert small.y_train.bincount().tolist() == [10, 10, 10]
    assert sorted(small.y_test.bincount().tolist()) == [2, 2, 3]
    assert (rows.diff() > 0).all() and torch.equal(small.y_train, data.y_train[rows])
    assert torch.equal(small.x_train, data.x_train[rows])
    assert small.digest == data.limited(30, 7, seed=1).digest != data.limited(30, 7, seed=2).digest


def test_no_limit_and_a_large_limit_keep_all() -> None:
    data = make()
    assert data.limited(None, None, seed=0).digest == data.digest
    assert data.limited(60, 1000, seed=0).digest == data.digest
    assert data.limited(3, 1, seed=0).y_train.tolist() != [0, 0, 0]


@pytest.mark.parametrize(("train", "test"), [(2, None), (0, None), (-1, 5), (None, 0), (None, -3)])
def test_impossible_limits(train: int | None, test: int | None) -> None:
    with pytest.raises(InputError, match="limit of"):
        make().limited(train, test, seed=0)
