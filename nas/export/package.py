"""The exports of a trained network as files of one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import nn

from nas.errors import InputError
from nas.export.onnx_file import check_onnx_can_be_written, write_onnx
from nas.export.source import deployed_state, network_source
from nas.model_file import ModelSpec, save_model
from nas.tensor_file import write_bytes, write_text


@dataclass(frozen=True)
class ExportedFile:
    """A file of an export, and the format it belongs to.

    difference: largest difference of its logits from the model's after reloading it; None where it was not
    checked or holds no weights.
    """

    file: str
    format: str
    difference: float | None = None


@dataclass(frozen=True)
class Format:
    """One way to export a network: the files it consists of, what opens them first, and how it is written."""

    files: tuple[str, ...]
    write: Callable[[ModelSpec, nn.Module, Path], None]


def export_model(spec: ModelSpec, model: nn.Module, folder: Path, formats: Sequence[str]) -> list[ExportedFile]:
    """Write ``model`` to ``folder`` in each of ``formats``; every file appears whole or not at all.

    Raises ``InputError`` for an unknown format, or one that cannot hold the network, before anything is written.
    """
    for name in formats:
        if name not in FORMATS:
            raise InputError(f"unknown export format '{name[:60]}'; known: {', '.join(FORMATS)}")
    if "py" in formats:
        network_source(spec)  # refuses networks that it has no words for
    if "onnx" in formats:
        check_onnx_can_be_written()
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in dict.fromkeys(formats):
        FORMATS[name].write(spec, model, folder)
        files += [ExportedFile(file, name) for file in FORMATS[name].files]
    return files


def _write_genotype(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    del model
    write_text(json.dumps(spec.genotype.to_data(), indent=1) + "\n", folder / "genotype.json")


def _write_source(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    source, state = network_source(spec), deployed_state(spec, model)
    write_bytes(save(state), folder / "network.safetensors")
    write_text(source, folder / "network.py")


FORMATS: dict[str, Format] = {
    "json": Format(("genotype.json",), _write_genotype),
    "safetensors": Format(("model.json", "model.safetensors"), save_model),
    "py": Format(("network.py", "network.safetensors"), _write_source),
    "onnx": Format(("network.onnx",), write_onnx),
}
"""All export formats by name. The check of each is a function of reload.py."""
