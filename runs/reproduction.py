"""The command that does a run again: what was typed is not kept, the recipe with all its overrides is."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from nas.errors import InputError
from runs.directory import RunDirectory
from runs.recipe import read_table, shipped
from search_spaces.catalogue import load_genotype, published
from search_spaces.genotype import genotype_from_data

OWN_RECIPE = "recipe.toml"
OWN_GENOTYPE = "genotype.json"
"""What files are called that the report tells the reader to save."""


def command_of(run: RunDirectory) -> str:
    """The command that does ``run`` again in another folder: a shipped recipe with what was overridden, or a file."""
    name = str(run.table.get("name"))
    arguments = ["nas", *run.command.split()]
    overrides = _overrides(name, run.table)
    arguments += [OWN_RECIPE] if overrides is None else [name, *overrides]
    if run.genotype is not None and "compare" not in run.table:  # whose recipe names it
        given = genotype_from_data(run.genotype)
        known = [one for one in published() if load_genotype(one) == given]
        arguments += ["--genotype", known[0] if known else OWN_GENOTYPE]
    return shlex.join(arguments)


def recipe_text(table: Mapping[str, Any]) -> str:
    """The tables of a recipe as TOML."""
    plain = [f"{_key(key)} = {_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    tables = [
        "\n".join([f"\n[{_key(name)}]", *(f"{_key(key)} = {_value(value)}" for key, value in part.items())])
        for name, part in table.items()
        if isinstance(part, Mapping)
    ]
    return "\n".join([*plain, *tables]) + "\n"


def _overrides(name: str, table: Mapping[str, Any]) -> list[str] | None:
    """``--set`` arguments that make ``table`` of the shipped recipe ``name``; None where that cannot be."""
    if name not in shipped():
        return None
    changes = [f"{key}={_value(value)}" for key, value in _changes(read_table(name), table, "")]
    try:
        if read_table(name, changes) != table:
            return None
    except InputError:
        return None
    return [part for change in changes for part in ("--set", change)]


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys with the values that differ; a table that lost a key counts as a whole."""
    for key, value in after.items():
        old = before.get(key)
        if old == value:
            continue
        if isinstance(old, Mapping) and isinstance(value, Mapping) and old.keys() <= value.keys():
            yield from _changes(old, value, f"{prefix}{key}.")
        elif isinstance(old, list) and isinstance(value, list) and len(old) == len(value):
            numbered = [{str(place): item for place, item in enumerate(items)} for items in (old, value)]
            yield from _changes(numbered[0], numbered[1], f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(value: Any) -> str:
    """A value of a recipe as TOML on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    # JSON's texts, numbers and truth values are TOML's.
    return json.dumps(value) if isinstance(value, bool | int | float | str) else json.dumps(str(value))


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)
