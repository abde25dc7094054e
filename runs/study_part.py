"""The [study] table of a recipe: which configurations of width and depth are trained, and how they are chosen."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna

from nas.errors import InputError, nearest
from nas.studies.rules import DEPTH_PATTERN, DEPTH_SHARE, WIDTH_PATTERN
from runs.construct import check_keys, construct, mapping, name_of

Direction = Literal["minimize", "maximize"]

OBJECTIVES: Mapping[str, Direction] = {
    "robust": "maximize",
    "natural": "maximize",
    "parameters": "minimize",
    "macs": "minimize",
    "latency": "minimize",
}
"""What a sampler may look for, and in which direction."""

SAMPLERS = ("random", "qmc", "tpe", "nsga2")

PRUNERS: Mapping[str, type[optuna.pruners.BasePruner]] = {
    "median": optuna.pruners.MedianPruner,
    "percentile": optuna.pruners.PercentilePruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "threshold": optuna.pruners.ThresholdPruner,
}

WAYS = ("grid", "depths", "widths", "compound")


@dataclass(frozen=True)
class Compound:
    """Networks of the same shape rule at several sizes: RobustScaling (``nas.studies.rules``).

    parameters or macs: the sizes. shares: of depth, sum D / (sum D + sum W). base: channels of each stage at a widening
    factor of 1. step: what factors are rounded to. depth_pattern, width_pattern: from stage to stage.
    """

    parameters: tuple[float, ...] = ()
    macs: tuple[float, ...] = ()
    shares: tuple[float, ...] = (DEPTH_SHARE,)
    base: tuple[int, ...] = (16, 32, 64)
    step: float = 1
    depth_pattern: tuple[float, ...] = DEPTH_PATTERN
    width_pattern: tuple[float, ...] = WIDTH_PATTERN

    def __post_init__(self) -> None:
        if bool(self.parameters) == bool(self.macs):
            raise InputError("give the sizes, either by parameters = [...] or by macs = [...]")
        if not len(self.base) == len(self.depth_pattern) == len(self.width_pattern):
            raise InputError("base, depth_pattern and width_pattern need one entry for each stage")
        if any(self.step * base != int(self.step * base) for base in self.base):
            raise InputError(f"step {self.step} of base {list(self.base)} is no whole number of channels")


@dataclass(frozen=True)
class Budget:
    """A slice of configurations of equal cost: parameters or macs, and the largest relative difference from it."""

    parameters: float = 0
    macs: float = 0
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if (self.parameters > 0) == (self.macs > 0) or min(self.parameters, self.macs) < 0:
            raise InputError("give either parameters or macs above 0: a slice is of equal one or equal other")
        if not 0 < self.tolerance < 1:
            raise InputError(f"tolerance must be above 0 and below 1, not {self.tolerance}")


@dataclass(frozen=True)
class Limits:
    """What a configuration may cost at most; 0 for no limit."""

    parameters: float = 0
    macs: float = 0

    def __post_init__(self) -> None:
        if min(self.parameters, self.macs) < 0:
            raise InputError("parameters and macs must be at least 0 (0 = no limit)")


@dataclass(frozen=True)
class Sampling:
    """A sampler of Optuna over the axes, in place of all configurations.

    trials: configurations that are tried. objectives: what it looks for, each a mean over the seeds.
    """

    name: str
    trials: int
    objectives: tuple[str, ...] = ("robust",)

    def __post_init__(self) -> None:
        if self.name not in SAMPLERS:
            raise InputError(f"no sampler '{self.name}': {nearest(self.name, SAMPLERS)}")
        if self.trials < 1:
            raise InputError(f"trials must be at least 1, not {self.trials}")
        for objective in self.objectives:
            if objective not in OBJECTIVES:
                raise InputError(f"no objective '{objective}': {nearest(objective, OBJECTIVES)}")
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise InputError("objectives must be at least one, each once")


@dataclass(frozen=True)
class Pruning:
    """A pruner of Optuna, by name, with its own settings."""

    name: str
    settings: Mapping[str, Any]

    def __call__(self) -> optuna.pruners.BasePruner:
        """The pruner."""
        return PRUNERS[self.name](**self.settings)


@dataclass(frozen=True)
class Rung:
    """A cheaper training before the full one: fewer epochs, on a share of the training images."""

    epochs: int
    data: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.data <= 1:
            raise InputError("a rung has at least 1 epoch and a share of the data above 0 and at most 1")


@dataclass(frozen=True)
class StudyPart:
    """A study of width and depth.

    Either ``space`` names a space of stages, and depths and widths list the choices of each stage, options those of
    the network (a list is varied, a value is not); or ``genotype`` (a published name, a file, a run) gives the cells,
    depths list the cells of each section, and channels (base filters), ratios and sections (the kind of cell of each
    section) are varied.

    configurations: all of the "grid"; "depths" or "widths" only, the rest as in ``baseline``; "compound", by the rule
    in ``compound``; or a list of tables, one for each configuration. draw: so many of them, at random by the recipe's
    seed; 0 for all. seeds: each configuration is trained once with each. rungs: cheaper trainings that go before, after
    each of which the pruner may stop.

    heartbeat: seconds between signs of life of a worker; one that gives none for four times as long has lost its trial.
    latency: whether it is measured. measures: whether cheap predictors of robustness are computed beside.
    keep_networks: whether the weights of all trained networks stay in the folder;
    checkpoints never do.
    """

    space: str = ""
    genotype: str = ""
    depths: tuple[tuple[int, ...], ...] = ()
    widths: tuple[tuple[int, ...], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    channels: tuple[int, ...] = ()
    ratios: tuple[tuple[int, ...], ...] = ()
    sections: tuple[tuple[str, ...], ...] = ()
    configurations: Literal["grid", "depths", "widths", "compound"] | tuple[Mapping[str, Any], ...] = "grid"
    baseline: Mapping[str, Any] = field(default_factory=dict)
    compound: Compound | None = None
    draw: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget | None = None
    limits: Limits = field(default_factory=Limits)
    sampler: Sampling | None = None
    pruner: Pruning | None = None
    rungs: tuple[Rung, ...] = ()
    heartbeat: float = 60.0
    latency: bool = False
    measures: bool = True
    keep_networks: bool = True

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(0 <= s < 2**63 for s in self.seeds):
            raise InputError(f"seeds must be at least one number of at least 0, each once, not {list(self.seeds)}")
        if (self.configurations == "compound") != (self.compound is not None):
            raise InputError("compound = { ... } and configurations = 'compound' belong together")
        if self.draw < 0:
            raise InputError(f"draw must be at least 0 (0 = all configurations), not {self.draw}")
        if not self.heartbeat > 0:
            raise InputError(f"heartbeat must be above 0 seconds, not {self.heartbeat}")
        if bool(self.space) == bool(self.genotype):
            raise InputError("name either a space of stages (space) or an architecture of cells (genotype)")
        own, other = (STAGES, CELLS) if self.space else (CELLS, STAGES)
        for name in other:
            if getattr(self, name):
                what = "a genotype of cells" if self.space else "a space of stages"
                raise InputError(f"'{name}' is of {what}: leave it out, or use {', '.join(own)}")
        if self.rungs and self.pruner is None:
            raise InputError("rungs are where a pruner may stop a trial: name one by pruner = { name = ... }")
        if self.pruner is not None and len(self.objectives) > 1:
            raise InputError(
                f"a pruner compares one number as a trial goes, and there are {len(self.objectives)} objectives: "
                "leave the pruner out, or look for 'robust' alone"
            )
        if self.pruner is not None and self.objectives != ("robust",):
            raise InputError("a pruner goes by accuracy under attack: look for 'robust', or leave the pruner out")
        if self.sampler is not None and (self.configurations != "grid" or self.budget is not None or self.draw):
            raise InputError("a sampler chooses configurations itself: leave 'configurations', 'budget', 'draw' out")

    @property
    def objectives(self) -> tuple[str, ...]:
        """What trials are compared by."""
        return self.sampler.objectives if self.sampler is not None else ("robust",)

    @property
    def directions(self) -> list[Direction]:
        """Of the objectives, as Optuna names them."""
        return [OBJECTIVES[objective] for objective in self.objectives]

    @property
    def times(self) -> bool:
        """Whether latency is measured."""
        return self.latency or "latency" in self.objectives


STAGES = ("widths", "options")
CELLS = ("channels", "ratios", "sections")
"""What is varied beside depths."""


def study_from(table: object) -> StudyPart:
    """The study that [study] describes."""
    entries = dict(mapping(table, "study"))
    given: dict[str, Any] = {}
    for name, kind in (("budget", Budget), ("limits", Limits), ("sampler", Sampling), ("compound", Compound)):
        if name in entries:
            given[name] = construct(kind, entries.pop(name), f"study.{name}")
    if "pruner" in entries:
        given["pruner"] = _pruning(entries.pop("pruner"))
    way = entries.get("configurations")
    if isinstance(way, str) and way not in WAYS:
        raise InputError(f"study.configurations: '{way}' is not known: {nearest(way, WAYS)}")
    part: StudyPart = construct(StudyPart, entries, "study", tuple(given), **given)
    return part


def _pruning(table: object) -> Pruning:
    entries = dict(mapping(table, "study.pruner"))
    name = name_of(entries, "study.pruner")
    if name not in PRUNERS:
        raise InputError(f"no pruner '{name}': {nearest(name, PRUNERS)}")
    check_keys(entries, _settings(PRUNERS[name]), "study.pruner", ("name",))
    pruning = Pruning(name, entries)
    try:
        pruning()
    except (TypeError, ValueError) as error:
        raise InputError(f"study.pruner: {' '.join(str(error).split())}") from None
    return pruning


def _settings(kind: type) -> Sequence[str]:
    return list(inspect.signature(kind).parameters)
