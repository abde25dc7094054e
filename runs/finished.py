"""A finished run opened again: its context, its networks, names for what is added to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nas.errors import InputError, nearest
from runs.context import Context, use_machine
from runs.directory import open_run
from runs.judging import Tick
from runs.recipe import build, override_key


@contextmanager
def opened(path: Path, overrides: list[str] | None = None, tick: Tick = lambda progress: None) -> Iterator[Context]:
    """A run to work on beside its own tasks, locked; overrides: section.key=value, of its recipe."""
    run = open_run(path)
    table = json.loads(json.dumps(run.table))
    for override in overrides or []:
        override_key(table, override)
    recipe = build(table)
    use_machine(recipe.general)
    with run.locked():
        yield Context(run, recipe, tick)


def network_folder(default: Path, run: Path, model: str) -> Path:
    """Where a network lies: a task's folder or one that ``nas compress`` made."""
    for folder in (default, run / model):
        if (folder / "model.json").is_file():
            return folder
    raise InputError(f"{run} has no trained network '{model}': {nearest(model, networks_of(run))}")


def networks_of(run: Path) -> list[str]:
    """Names of the networks of a run."""
    folders = [path.parent for path in run.rglob("model.json")]
    # Within the folder of a compression lie the networks between its steps.
    whole = [folder for folder in folders if not any(parent in folders for parent in folder.parents)]
    return sorted({"compressed" if folder.name == "compress" else folder.name for folder in whole} - {"export"})


def label_of(name: str, settings: list[str] | None, number: int | None, model: str) -> str:
    """A folder name that tells settings apart."""
    parts = [name, model, *(settings or []), *([str(number)] if number is not None else [])]
    text = "-".join(parts)
    label = "".join(c if c.isalnum() or c in ".-_" else "_" for c in text)
    # Cut or changed names need something that still tells them apart.
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return label if len(label) <= 100 else f"{label[:91]}-{digest}"
