"""Networks exported, reloaded and compared, on clean and adversarial images of the data they were trained for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nas.analysis.complexity import complexity, nonzero_parameters
from nas.attacks.pgd import Pgd
from nas.compression.size import stored_size
from nas.export.card import About, write_card
from nas.export.package import ExportedFile, check_formats, export_model
from nas.export.parity import Attacks, check_exports
from nas.model_file import ModelSpec, load_model, weights_digest
from nas.threat_model import ThreatModel
from runs.directory import flatten, make_folder, read_json
from runs.reproduction import command_of

if TYPE_CHECKING:
    from runs.tasks import Context

COMPARED = 32
"""Images on which files are compared."""


def attack_by(threat_model: ThreatModel) -> Attacks:
    """PGD-10 from a random start, away from what the network itself says of the images."""
    attack = Pgd(threat_model=threat_model, steps=10)

    def adversarial(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            answers = model(x).argmax(1)
        return attack(model, x, answers, generator=torch.Generator(x.device).manual_seed(0))

    return adversarial


def card_of(
    context: Context, name: str, source: Path, spec: ModelSpec, files: Sequence[ExportedFile], folder: Path
) -> Path:
    """Write the model card of network ``name`` of a run, trained in ``source``, to ``folder``."""
    _, model = load_model(source)
    size, digest = complexity(spec), weights_digest(model)
    run, data = context.run, context.data
    found = []
    for path in sorted(run.path.rglob("result.json")):
        result = read_json(path)
        # Attacks on other weights, an earlier compression of the same name for instance, say nothing of these.
        if isinstance(result, dict) and result.get("digest") == digest and "worst_case" in result:
            threat = {"norm": context.recipe.threat_model.norm, "epsilon": context.recipe.threat_model.epsilon}
            found.append({"threat_model": threat, **result})
    paths = sorted(run.path.rglob("timing.json"))
    about = About(
        name=f"{context.recipe.general.name}: {name}",
        size={
            "parameters": size.parameters,
            "nonzero": nonzero_parameters(model),
            "macs": size.macs,
            "bytes": dataclasses.asdict(stored_size(model)),
            "digest": digest,
        },
        data={"name": data.name, "train": len(data.y_train), "test": len(data.y_test), "digest": data.digest},
        recipe=flatten(run.table),
        seconds={str(path.parent.relative_to(run.path)): read_json(path)["seconds"] for path in paths},
        evaluations=found,
        commands=[command_of(run)],
        environment=read_json(run.path / "environment.json"),
    )
    return write_card(spec, about, files, folder)


def export_network(
    context: Context, name: str, folder: Path, formats: Sequence[str]
) -> tuple[list[ExportedFile], Path]:
    """Export network ``name`` of a finished run to ``folder``: the files, compared, and the model card."""
    from runs.finished import network_folder
    from runs.tasks import model_folder

    check_formats(formats)
    source = network_folder(model_folder(context.run, name), context.run.path, name)
    spec, network = load_model(source)
    make_folder(folder)
    files = export_into(context, spec, network, folder, formats)
    return files, card_of(context, name, source, spec, files, folder)


def export_into(
    context: Context, spec: ModelSpec, model: nn.Module, folder: Path, formats: Sequence[str]
) -> list[ExportedFile]:
    """Write a trained network of a run to ``folder`` in each of ``formats``, and compare what was written."""
    export_model(spec, model, folder, formats)
    # The test set is for the final evaluation only: exports are compared on held-out training images.
    rows = context.split.validation[:COMPARED].to(context.data.x_train.device)
    inputs = (context.data.x_train[rows].float() / 255).cpu()
    return check_exports(folder, spec, model, inputs, attack_by(context.recipe.threat_model))
