"""Arrays from an .npz file: every layout, and one clear message for every way to get it wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nas.data.arrays import Arrays
from nas.errors import InputError

RANDOM = np.random.default_rng(0)
GOOD: dict[str, Any] = {
    "x_train": RANDOM.integers(0, 256, (30, 9, 10, 3), dtype=np.uint8),
    "y_train": np.arange(30) % 3,
    "x_test": RANDOM.integers(0, 256, (12, 9, 10, 3), dtype=np.uint8),
    "y_test": np.arange(12) % 3,
}


def saved(folder: Path, **changes: Any) -> str:
    arrays = {key: value for key, value in (GOOD | changes).items() if value is not None}
    np.savez(folder / "mine.npz", **arrays)
    return str(folder / "mine.npz")


def test_reads_what_was_saved(tmp_path: Path) -> None:
    data = Arrays(saved(tmp_path), classes=("x", "y", "z"))()
    assert (data.name, data.classes, data.input_shape) == ("mine", ("x", "y", "z"), (3, 9, 10))
    assert np.array_equal(data.x_train.permute(0, 2, 3, 1).numpy(), GOOD["x_train"])
    assert np.array_equal(data.x_test.permute(0, 2, 3, 1).numpy(), GOOD["x_test"])
    assert data.y_train.tolist() == GOOD["y_train"].tolist() and data.y_train.dtype == torch.int64
    assert data.x_train.is_contiguous()


def test_all_layouts_and_label_types_give_the_same(tmp_path: Path) -> None:
    reference = Arrays(saved(tmp_path))()
    assert reference.classes == ("0", "1", "2")
    first = {key: GOOD[key].transpose(0, 3, 1, 2) for key in ("x_train", "x_test")}
    assert Arrays(saved(tmp_path, **first))().digest == reference.digest
    for kind in ("uint8", "int32", ">i8"):
        labels = {key: GOOD[key].astype(kind)[:, None] for key in ("y_train", "y_test")}
        assert Arrays(saved(tmp_path, **labels))().digest == reference.digest
    np.savez_compressed(tmp_path / "small.npz", **GOOD)
    assert Arrays(str(tmp_path / "small.npz"))().digest == reference.digest


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channel_counts(tmp_path: Path, channels: int) -> None:
    images = {key: np.repeat(GOOD[key][..., :1], channels, axis=3) for key in ("x_train", "x_test")}
    assert Arrays(saved(tmp_path, **images))().input_shape == (channels, 9, 10)


def test_grey_images_need_no_channel_axis(tmp_path: Path) -> None:
    grey = {key: GOOD[key][..., 0] for key in ("x_train", "x_test")}
    data = Arrays(saved(tmp_path, **grey))()
    assert data.input_shape == (1, 9, 10) and np.array_equal(data.x_train[:, 0].numpy(), grey["x_train"])


def test_limits(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = Arrays(path, train_limit=9, test_limit=4, seed=2)()
    assert data.y_train.bincount().tolist() == [3, 3, 3] and len(data.y_test) == 4
    assert data.digest == Arrays(path, train_limit=9, test_limit=4, seed=2)().digest
    assert data.digest != Arrays(path, train_limit=9, test_limit=4, seed=3)().digest
    with pytest.raises(InputError, match="limit of 1"):
        Arrays(path, train_limit=1)()


BAD_ARRAYS: list[tuple[str, dict[str, Any], str]] = [
    ("missing key", {"y_test": None}, r"lacks y_test \(found: x_train, y_train, x_test\).*numpy.savez"),
    ("object images", {"x_train": np.array([{}, None])}, "x_train cannot be read.*not of objects"),
    ("object labels", {"y_train": np.array(["a", 1], dtype=object)}, "y_train cannot be read"),
    ("float images", {"x_train": GOOD["x_train"] / 255}, "x_train is float64.*multiply by 255.*astype"),
    ("int images", {"x_test": GOOD["x_test"].astype(np.int64)}, "x_test is int64.*uint8"),
    ("flat images", {"x_train": GOOD["x_train"].reshape(30, -1)}, r"x_train has shape \(30, 270\); give images as"),
    ("too many dims", {"x_test": GOOD["x_test"][None]}, "x_test has shape"),
    ("both axes", {"x_train": np.zeros((30, 3, 9, 3), np.uint8)}, r"x_train.*\(30, 3, 9, 3\): both axis 1 and axis 3"),
    ("no axis", {"x_train": np.zeros((30, 9, 9, 5), np.uint8)}, "x_train.*neither axis 1 nor axis 3.*save the images"),
    ("lengths", {"y_train": np.arange(29) % 3}, "30 images but y_train has 29 labels"),
    ("negative", {"y_train": np.arange(30) % 3 - 1}, "y_train has the negative label -1; number"),
    ("float labels", {"y_test": np.zeros(12)}, "y_test is float64; labels must be whole numbers.*astype"),
    ("text labels", {"y_test": np.array(["cat"] * 12)}, "y_test is <U3; labels"),
    ("one-hot", {"y_train": np.eye(3, dtype=int)[GOOD["y_train"]]}, r"y_train has shape \(30, 3\).*not one-hot"),
    ("huge", {"y_train": np.full(30, 2**64 - 1, dtype=np.uint64)}, "y_train has the label 18446744073709551615"),
    ("unknown test label", {"y_test": np.arange(12) % 4}, r"y_test has labels 0\.\.3, but 3 classes"),
    ("sizes", {"x_test": GOOD["x_test"][:, 1:]}, r"\(3, 9, 10\) but x_test of \(3, 8, 10\)"),
    ("channels", {"x_test": GOOD["x_test"][..., :1]}, r"\(3, 9, 10\) but x_test of \(1, 9, 10\)"),
    ("gap", {"y_train": np.arange(30) % 2 * 2}, "y_train has labels up to 2 but none is 1.*without gaps"),
    ("one-based", {"y_train": np.arange(30) % 3 + 1}, "labels up to 3 but none is 0"),
    ("billion", {"y_train": np.array([10**9] + [0] * 29)}, "labels up to 1000000000 but none is 1"),
    ("empty", {"x_test": GOOD["x_test"][:0], "y_test": GOOD["y_test"][:0]}, "x_test has no images"),
    ("all empty", {"x_train": GOOD["x_train"][:0], "y_train": GOOD["y_train"][:0]}, "class"),
    ("tiny", {"x_train": GOOD["x_train"][:, :7], "x_test": GOOD["x_test"][:, :7]}, "7x10 pixels"),
    ("one class", {"y_train": np.zeros(30, int), "y_test": np.zeros(12, int)}, "at least 2"),
]


@pytest.mark.parametrize(("changes", "message"), [c[1:] for c in BAD_ARRAYS], ids=[c[0] for c in BAD_ARRAYS])
def test_bad_arrays(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = saved(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as caught:
        Arrays(path)()
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_named_classes_must_fit_the_labels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"mine.npz.*labels 0\.\.2, but 2 classes"):
        Arrays(saved(tmp_path), classes=("x", "y"))()
    with pytest.raises(InputError, match=r"mine.npz: y_train has no sample of class 3 \('w'\)"):
        Arrays(saved(tmp_path), classes=("x", "y", "z", "w"))()


def test_bad_files(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message) as caught:
            Arrays(str(path))()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused(tmp_path / "absent.npz", "no such file.*x_train, y_train, x_test, y_test")
    refused(tmp_path, "no such file")
    for content in (b"", b"not an archive", b"PK\x03\x04 almost a zip"):
        (tmp_path / "odd.npz").write_bytes(content)
        refused(tmp_path / "odd.npz", "cannot be read as an .npz file.*numpy.savez")
    np.save(tmp_path / "single.npy", np.zeros(3))
    refused(tmp_path / "single.npy", "single array")
    whole = Path(saved(tmp_path)).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.npz", "cannot be read as an .npz file")
    damaged = bytearray(whole)
    damaged[2000] ^= 0xFF
    (tmp_path / "damaged.npz").write_bytes(damaged)
    refused(tmp_path / "damaged.npz", "x_train cannot be read.*copied as a whole")


def test_any_flipped_byte_is_harmless_or_told(tmp_path: Path) -> None:
    small = {key: value[:3, :8, :8, 0] if value.ndim == 4 else value[:3] for key, value in GOOD.items()}
    path = Path(saved(tmp_path, **small))
    digest, whole = Arrays(str(path))().digest, path.read_bytes()
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            assert Arrays(str(path))().digest == digest
        except InputError as error:
            assert str(path) in str(error)


def test_a_member_that_is_no_array(tmp_path: Path) -> None:
    import zipfile

    path = Path(saved(tmp_path, y_test=None))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y_test", b"0 1 2")
    with pytest.raises(InputError, match="y_test is not a NumPy array"):
        Arrays(str(path))()


def test_nothing_pickled_runs(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    path = saved(tmp_path, x_train=np.array([Trap()], dtype=object))
    with pytest.raises(InputError):
        Arrays(path)()
    assert not (tmp_path / "sprung").exists()


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = saved(tmp_path)
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(InputError, match=r"mine.npz: cannot be opened \(Permission denied\)"):
        Arrays(path)()
