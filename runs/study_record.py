"""What a study found, told: rows of a file, configurations with their means, and which to take within a budget."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student

from nas.errors import InputError
from nas.evaluation.interval import wilson
from nas.studies.observation import Observation, by_configuration

LEVEL = 0.95


def csv_of(results: Mapping[str, Any]) -> str:
    """One line an observation; lists of stages are joined by '-'."""
    entries = results["observations"]
    attacks = list(results["attacks"])
    measures = sorted({name for entry in entries for name in entry["observation"]["measures"]})
    options = sorted({name for entry in entries for name, _ in entry["observation"]["options"]})
    plain = ("configuration", "space", "seed", "epochs", "parameters", "macs", "natural", "robust", "n", "latency")
    lists = ("depths", "widths", "stage_parameters", "stage_macs")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *lists, *options, *attacks, *measures])
    for entry in entries:
        one = entry["observation"]
        stated = dict(one["options"])
        writer.writerow(
            [
                *("" if one[name] is None else one[name] for name in plain),
                *("-".join(map(str, one[name])) for name in lists),
                *(stated.get(name, "") for name in options),
                *(entry["attacks"][name] for name in attacks),
                *(one["measures"].get(name, "") for name in measures),
            ]
        )
    return text.getvalue()


@dataclass(frozen=True)
class Candidate:
    """A configuration over its seeds.

    robust, natural: means;  low, high: the interval of the mean of ``robust``, from the deviation between seeds that
    all configurations have in common; of one seed alone, over the test images.
    """

    first: Observation
    seeds: tuple[int, ...]
    robust: float
    natural: float
    low: float
    high: float

    @property
    def digest(self) -> str:
        """Of the configuration."""
        return self.first.configuration

    def to_data(self) -> dict[str, Any]:
        """As written to JSON."""
        return {
            "configuration": self.digest,
            "space": self.first.space,
            "depths": list(self.first.depths),
            "widths": list(self.first.widths),
            "options": dict(self.first.options),
            "parameters": self.first.parameters,
            "macs": self.first.macs,
            "seeds": list(self.seeds),
            "natural": self.natural,
            "robust": self.robust,
            "interval": [self.low, self.high],
        }


@dataclass(frozen=True)
class Spread:
    """The standard deviation of ``robust`` between seeds, pooled over configurations, and its degrees of freedom."""

    deviation: float
    freedom: int

    def half(self, *seeds: int) -> float:
        """Half the interval of a mean over so many seeds, or of the difference of two such means."""
        return float(student.ppf((1 + LEVEL) / 2, self.freedom)) * self.deviation * math.sqrt(sum(1 / n for n in seeds))


def spread_of(observations: Sequence[Observation]) -> Spread | None:
    """How much seeds differ; None where no configuration has two.

    Pooled: three seeds tell little of one configuration's own deviation, and the luckiest few would look certain.
    """
    squares, freedom = 0.0, 0
    for group in by_configuration(observations).values():
        mean = statistics.fmean(one.robust for one in group)
        squares += sum((one.robust - mean) ** 2 for one in group)
        freedom += len(group) - 1
    return Spread(math.sqrt(squares / freedom), freedom) if freedom else None


def candidates(observations: Sequence[Observation]) -> list[Candidate]:
    """The configurations, that with the highest lower bound of mean worst-case accuracy first; then the smallest."""
    spread = spread_of(observations)
    found = []
    for group in by_configuration(observations).values():
        robust = statistics.fmean(one.robust for one in group)
        if spread is None:
            low, high = wilson(round(robust * group[0].n), group[0].n)
        else:
            half = spread.half(len(group))
            low, high = max(0.0, robust - half), min(1.0, robust + half)
        natural = statistics.fmean(one.natural for one in group)
        found.append(Candidate(group[0], tuple(one.seed for one in group), robust, natural, low, high))
    return sorted(found, key=lambda one: (-one.low, one.first.parameters, one.digest))


@dataclass(frozen=True)
class Recommendation:
    """The best configuration within a budget, what cannot be told from it, and those one step from it."""

    best: Candidate
    equals: tuple[Candidate, ...]
    neighbours: tuple[Candidate, ...]
    considered: int
    spread: Spread | None

    def to_data(self) -> dict[str, Any]:
        """As written to JSON."""
        return {
            "best": self.best.to_data(),
            "within_chance": [one.to_data() for one in self.equals],
            "neighbours": [one.to_data() for one in self.neighbours],
            "considered": self.considered,
            "seed_deviation": None if self.spread is None else self.spread.deviation,
        }

    def lines(self) -> list[str]:
        """The evidence in words."""
        best = self.best
        n = len(best.seeds)
        basis = (
            f"{n} seed{'s' * (n > 1)}, 95 % interval of the mean {best.low:.1%} to {best.high:.1%}"
            if self.spread is not None
            else f"one seed, 95 % interval over {best.first.n} test images {best.low:.1%} to {best.high:.1%}; more "
            "seeds would say what another training gives"
        )
        lines = [f"best of {self.considered} configurations within the budget: worst case {best.robust:.1%} ({basis})."]
        if self.equals:
            least = min(self.equals, key=lambda one: one.first.parameters)
            lines.append(
                f"{len(self.equals)} others are within chance of it at the 95 % level"
                + (
                    f"; the smallest has {least.first.parameters:,} parameters and {least.robust:.1%}."
                    if least.first.parameters < best.first.parameters
                    else ", none of them smaller."
                )
            )
        for one in self.neighbours:
            lines.append(f"one step away, {shape(one.first)}: {one.robust:.1%} ({one.first.parameters:,} parameters).")
        return lines


def recommend(
    observations: Sequence[Observation],
    *,
    parameters: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
) -> Recommendation:
    """The configuration to take within the budget. Raises ``InputError`` with the nearest where none fits."""
    if not observations:
        raise InputError("the study has no finished trial yet: nas study width-depth --resume goes on with it")
    limits = (("parameters", parameters), ("macs", macs), ("latency", latency))
    if latency is not None and all(one.latency is None for one in observations):
        raise InputError("the study measured no latency: begin one with --set study.latency=true")

    def fits(one: Observation) -> bool:
        return all(limit is None or _cost(one, name) <= limit for name, limit in limits)

    within = [one for one in observations if fits(one)]
    if not within:
        over = [
            f"{name} {limit:,.6g} (the smallest has {min(_cost(one, name) for one in observations):,.6g})"
            for name, limit in limits
            if limit is not None
        ]
        raise InputError(f"no configuration of the study keeps to {' and '.join(over)}: raise the budget")
    # How much seeds differ is a property of all trainings, in the budget or not.
    spread = spread_of(observations)
    fitting = {one.configuration for one in within}
    ranked = [one for one in candidates(observations) if one.digest in fitting]
    best, others = ranked[0], ranked[1:]
    if spread is None:
        equals = tuple(one for one in others if one.high >= best.low)
    else:
        equals = tuple(
            one for one in others if best.robust - one.robust <= spread.half(len(best.seeds), len(one.seeds))
        )
    near = [one for one in others if _steps(best.first, one.first) == 1]
    return Recommendation(best, equals, tuple(near[:6]), len(ranked), spread)


def shape(one: Observation) -> str:
    """Depths, widths and options of a configuration in few characters."""
    options = "".join(f", {name} {value}" for name, value in one.options)
    return f"depths {'-'.join(map(str, one.depths))}, widths {'-'.join(map(str, one.widths))}{options}"


def _cost(one: Observation, name: str) -> float:
    value = getattr(one, name)
    return math.inf if value is None else float(value)


def _steps(one: Observation, other: Observation) -> int:
    """In how many stages (or options) two configurations differ."""
    if one.space != other.space or len(one.depths) != len(other.depths):
        return len(one.depths) + len(one.widths) + 1
    pairs = [*zip(one.depths, other.depths, strict=True), *zip(one.widths, other.widths, strict=True)]
    return sum(a != b for a, b in pairs) + (one.options != other.options)


def toml(table: Mapping[str, Any]) -> str:
    """A recipe's tables as TOML: values first, then one section for each table."""
    values = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    lines = [f"{key} = {_value(value)}" for key, value in values.items()]
    for name, section in table.items():
        if isinstance(section, Mapping):
            lines += ["", f"[{name}]", *(f"{_key(key)} = {_value(value)}" for key, value in section.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def _key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else json.dumps(key)
