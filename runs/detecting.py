"""A network with a detector before it judged: attacks that do not know the detector, and the one that does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nas.detection.evasion import Evasion
from nas.detection.feature_squeezing import Detector, detection, threshold_at
from nas.evaluation.robustness import Evaluation, Trial, check_images, check_model, correct
from nas.evaluation.suspicion import suspicions
from nas.model_file import weights_digest
from nas.model_state import constant, evaluating
from nas.randomness import generator
from runs.contenders import Detect
from runs.judging import Bench

ADAPTIVE = "adaptive"
"""The attack that knows the detector."""


def judge_detected(
    bench: Bench, model: nn.Module, trials: Mapping[str, Trial], part: Detect, legitimate: Tensor
) -> dict[str, Any]:
    """What ``judge`` finds, of a network that may refuse an image. JSON-ready.

    A clean image counts as right where it is classified right and not refused, an attacked one as withstood where it is
    classified right or refused; the worst case includes the adaptive attack. The checks are those of the network
    alone. legitimate: images [M, C, H, W] in [0, 1] that choose the threshold.
    """
    x, y, size = bench.x, bench.y, bench.batch_size
    check_images(x, y)
    with evaluating(model), constant(model):
        check_model(model, x, y)
        threshold = threshold_at(part.squeezing.scores(model, legitimate, size), part.false_positive_rate)
        detector = Detector(part.squeezing, threshold)
        accepted = ~detector.flags(model, x, size)
        known = correct(model, x, y, size)
        natural = known & accepted
        evasion = Evasion(
            detector, bench.threat_model, part.steps, score_weight=part.score_weight, restarts=part.restarts
        )
        everything = {**trials, ADAPTIVE: Trial(evasion)}
        fooled: dict[str, Tensor] = {}
        withstood: dict[str, Tensor] = {}
        rows: dict[str, Any] = {}
        for done, (name, trial) in enumerate(everything.items(), start=1):
            attacked = _attacked(bench, model, detector, trial, name, known)
            found = detection(detector, model, x, attacked[known], y[known], size)
            fooled[name], withstood[name] = known.clone(), natural.clone()
            fooled[name][known] = ~found.adversarial
            withstood[name][known] &= ~(found.adversarial & ~found.flagged)
            rows[name] = found.to_data()
            bench.tick(0.9 * done / len(everything))
    settings = {name: str(trial) for name, trial in everything.items()}
    alone = Evaluation(known, {name: fooled[name] for name in trials}, settings, y)
    checks = suspicions(model, x, y, alone, bench.threat_model, seed=bench.seed)
    return {
        **Evaluation(natural, withstood, settings, y).to_data(),
        "seed": bench.seed,
        "digest": weights_digest(model),
        "checks": [dataclasses.asdict(check) for check in checks],
        "detection": {
            "detector": str(detector),
            "threshold": threshold,
            "false_positives": float((~accepted).double().mean()),
            "without": alone.to_data()["worst_case"],
            "attacks": rows,
        },
    }


def _attacked(bench: Bench, model: nn.Module, detector: Detector, trial: Trial, name: str, known: Tensor) -> Tensor:
    """Attacked images of those that are ``known`` [N]; every start takes those that none has got past both yet."""
    attacked, standing, fooled = bench.x.clone(), known.clone(), ~known
    for restart in range(trial.restarts):
        randomness = generator(bench.seed, f"evaluate {name}", restart, device=bench.x.device)
        for rows in standing.nonzero().squeeze(1).split(bench.batch_size):
            images = trial.attack(model, bench.x[rows], bench.y[rows], generator=randomness)
            wrong = ~correct(model, images, bench.y[rows], bench.batch_size)
            # One that fools the network alone stays until one fools both.
            passed = wrong & ~detector.flags(model, images, bench.batch_size)
            better = passed | ~fooled[rows]
            attacked[rows[better]] = images[better]
            fooled[rows] |= wrong
            standing[rows] = ~passed
    return attacked
