"""What a network costs: parameters and multiply-accumulates, in total, by section and by cell.

Everything is read off the network itself, built on the ``meta`` device, where tensors have shapes but no
values: no weights are drawn, and the kernels of ``search_spaces.kernels`` never take their CPU form, so each
convolution and linear layer runs as the module it is and a forward hook sees it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from nas.activations.activation import PerPlace
from nas.compression.masks import left_by
from nas.model_file import ModelSpec
from nas.prediction import networks_in, passes_of
from search_spaces.genotype import Genotype, StageGenotype
from search_spaces.network import parameter_count


@dataclass(frozen=True)
class SectionCost:
    """Cost of a part of the network: "stem", "section 1" (or "stage 1"), ..., "classifier"."""

    name: str
    parameters: int
    macs: int


@dataclass(frozen=True)
class CellCost:
    """Cost of one cell: its place (from 0), kind, filters per node and section (from 1)."""

    index: int
    kind: str
    channels: int
    section: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class Complexity:
    """Parameters as deployed and multiply-accumulates of one image; sections (and cells, if any) in order.

    The sections add up to the totals.
    """

    parameters: int
    macs: int
    sections: tuple[SectionCost, ...]
    cells: tuple[CellCost, ...]

    def to_data(self) -> dict[str, Any]:
        """Plain lists and dictionaries, as written to JSON."""
        return {
            "parameters": self.parameters,
            "macs": self.macs,
            "sections": [asdict(section) for section in self.sections],
            "cells": [asdict(cell) for cell in self.cells],
        }


def complexity(spec: ModelSpec) -> Complexity:
    """The cost of the network of ``spec``; of an ensemble, of all its networks and of all passes of one prediction.

    MACs count convolutions and linear layers, as is usual, and gates of activations (Sparta); normalisation, pooling
    and additions are left out.
    Masked weights count as multiplied, since dense kernels multiply them.
    """
    whole = spec.plans or spec.prediction or not isinstance(spec.activation, PerPlace | None)
    short = None if whole else _shortened(spec, 1)
    if short is None or short == spec:
        return _counted(spec)
    return _lengthened(spec, _counted_once(short), _counted_once(_shortened(spec, 2) or spec)) or _counted(spec)


def _shortened(spec: ModelSpec, depth: int) -> ModelSpec | None:
    """``spec`` with stages of at most ``depth`` layers; None for networks of cells."""
    genotype = spec.genotype
    if not isinstance(genotype, StageGenotype):
        return None
    depths = tuple(min(depth, own) for own in genotype.depths)
    return replace(spec, genotype=replace(genotype, depths=depths))


def _lengthened(spec: ModelSpec, one: Complexity, two: Complexity) -> Complexity | None:
    """The cost of ``spec`` from those of the same stages of at most one and at most two layers.

    Layers of a stage after its first are alike, so each costs what the second does: studies count thousands of
    networks that differ in depth only. None where the network does not tell its stages apart.
    """
    assert isinstance(spec.genotype, StageGenotype)
    depths = {f"stage {number}": depth for number, depth in enumerate(spec.genotype.depths, start=1)}
    if not depths.keys() <= {section.name for section in one.sections}:
        return None
    sections = []
    for first, second in zip(one.sections, two.sections, strict=True):
        more = depths.get(first.name, 1) - 1
        parameters = first.parameters + more * (second.parameters - first.parameters)
        sections.append(SectionCost(first.name, parameters, first.macs + more * (second.macs - first.macs)))
    return Complexity(
        sum(section.parameters for section in sections), sum(section.macs for section in sections), tuple(sections), ()
    )


def _counted(spec: ModelSpec) -> Complexity:
    model = _without_weights(spec)
    networks, passes = [*networks_in(model).values()], passes_of(model)
    parameters: Counter[str] = Counter()
    macs: Counter[str] = Counter()
    for network in networks:
        parameters.update(_parameters_by_name(network))
        macs.update({name: passes * cost for name, cost in _macs_by_layer(network, spec.input_shape).items()})
    sections = _sections(spec, networks[0])
    section_parameters, section_macs = _by_section(parameters, sections), _by_section(macs, sections)
    # Parameters come in the order of the network; a section without any (a quantised one) follows at the end.
    names = dict.fromkeys([*section_parameters, *section_macs])
    return Complexity(
        sum(parameters.values()),
        sum(macs.values()),
        tuple(SectionCost(name, section_parameters[name], section_macs[name]) for name in names),
        _cells(spec, parameters, macs),
    )


_counted_once = lru_cache(maxsize=4096)(_counted)


def parameters_of(spec: ModelSpec) -> int:
    """Parameters of the network of ``spec`` as deployed. Draws no weights: fit for a rejection sampler."""
    return sum(parameter_count(network) for network in networks_in(_without_weights(spec)).values())


def with_parameters(spec: ModelSpec, target: int) -> ModelSpec:
    """``spec`` with the base channels at which its network comes nearest to ``target`` parameters."""
    return _with_size(spec, target, parameters_of)


def with_macs(spec: ModelSpec, target: int) -> ModelSpec:
    """``spec`` with the base channels at which its network comes nearest to ``target`` multiply-accumulates."""
    return _with_size(spec, target, lambda one: complexity(one).macs)


def _with_size(spec: ModelSpec, target: int, size_of: Callable[[ModelSpec], int]) -> ModelSpec:
    """The base channels at which the size is nearest to ``target``.

    Networks of more channels are larger, so the channels are found by bisection. A genotype that holds its own size is
    returned as it is.
    """
    if isinstance(spec.genotype, StageGenotype):
        return spec

    def size(channels: int) -> int:
        return size_of(replace(spec, channels=channels))

    low, high = 1, 2
    while size(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) < target else (low, middle)
    return replace(spec, channels=min((low, high), key=lambda channels: abs(size(channels) - target)))


def nonzero_parameters(model: nn.Module) -> int:
    """Parameters of ``model`` as deployed, less the weights that masks hold at zero.

    A mask is a buffer ``mask`` of the weight's shape, in a parametrisation or beside the weight. Weights that merely
    happen to be zero are counted: nothing keeps them there.
    """
    return sum(_nonzero(network) for network in networks_in(model).values())


def _nonzero(model: nn.Module) -> int:
    masked = 0
    for name, module in model.named_modules():
        if name.startswith("auxiliary."):
            continue
        if not parametrize.is_parametrized(module):
            mask = getattr(module, "mask", None)
            if isinstance(mask, Tensor) and "weight" in module._parameters:
                masked += mask.numel() - int(mask.sum())
            continue
        for parametrisations in module.parametrizations.values():  # type: ignore[union-attr, operator]
            if (alive := left_by(parametrisations)) is not None:
                masked += alive.numel() - int(alive.sum())
    return parameter_count(model) - masked


def _macs_by_layer(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, int]:
    """Multiply-accumulates of one image of ``input_shape`` (C, H, W), by name of the module that carries them out.

    Those of convolutions and products of matrices, attention included. ``model`` is on the ``meta`` device and in eval
    mode. A module that runs more than once counts each time.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, *input_shape, device="meta"))
    # A module's count holds those of the modules within it.
    root = type(model).__name__
    totals = {
        name.removeprefix(root).removeprefix("."): sum(found.values())
        for name, found in counter.flop_counts.items()
        if name != "Global"
    }
    own = dict(totals)
    for name, count in totals.items():
        outer = name
        while outer:
            outer = outer.rpartition(".")[0]
            if outer in own:
                own[outer] -= count
                break
    return {name: count // 2 for name, count in own.items() if count}


def _without_weights(spec: ModelSpec) -> nn.Module:
    with torch.device("meta"):
        return spec.build().eval()


def _parameters_by_name(model: nn.Module) -> dict[str, int]:
    """As ``parameter_count``, by name."""
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if not name.startswith("auxiliary.") and torch.is_floating_point(parameter)
    }


