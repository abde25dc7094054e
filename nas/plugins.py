"""Plug-ins: a module of a plug-in folder is named after what it adds and holds it under PLUGIN, a space under SPACE."""

from __future__ import annotations

import hashlib
import importlib
import os
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

from nas.errors import InputError, nearest
from search_spaces import catalogue

FOLDERS = {
    "attacks": "attack",
    "training": "training method",
    "compression": "compression method",
    "activations": "activation",
    "data": "data set",
}
"""Folders of ``nas`` that hold plug-ins, and what one of theirs is called."""

KINDS = (*FOLDERS, "search_spaces")
"""Folders that a folder of plug-ins may have."""

VARIABLE = "NAS_PLUGINS"
"""The environment variable that names folders of plug-ins outside of this program, to every process of a run."""


def use(*folders: Path | str) -> None:
    """Add the plug-ins of ``folders``, which look as ``nas`` does: training/mine.py, search_spaces/mine.py, ...

    Their modules are imported, which runs their code: a folder is named by the user, never by a recipe or a run.
    Processes that are started later know them, too. Raises ``InputError`` for what cannot be used.
    """
    wanted = [str(Path(folder).resolve()) for folder in folders]
    known = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys([*known, *wanted]))
    use_named()


def use_named() -> None:
    """Add the plug-ins that the environment names: what a process does first. Raises ``InputError``."""
    for folder in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        _add(Path(folder))


def own() -> dict[str, str]:
    """The files of plug-ins from outside of this program, "training/mine", what they share included; their digests."""
    found = {}
    for folder in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        for path in sorted(path for kind in KINDS for path in (Path(folder) / kind).glob("*.py")):
            found[f"{path.parent.name}/{path.stem}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def _add(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"there is no folder of plug-ins {folder}")
    if not (files := _files(folder)):
        raise InputError(f"{folder} holds no plug-ins: they lie in its folders {', '.join(KINDS)}")
    for path in files:
        kind = path.parent.name
        package = importlib.import_module(kind if kind == "search_spaces" else f"nas.{kind}")
        if str(path.parent) not in package.__path__:
            package.__path__.append(str(path.parent))
            importlib.invalidate_caches()
        try:
            module = importlib.import_module(f"{package.__name__}.{path.stem}")
        except Exception as error:
            line = " ".join(str(error).split())[:200]
            raise InputError(f"plug-in {path} cannot be used: {type(error).__name__}: {line}") from error
        if module.__file__ is None or not path.samefile(module.__file__):
            raise InputError(f"plug-in {path}: '{path.stem}' is taken by {module.__file__}; choose another name")
        held = "SPACE" if kind == "search_spaces" else "PLUGIN"
        if not hasattr(module, held):
            raise InputError(f"plug-in {path} has no {held}: end it with {held} = ..., or let its name begin with '_'")
    available.cache_clear()
    catalogue.spaces.cache_clear()


def _files(folder: Path) -> list[Path]:
    """The modules in a folder of plug-ins. Those whose name begins with "_" are what others share."""
    return [path for kind in KINDS for path in sorted((folder / kind).glob("*.py")) if not path.name.startswith("_")]


@cache
def available(folder: str) -> dict[str, Any]:
    """All plug-ins of a folder by name. A module without PLUGIN is not one, nor one whose name begins with "_"."""
    package = importlib.import_module(f"nas.{folder}")
    found = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        if module_info.name.startswith("_"):
            continue
        module = importlib.import_module(f"nas.{folder}.{module_info.name}")
        if hasattr(module, "PLUGIN"):
            found[module_info.name] = module.PLUGIN
    return found


def load(folder: str, name: str) -> Any:
    """The plug-in ``name``. Raises ``InputError`` that suggests the nearest name."""
    plugins = available(folder)
    if name not in plugins:
        hint = nearest(name, plugins)
        own = "; name the folder of your own by nas --plugins FOLDER" if hint.startswith("known") else ""
        raise InputError(f"unknown {FOLDERS[folder]} '{name}': {hint}{own}")
    return plugins[name]


def summary(plugin: Any) -> str:
    """The first line of a plug-in's docstring."""
    return (plugin.__doc__ or "").strip().splitlines()[0]
