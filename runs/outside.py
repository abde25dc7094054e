"""Networks from outside of a run: any module by ``module:function``, with or without a file of weights, or a .pt2."""

from __future__ import annotations

import importlib
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from nas import plugins
from nas.data.image_data import ImageData
from nas.errors import InputError
from runs.construct import construct

SIZE_NAMES = re.compile(
    r"(s|u|zf|zuf)\d+|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|IntTrueDiv|FloatTrueDiv|ModularIndexing|Where|"
    r"Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Pow|PowByNatural|Integer|floor|ceiling|ToFloat|TruncToInt|RoundToInt|oo|int_oo|True|False"
)
"""What the sizes of an exported program may be made of: symbols and functions of numbers."""

SYMBOL = re.compile(r"Symbol\('\w+'(, \w+=(True|False))*\)")


def is_outside(name: str) -> bool:
    """Whether ``name`` means a network from outside and no run directory."""
    return not Path(name).is_dir() and (name.endswith(".pt2") or ":" in name)


def network_from(name: str, weights: Path | None, device: torch.device) -> nn.Module:
    """The network ``name`` in eval mode on ``device``.

    name: "package.module:function", called without arguments (the present folder is searched first; calling it runs
    its code), or a .pt2 file of torch.export. weights: a state dict as .safetensors, or as a file of torch.save, of
    which only tensors are read.
    """
    model = _exported(Path(name)) if name.endswith(".pt2") else _called(name)
    if weights is not None:
        _load(model, weights)
    return model.eval().to(device) if not isinstance(model, _Exported) else model.to(device)


def source_from(text: str, **more: Any) -> dict[str, Any]:
    """The [data] table of a data set: a plug-in's name, a file (.npz), or "name:path", e.g. "folder:./images"."""
    name, _, path = text.partition(":")
    if text.endswith(".npz") and not path:
        name, path = "arrays", text
    return {"name": name, **({"path": path} if path else {}), **more}


def data_from(table: Mapping[str, Any]) -> ImageData:
    """The data set that a table of ``source_from`` names."""
    entries = dict(table)
    data: ImageData = construct(plugins.load("data", entries.pop("name")), entries, "--data")()
    return data


class _Exported(nn.Module):
    """An exported program: a fixed graph, already in eval mode."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)

    def train(self, mode: bool = True) -> _Exported:
        # torch.export refuses to change the mode of its modules: theirs is that of the export.
        self.training = mode
        return self


def _exported(path: Path) -> nn.Module:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        _check_expressions(path)
        with _nothing_unpickled():
            return _Exported(torch.export.load(path).module())
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} is no program of torch.export: {_line(error)}") from None


def _check_expressions(path: Path) -> None:
    """Raise ``InputError`` for sizes that are more than arithmetic: torch lets sympy evaluate their text."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".json"):
                for text in _expressions(json.loads(archive.read(name))):
                    text = SYMBOL.sub("s0", text)
                    names = re.findall(r"[A-Za-z_]\w*", text)
                    if not re.fullmatch(r"[\w\s+*/(),.<>=!&|~-]*", text) or not all(map(SIZE_NAMES.fullmatch, names)):
                        raise InputError(f"{path} holds a size that is no arithmetic: {text[:80]!r}")


def _expressions(tree: Any) -> Iterator[str]:
    """Every text that stands under "expr_str" in a JSON tree."""
    waiting = [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if isinstance(item.get("expr_str"), str):
                yield item["expr_str"]
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


@contextmanager
def _nothing_unpickled() -> Iterator[None]:
    """Within it, torch reads tensors only, and nothing runs what a pickle asks for."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise InputError("the file holds pickled objects, which are never loaded: export the model again without them")

    def tensors_only(*arguments: Any, **options: Any) -> Any:
        return load(*arguments, **{**options, "weights_only": True})

    load = torch.load
    with mock.patch.object(torch, "load", tensors_only), mock.patch.object(pickle, "loads", refuse):
        yield


def _called(name: str) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"cannot import '{module_name}' of '{name}': {_line(error)}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"'{module_name}' has no function '{function_name}'")
    try:
        model = function()
    except Exception as error:
        raise InputError(f"{name}() failed: {type(error).__name__}: {_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name}() returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _load(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        model.load_state_dict(state)
    except Exception as error:
        raise InputError(f"the weights in {path} do not fit the network: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
