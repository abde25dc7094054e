"""The [compress] table of a recipe: methods in order, each with the fine-tuning that follows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nas import plugins
from nas.compression.plan import Compression, Steers
from nas.errors import InputError
from nas.objective import Attack, Objective
from nas.training.loop import Training
from runs.construct import construct, mapping, name_of

Table = Mapping[str, Any]

PARENT = "parent"
"""Stands for the network before compression where fine-tuning learns from a teacher."""


@dataclass(frozen=True)
class FineTune:
    """What fine-tuning after compression changes in the training schedule; a quarter of both unless stated."""

    epochs: int
    learning_rate: float

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise InputError(f"epochs of fine-tuning must be at least 0 (0 = none), not {self.epochs}")


@dataclass(frozen=True)
class Step:
    """A compression method and what the network is trained by afterwards.

    training: the schedule of training that leads up to the plan, and of fine-tuning for ``epochs`` epochs (0 = none).
    objective: of fine-tuning; None for the run's. One whose ``teacher`` is "parent" learns from the network before.
    """

    name: str
    method: Compression
    training: Training
    epochs: int
    objective: Objective | None = None

    @property
    def fine_tuning(self) -> Training:
        """The schedule of fine-tuning."""
        return dataclasses.replace(self.training, epochs=self.epochs)

    def steering(self, epochs: int) -> Training:
        """The schedule of the training that leads up to the plan: its last epoch counts, and no average."""
        return dataclasses.replace(
            self.training, epochs=epochs, validate_every=epochs, ema=0.0, ema_warmup=0.0, swa=0.0
        )


@dataclass(frozen=True)
class CompressPart:
    """Compression methods in the order they are applied."""

    steps: tuple[Step, ...]

    @property
    def epochs(self) -> int:
        """Epochs of all training: what leads up to the plans, and fine-tuning."""
        led = [step.method.epochs for step in self.steps if isinstance(step.method, Steers)]
        return sum(step.epochs for step in self.steps) + sum(led)


@dataclass(frozen=True)
class Makers:
    """How a recipe makes what a table names.  attack: for the field of that name, by class;  objective: of a table."""

    attack: Callable[[], Attack]
    objective: Callable[[Table, str], Objective]


def compress_from(table: object, training: Training, where: str, makers: Makers) -> CompressPart:
    """The compression that a table describes: one method by name, or ``steps``, a list of such."""
    entries = dict(mapping(table, where))
    if "steps" not in entries:
        return CompressPart((_step(entries, training, where, makers, {}),))
    steps = entries.pop("steps")
    shared = mapping(entries.pop("fine_tune", {}), f"{where}.fine_tune")
    if entries:
        raise InputError(f"{where}: '{next(iter(entries))}' stands beside steps: move it into one of them")
    if not isinstance(steps, list) or not steps:
        raise InputError(f"{where}.steps must be a list of at least one table, each with the name of a method")
    return CompressPart(
        tuple(_step(item, training, f"{where}.steps[{i}]", makers, shared) for i, item in enumerate(steps))
    )


def _step(table: object, training: Training, where: str, makers: Makers, shared: Table) -> Step:
    entries = dict(mapping(table, where))
    name = name_of(entries, where)
    cls = plugins.load("compression", name)
    own = mapping(entries.pop("fine_tune", {}), f"{where}.fine_tune")
    if not cls.retrains:
        # What a recipe says of all steps is about those that are trained after.
        shared = {key: value for key, value in shared.items() if key != "epochs"}
    stated = {**shared, **own}
    method_table = stated.pop("method", None)
    tuning: FineTune = construct(
        FineTune,
        {
            "epochs": max(1, training.epochs // 4) if cls.retrains else 0,
            "learning_rate": training.optimiser.learning_rate / 4,
            **stated,
        },
        f"{where}.fine_tune",
        ("method",),
    )
    given = {"attack": makers.attack()} if "attack" in {f.name for f in dataclasses.fields(cls)} else {}
    method = construct(cls, entries, where, ("name", "fine_tune"), **given)
    optimiser = dataclasses.replace(training.optimiser, learning_rate=tuning.learning_rate)
    objective = None if method_table is None else makers.objective(method_table, f"{where}.fine_tune.method")
    if objective is not None and getattr(method, "distil", False):
        raise InputError(
            f"{where}.fine_tune.method: '{name}' fine-tunes by a distillation of its own; distil = false allows another"
        )
    return Step(name, method, dataclasses.replace(training, optimiser=optimiser), tuning.epochs, objective)
