"""Reload the exports of a folder and run them: the program that parity.py starts in a fresh, isolated process.

Arguments: the folder of the exports, a scratch folder, the folder of this project's packages, the formats.
Reads images.safetensors in the scratch folder, clean and adversarial; writes answers.safetensors (logits of both, and
gradients where the format has them, by format) and report.json (by format: other values read from the export, or the
error). It is run by its path and imports nothing of the project at the top, because an exported source file must work
without it.
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

Network = Callable[[Tensor], Tensor]
Reloaded = tuple[Any, Network | None]
"""Plain values that must be those of the specification, and what gives logits if the format has weights."""


def reload_py(folder: Path, inputs: Tensor) -> Reloaded:
    """network.py with network.safetensors: its classes and network. Nothing of the project may be imported yet."""
    module = _module(folder / "network.py")
    network = module.load(folder / "network.safetensors")
    network(inputs)
    imported = {"nas", "search_spaces", "runs"} & {name.partition(".")[0] for name in sys.modules}
    if imported:
        raise RuntimeError(f"it imports {', '.join(sorted(imported))}, but must stand alone")
    return list(module.CLASSES), network


def reload_robustbench(folder: Path, inputs: Tensor) -> Reloaded:
    """robustbench_model.py: its network."""
    del inputs
    return None, _module(folder / "robustbench_model.py").load_model()


def reload_timm(folder: Path, inputs: Tensor) -> Reloaded:
    """timm_model.py: the name under which it registers, and its network, through timm where that is installed."""
    del inputs
    module = _module(folder / "timm_model.py")
    name = module.CONFIG["architecture"]
    if importlib.util.find_spec("timm") is None:
        return name, getattr(module, name)(pretrained=True)
    import timm

    return name, timm.create_model(name, pretrained=True).eval()


def _module(path: Path) -> Any:
    """A Python file, executed."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # as an import does; timm looks there
    spec.loader.exec_module(module)
    return module


def reload_json(folder: Path, inputs: Tensor) -> Reloaded:
    """genotype.json, read by the package."""
    del inputs
    from search_spaces.genotype import read_genotype

    return read_genotype(folder / "genotype.json").to_data(), None


def reload_safetensors(folder: Path, inputs: Tensor) -> Reloaded:
    """model.json with model.safetensors, read by the package: the specification and the network."""
    del inputs
    from nas import plugins
    from nas.model_file import load_model

    plugins.use_named()
    spec, model = load_model(folder)
    return spec.to_data(), model


def reload_onnx(folder: Path, inputs: Tensor) -> Reloaded:
    """network.onnx by ONNX Runtime: its classes and network, which takes any number of images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "network.onnx", providers=["CPUExecutionProvider"])
    (name,) = [entry.name for entry in session.get_inputs()]

    def network(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.detach().numpy()})[0])

    _check_takes_any_number(network, inputs)
    return json.loads(session.get_modelmeta().custom_metadata_map["classes"]), network


def reload_pt2(folder: Path, inputs: Tensor) -> Reloaded:
    """network.pt2 by torch alone: its classes and network, which takes any number of images."""
    extra = {"classes.json": ""}
    network = torch.export.load(folder / "network.pt2", extra_files=extra).module()
    _check_takes_any_number(network, inputs)
    return json.loads(extra["classes.json"]), network


def _check_takes_any_number(network: Network, inputs: Tensor) -> None:
    together = network(inputs)
    alone = torch.cat([network(image[None]) for image in inputs[:2]])
    if (alone - together[:2]).abs().max() > 1e-4 * max(1.0, float(together.abs().max())):
        raise RuntimeError("an image has other logits alone than among others")


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
    "robustbench": reload_robustbench,
    "timm": reload_timm,
    "graphml": reload_graphml,
    "dot": reload_dot,
    "svg": reload_svg,
}
"""Formats that must work where this project is not installed. They are reloaded first."""

WITH_PACKAGE: dict[str, Callable[[Path, Tensor], Reloaded]] = {
    "json": reload_json,
    "safetensors": reload_safetensors,
}


DIFFERENTIABLE = ("py", "pt2", "robustbench", "timm", "safetensors")
"""Formats through which gradients flow: attacks are carried out on them."""


RADIUS = 8 / 255
"""Of the step by which adversarial images are made again from a format's own gradients."""


def answers(network: Network, images: dict[str, Tensor]) -> dict[str, Tensor]:
    """The logits of ``network`` for clean and adversarial images, and what attacks would see where it has gradients.

    The loss is cross-entropy against what the network says of the clean images. "gradient": that of the adversarial
    images. "gradient_clean": that of the clean ones, where an attack starts; "remade": adversarial images made from it
    by one step of ``RADIUS`` along its signs.
    """
    with torch.no_grad():
        clean = network(images["clean"])
    labels = clean.argmax(1)
    found = {"clean": clean}
    for name, key in (("adversarial", "gradient"), ("clean", "gradient_clean")):
        x = images[name].clone().requires_grad_()
        logits = network(x)
        found.setdefault(name, logits.detach())
        if logits.requires_grad:
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x, allow_unused=True)
            if gradient is not None:
                found[key] = gradient
    if "gradient_clean" in found:
        found["remade"] = (images["clean"] + RADIUS * found["gradient_clean"].sign()).clamp(0, 1)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def main(folder: str, scratch: str, packages: str, *formats: str) -> None:
    """Reload ``formats`` from ``folder``."""
    from safetensors.torch import load_file, save_file

    images = load_file(Path(scratch, "images.safetensors"))
    report: dict[str, Any] = {}
    found: dict[str, Tensor] = {}
    for functions in (ALONE, WITH_PACKAGE):
        for name in functions.keys() & set(formats):
            try:
                with torch.no_grad():
                    plain, network = functions[name](Path(folder), images["clean"])
                given = {} if network is None else answers(network, images)
            except Exception as error:  # whatever an export does wrong belongs in the report, under its name
                report[name] = {"error": f"{type(error).__name__}: {error}"}
                continue
            report[name] = {"plain": plain}
            found |= {f"{name}.{part}": tensor for part, tensor in given.items()}
        sys.path.insert(0, packages)
    save_file(found, Path(scratch, "answers.safetensors"))
    Path(scratch, "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
