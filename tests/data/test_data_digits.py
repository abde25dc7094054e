"""The built-in digits."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

from nas.data.digits import PLUGIN


def test_digits_are_all_there_and_split_the_same_each_time() -> None:
    data = PLUGIN()()
    assert data.input_shape == (1, 8, 8) and data.classes == tuple("0123456789")
    assert (len(data.x_train), len(data.x_test)) == (1437, 360)
    assert data.digest == PLUGIN()().digest
    assert (data.y_test.bincount() - data.y_train.bincount() / 4).abs().max() <= 1.25  # stratified

    values, labels = load_digits(return_X_y=True)
    expected = [
        (label, tuple(round(v * 255 / 16) for v in row)) for row, label in zip(values, labels.tolist(), strict=True)
    ]
    x, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    found = [(label, tuple(row)) for row, label in zip(x.flatten(1).tolist(), y.tolist(), strict=True)]
    assert sorted(found) == sorted(expected)
    assert int(x.max()) == 255