def _sections(spec: ModelSpec, model: nn.Module) -> dict[str, str]:
    """The section of every cell ("cells.0"), stage ("stages.0") or layer of a chain ("features.0")."""
    genotype = spec.genotype
    if isinstance(genotype, Genotype):
        placed = genotype.layout.place(spec.cells, spec.channels)
        return {f"cells.{index}": f"section {place.section + 1}" for index, place in enumerate(placed)}
    return _stages(genotype, model)


def _stages(genotype: StageGenotype, model: nn.Module) -> dict[str, str]:
    """The stage of each module of ``stages``, or of a chain: there the n-th convolution begins the n-th layer."""
    if hasattr(model, "stages"):
        return {f"stages.{index}": f"stage {index + 1}" for index in range(len(genotype.depths))}
    features = model.get_submodule("features") if hasattr(model, "features") else nn.Sequential()
    stage_of_layer = [stage for stage, depth in enumerate(genotype.depths, start=1) for _ in range(depth)]
    convolutions = sum(isinstance(child, nn.Conv2d) for child in features.children())
    if convolutions != len(stage_of_layer):
        return {}
    sections, layer = {}, 0
    for name, child in features.named_children():
        layer += isinstance(child, nn.Conv2d)
        sections[f"features.{name}"] = f"stage {stage_of_layer[max(layer, 1) - 1]}"
    return sections


def _section_of(name: str, sections: dict[str, str]) -> str:
    """The section of a layer or parameter; the parts outside cells and chains, as the stem, are their own."""
    first, _, rest = name.partition(".")
    return sections.get(f"{first}.{rest.partition('.')[0]}", first)


def _by_section(costs: dict[str, int], sections: dict[str, str]) -> Counter[str]:
    totals: Counter[str] = Counter()
    for name, cost in costs.items():
        totals[_section_of(name, sections)] += cost
    return totals


def _cells(spec: ModelSpec, parameters: dict[str, int], macs: dict[str, int]) -> tuple[CellCost, ...]:
    if not isinstance(spec.genotype, Genotype):
        return ()

    def within(costs: dict[str, int], index: int) -> int:
        return sum(cost for name, cost in costs.items() if name.startswith(f"cells.{index}."))

    placed = spec.genotype.layout.place(spec.cells, spec.channels)
    return tuple(
        CellCost(i, place.kind, place.channels, place.section + 1, within(parameters, i), within(macs, i))
        for i, place in enumerate(placed)
    )
