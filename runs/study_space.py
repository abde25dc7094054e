"""What a study varies, as axes; one function from a place on them to a configuration; and what configurations cost.

A configuration is an architecture at its full size: a ``StageGenotype``, or a ``Genotype`` of cells and its base
channels. To build a network takes a tenth of a second, and a study may have thousands: the cost of a stage depends on
its depth, its width and what comes into it, so that each such stage is counted once, in a network that has it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nas.analysis.complexity import complexity
from nas.errors import InputError
from nas.model_file import ModelSpec
from nas.randomness import generator
from nas.studies.rules import robust_scaling
from runs.construct import check_keys
from runs.study_part import Budget, Compound, Limits, StudyPart
from search_spaces.catalogue import load_genotype, space_of
from search_spaces.genotype import AnyGenotype, Genotype, GenotypeError, StageGenotype, genotype_from_data

LARGEST_GRID = 250_000
"""Configurations that are listed one by one; of more, a sampler draws some."""

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Configuration:
    """An architecture at its size.  channels: base filters of cells, 0 where the genotype itself has its size."""

    genotype: AnyGenotype
    channels: int = 0

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that name it: those of the genotype, where that holds its size."""
        if not self.channels:
            return self.genotype.digest
        text = json.dumps([self.genotype.to_data(), self.channels], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage, or cells of each section where these are stated."""
        return self.genotype.layout.depths if isinstance(self.genotype, Genotype) else self.genotype.depths

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage, or filters of each section."""
        if isinstance(self.genotype, Genotype):
            return tuple(self.channels * factor for factor in self.genotype.layout.ratio)
        return self.genotype.widths

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """What else was varied, by name."""
        if isinstance(self.genotype, Genotype):
            return (("sections", "-".join(self.genotype.layout.sections)),)
        return self.genotype.options

    def to_data(self) -> dict[str, Any]:
        """As written to JSON."""
        return {"genotype": self.genotype.to_data(), "channels": self.channels}

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Configuration:
        """The configuration in parsed JSON."""
        return Configuration(genotype_from_data(data["genotype"]), int(data["channels"]))


@dataclass(frozen=True)
class Axis:
    """One thing that is varied, and its choices."""

    name: str
    choices: tuple[Any, ...]


@dataclass(frozen=True)
class Axes:
    """All axes of a study, and the configuration of a choice on each. ``cells``: the architecture that is varied."""

    axes: tuple[Axis, ...]
    space: str = ""
    cells: Genotype | None = None

    @property
    def size(self) -> int:
        """Configurations of the whole grid."""
        return math.prod(len(axis.choices) for axis in self.axes)

    def configuration(self, values: Values) -> Configuration:
        """The configuration at ``values``, one for each axis by its name. Raises ``InputError`` where there is none."""
        depths = _several(values, "depth")
        try:
            if self.cells is None:
                options = {name.removeprefix("option "): v for name, v in values.items() if name.startswith("option ")}
                widths = _several(values, "width")
                space: Any = space_of(StageGenotype(self.space, depths, widths, tuple(options.items())))
                # Options at their defaults are left out: a network has one name.
                return Configuration(space.genotype(depths, widths, **options))
            layout = dataclasses.replace(
                self.cells.layout, sections=tuple(values["sections"]), ratio=tuple(values["ratio"]), depths=depths
            )
            cell = self.cells.cell
            genotype = Genotype(self.cells.space, layout, tuple((kind, cell[kind]) for kind in layout.kinds))
            return Configuration(genotype, int(values["channels"]))
        except KeyError as error:
            raise InputError(f"study: the genotype has no cell of kind {error}: use its own in sections") from None
        except GenotypeError as error:
            raise InputError(f"study: {error}") from None
        except ValueError as error:
            raise InputError(f"study, {_shown(values)}: {error}") from None

    def values(self, table: Mapping[str, Any], where: str, rest: Values | None = None) -> dict[str, Any]:
        """The choices that a table of a recipe states (depths, widths, ...); what it does not is of ``rest``."""
        stated: dict[str, Any] = {}
        known = ("depths", "widths", "options") if self.cells is None else ("depths", "channels", "ratio", "sections")
        check_keys(table, known, where)
        for key, value in table.items():
            if key in ("depths", "widths"):
                stages = sum(axis.name.startswith(f"{key[:-1]} ") for axis in self.axes)
                if not isinstance(value, list) or len(value) != stages or not all(type(v) is int for v in value):
                    raise InputError(f"{where}.{key} must be {stages} whole numbers, not {value!r}")
                stated |= {f"{key[:-1]} {i}": v for i, v in enumerate(value, start=1)}
            elif key == "options":
                if not isinstance(value, Mapping):
                    raise InputError(f"{where}.options must be a table, not {value!r}")
                stated |= {f"option {name}": v for name, v in value.items()}
            else:
                stated[key] = tuple(value) if isinstance(value, list) else value
        whole = {**(rest or {}), **stated}
        for axis in self.axes:
            if axis.name not in whole:
                if len(axis.choices) > 1:
                    what = axis.name.split()[0]
                    raise InputError(f"{where}: '{axis.name}' is not stated: give {what}s, or one choice only")
                whole[axis.name] = axis.choices[0]
        return {axis.name: whole[axis.name] for axis in self.axes} | whole

    def grid(self, varied: Callable[[str], bool], fixed: Values) -> Iterator[Configuration]:
        """All configurations of the axes that are ``varied``, the others as in ``fixed``."""
        axes = [axis if varied(axis.name) else Axis(axis.name, (fixed[axis.name],)) for axis in self.axes]
        count = math.prod(len(axis.choices) for axis in axes)
        if count > LARGEST_GRID:
            raise InputError(
                f"study: {count:,} configurations are too many for a grid: give fewer choices (at most "
                f"{LARGEST_GRID:,}), or draw some by sampler = {{ name = 'random', trials = 1000 }}"
            )
        names = [axis.name for axis in axes]
        for choice in itertools.product(*(axis.choices for axis in axes)):
            yield self.configuration(dict(zip(names, choice, strict=True)))


def axes_of(part: StudyPart, cells: int = 0) -> Axes:
    """The axes of a study.  cells: of a network of cells whose depths are not stated."""
    if part.space:
        if len(part.depths) != len(part.widths) or not (part.depths or part.compound):
            raise InputError("study: give depths and widths, a list of choices for each of as many stages")
        axes = [Axis(f"{name} {i}", choices) for name, lists in (("depth", part.depths), ("width", part.widths))
                for i, choices in enumerate(lists, start=1)]  # fmt: skip
        axes += [Axis(f"option {n}", tuple(v) if isinstance(v, list) else (v,)) for n, v in part.options.items()]
        found = Axes(tuple(axes), space=part.space)
    else:
        genotype = _genotype(part.genotype)
        layout = genotype.layout
        own = layout.depths or _even(layout.reductions(cells), cells)
        depths = part.depths or tuple((depth,) for depth in own)
        if not part.channels:
            raise InputError("study.channels is missing: the base filters of the cells, a list of choices")
        ratios, sections = part.ratios or (layout.ratio,), part.sections or (layout.sections,)
        if not len(depths) == len(sections[0]) == len(ratios[0]) or len({len(one) for one in (*ratios, *sections)}) > 1:
            raise InputError("study: depths, and each of ratios and sections, need one entry for each section")
        axes = [Axis(f"depth {i}", choices) for i, choices in enumerate(depths, start=1)]
        axes += [Axis("channels", part.channels), Axis("ratio", ratios), Axis("sections", sections)]
        found = Axes(tuple(axes), cells=genotype)
    for axis in found.axes:
        if not axis.choices or len(set(map(repr, axis.choices))) < len(axis.choices):
            raise InputError(f"study: '{axis.name}' needs at least one choice, each once")
    return found


@dataclass
class Costs:
    """Parameters and MACs of configurations, each kind of stage counted once.

    spec: the network of a configuration. For some configurations the sum is checked against the network itself; where
    that fails, the space is not a sum of its stages, and each configuration is counted by itself.
    """

    spec: Callable[[Configuration], ModelSpec]
    checks: int = 3

    def __post_init__(self) -> None:
        self.counted = 0
        self._parts: dict[tuple[Any, ...], tuple[int, int]] = {}
        self._names: tuple[str, ...] = ()
        self._whole: dict[str, tuple[int, int]] = {}
        self._checked = 0
        self._additive = True

    def __call__(self, configuration: Configuration) -> tuple[int, int]:
        """Parameters, and MACs of one image. Raises ``InputError`` for a network that cannot be built."""
        known = self._whole.get(configuration.digest)
        if known is not None:
            return known
        keys = [(name, *key) for name, key in self._keys(configuration)]
        if not keys or any(key not in self._parts for key in keys):
            return self._count(configuration)
        found = [self._parts[key] for key in keys]
        total = sum(cost for cost, _ in found), sum(cost for _, cost in found)
        if self._checked < self.checks:
            self._checked += 1
            if (counted := self._count(configuration)) != total:
                self._names, self._parts = (), {}  # not a sum: from now on every one by itself
                self._checked = self.checks
                self._additive = False
                return counted
        return total

    def _count(self, configuration: Configuration) -> tuple[int, int]:
        self.counted += 1
        try:
            cost = complexity(self.spec(configuration))
        except (ValueError, RuntimeError) as error:
            text = " ".join(str(error).split())
            raise InputError(f"study: {_named(configuration)} cannot be built for this data: {text}") from None
        names = tuple(section.name for section in cost.sections)
        if self._additive and names and (not self._names or names == self._names):
            self._names = names
            for (name, key), section in zip(self._keys(configuration), cost.sections, strict=True):
                self._parts.setdefault((name, *key), (section.parameters, section.macs))
        self._whole[configuration.digest] = cost.parameters, cost.macs
        return cost.parameters, cost.macs

    def _keys(self, configuration: Configuration) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """What the cost of each part of the network depends on."""
        depths, widths = configuration.depths, configuration.widths
        rest = configuration.options
        for name in self._names:
            place = name.rpartition(" ")[2]
            if not place.isdigit():
                yield name, (widths[0], widths[-1], rest)
                continue
            index = int(place) - 1
            before = [(min(depth, 2), width) for depth, width in zip(depths[:index], widths[:index], strict=True)]
            # A cell sees the output of the two before it; a block that of the one.
            seen = (
                tuple(before[-2:])
                if isinstance(configuration.genotype, Genotype)
                else widths[max(0, index - 1) : index]
            )
            yield name, (depths[index], widths[index], seen, rest)


def planned(part: StudyPart, axes: Axes, costs: Costs, seed: int = 0) -> list[Configuration]:
    """The configurations of a study without a sampler, each once. Raises ``InputError`` where none is left."""
    found: Iterable[Configuration]
    if isinstance(part.configurations, str):
        if part.compound is not None:
            found = compound(part.compound, axes, costs)
        elif part.configurations == "grid":
            found = axes.grid(lambda name: True, {})
        else:
            fixed = axes.values(part.baseline, "study.baseline", _all_but(axes, part.configurations[:-1]))
            varied = part.configurations[:-1] + " "
            found = axes.grid(lambda name: name.startswith(varied), fixed)
    else:
        if not part.configurations:
            raise InputError("study.configurations is an empty list")
        stated = enumerate(part.configurations)
        found = (axes.configuration(axes.values(t, f"study.configurations[{i}]")) for i, t in stated)
    kept = list({one.digest: one for one in found}.values())
    if part.budget is not None or part.limits.parameters or part.limits.macs:
        counted = [(one, *costs(one)) for one in kept]
        kept = [one for one, parameters, macs in counted if fits(part.budget, part.limits, parameters, macs)]
        if not kept:
            raise InputError(refusal(part.budget, part.limits, counted))
    if 0 < part.draw < len(kept):
        drawn = torch.randperm(len(kept), generator=generator(seed, "configurations"))[: part.draw]
        kept = [kept[index] for index in sorted(drawn.tolist())]
    return kept


def compound(rule: Compound, axes: Axes, costs: Costs) -> Iterator[Configuration]:
    """The network of each size and each share of depth by RobustScaling, with each of the options."""
    varied = [axis for axis in axes.axes if axis.name.startswith("option ")]
    for choice in itertools.product(*(axis.choices for axis in varied)):
        yield from _scaled(rule, axes, costs, {axis.name: value for axis, value in zip(varied, choice, strict=True)})


def _scaled(rule: Compound, axes: Axes, costs: Costs, options: Values) -> Iterator[Configuration]:
    def built(depths: Sequence[int], factors: Sequence[float]) -> Configuration:
        widths = [round(factor * base) for factor, base in zip(factors, rule.base, strict=True)]
        stages = {f"depth {i}": depth for i, depth in enumerate(depths, start=1)}
        stages |= {f"width {i}": width for i, width in enumerate(widths, start=1)}
        return axes.configuration({**stages, **options})

    for size in rule.parameters or rule.macs:
        for share in rule.shares:
            scaled = robust_scaling(
                lambda depths, factors: costs(built(depths, factors))[0 if rule.parameters else 1],
                size,
                share=share,
                depth_pattern=rule.depth_pattern,
                width_pattern=rule.width_pattern,
                step=rule.step,
            )
            yield built(scaled.depths, scaled.factors)


def fits(budget: Budget | None, limits: Limits, parameters: int, macs: int) -> bool:
    """Whether a configuration of that cost is within what a study may have."""
    if (limits.parameters and parameters > limits.parameters) or (limits.macs and macs > limits.macs):
        return False
    if budget is None:
        return True
    cost, target = (parameters, budget.parameters) if budget.parameters else (macs, budget.macs)
    return abs(cost - target) <= budget.tolerance * target


def refusal(budget: Budget | None, limits: Limits, counted: Sequence[tuple[Configuration, int, int]]) -> str:
    """Why nothing is left, and the nearest value that would leave something."""
    within = [(one, p, m) for one, p, m in counted if fits(None, limits, p, m)]
    if not within:
        least = min(p for _, p, _ in counted), min(m for _, _, m in counted)
        over = [
            f"limits.{name} = {limit:,.0f} (the smallest has {smallest:,})"
            for name, limit, smallest in zip(
                ("parameters", "macs"), (limits.parameters, limits.macs), least, strict=True
            )
            if limit and smallest > limit
        ]
        if not over:
            cheapest = min(counted, key=lambda entry: entry[1:])
            over = [f"both limits at once (the smallest has {cheapest[1]:,} parameters, {cheapest[2]:,} MACs)"]
        return f"study: no configuration keeps to {' and '.join(over)}: raise it, or give smaller choices"
    assert budget is not None
    name, target = ("parameters", budget.parameters) if budget.parameters else ("macs", budget.macs)
    near = min((p if budget.parameters else m for _, p, m in within), key=lambda cost: abs(cost - target))
    # Up to the next thousandth; a tolerance of all and more is none.
    enough = math.ceil(1000 * abs(near - target) / target) / 1000
    return (
        f"study.budget: no configuration has {name} within {budget.tolerance:.1%} of {target:,.0f}; the nearest "
        f"possible is {near:,}: set study.budget.{name}={near}" + f", or a tolerance of {enough:.3f}" * (enough < 1)
    )


def _several(values: Values, name: str) -> tuple[int, ...]:
    return tuple(value for key, value in values.items() if key.startswith(f"{name} "))


def _all_but(axes: Axes, varied: str) -> dict[str, Any]:
    """A stand-in for the axes that are varied: the baseline need not state them."""
    return {axis.name: axis.choices[0] for axis in axes.axes if axis.name.startswith(f"{varied} ")}


def _genotype(name: str) -> Genotype:
    if Path(name).is_dir():
        from runs.context import found_genotype
        from runs.directory import open_run

        genotype = found_genotype(open_run(Path(name)))
        space_of(genotype)
    else:
        genotype = load_genotype(name)
    if not isinstance(genotype, Genotype):
        raise InputError(f"study.genotype: '{name}' is written in stages: name its space by study.space instead")
    return genotype


def _even(reductions: Sequence[int], cells: int) -> tuple[int, ...]:
    edges = [0, *reductions, cells]
    return tuple(end - begin for begin, end in itertools.pairwise(edges))


def _shown(values: Values) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def _named(configuration: Configuration) -> str:
    return f"depths {list(configuration.depths)}, widths {list(configuration.widths)}"
