"""Plug-ins: a module of a plug-in folder is named after what it adds and holds it under PLUGIN."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from nas.errors import InputError, nearest

FOLDERS = {
    "attacks": "attack",
    "training": "training method",
    "compression": "compression method",
    "activations": "activation",
    "data": "data set",
}
"""Folders of ``nas`` that hold plug-ins, and what one of theirs is called."""


@cache
def available(folder: str) -> dict[str, Any]:
    """All plug-ins of a folder by name. A module without PLUGIN is not one."""
    package = importlib.import_module(f"nas.{folder}")
    found = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"nas.{folder}.{module_info.name}")
        if hasattr(module, "PLUGIN"):
            found[module_info.name] = module.PLUGIN
    return found


def load(folder: str, name: str) -> Any:
    """The plug-in ``name``. Raises ``InputError`` that suggests the nearest name."""
    plugins = available(folder)
    if name not in plugins:
        raise InputError(f"unknown {FOLDERS[folder]} '{name}': {nearest(name, plugins)}")
    return plugins[name]


def summary(plugin: Any) -> str:
    """The first line of a plug-in's docstring."""
    return (plugin.__doc__ or "").strip().splitlines()[0]
