"""Trees of tensors and plain values in one safetensors file: checkpoints that are written whole or not at all.

Nothing is pickled: tensors go to the safetensors body, everything else to JSON in its header.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nas import ranks
from nas.errors import InputError, check_schema

Tree = dict[str, Any]
"""Nested dictionaries with string keys; leaves are tensors or JSON values."""


SCHEMA = 1
"""Version of the form of these files; what a tree holds is the affair of those who write it."""


def write_tree(tree: Tree, path: Path) -> None:
    """Write ``tree`` so that ``path`` holds either the old or the new content, whatever happens meanwhile."""
    tensors: dict[str, Tensor] = {}
    plain = _separate(tree, "", tensors)
    # One entry: safetensors writes several in an order of chance.
    write_bytes(save(tensors, metadata={"tree": json.dumps({"schema": SCHEMA, **plain})}), path)


def read_tree(path: Path, device: torch.device | str = "cpu") -> Tree:
    """The tree in ``path``, tensors on ``device``. Raises ``InputError`` for a damaged or foreign file."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if "tree" not in metadata:
                raise InputError(f"{path} was not written by this program (no tree in its header)")
            tree = json.loads(metadata["tree"])
            if not isinstance(tree, dict) or "tree" not in tree:
                raise InputError(f"{path} is damaged: its header holds no tree")
            check_schema(tree.pop("schema", SCHEMA), SCHEMA, path)  # absent from the first ones
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged or not a safetensors file ({_first_line(error)})") from None
    try:
        return _joined(tree, tensors)
    except (KeyError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{path} is damaged: its header and its tensors do not belong together") from None


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises ``InputError`` for a damaged or foreign file."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({_first_line(error)})") from None


def write_bytes(content: bytes, path: Path) -> None:
    """Replace ``path`` by ``content`` in one step that survives a crash at any moment.

    Raises ``OSError``, which names the file, where that cannot be done; the old file stays. All processes of a
    data-parallel run call it, and the first one writes.
    """
    ranks.first(lambda: _write(content, path))


def _write(content: bytes, path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # a full disk names none
        with suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(text: str, path: Path) -> None:
    """``write_bytes`` for text."""
    write_bytes(text.encode("utf-8"), path)


def _separate(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # safetensors refuses tensors that share memory or are not contiguous.
        # Numbered: keys may contain slashes, so that paths alone are not unique.
        name = f"{len(tensors)}{name}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"tree": {key: _separate(item, f"{name}/{key}", tensors) for key, item in value.items()}}
    return {"value": value}


def _joined(node: Any, tensors: dict[str, Tensor]) -> Any:
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "tree" in node:
        return {key: _joined(item, tensors) for key, item in node["tree"].items()}
    return node["value"]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
