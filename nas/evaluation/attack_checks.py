"""Checks of the attacks: whether others, stronger in some respect, find what they did not."""

from __future__ import annotations

from dataclasses import replace

import torch

from nas.attacks.fgsm import Fgsm
from nas.attacks.gradient import input_gradient
from nas.attacks.losses import right
from nas.attacks.pgd import Pgd
from nas.attacks.square import Square
from nas.evaluation.expectation import answers_at_random
from nas.evaluation.suspicion import Case, Check, grade, share
from nas.model_state import crafting
from nas.threat_model import ThreatModel

NOISE_DRAWS = 20
STEPS = 40
QUERIES = 200
SEARCHED = 64
"""Samples that the search by queries is tried on."""


def unbounded(case: Case) -> Check:
    """Free to change every pixel, an attack must win always."""
    # 1 is the whole range of every pixel in l_inf and most of an image's contrast in l_2 for larger images: scale it.
    bounds = case.threat_model
    everything = ThreatModel("linf", bounds.upper - bounds.lower, bounds.lower, bounds.upper)
    attack = Pgd(everything, steps=40, step_size=everything.epsilon / 10, loss="margin", stop_when_broken=True)
    left = share(case.withstood(attack, "unbounded"))
    detail = f"accuracy {left:.1%} when every pixel may change freely; it should be 0 %"
    return Check("unbounded attack", grade(left, 0.0, 0.05), detail)


def noise(case: Case) -> Check:
    """Gradients should do better than chance."""
    randomness = case.generator("noise")
    survived = case.natural
    # Of a model that answers at random many trials break samples by luck: it is given one.
    draws = 1 if answers_at_random(case.model) else NOISE_DRAWS
    for _ in range(draws):
        survived = survived & case.answers(case.threat_model.random_start(case.x, randomness))
    by_chance = share(survived)
    return Check(
        "random noise",
        "pass" if case.worst <= by_chance else "fail",
        f"accuracy {by_chance:.1%} under the worst of {draws} random perturbations, {case.worst:.1%} under the "
        "attacks; gradients should do better than chance",
    )


def iteration(case: Case) -> Check:
    """One step must not beat all attacks."""
    single = share(case.withstood(Fgsm(case.threat_model), "one step"))
    return Check(
        "iteration helps",
        "pass" if case.worst <= single + 1 / len(case.x) else "fail",
        f"accuracy {single:.1%} under one step, {case.worst:.1%} under all attacks",
    )


def larger_ball(case: Case) -> Check:
    """More freedom must not be safer."""
    double = replace(case.threat_model, epsilon=2 * case.threat_model.epsilon)
    wide = share(case.withstood(Pgd(double, steps=20, loss="margin", stop_when_broken=True), "larger ball"))
    return Check(
        "larger ball",
        "pass" if wide <= case.worst + 1 / len(case.x) else "warn",
        f"accuracy {wide:.1%} under PGD-20 with twice the epsilon, {case.worst:.1%} under all attacks at epsilon",
    )


def margin_ascent(case: Case) -> list[Check]:
    """PGD on the margin, which saturated logits do not flatten, followed step by step."""
    threat_model, x = case.threat_model, case.x
    step = 2.5 / STEPS * threat_model.epsilon
    point = threat_model.random_start(x, case.generator("margin"))
    standing, margins = case.natural.clone(), []
    # A model that answers at random gets one wrong or another along the way by luck: only its last answers count.
    lucky = answers_at_random(case.model)
    with crafting(case.model):
        for _ in range(STEPS):
            gradient, losses, logits = input_gradient(case.model, point, case.y, "margin", None)
            if not lucky:
                standing &= right(logits, case.y)
            margins.append(losses)
            point = threat_model.project(point + step * threat_model.geometry.steepest(gradient), x)
    final = case.answers(point)
    broken = share(case.robust & ~(standing & final))
    silent = share(case.robust & ~standing & final)
    standing &= final
    # Of a curve scaled to [0, 1], what its best value still gained in the last quarter.
    best = torch.stack(margins).cummax(0).values
    late = (best[-1] - best[-STEPS // 4]) / (best[-1] - best[0]).clamp_min(1e-12)
    watched = case.natural & standing
    gaining = float(late[watched].median()) if bool(watched.any()) else 0.0
    risen = share((best[-1] > best[0])[watched]) if bool(watched.any()) else 1.0
    return [
        Check(
            "margin loss",
            grade(broken, 0.05, 0.08),
            f"{broken:.1%} of the samples withstood the attacks but fall to PGD-{STEPS} on the margin of the logits",
        ),
        Check(
            "iterates",
            grade(silent, 0.01, 0.05),
            f"{silent:.1%} of the samples withstood the attacks, were broken on the way of PGD-{STEPS}, and are right "
            "again at its end",
        ),
        Check(
            "loss rises",
            "pass" if risen >= 0.95 else "warn" if risen >= 0.8 else "fail",
            f"{risen:.1%} of the samples that stand moved towards a wrong class within {STEPS} steps",
        ),
        Check(
            "converged",
            grade(gaining, 0.25, 0.5),
            f"{gaining:.0%} of the rise of the margin came in the last quarter of {STEPS} steps (median)",
        ),
    ]


def queries(case: Case) -> Check:
    """Answers alone must not find what gradients did not."""
    rows = case.robust.nonzero().squeeze(1)[:SEARCHED]
    if len(rows) == 0:
        return Check("search by queries", "pass", "no sample withstood the attacks")
    attack = Square(case.threat_model, queries=QUERIES)
    attempt = attack.attempt(case.model, case.x[rows], case.y[rows], generator=case.generator("queries"))
    broken = share(attempt.broken_at >= 0)
    return Check(
        "search by queries",
        grade(broken, 0.02, 0.05),
        f"{broken:.1%} of {len(rows)} samples that withstood the attacks fall to Square with {QUERIES} queries",
    )


def transfer(case: Case) -> list[Check]:
    """Examples made for another network must not break what those made for this one did not."""
    lines = []
    for name, surrogate in case.surrogates.items():
        attack = Pgd(case.threat_model, steps=20, loss="margin", keep="best")
        images = attack(surrogate, case.x, case.y, generator=case.generator(f"transfer {name}"))
        broken = share(case.robust & ~case.answers(images))
        lines.append(
            Check(
                f"transfer from {name}",
                grade(broken, 0.03, 0.08),
                f"{broken:.1%} of the samples withstood the attacks but fall to PGD-20 made for '{name}'",
            )
        )
    return lines


ATTACK_CHECKS = (unbounded, noise, iteration, larger_ball, margin_ascent, queries, transfer)
