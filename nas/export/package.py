"""The exports of a trained network as files of one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import nn

from nas.errors import InputError, nearest
from nas.export.graph_files import write_dot, write_graphml, write_svg
from nas.export.loaders import write_robustbench, write_timm
from nas.export.onnx_file import check_onnx_can_be_written, write_onnx
from nas.export.program_file import write_program
from nas.export.source import deployed_state, network_source
from nas.model_file import ModelSpec, save_model
from nas.tensor_file import write_bytes, write_text


@dataclass(frozen=True)
class ExportedFile:
    """A file of an export, and the format it belongs to.

    difference, adversarial: largest difference of its logits from the model's after reloading it, on images as they are
    and on adversarial ones. gradient: difference of its loss's gradients by adversarial images from the model's, as a
    share of these. moved: share of the pixels in which adversarial images made from its own gradients differ from the
    model's. None where that was not checked, or where the format holds no weights or has no gradients.
    """

    file: str
    format: str
    difference: float | None = None
    adversarial: float | None = None
    gradient: float | None = None
    moved: float | None = None


@dataclass(frozen=True)
class Format:
    """One way to export a network: the files it consists of, what opens them first, and how it is written.

    weights: which of the files hold weights;  meaningful: whether the others say something without these.
    """

    files: tuple[str, ...]
    write: Callable[[ModelSpec, nn.Module, Path], None]
    weights: tuple[str, ...] = ()
    meaningful: bool = True


def export_model(spec: ModelSpec, model: nn.Module, folder: Path, formats: Sequence[str]) -> list[ExportedFile]:
    """Write ``model`` to ``folder`` in each of ``formats``; every file appears whole or not at all.

    Raises ``InputError`` for an unknown format, or one that cannot hold the network, before anything is written.
    """
    formats = [name for name in formats if name != CARD_FORMAT]
    check_formats(formats)
    if {"robustbench", "timm"} & set(formats) and "py" not in formats:
        formats = ["py", *formats]  # which these load
    if "py" in formats:
        network_source(spec)  # refuses networks that it has no words for
    if "onnx" in formats:
        check_onnx_can_be_written()
    folder.mkdir(parents=True, exist_ok=True)
    # Those that may still refuse the network come first: what a refusal leaves behind would never be compared.
    for name in sorted(dict.fromkeys(formats), key=lambda name: name not in ("pt2", "onnx")):
        FORMATS[name].write(spec, model, folder)
    return [ExportedFile(file, name) for name in dict.fromkeys(formats) for file in FORMATS[name].files]


def check_formats(formats: Sequence[str], *, trained: bool = True) -> None:
    """Raise ``InputError`` for a format that is not known, or that is nothing without the weights of a training."""
    for name in formats or ("",):
        if name == CARD_FORMAT:
            if not trained:
                raise InputError(
                    "'card' says how a network was trained and what it withstood, which an architecture by itself has "
                    "not been and has not: train it (nas train)"
                )
            continue
        if name not in FORMATS:
            raise InputError(f"unknown export format '{name[:60]}': {nearest(name, [*FORMATS, CARD_FORMAT])}")
        if not trained and not FORMATS[name].meaningful:
            known = ", ".join(name for name, entry in FORMATS.items() if entry.meaningful)
            raise InputError(
                f"'{name}' holds the weights of a training, which an architecture by itself has none of: train it (nas "
                f"train), or export {known}"
            )


def _write_genotype(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    del model
    write_text(json.dumps(spec.genotype.to_data(), indent=1) + "\n", folder / "genotype.json")


def _write_source(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    source, state = network_source(spec), deployed_state(spec, model)
    write_bytes(save(state), folder / "network.safetensors")
    write_text(source, folder / "network.py")


FORMATS: dict[str, Format] = {
    "json": Format(("genotype.json",), _write_genotype),
    "safetensors": Format(
        ("model.json", "model.safetensors"), save_model, weights=("model.safetensors",), meaningful=False
    ),
    "py": Format(("network.py", "network.safetensors"), _write_source, weights=("network.safetensors",)),
    "onnx": Format(("network.onnx",), write_onnx, weights=("network.onnx",), meaningful=False),
    "pt2": Format(("network.pt2",), write_program, weights=("network.pt2",), meaningful=False),
    "robustbench": Format(("robustbench_model.py",), write_robustbench, meaningful=False),
    "timm": Format(("timm_model.py",), write_timm),
    "graphml": Format(("architecture.graphml",), write_graphml),
    "dot": Format(("architecture.dot",), write_dot),
    "svg": Format(("architecture.svg",), write_svg),
}
"""All export formats by name. The check of each is a function of reload.py."""

CARD_FORMAT = "card"
"""The format of the model card, which says more than a network alone knows: whoever has the run writes it (card.py)."""
