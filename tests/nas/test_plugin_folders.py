"""Plug-ins: whatever lies in a folder is found under its file name and follows the house rules."""

import dataclasses
from pathlib import Path

import pytest

import nas
from nas import plugins
from nas.errors import InputError, nearest

FOLDERS = list(plugins.FOLDERS)


def _files(folder):
    package = Path(nas.__file__).parent / folder
    return {path.stem for path in package.glob("*.py") if "\nPLUGIN = " in path.read_text()}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_file_with_a_plugin_is_available_under_its_name(folder):
    found = plugins.available(folder)
    assert set(found) == _files(folder)
    assert found
    for name, plugin in found.items():
        assert plugins.load(folder, name) is plugin
        assert plugin.__module__ == f"nas.{folder}.{name}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_plugins_are_frozen_values_with_a_summary(folder):
    for name, plugin in plugins.available(folder).items():
        assert dataclasses.is_dataclass(plugin), name
        assert plugin.__dataclass_params__.frozen, name
        assert 10 < len(plugins.summary(plugin)) < 160, name


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="pgd"):
        plugins.load("attacks", "pdg")
    with pytest.raises(InputError, match="training method"):
        plugins.load("training", "no such thing at all")


def test_nearest_names_all_where_none_is_near():
    assert nearest("trads", ["trades", "standard"]) == "did you mean 'trades'?"
    assert "trades" in nearest("zzz", ["trades", "standard"])
    assert "standard" in nearest("zzz", ["trades", "standard"])
    assert nearest("x", []) == "none is known"
