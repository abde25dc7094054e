"""Networks exported, reloaded and compared, on clean and adversarial images of the data they were trained for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.export.package import ExportedFile, export_model
from nas.export.parity import Attacks, check_exports
from nas.model_file import ModelSpec
from nas.threat_model import ThreatModel

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


def export_into(
    context: Context, spec: ModelSpec, model: nn.Module, folder: Path, formats: Sequence[str]
) -> list[ExportedFile]:
    """Write a trained network of a run to ``folder`` in each of ``formats``, and compare what was written."""
    export_model(spec, model, folder, formats)
    # The test set is for the final evaluation only: exports are compared on held-out training images.
    rows = context.split.validation[:COMPARED].to(context.data.x_train.device)
    inputs = (context.data.x_train[rows].float() / 255).cpu()
    return check_exports(folder, spec, model, inputs, attack_by(context.recipe.threat_model))
