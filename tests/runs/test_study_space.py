"""What a study varies: which configurations a recipe means, what they cost, and what is said where none fits."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from nas.analysis.complexity import complexity
from nas.errors import InputError
from nas.model_file import ModelSpec
from nas.studies.rules import depth_share
from runs.study_part import Limits, study_from
from runs.study_space import Configuration, Costs, axes_of, fits, planned
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import Genotype

CLASSES = tuple(map(str, range(10)))


def spec(one: Configuration) -> ModelSpec:
    return ModelSpec(one.genotype, one.channels or 1, 6, (1, 16, 16), CLASSES, (0.5,), (0.5,))


def plan(table: dict[str, Any], costs: Costs | None = None) -> list[Configuration]:
    part = study_from(table)
    return planned(part, axes_of(part, 6), costs or Costs(spec))


GRID: dict[str, Any] = {"space": "resnet", "depths": [[1, 2], [1, 2], [1]], "widths": [[4, 8], [6], [4, 8, 12]]}
CELLS: dict[str, Any] = {"genotype": "arnas", "channels": [2, 4], "depths": [[1, 2], [2], [2, 3]]}


def test_a_grid_has_every_combination_once() -> None:
    found = plan(GRID)
    shapes = {(one.depths, one.widths) for one in found}
    assert len(found) == len(shapes) == 2 * 2 * 1 * 2 * 1 * 3
    assert ((2, 2, 1), (8, 6, 12)) in shapes


def test_depths_alone_leave_the_widths_at_the_baseline() -> None:
    found = plan({**GRID, "configurations": "depths", "baseline": {"widths": [8, 6, 4]}})
    assert {one.widths for one in found} == {(8, 6, 4)} and len(found) == 4
    found = plan({**GRID, "configurations": "widths", "baseline": {"depths": [2, 1, 1]}})
    assert {one.depths for one in found} == {(2, 1, 1)} and len(found) == 6
    with pytest.raises(InputError, match=r"study.baseline: 'width 1' is not stated"):
        plan({**GRID, "configurations": "depths"})


def test_configurations_given_one_by_one() -> None:
    given = [{"depths": [2, 1, 1], "widths": [5, 6, 7]}, {"depths": [1, 1, 1], "widths": [5, 6, 7]}]
    found = plan({**GRID, "configurations": [*given, given[0]]})
    assert [(one.depths, one.widths) for one in found] == [((2, 1, 1), (5, 6, 7)), ((1, 1, 1), (5, 6, 7))]
    with pytest.raises(InputError, match=r"study.configurations\[0\].depths must be 3 whole numbers"):
        plan({**GRID, "configurations": [{"depths": [1, 1]}]})


@pytest.mark.parametrize("what", ["parameters", "macs"])
def test_a_slice_is_what_the_networks_themselves_cost(what: str) -> None:
    every = {one.digest: getattr(complexity(spec(one)), what) for one in plan(GRID)}
    target = sorted(every.values())[len(every) // 2]
    near = {digest for digest, cost in every.items() if abs(cost - target) <= 0.2 * target}
    found = plan({**GRID, "budget": {what: target, "tolerance": 0.2}})
    assert {one.digest for one in found} == near and 1 < len(near) < len(every)


@pytest.mark.slow
def test_compound_scaling_follows_its_rule_at_every_size() -> None:
    sizes, shares = [40_000, 100_000], [0.4, 0.7]
    rule = {"parameters": sizes, "shares": shares, "base": [4, 8, 16], "step": 0.5}
    found = plan({"space": "residual", "configurations": "compound", "compound": rule})
    assert len(found) == 4
    for one, (size, share) in zip(found, itertools.product(sizes, shares), strict=True):
        assert complexity(spec(one)).parameters == pytest.approx(size, rel=0.15)
        factors = [width / base for width, base in zip(one.widths, (4, 8, 16), strict=True)]
        assert depth_share(one.depths, factors) == pytest.approx(share, abs=0.1)
    rule = {"parameters": [100_000], "base": [4, 8, 16]}
    gated = {"space": "residual", "configurations": "compound", "compound": rule, "options": {"se": ["none", "plain"]}}
    assert [one.options for one in plan(gated)] == [(), (("se", "plain"),)]
    with pytest.raises(InputError, match="belong together"):
        plan({**GRID, "configurations": "compound"})
    with pytest.raises(InputError, match="either by parameters"):
        plan({"space": "residual", "configurations": "compound", "compound": {}})


def test_some_are_drawn_at_random_by_the_seed() -> None:
    part = study_from({**GRID, "draw": 10})
    every = plan(GRID)
    one, again, other = (planned(part, axes_of(part), Costs(spec), seed) for seed in (0, 0, 1))
    assert one == again != other and len(set(one)) == len(set(other)) == 10
    assert set(one) < set(every) and plan({**GRID, "draw": 1000}) == every


def test_an_impossible_budget_names_the_nearest() -> None:
    costs = sorted({complexity(spec(one)).parameters for one in plan(GRID)})
    with pytest.raises(
        InputError, match=rf"nearest possible is {costs[-1]:,}: set study.budget.parameters={costs[-1]}"
    ):
        plan({**GRID, "budget": {"parameters": 10 * costs[-1]}})
    assert plan({**GRID, "budget": {"parameters": costs[-1]}})
    with pytest.raises(InputError, match=r"or a tolerance of (0\.\d+)$") as refused:
        plan({**GRID, "budget": {"parameters": 1.2 * costs[-1], "tolerance": 0.01}})
    assert plan({**GRID, "budget": {"parameters": 1.2 * costs[-1], "tolerance": float(str(refused.value)[-5:])}})
    with pytest.raises(InputError, match=r"set study.budget.parameters=\d+$"):
        plan({**GRID, "budget": {"parameters": costs[0] / 3}})
    with pytest.raises(InputError, match=rf"limits.parameters = 10 \(the smallest has {costs[0]:,}\)"):
        plan({**GRID, "limits": {"parameters": 10}})
    assert len(plan({**GRID, "limits": {"parameters": costs[0]}})) == 1


def test_costs_of_a_grid_from_few_networks() -> None:
    costs = Costs(spec)
    every = plan({**GRID, "widths": [[4, 8, 12], [6, 12], [4, 8, 12]]})
    found = {one: costs(one) for one in every}
    assert len(every) == 72 and costs.counted < 36
    for one in every[::9]:
        whole = complexity(spec(one))
        assert found[one] == (whole.parameters, whole.macs)


def test_costs_of_cells_depend_on_two_sections_before() -> None:
    costs = Costs(spec)
    for one in plan({**CELLS, "channels": [2], "ratios": [[1, 2, 2], [2, 1, 4]]})[::2]:
        whole = complexity(spec(one))
        assert costs(one) == (whole.parameters, whole.macs)


def test_costs_that_are_no_sum_of_stages_are_counted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def interacting(given: ModelSpec) -> Any:
        found, depths = complexity(given), given.genotype.depths  # type: ignore[union-attr]
        return dataclasses.replace(found, parameters=found.parameters + depths[0] * depths[1])

    monkeypatch.setattr("runs.study_space.complexity", interacting)
    costs = Costs(spec)
    for one in plan(GRID)[::2]:
        assert costs(one)[0] == interacting(spec(one)).parameters


def test_cells_are_varied_in_depth_width_ratio_and_placement() -> None:
    own = load_genotype("arnas")
    assert isinstance(own, Genotype)
    sections = [list(own.layout.sections), [own.layout.sections[-1]] * 2 + [own.layout.sections[0]]]
    found = plan({**CELLS, "ratios": [[1, 2, 2], [1, 1, 1]], "sections": sections})
    assert len({one.digest for one in found}) == len(found) == 2 * 2 * 2 * 2 * 2
    for one in found:
        assert isinstance(one.genotype, Genotype)
        placed = one.genotype.layout.place(6, one.channels)
        assert len(placed) == sum(one.depths)
        assert tuple(dict.fromkeys((p.section, p.channels) for p in placed)) == tuple(enumerate(one.widths))
        assert all(cell == own.cell[kind] for kind, cell in one.genotype.cells)
    assert Configuration.from_data(found[0].to_data()) == found[0]


def test_without_depths_cells_keep_their_own() -> None:
    (one,) = plan({"genotype": "arnas", "channels": [4]})
    layout = load_genotype("arnas").layout  # type: ignore[union-attr]
    assert [p.section for p in one.genotype.layout.place(6, 4)] == [p.section for p in layout.place(6, 4)]  # type: ignore[union-attr]


def test_the_digest_tells_base_channels_apart() -> None:
    small, large = plan({"genotype": "arnas", "channels": [4, 8]})
    assert small.genotype == large.genotype and small.digest != large.digest


@pytest.mark.parametrize(
    "change, message",
    [
        ({"space": "resnets"}, "unknown search space 'resnets'"),
        ({"depths": [[1], [1]]}, "a list of choices for each of as many stages"),
        ({"depths": [[1, 1], [1], [1]]}, "'depth 1' needs at least one choice, each once"),
        ({"depths": [[], [1], [1]]}, "'depth 1' needs at least one choice"),
        ({"depths": [[0], [1], [1]]}, "at least 1"),
        ({"genotype": "arnas"}, "either a space of stages"),
        ({"channels": [4]}, "'channels' is of a genotype of cells"),
        ({"options": {"se": "plain"}}, "has no options"),
        ({"seeds": [0, 0]}, "each once"),
        ({"configurations": "gird"}, "did you mean 'grid'"),
        ({"budget": {"parameters": 1, "macs": 1}}, "either parameters or macs"),
        ({"sampler": {"name": "tep", "trials": 3}}, "did you mean 'tpe'"),
        ({"sampler": {"name": "tpe", "trials": 3, "objectives": ["robst"]}}, "did you mean 'robust'"),
        ({"sampler": {"name": "tpe", "trials": 3}, "configurations": "depths"}, "chooses configurations itself"),
        ({"pruner": {"name": "medien"}}, "did you mean 'median'"),
        ({"pruner": {"name": "median", "n_warmup": 3}}, "did you mean 'n_warmup_steps'"),
        ({"pruner": {"name": "percentile", "percentile": 200.0}}, "study.pruner: "),
        ({"rungs": [{"epochs": 1}]}, "name one by pruner"),
        (
            {"pruner": {"name": "median"}, "sampler": {"name": "nsga2", "trials": 3, "objectives": ["robust", "macs"]}},
            "a pruner compares one number",
        ),
        ({"heartbeat": 0}, "heartbeat must be above 0"),
        ({"widts": []}, "did you mean 'widths'"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        plan({**GRID, **change})
    assert "\n" not in str(caught.value)


def test_limits_and_budget_hold_together() -> None:
    assert fits(None, Limits(), 10**12, 10**12)
    assert not fits(None, Limits(parameters=10), 11, 1) and not fits(None, Limits(macs=10), 1, 11)
