"""Checks with which the evaluator suspects itself: signs that an attack failed rather than the defence held.

After Carlini et al. (arXiv 1902.06705), Athalye et al. (arXiv 1802.00420) and Tramer et al. (arXiv 2002.08347).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from nas.attacks.fgsm import Fgsm
from nas.attacks.gradient import input_gradient
from nas.attacks.pgd import Pgd
from nas.evaluation.robustness import Evaluation
from nas.model_state import crafting, evaluating
from nas.randomness import generator
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class Check:
    """One graded line: what was looked at, the verdict, and the numbers."""

    name: str
    verdict: Literal["pass", "warn", "fail"]
    detail: str


def suspicions(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    evaluation: Evaluation,
    threat_model: ThreatModel,
    *,
    seed: int,
    samples: int = 128,
    noise_draws: int = 20,
) -> list[Check]:
    """Masking checks on the first ``samples`` images (x in [0, 1]) of an evaluation, in eval mode."""
    x, y = x[:samples], y[:samples]
    with evaluating(model):
        with torch.no_grad():
            right = model(x).argmax(1) == y
            repeatable = bool(torch.equal(model(x), model(x)))
        checks = [_deterministic(repeatable), _zero_gradients(model, x, y)]
        unbounded = _accuracy(model, x, y, right, _unbounded(threat_model), seed)
        checks.append(
            Check(
                "unbounded attack",
                _grade(unbounded, 0.0, 0.05),
                f"accuracy {unbounded:.1%} when every pixel may change freely; it should be 0 %",
            )
        )
        noise = _noise_accuracy(model, x, y, right, threat_model, noise_draws, seed)
        worst = float(evaluation.worst_case[: len(x)].double().mean())
        checks.append(
            Check(
                "random noise",
                "pass" if worst <= noise else "fail",
                f"accuracy {noise:.1%} under the worst of {noise_draws} random perturbations, {worst:.1%} under the "
                "attacks; gradients should do better than chance",
            )
        )
        checks += _strength(model, x, y, right, threat_model, worst, seed)
        checks.append(_another_loss(model, x, y, evaluation.worst_case[: len(x)], threat_model, seed))
    return checks


def _deterministic(repeatable: bool) -> Check:
    detail = "two passes give the same logits" if repeatable else "two passes differ: average over the randomness"
    return Check("deterministic model", "pass" if repeatable else "fail", detail)


def _zero_gradients(model: nn.Module, x: Tensor, y: Tensor) -> Check:
    with crafting(model):
        gradient, _, _ = input_gradient(model, x, y, "margin", None)
    share = float((gradient.flatten(1).abs().amax(1) == 0).double().mean())
    return Check("zero gradients", _grade(share, 0.01, 0.1), f"{share:.1%} of the samples have no margin gradient")


def _strength(
    model: nn.Module, x: Tensor, y: Tensor, right: Tensor, threat_model: ThreatModel, worst: float, seed: int
) -> list[Check]:
    """Iterating must not be weaker than one step, and a larger ball not safer."""
    single = _accuracy(model, x, y, right, Fgsm(threat_model), seed)
    double = replace(threat_model, epsilon=2 * threat_model.epsilon)
    wide = _accuracy(model, x, y, right, Pgd(double, steps=20, keep="best", loss="margin"), seed)
    tolerance = 1 / len(x)
    return [
        Check(
            "iteration helps",
            "pass" if worst <= single + tolerance else "fail",
            f"accuracy {single:.1%} under one step, {worst:.1%} under all attacks",
        ),
        Check(
            "larger ball",
            "pass" if wide <= worst + tolerance else "warn",
            f"accuracy {wide:.1%} under PGD-20 with twice the epsilon, {worst:.1%} under all attacks at epsilon",
        ),
    ]


def _another_loss(
    model: nn.Module, x: Tensor, y: Tensor, robust: Tensor, threat_model: ThreatModel, seed: int
) -> Check:
    """Whether the margin loss, which saturated logits do not flatten, breaks what the evaluation counts as robust."""
    attack = Pgd(threat_model, steps=20, keep="best", loss="margin")
    x_adv = attack(model, x, y, generator=generator(seed, "suspicion margin", device=x.device))
    with torch.no_grad():
        broken = robust & (model(x_adv).argmax(1) != y)
    share = float(broken.double().mean())
    return Check(
        "margin loss",
        _grade(share, 0.05, 0.08),
        f"{share:.1%} of the samples withstood the attacks but fall to PGD-20 on the margin of the logits",
    )


def _unbounded(threat_model: ThreatModel) -> Pgd:
    # 1 is the whole range of every pixel in l_inf and most of an image's contrast in l_2 for larger images: scale it.
    everything = ThreatModel("linf", threat_model.upper - threat_model.lower, threat_model.lower, threat_model.upper)
    return Pgd(everything, steps=40, step_size=everything.epsilon / 10, loss="margin", keep="best")


def _accuracy(model: nn.Module, x: Tensor, y: Tensor, right: Tensor, attack: Pgd | Fgsm, seed: int) -> float:
    x_adv = attack(model, x, y, generator=generator(seed, "suspicion", device=x.device))
    with torch.no_grad():
        return float((right & (model(x_adv).argmax(1) == y)).double().mean())


def _noise_accuracy(
    model: nn.Module, x: Tensor, y: Tensor, right: Tensor, threat_model: ThreatModel, draws: int, seed: int
) -> float:
    randomness = generator(seed, "suspicion noise", device=x.device)
    survived = right.clone()
    with torch.no_grad():
        for _ in range(draws):
            survived &= model(threat_model.random_start(x, randomness)).argmax(1) == y
    return float(survived.double().mean())


def _grade(value: float, good: float, bad: float) -> Literal["pass", "warn", "fail"]:
    return "pass" if value <= good else "warn" if value <= bad else "fail"
