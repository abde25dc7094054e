"""The torchvision data sets: real file formats written here, absent files, damaged files, a dead network."""

from __future__ import annotations

import hashlib
import pickle
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from nas.data import cifar10, cifar100, fashion_mnist, mnist, stl10, svhn, torchvision_sets
from nas.data.image_data import ImageData
from nas.errors import InputError

MODULES = {"MNIST": mnist, "FashionMNIST": fashion_mnist, "CIFAR10": cifar10, "CIFAR100": cifar100, "SVHN": svhn}
MODULES["STL10"] = stl10
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may reach beyond this machine: names do not resolve, and proxies are not asked."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in tests")

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda h, *a, **k: real(h, *a, **k) if h == "127.0.0.1" else refuse())
    monkeypatch.setenv("no_proxy", "*")


def images(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def labels(n: int, classes: int = 10) -> np.ndarray:
    return np.arange(n, dtype=np.uint8) % classes


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def equal(data: ImageData, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> None:
    for tensor, array in zip((data.x_train, data.x_test), (x_train, x_test), strict=True):
        assert tensor.dtype == torch.uint8 and np.array_equal(tensor.numpy(), array)
    for tensor, array in zip((data.y_train, data.y_test), (y_train, y_test), strict=True):
        assert tensor.dtype == torch.int64 and tensor.tolist() == array.tolist()


def write_idx(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    file.write_bytes(header + array.tobytes())


@pytest.mark.parametrize("kind", ["MNIST", "FashionMNIST"])
def test_mnist_format(tmp_path: Path, kind: str) -> None:
    content = {"train": (images(40, 28, 28), labels(40)), "t10k": (images(20, 28, 28), labels(20))}
    for part, (x, y) in content.items():
        write_idx(tmp_path / kind / "raw" / f"{part}-images-idx3-ubyte", x)
        write_idx(tmp_path / kind / "raw" / f"{part}-labels-idx1-ubyte", y)
    data = MODULES[kind].PLUGIN(root=str(tmp_path))()
    (x_train, y_train), (x_test, y_test) = content.values()
    equal(data, x_train[:, None], y_train, x_test[:, None], y_test)
    assert data.name == MODULES[kind].__name__.rsplit(".", 1)[1]
    expected = tuple("0123456789") if kind == "MNIST" else tuple(datasets.FashionMNIST.classes)
    assert data.classes == expected
    small = MODULES[kind].PLUGIN(root=str(tmp_path), train_limit=20, test_limit=10)()
    assert small.y_train.bincount().tolist() == [2] * 10 and small.y_test.bincount().tolist() == [1] * 10

    for damage in (b"", b"\0\0\x08\x03", (tmp_path / kind / "raw" / "t10k-images-idx3-ubyte").read_bytes()[:-9]):
        (tmp_path / kind / "raw" / "t10k-images-idx3-ubyte").write_bytes(damage)
        for download in (False, True):
            with pytest.raises(InputError, match=f"{kind} .*{tmp_path}/{kind}/raw.*arrays"):
                MODULES[kind].PLUGIN(root=str(tmp_path), download=download)()


@pytest.mark.parametrize(("kind", "key", "classes"), [("CIFAR10", "labels", 10), ("CIFAR100", "fine_labels", 100)])
def test_cifar_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, key: str, classes: int) -> None:
    known = getattr(datasets, kind)
    folder = tmp_path / known.base_folder
    folder.mkdir()
    x_train, y_train, x_test, y_test = [], [], images(classes, 3, 32, 32), labels(classes, classes)
    for attribute in ("train_list", "test_list"):
        written = []
        for name, _ in getattr(known, attribute):
            x, y = (images(classes, 3, 32, 32), labels(classes, classes)) if "train" in attribute else (x_test, y_test)
            if "train" in attribute:
                x_train.append(x)
                y_train.append(y)
            (folder / name).write_bytes(pickle.dumps({"data": x.reshape(classes, -1), key: y.tolist()}))
            written.append([name, md5(folder / name)])
        monkeypatch.setattr(known, attribute, written)
    names = [f"class {number}" for number in range(classes)]
    meta = folder / known.meta["filename"]
    meta.write_bytes(pickle.dumps({known.meta["key"]: names}))
    monkeypatch.setattr(known, "meta", known.meta | {"md5": md5(meta)})

    data = MODULES[kind].PLUGIN(root=str(tmp_path), download=False)()
    equal(data, np.concatenate(x_train), np.concatenate(y_train), x_test, y_test)
    assert data.classes == tuple(names) and data.input_shape == (3, 32, 32)
    meta.write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"{kind} .*{known.base_folder}"):
        MODULES[kind].PLUGIN(root=str(tmp_path), download=False)()


def test_svhn_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat

    content, known = {}, {}
    for part, n in (("train", 30), ("test", 20)):
        x, y = images(n, 3, 32, 32), labels(n)
        file = tmp_path / f"{part}_32x32.mat"
        savemat(file, {"X": x.transpose(2, 3, 1, 0), "y": np.where(y == 0, 10, y)[:, None]})  # 10 stands for 0
        content[part], known[part] = (x, y), ["http://127.0.0.1:9/", file.name, md5(file)]
    monkeypatch.setattr(datasets.SVHN, "split_list", known)
    data = svhn.PLUGIN(root=str(tmp_path), download=False)()
    equal(data, *content["train"], *content["test"])
    assert data.classes == tuple("0123456789")


def test_stl10_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    content, known = {}, {}
    for part, n in (("train", 20), ("test", 10)):
        x, y = images(n, 3, 96, 96), labels(n)
        (folder / f"{part}_X.bin").write_bytes(x.transpose(0, 1, 3, 2).tobytes())  # column by column
        (folder / f"{part}_y.bin").write_bytes((y + 1).tobytes())
        content[part] = (x, y)
        known[part] = [[f"{part}_{a}.bin", md5(folder / f"{part}_{a}.bin")] for a in ("X", "y")]
        monkeypatch.setattr(datasets.STL10, f"{part}_list", known[part])
    data = stl10.PLUGIN(root=str(tmp_path), download=False)()
    equal(data, *content["train"], *content["test"])
    assert len(data.classes) == 10 and data.classes[0] == "airplane"


@pytest.mark.parametrize("kind", MODULES)
def test_absent_files_without_download(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match=f"{kind} is not there.*downloading is off.*{tmp_path}.*'arrays'") as caught:
        MODULES[kind].PLUGIN(root=str(tmp_path / "nowhere"), download=False)()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "nowhere").exists(), "looking leaves nothing behind"


