"""What holds for every data set in the folder, found by listing it."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import MISSING, FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest

import nas.data

PLUGINS = {
    name: module.PLUGIN
    for _, name, _ in pkgutil.iter_modules(nas.data.__path__)
    if hasattr(module := importlib.import_module(f"nas.data.{name}"), "PLUGIN")
}


def test_the_promised_data_sets_are_there() -> None:
    published = {"cifar10", "cifar100", "fashion_mnist", "mnist", "stl10", "svhn"}
    assert set(PLUGINS) >= {"arrays", "digits", "folder"} | published


@pytest.mark.parametrize("name", PLUGINS)
def test_a_data_set_is_a_frozen_dataclass_with_one_line_about_it(name: str) -> None:
    plugin = PLUGINS[name]
    assert isinstance(plugin, type) and is_dataclass(plugin)
    make: Any = plugin
    frozen = make(**{field.name: "somewhere" for field in fields(plugin) if field.default is MISSING})
    with pytest.raises(FrozenInstanceError):
        frozen.path = "elsewhere"
    assert plugin.__name__.lower() == name.replace("_", "")
    line = (plugin.__doc__ or "").splitlines()[0]
    assert line.endswith(".") and 20 < len(line) <= 116
    module = importlib.import_module(f"nas.data.{name}")
    assert (module.__doc__ or "").splitlines()[0] == line
