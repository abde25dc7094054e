"""Networks exported, reloaded and compared, on clean and adversarial images of the data they were trained for."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.export.card import About, write_card
from nas.export.model_info import model_info, write_model_info
from nas.export.package import CARD_FORMAT, FORMATS, ExportedFile, check_formats, export_model
from nas.export.parity import Attacks, check_exports
from nas.model_file import ModelSpec, load_model
from nas.prediction import networks_in, passes_of
from nas.report.doubts import guessing, masking
from nas.threat_model import ThreatModel
from runs.context import Context, model_folder
from runs.directory import flatten, make_folder, read_json
from runs.finished import network_folder
from runs.networks import size_of
from runs.reproduction import command_of

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


def describe(
    context: Context, name: str, source: Path, files: Sequence[ExportedFile], folder: Path, commands: Sequence[str] = ()
) -> list[Path]:
    """Write what is known of network ``name`` of a run, trained in ``source``, beside its exported ``files``.

    The model card, and what RobustBench's tables say where its loader is among the files. commands: that wrote these.
    """
    spec, model = load_model(source)
    size = size_of(spec, model)
    run, data, recipe = context.run, context.data, context.recipe
    threat: dict[str, Any] = {"norm": recipe.threat_model.norm, "epsilon": recipe.threat_model.epsilon}
    found = []
    for path in sorted(run.path.rglob("result.json")):
        result = read_json(path)
        # Attacks on other weights, an earlier compression of the same name for instance, say nothing of these.
        if isinstance(result, dict) and result.get("digest") == size["digest"] and "worst_case" in result:
            found.append({"threat_model": threat, **result})
    about = About(
        name=f"{recipe.general.name}: {name}",
        size=size,
        data=data.to_data(),
        recipe=flatten(run.table),
        seconds=_seconds(context, name, source),
        evaluations=found,
        doubts=_doubts(found, len(spec.classes)),
        commands=[command_of(run), *_compressing(source), *commands],
        environment=read_json(run.path / "environment.json"),
    )
    written = [write_card(spec, about, files, folder)]
    if any(file.format == "robustbench" for file in files):
        extra, passes = recipe.data.extra is not None, len(networks_in(model)) * passes_of(model)
        entry = model_info(
            spec, data=data.name, threat_model=threat, extra=extra, forward_passes=passes, evaluations=found
        )
        written.append(write_model_info(spec, entry, threat["norm"], folder))
    return written


def _compressing(source: Path) -> list[str]:
    """The command that made ``source`` by compressing another network of the run, if one did. RUN: its folder."""
    note = source / "compression.json"
    if not note.exists():
        return []
    asked = read_json(note)
    return [shlex.join(["nas", "compress", "RUN", "--model", asked["model"]]) + f"  # {', '.join(asked['settings'])}"]


def _seconds(context: Context, name: str, source: Path) -> dict[str, float]:
    """What the search, this network's own tasks and the whole run took."""
    run = context.run.path
    taken = {str(path.parent.relative_to(run)): read_json(path)["seconds"] for path in sorted(run.rglob("timing.json"))}
    own = ("search", *([str(source.relative_to(run))] if source.is_relative_to(run) else []), f"evaluate/{name}")
    return {**{task: taken[task] for task in own if task in taken}, f"all {len(taken)} tasks": sum(taken.values())}


def _doubts(found: Sequence[dict[str, Any]], classes: int) -> list[str]:
    """Reasons not to believe what attacks found of one network."""
    if not found:
        return []
    smallest = min(found, key=lambda result: int(result["n"]))
    failed = dict.fromkeys(
        check["name"] for result in found for check in result["checks"] if check["verdict"] == "fail"
    )
    return [
        *guessing({"it": smallest["natural"]}, smallest["n"], classes),
        *masking({"it": list(failed)} if failed else {}),
    ]


def export_network(
    context: Context, name: str, folder: Path, formats: Sequence[str]
) -> tuple[list[ExportedFile], list[Path]]:
    """Export network ``name`` of a finished run to ``folder``: the files, compared, and what tells of them.

    A model card is always written; with the format "card" alone nothing else is, and it tells of the files that lie
    there.
    """
    check_formats(formats)
    source = network_folder(model_folder(context.run, name), context.run.path, name)
    spec, network = load_model(source)
    make_folder(folder)
    files = export_into(context, spec, network, folder, [each for each in formats if each != CARD_FORMAT])
    command = shlex.join(["nas", "export", "RUN", "--model", name, "--to", ",".join(formats)])
    return files, describe(context, name, source, files, folder, [command])


def export_into(
    context: Context, spec: ModelSpec, model: nn.Module, folder: Path, formats: Sequence[str]
) -> list[ExportedFile]:
    """Write a trained network of a run to ``folder`` in each of ``formats``, and compare all that is there then."""
    if formats:
        export_model(spec, model, folder, formats)
    elif not any((folder / file).exists() for entry in FORMATS.values() for file in entry.files):
        return []
    # The test set is for the final evaluation only: exports are compared on held-out training images.
    rows = context.split.validation[:COMPARED].to(context.data.x_train.device)
    inputs = (context.data.x_train[rows].float() / 255).cpu()
    return check_exports(folder, spec, model, inputs, attack_by(context.recipe.threat_model))
