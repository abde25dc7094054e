"""Networks from outside: what can be evaluated, and files that must not get to do anything."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nas.errors import InputError
from runs.outside import data_from, is_outside, network_from, source_from

CPU = torch.device("cpu")

SOURCE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def wrong():
    return 3

def broken():
    raise RuntimeError("no such luck")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "outside_models.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "outside_models", raising=False)
    return tmp_path


def _network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_a_function_builds_the_network_and_weights_fill_it(folder: Path) -> None:
    x = torch.rand(2, 1, 8, 8)
    assert is_outside("outside_models:build") and not is_outside(str(folder))
    trained = _network()
    save_file(trained.state_dict(), folder / "w.safetensors")
    torch.save({"state_dict": trained.state_dict()}, folder / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        model = network_from("outside_models:build", folder / name, CPU)
        assert not model.training
        assert torch.equal(model(x), trained(x))
    assert not torch.equal(network_from("outside_models:build", None, CPU)(x), trained(x))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("outside_models:none", "no function 'none'"),
        ("outside_models:wrong", "returned a int"),
        ("outside_models:broken", "no such luck"),
        ("outside_nothing:build", "cannot import"),
        ("missing.pt2", "no file"),
    ],
)
def test_what_is_no_network_is_refused_in_one_line(folder: Path, name: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as refusal:
        network_from(name, None, CPU)
    assert "\n" not in str(refusal.value)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("exploded"),)


def test_pickled_weights_do_nothing(folder: Path) -> None:
    (folder / "bomb.pt").write_bytes(pickle.dumps(_Bomb()))
    torch.save({"weight": _Bomb()}, folder / "bomb2.pt")
    for name in ("bomb.pt", "bomb2.pt"):
        with pytest.raises(InputError, match="do not fit"):
            network_from("outside_models:build", folder / name, CPU)
    assert not (folder / "exploded").exists()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    batch = torch.export.Dim("batch", min=1, max=1024)
    exported = torch.export.export(_network().eval(), (torch.rand(4, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, path)
    return path


def test_an_exported_program_is_a_network_with_a_gradient(program: Path) -> None:
    model, x = network_from(str(program), None, CPU), torch.rand(3, 1, 8, 8, requires_grad=True)
    assert torch.allclose(model(x), _network()(x))
    model.train().eval()
    assert bool(torch.autograd.grad(model(x).sum(), x)[0].abs().sum() > 0)


def _rewritten(program: Path, target: Path, change: object) -> Path:
    """The archive with every member passed through ``change(name, content)``."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))  # type: ignore[operator]
    return target


def test_sizes_that_are_code_are_refused(program: Path, folder: Path) -> None:
    seen = []

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith(".json") or b"expr_str" not in content:
            return content
        tree = json.loads(content)

        def walk(item: object) -> None:
            if isinstance(item, dict):
                if "expr_str" in item:
                    item["expr_str"] = "open('exploded', 'w')"
                    seen.append(name)
                for value in item.values():
                    walk(value)
            elif isinstance(item, list):
                for value in item:
                    walk(value)

        walk(tree)
        return json.dumps(tree).encode()

    path = _rewritten(program, folder / "bad.pt2", change)
    assert seen
    with pytest.raises(InputError, match="no arithmetic"):
        network_from(str(path), None, CPU)
    assert not (folder / "exploded").exists()


def test_pickles_inside_of_a_program_are_not_run(program: Path, folder: Path) -> None:
    changed = []

    def change(name: str, content: bytes) -> bytes:
        if name.endswith((".pt", "weight_0")) or "sample_inputs" in name or "/constants/" in name:
            changed.append(name)
            if name.endswith(".json"):
                return content
            return pickle.dumps(_Bomb())
        if name.endswith("weights_config.json"):
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        return content

    path = _rewritten(program, folder / "bad.pt2", change)
    assert changed
    with pytest.raises(InputError):
        network_from(str(path), None, CPU)
    assert not (folder / "exploded").exists()
    # Not because the file is harmless:
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert (folder / "exploded").exists()


def test_data_by_name_and_by_file(tmp_path: Path) -> None:
    import numpy as np

    assert data_from(source_from("digits")).input_shape == (1, 8, 8)
    arrays = {"x": np.zeros((4, 8, 8), np.uint8), "y": np.arange(4) % 2}
    np.savez(tmp_path / "own.npz", x_train=arrays["x"], y_train=arrays["y"], x_test=arrays["x"], y_test=arrays["y"])
    assert len(data_from(source_from(str(tmp_path / "own.npz"))).x_test) == 4
    assert len(data_from(source_from(f"arrays:{tmp_path / 'own.npz'}")).x_test) == 4
    with pytest.raises(InputError, match="digits"):
        data_from(source_from("digit"))
