"""Named sets of attacks: a quick look, the standard of the field, everything that may find more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nas.attacks.autoattack import AutoAttack
from nas.attacks.fgsm import Fgsm
from nas.attacks.fmn import FastMinimumNorm
from nas.attacks.hidden_layers import HiddenLayers
from nas.attacks.hopskipjump import HopSkipJump
from nas.attacks.krylov import Krylov
from nas.attacks.pgd import Pgd
from nas.attacks.rays import RayS
from nas.errors import InputError, nearest
from nas.evaluation.robustness import Trial
from nas.objective import Attack
from nas.threat_model import ThreatModel

Make = Callable[[ThreatModel], Attack]

QUICK: dict[str, Make] = {
    "fgsm": Fgsm,
    "pgd-20": lambda ball: Pgd(ball, steps=20, keep="best"),
    "pgd-20-margin": lambda ball: Pgd(ball, steps=20, loss="margin", keep="best"),
}
STANDARD: dict[str, Make] = {
    "pgd-50-margin": lambda ball: Pgd(ball, steps=50, loss="margin", keep="best"),
    "autoattack": AutoAttack,
}
FULL: dict[str, Make] = {
    **QUICK,
    **STANDARD,
    "krylov": Krylov,
    "hidden-layers": HiddenLayers,
    "fmn": FastMinimumNorm,
    "rays": RayS,
    "hopskipjump": HopSkipJump,
}
SUITES: dict[str, dict[str, Make]] = {"quick": QUICK, "standard": STANDARD, "full": FULL}


@dataclass(frozen=True)
class Suite:
    """Attacks to run, and those that the threat model leaves out, with the reason."""

    trials: Mapping[str, Trial]
    left_out: Mapping[str, str]


def suite(name: str, threat_model: ThreatModel) -> Suite:
    """The suite ``name`` ("quick", "standard" or "full") for a threat model."""
    if name not in SUITES:
        raise InputError(f"unknown suite '{name}': {nearest(name, SUITES)}")
    trials, left_out = {}, {}
    for label, make in SUITES[name].items():
        try:
            trials[label] = Trial(make(threat_model))
        except InputError as refusal:
            left_out[label] = str(refusal)
    return Suite(trials, left_out)
