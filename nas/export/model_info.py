"""What RobustBench's tables say of a network, in the layout of its folder model_info: one JSON file a network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.export.loaders import entry_name
from nas.model_file import ModelSpec
from nas.tensor_file import write_text

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
"""Folders of threat models. RobustBench has tables for the first two."""


def model_info(
    spec: ModelSpec,
    *,
    data: str,
    threat_model: Mapping[str, Any],
    extra: bool,
    forward_passes: int,
    evaluations: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The entry of a network; accuracies in per cent, as text.

    data: name of its data set;  threat_model: norm and epsilon it was trained for;  extra: whether it was trained on
    images beside the data set;  forward_passes: of a network for one prediction;  evaluations: results of attacks on
    these weights, those within another threat model are left out. "reported" is the worst case over all attacks,
    "autoattack_acc" that of the standard AutoAttack; a number that was not measured is not there. What only an author
    can say (link, authors, venue) is empty.
    """
    within = [found for found in evaluations if dict(found["threat_model"]) == dict(threat_model)]
    info: dict[str, Any] = {
        "link": "",
        "name": entry_name(spec),
        "authors": "",
        "additional_data": extra,
        "number_forward_passes": forward_passes,
        "dataset": data,
        "venue": "",
        "architecture": f"{spec.genotype.space}, genotype {spec.genotype.digest}",
        "eps": _fraction(threat_model["epsilon"]),
    }
    if not within:
        return info
    worst = min(within, key=lambda found: float(found["worst_case"]))
    info |= {"clean_acc": _per_cent(worst["natural"]), "reported": _per_cent(worst["worst_case"])}
    standard = [
        accuracy
        for found in within
        for name, accuracy in found["attacks"].items()
        if str(found["attack_settings"].get(name, "")).startswith("AutoAttack standard")
    ]
    if standard:
        info["autoattack_acc"] = _per_cent(min(standard))
    return info | {
        "unreliable": any(check["verdict"] == "fail" for found in within for check in found["checks"]),
        "footnote": f"On {worst['n']:,} test images, in the worst case over: {'; '.join(worst['attacks'])}.",
    }


def write_model_info(spec: ModelSpec, info: Mapping[str, Any], norm: str, folder: Path) -> Path:
    """Write an entry of the threat model with ``norm`` to model_info/<data>/<threat model> in ``folder``."""
    # A data set may be named by the path of a folder, which must not lead anywhere.
    data = re.sub("[^A-Za-z0-9]+", "_", info["dataset"]).strip("_")[:60] or "data"
    path = folder / "model_info" / data / NORMS[norm] / f"{entry_name(spec)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(info, indent=1) + "\n", path)
    return path


def _per_cent(share: float) -> str:
    return f"{100 * share:.2f}"


def _fraction(epsilon: float) -> str:
    """A radius in steps of 1/255 where it is one, as the field writes it."""
    steps = round(255 * epsilon)
    return f"{steps}/255" if steps and abs(255 * epsilon - steps) < 1e-6 else f"{epsilon:g}"