@pytest.mark.parametrize("kind", MODULES)
def test_absent_files_offline(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match=f"{kind} could not be downloaded.*{tmp_path}.*'arrays'") as caught:
        MODULES[kind].PLUGIN(root=str(tmp_path))()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (RuntimeError("first\nsecond"), r"\(RuntimeError: first second\)"),
        (ConnectionResetError("broke off"), r"\(ConnectionResetError: broke off\)"),
        (EOFError(), r"\(EOFError\)"),
        (AssertionError("long " * 1000), r"\(AssertionError: long .*\.\.\.\)"),
    ],
)
def test_whatever_torchvision_raises_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, message: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(datasets, "CIFAR10", broken)
    with pytest.raises(InputError, match=message) as caught:
        cifar10.PLUGIN(root=str(tmp_path))()
    assert caught.value.__cause__ is failure


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="MNIST could not be downloaded"):
        mnist.PLUGIN(root=str(tmp_path / "file"))()


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_sets, "SILENCE_LIMIT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts and never answers
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        started = time.monotonic()
        with pytest.raises(InputError, match="timed out"):
            fashion_mnist.PLUGIN(root=str(tmp_path))()
    assert time.monotonic() - started < 5
    assert socket.getdefaulttimeout() is None, "the process-wide setting is put back"


def test_files_are_fetched_only_when_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Fake:
        classes = ("up", "down")

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            calls.append((train, download))
            if download:
                (root / "fetched").touch()
            if not (root / "fetched").exists():
                raise RuntimeError("Dataset not found")
            self.data = np.full((4, 8, 8, 3), int(train), np.uint8)
            self.targets = [0, 1, 0, 1]

    monkeypatch.setattr(datasets, "CIFAR10", Fake)
    plugin = cifar10.PLUGIN(root=str(tmp_path / "new" / "root"))
    data = plugin()
    assert calls == [(True, False), (True, True), (False, True)]
    assert int(data.x_train.min()) == 1 and int(data.x_test.max()) == 0 and data.classes == ("up", "down")
    calls.clear()
    assert plugin().digest == data.digest and calls == [(True, False), (False, False)]


def test_of_those_that_start_together_one_fetches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = []

    class Slow:
        classes = ("up", "down")

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            if download and not (root / "fetched").exists():
                fetches.append(train)
                time.sleep(0.2)
                (root / "fetched").touch()
            if not (root / "fetched").exists():
                raise RuntimeError("Dataset not found")
            self.data = np.zeros((4, 8, 8, 3), np.uint8)
            self.targets = [0, 1, 0, 1]

    monkeypatch.setattr(datasets, "CIFAR10", Slow)
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(cifar10.PLUGIN(root=str(tmp_path))) for _ in range(4)]
    assert len({job.result().digest for job in made}) == 1
    assert fetches == [True]


def test_fields_are_alike() -> None:
    for module in MODULES.values():
        defaults = {field.name: field.default for field in fields(module.PLUGIN)}
        assert defaults == {"root": "data", "download": True, "train_limit": None, "test_limit": None, "seed": 0}


def test_listing_the_sets_does_not_import_torchvision() -> None:
    names = ", ".join(module.__name__ for module in MODULES.values())
    check = f"import sys, {names}; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])
