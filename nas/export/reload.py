"""Reload the exports of a folder and run them: the program that parity.py starts in a fresh, isolated process.

Arguments: the folder of the exports, a scratch folder, the folder of this project's packages, the formats.
Reads inputs.safetensors in the scratch folder; writes logits.safetensors (by format) and report.json (by
format: other values read from the export, or the error). It is run by its path and imports nothing of the
project at the top, because an exported source file must work without it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

Reloaded = tuple[Any, Tensor | None]
"""Plain values that must be those of the specification, and the logits if the format has weights."""


def reload_py(folder: Path, inputs: Tensor) -> Reloaded:
    """network.py with network.safetensors: its classes and logits. Nothing of the project may be imported yet."""
    spec = importlib.util.spec_from_file_location("network", folder / "network.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logits = module.load(folder / "network.safetensors")(inputs)
    imported = {"nas", "search_spaces", "runs"} & {name.partition(".")[0] for name in sys.modules}
    if imported:
        raise RuntimeError(f"it imports {', '.join(sorted(imported))}, but must stand alone")
    return list(module.CLASSES), logits


def reload_json(folder: Path, inputs: Tensor) -> Reloaded:
    """genotype.json, read by the package."""
    del inputs
    from search_spaces.genotype import read_genotype

    return read_genotype(folder / "genotype.json").to_data(), None


def reload_safetensors(folder: Path, inputs: Tensor) -> Reloaded:
    """model.json with model.safetensors, read by the package: the specification and logits."""
    from nas.model_file import load_model

    spec, model = load_model(folder)
    return spec.to_data(), model(inputs)


def reload_onnx(folder: Path, inputs: Tensor) -> Reloaded:
    """network.onnx by ONNX Runtime: its classes and logits, one image at a time and all together."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "network.onnx", providers=["CPUExecutionProvider"])
    (name,) = [entry.name for entry in session.get_inputs()]
    together = torch.from_numpy(session.run(None, {name: inputs.numpy()})[0])
    alone = torch.cat([torch.from_numpy(session.run(None, {name: image[None].numpy()})[0]) for image in inputs[:2]])
    if (alone - together[:2]).abs().max() > 1e-4 * max(1.0, float(together.abs().max())):
        raise RuntimeError("an image has other logits alone than among others")
    return json.loads(session.get_modelmeta().custom_metadata_map["classes"]), together


def reload_pt2(folder: Path, inputs: Tensor) -> Reloaded:
    """network.pt2 by torch alone: its classes and logits, one image at a time and all together."""
    extra = {"classes.json": ""}
    network = torch.export.load(folder / "network.pt2", extra_files=extra).module()
    together = network(inputs)
    alone = torch.cat([network(image[None]) for image in inputs[:2]])
    if (alone - together[:2]).abs().max() > 1e-4 * max(1.0, float(together.abs().max())):
        raise RuntimeError("an image has other logits alone than among others")
    return json.loads(extra["classes.json"]), together


def reload_graphml(folder: Path, inputs: Tensor) -> Reloaded:
    """architecture.graphml by networkx: its edges."""
    del inputs
    import networkx as nx

    edges = nx.read_graphml(folder / "architecture.graphml", force_multigraph=True).edges(data="operation")
    return sorted([source, target, name] for source, target, name in edges), None


def reload_dot(folder: Path, inputs: Tensor) -> Reloaded:
    """architecture.dot: its edges."""
    del inputs
    text = r'"((?:[^"\\]|\\.)*)"'
    lines = re.findall(rf"^  {text} -> {text} \[label={text}\];$", _text(folder / "architecture.dot"), re.MULTILINE)
    return sorted([re.sub(r"\\(.)", r"\1", part) for part in edge] for edge in lines), None


def reload_svg(folder: Path, inputs: Tensor) -> Reloaded:
    """architecture.svg: the titles of all it shows."""
    del inputs
    return titles_of(_text(folder / "architecture.svg")), None


def titles_of(svg: str) -> list[str]:
    """What the title elements of a picture say, in their order. Raises where it is not XML."""
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}title")]


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8")


ALONE: dict[str, Callable[[Path, Tensor], Reloaded]] = {
    "py": reload_py,
    "onnx": reload_onnx,
    "pt2": reload_pt2,
    "graphml": reload_graphml,
    "dot": reload_dot,
    "svg": reload_svg,
}
"""Formats that must work where this project is not installed. They are reloaded first."""

WITH_PACKAGE: dict[str, Callable[[Path, Tensor], Reloaded]] = {
    "json": reload_json,
    "safetensors": reload_safetensors,
}


def main(folder: str, scratch: str, packages: str, *formats: str) -> None:
    """Reload ``formats`` from ``folder``."""
    from safetensors.torch import load_file, save_file

    inputs = load_file(Path(scratch, "inputs.safetensors"))["inputs"]
    report: dict[str, Any] = {}
    logits: dict[str, Tensor] = {}
    for functions in (ALONE, WITH_PACKAGE):
        for name in functions.keys() & set(formats):
            try:
                with torch.no_grad():
                    plain, output = functions[name](Path(folder), inputs)
            except Exception as error:  # whatever an export does wrong belongs in the report, under its name
                report[name] = {"error": f"{type(error).__name__}: {error}"}
                continue
            report[name] = {"plain": plain}
            if output is not None:
                logits[name] = output.contiguous()
        sys.path.insert(0, packages)
    save_file(logits, Path(scratch, "logits.safetensors"))
    Path(scratch, "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
