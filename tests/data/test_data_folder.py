"""Image folders, on images made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nas.data.folder import Folder
from nas.errors import InputError


def write(file: Path, value: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), value, np.uint8)
    pixels[:, 0] = 255  # a mark at the left
    Image.fromarray(pixels).convert(mode).save(file)


def refused(path: Path, message: str, **options: int | bool) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Folder(str(path), **options)()  # type: ignore[arg-type]
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_given_parts(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                write(tmp_path / part / name / f"{number}.png", 100 * label + 10 * number + (part == "test"))
    data = Folder(str(tmp_path))()
    assert data.classes == ("cat", "dog") and data.input_shape == (3, 8, 8) and data.name == tmp_path.name
    assert data.y_train.tolist() == [0, 0, 0, 1, 1, 1] and data.y_test.tolist() == [0, 0, 1, 1]
    assert data.x_train[:, 0, 5, 5].tolist() == [0, 10, 20, 100, 110, 120]
    assert data.x_test[:, 2, 5, 5].tolist() == [1, 11, 101, 111]
    assert (data.x_train[:, :, :, 0] == 255).all(), "rows stay rows"


def test_a_fifth_is_held_out(tmp_path: Path) -> None:
    for label, count in enumerate((10, 20)):
        for number in range(count):
            write(tmp_path / f"class{label}" / f"{number:02}.png", 100 * label + number)
    write(tmp_path / ".hidden" / "x.png")
    (tmp_path / "class0" / ".DS_Store").write_text("hidden files are no images")
    (tmp_path / "labels.csv").write_text("files beside the class folders do not matter")
    data = Folder(str(tmp_path))()
    assert data.y_test.bincount().tolist() == [2, 4] and data.y_train.bincount().tolist() == [8, 16]
    values = torch.cat([data.x_train, data.x_test])[:, 0, 5, 5].tolist()
    assert sorted(values) == [*range(10), *range(100, 120)]
    assert all((value >= 100) == label for value, label in zip(values[-6:], data.y_test.tolist(), strict=True))
    assert data.digest == Folder(str(tmp_path))().digest


def test_size_scales_the_shorter_side_and_crops_the_middle(tmp_path: Path) -> None:
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 64, 3), np.uint8))
    expected = np.asarray(wide.resize((32, 8), Image.Resampling.BILINEAR).crop((12, 0, 20, 8)), dtype=int)
    for part in ("train", "test"):
        for name, image in (("a", wide), ("b", wide.transpose(Image.Transpose.TRANSPOSE))):
            (tmp_path / part / name).mkdir(parents=True)
            image.save(tmp_path / part / name / "0.png")
    data = Folder(str(tmp_path), size=8)()
    assert data.input_shape == (3, 8, 8)
    across, down = data.x_train.permute(0, 2, 3, 1).int().numpy()
    assert abs(across - expected).max() <= 1  # grey levels: the order of the two passes may round differently
    assert abs(down.transpose(1, 0, 2) - expected).max() <= 1


def test_size_leaves_fitting_images_as_they_are(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8)).save(tmp_path / name / f"{number}.png")
    assert Folder(str(tmp_path), size=9)().digest == Folder(str(tmp_path))().digest


def test_kinds_of_images(tmp_path: Path) -> None:
    for number, (mode, kind) in enumerate([("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("P", "gif"), ("1", "bmp")]):
        write(tmp_path / "a" / f"{number}.{kind}", 255, mode=mode)
        write(tmp_path / "b" / f"{number}.{kind}", 255, mode=mode)
    assert (Folder(str(tmp_path))().x_train == 255).all()
    assert Folder(str(tmp_path), grey=True)().input_shape == (1, 8, 8)


def test_the_upright_tag_of_cameras_is_followed(tmp_path: Path) -> None:
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[0] = 255
    tag = Image.Exif()
    tag[0x0112] = 6  # stored rotated by 90 degrees
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(upright).save(tmp_path / name / "0.png")
        Image.fromarray(np.rot90(upright)).save(tmp_path / name / "1.png", exif=tag)
    data = Folder(str(tmp_path))()
    expected = torch.from_numpy(upright).permute(2, 0, 1)
    assert all(torch.equal(image, expected) for image in [*data.x_train, *data.x_test])


def test_bad_images_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(3):
            write(tmp_path / name / f"{number}.png")
    odd = tmp_path / "b" / "1.png"
    write(odd, size=(9, 8))
    refused(tmp_path, r"b/1.png: has 9x8 pixels but .*a/0.png has 8x8; set 'size'")
    assert Folder(str(tmp_path), size=8)().input_shape == (3, 8, 8)
    write(odd, size=(32, 32))
    for content in (b"", b"no image at all", odd.read_bytes()[:-30]):
        odd.write_bytes(content)
        refused(tmp_path, r"b/1.png: cannot be read as an image", size=8)
    Image.fromarray(np.full((8, 8), 3000, np.uint16)).save(odd)
    refused(tmp_path, r"b/1.png: has more than 8 bits")


def test_bad_folders_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "no such folder")
    refused(tmp_path, r"0 class folder\(s\)")
    write(tmp_path / "a" / "0.png")
    refused(tmp_path, r"1 class folder\(s\)")
    write(tmp_path / "b" / "0.png")
    refused(tmp_path, "a: holds one image; at least 2")
    for name in ("a", "b"):
        write(tmp_path / name / "1.png")
    assert len(Folder(str(tmp_path))().x_train) == 2
    (tmp_path / "c").mkdir()
    refused(tmp_path, "c: holds no images")
    write(tmp_path / "c" / "deep" / "0.png")
    refused(tmp_path, "c/deep: is a folder inside a class folder")


def test_bad_sizes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for number in range(2):
            write(tmp_path / name / f"{number}.png")
    with pytest.raises(InputError, match="image size is 0"):
        Folder(str(tmp_path), size=0)()
    refused(tmp_path, "4x4 pixels.*8x8", size=4)


def test_parts_must_agree(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / "train" / name / "0.png")
    refused(tmp_path, "has a folder 'train' but not both")
    for name in ("a", "b"):
        write(tmp_path / "test" / name / "0.png")
    refused(tmp_path, "train/c: there is no such class in .*test")
    write(tmp_path / "test" / "c" / "0.png")
    assert len(Folder(str(tmp_path))().classes) == 3
