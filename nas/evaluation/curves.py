"""Accuracy as a function of what the attacker may do: the size of the ball, the number of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nas.attacks.momentum import Momentum
from nas.attacks.pgd import Pgd
from nas.evaluation.robustness import check_images, check_model, correct
from nas.model_state import constant, evaluating
from nas.randomness import generator
from nas.threat_model import ThreatModel

MULTIPLES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
STEPS = (1, 2, 5, 10, 20, 50, 100)

Point = dict[str, float]


def epsilon_curve(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    seed: int,
    multiples: Sequence[float] = MULTIPLES,
    steps: int = 20,
    batch_size: int = 512,
    tick: Callable[[float], None] = lambda progress: None,
) -> list[Point]:
    """Accuracy under PGD on the margin with balls of ``multiples`` times epsilon, from the smallest on.

    What a smaller ball broke is not attacked again: it lies in the larger one, so accuracy never rises.
    x: [N, C, H, W] in [0, 1].  Returns [{"epsilon", "accuracy"}], first the clean images at epsilon 0.
    """
    check_images(x, y)
    points: list[Point] = []
    with evaluating(model), constant(model):
        check_model(model, x, y)
        standing = correct(model, x, y, batch_size)
        points.append({"epsilon": 0.0, "accuracy": float(standing.double().mean())})
        for index, multiple in enumerate(sorted(multiples)):
            ball = replace(threat_model, epsilon=multiple * threat_model.epsilon)
            attack = Pgd(ball, steps=steps, loss="margin", keep="best")
            randomness = generator(seed, "epsilon curve", index, device=x.device)
            for rows in standing.nonzero().squeeze(1).split(batch_size):
                x_adv = attack(model, x[rows], y[rows], generator=randomness)
                standing[rows] = correct(model, x_adv, y[rows], batch_size)
            points.append({"epsilon": ball.epsilon, "accuracy": float(standing.double().mean())})
            tick((index + 1) / len(multiples))
    return points


def step_curve(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    seed: int,
    steps: Sequence[int] = STEPS,
    batch_size: int = 512,
    tick: Callable[[float], None] = lambda progress: None,
) -> list[Point]:
    """Accuracy under PGD on the margin of so many steps, each attack on its own: a level end means it has converged.

    x: [N, C, H, W] in [0, 1].  Returns [{"steps", "accuracy"}], from the fewest steps on.
    """
    check_images(x, y)
    points: list[Point] = []
    with evaluating(model), constant(model):
        check_model(model, x, y)
        natural = correct(model, x, y, batch_size)
        for index, count in enumerate(sorted(steps)):
            standing = natural.clone()
            attack = Pgd(threat_model, steps=count, loss="margin", keep="best")
            randomness = generator(seed, "step curve", index, device=x.device)
            for rows in natural.nonzero().squeeze(1).split(batch_size):
                x_adv = attack(model, x[rows], y[rows], generator=randomness)
                standing[rows] = correct(model, x_adv, y[rows], batch_size)
            points.append({"steps": float(count), "accuracy": float(standing.double().mean())})
            tick((index + 1) / len(steps))
    return points


def transfer(
    model: nn.Module,
    surrogates: dict[str, nn.Module],
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    seed: int,
    batch_size: int = 512,
) -> dict[str, Any]:
    """Accuracy on examples that were made for other networks, of each and of all together.

    PGD-20 on the margin, and MI-FGSM on the loss with input diversity, which transfers better where networks differ; a
    sample stands only if it stands against both.
    """
    check_images(x, y)
    attacks = (
        Pgd(threat_model, steps=20, loss="margin", keep="best"),
        Momentum(threat_model, steps=20, diversity=0.5),
    )
    with evaluating(model):
        check_model(model, x, y)
        natural = correct(model, x, y, batch_size)
        together, each = natural.clone(), {}
        for name, surrogate in surrogates.items():
            randomness = generator(seed, f"transfer {name}", device=x.device)
            survived = natural.clone()
            for attack in attacks:
                for rows in survived.nonzero().squeeze(1).split(batch_size):
                    with evaluating(surrogate):
                        x_adv = attack(surrogate, x[rows], y[rows], generator=randomness)
                    survived[rows] = correct(model, x_adv, y[rows], batch_size)
            each[name] = float(survived.double().mean())
            together &= survived
    return {"from": each, "worst_case": float(together.double().mean()), "attack": "; ".join(map(str, attacks))}
