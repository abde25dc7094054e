"""Plain tables to dataclasses: every key checked, every value of the right type, defaults only in the dataclass."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nas.errors import InputError, nearest


def construct(cls: type, table: object, where: str, siblings: Sequence[str] = (), **given: Any) -> Any:
    """An instance of dataclass ``cls`` from ``table``, which stands at ``where`` in the recipe.

    given: fields that do not come from the recipe; siblings: keys of the same table that were taken out of it before,
    to be suggested where one is misspelt. Raises ``InputError`` naming the key, what is wrong and what
    would be right.
    """
    entries = mapping(table, where)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init and field.name not in given}
    check_keys(entries, fields, where, siblings)
    values = dict(given)
    for name, value in entries.items():
        values[name] = _value(hints[name], value, f"{where}.{name}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"{where}.{name} is missing: it has no default")
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def mapping(table: object, where: str) -> Mapping[str, Any]:
    """``table`` if it is one."""
    if not isinstance(table, Mapping):
        raise InputError(f"{where} must be a table, not {_kind(table)}")
    return table


def check_keys(
    entries: Mapping[str, Any], known: typing.Iterable[str], where: str, siblings: Sequence[str] = ()
) -> None:
    """Raise ``InputError`` for a key that is not known, naming the nearest one."""
    names = list(known)
    for key in entries:
        if key not in names:
            place = f"[{where}]" if where else "the recipe"
            hint = nearest(key, [*names, *siblings]) if names or siblings else "it takes none"
            raise InputError(f"unknown key '{key}' in {place}: {hint}")


def name_of(entries: dict[str, Any], where: str) -> str:
    """Takes the "name" of what a table describes out of its ``entries``."""
    if "name" not in entries:
        raise InputError(f"{where}.name is missing: it says which one to use")
    name = entries.pop("name")
    if not isinstance(name, str):
        raise InputError(f"{where}.name must be a text, not {name!r}")
    return name


def chosen(table: object, where: str, kinds: Mapping[str, type]) -> Any:
    """An instance of the one of ``kinds`` that a table names."""
    entries = dict(mapping(table, where))
    name = name_of(entries, where)
    if name not in kinds:
        raise InputError(f"unknown {where} '{name}': {nearest(name, kinds)}")
    return construct(kinds[name], entries, where, ("name",))


def plain(value: Any) -> Any:
    """Dataclasses as nested tables, for the record of a run."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        table = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **table}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return construct(hint, value, where)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and arguments and dataclasses.is_dataclass(arguments[0]):
        if not isinstance(value, list):
            raise InputError(f"{where} must be a list of tables, not {_kind(value)}")
        return tuple(_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    try:
        # Strict JSON rules: lists become tuples, integers pass as floats, and nothing else is converted.
        return TypeAdapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].replace("Input should be", "it should be")
        raise InputError(f"{where} = {_short(value)} is wrong: {reason} ({_type(hint)})") from None


def _type(hint: Any) -> str:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is not None:
        return str(hint).replace("typing.", "")
    return getattr(hint, "__name__", str(hint))


def _kind(value: object) -> str:
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a table"}
    return names.get(type(value), f"a {type(value).__name__}")


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
