"""Plug-ins from outside: found beside the shipped ones once their folder is named, and never otherwise."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nas import plugins
from nas.errors import InputError
from search_spaces import catalogue

METHOD = '''
"""Standard training by another name."""
from nas.training.standard import Standard


class Mine(Standard):
    """Standard training by another name."""


PLUGIN = Mine
'''

SPACE = '''
"""Cells of two operations."""
from search_spaces.cell_space import CellSpace
from search_spaces.layout import Layout

SPACE = CellSpace("own_space", ("skip_connect", "sep_conv_3x3"), Layout(("normal", "normal"), (1, 2)))
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for plug-ins; whatever is added from it is gone after the test."""
    monkeypatch.setenv(plugins.VARIABLE, "")
    kinds = [f"nas.{kind}" for kind in plugins.FOLDERS] + ["search_spaces"]
    packages = [importlib.import_module(kind) for kind in kinds]
    before = [list(package.__path__) for package in packages]
    modules = set(sys.modules)
    yield tmp_path
    for package, path in zip(packages, before, strict=True):
        package.__path__[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            parent, _, child = name.rpartition(".")
            del sys.modules[name]
            vars(sys.modules[parent]).pop(child, None)
    plugins.available.cache_clear()
    catalogue.spaces.cache_clear()


def put(folder: Path, place: str, text: str) -> Path:
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_named_folder_adds_what_it_holds(own: Path) -> None:
    put(own, "training/own_method.py", METHOD)
    put(own, "training/_shared.py", "raise RuntimeError('imported by itself')")
    put(own, "search_spaces/own_space.py", SPACE)
    assert "own_method" not in plugins.available("training") and "own_space" not in catalogue.spaces()
    plugins.use(own)
    assert plugins.load("training", "own_method").__name__ == "Mine"
    assert plugins.load("training", "trades") and "_shared" not in plugins.available("training")
    assert catalogue.spaces()["own_space"].name == "own_space"
    assert os.environ[plugins.VARIABLE] == str(own)  # which processes that are started inherit
    assert sorted(plugins.own()) == ["search_spaces/own_space", "training/_shared", "training/own_method"]


def test_their_digest_says_when_they_change(own: Path) -> None:
    path = put(own, "training/own_method.py", METHOD)
    plugins.use(own)
    before = plugins.own()["training/own_method"]
    path.write_text(METHOD + "# changed\n")
    assert plugins.own()["training/own_method"] != before


@pytest.mark.parametrize(
    ("place", "text", "says"),
    [
        ("training/own_broken.py", "import nothing_of_this_name", "ModuleNotFoundError"),
        ("training/own_broken.py", "def f(:", "SyntaxError"),
        ("training/own_empty.py", "", "has no PLUGIN"),
        ("search_spaces/own_empty.py", "", "has no SPACE"),
        ("training/trades.py", METHOD, "choose another name"),
        ("elsewhere/own_method.py", METHOD, "holds no plug-ins"),
    ],
)
def test_what_cannot_be_used_is_named(own: Path, place: str, text: str, says: str) -> None:
    put(own, place, text)
    with pytest.raises(InputError, match=says) as error:
        plugins.use(own)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there_is_named(own: Path) -> None:
    with pytest.raises(InputError, match="no folder of plug-ins"):
        plugins.use(own / "typo")
