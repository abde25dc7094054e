"""Parameters and multiply-accumulates against torch's own counter, and that the parts add up."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nas.analysis.complexity import complexity, nonzero_parameters, parameters_of
from nas.compression.magnitude import MagnitudePruning
from nas.model_file import ModelSpec, with_plan
from search_spaces import darts, dsara
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import StageGenotype
from search_spaces.network import parameter_count


def spec_of(genotype, *, channels=8, cells=6, shape=(3, 16, 16), auxiliary=False):
    mean = (0.5,) * shape[0]
    return ModelSpec(genotype, channels, cells, shape, tuple("0123456789"), mean, mean, auxiliary=auxiliary)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


ARNAS = spec_of(load_genotype("arnas"), channels=64, cells=20, shape=(3, 32, 32))
SPECS = {
    "arnas": ARNAS,
    "digits": spec_of(dsara.SPACE.random(seeded(0)), shape=(1, 8, 8)),
    "depths": spec_of(
        replace(dsara.SPACE.random(seeded(5)), layout=replace(dsara.SPACE.layout, depths=(1, 4, 2))), cells=20
    ),
    "odd sizes": spec_of(dsara.SPACE.random(seeded(1)), channels=5, cells=7, shape=(3, 13, 11)),
    "one channel": spec_of(dsara.SPACE.random(seeded(2)), channels=1),
    "stem with strides": spec_of(darts.SPACE.random(seeded(3)), channels=4, shape=(3, 160, 160)),
    "darts": spec_of(darts.SPACE.random(seeded(4))),
    "plain": spec_of(StageGenotype("plain", (2, 1, 3), (8, 12, 20))),
}


def torch_macs(spec):
    with torch.device("meta"):
        model = spec.build().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, *spec.input_shape, device="meta"))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", SPECS)
def test_totals_are_those_of_torch_and_parts_add_up(name):
    spec = SPECS[name]
    cost = complexity(spec)
    assert cost.macs == torch_macs(spec)
    assert cost.parameters == parameters_of(spec) == parameter_count(spec.build())
    assert sum(section.macs for section in cost.sections) == cost.macs
    assert sum(section.parameters for section in cost.sections) == cost.parameters
    for number in {cell.section for cell in cost.cells}:
        (section,) = (one for one in cost.sections if one.name == f"section {number}")
        inside = [cell for cell in cost.cells if cell.section == number]
        assert (section.parameters, section.macs) == (
            sum(cell.parameters for cell in inside),
            sum(cell.macs for cell in inside),
        )


def test_published_size_of_arnas():
    cost = complexity(ARNAS)
    assert cost.parameters == 4_520_394
    assert round(cost.macs / 1e9, 2) == 1.24
    assert [section.name for section in cost.sections] == ["stem", "section 1", "section 2", "section 3", "classifier"]
    placed = ARNAS.genotype.layout.place(20, 64)
    assert [(cell.index, cell.kind, cell.channels) for cell in cost.cells] == [
        (index, place.kind, place.channels) for index, place in enumerate(placed)
    ]
    assert [cell.section for cell in cost.cells] == [1] * 6 + [2] * 7 + [3] * 7


def test_depths_and_not_the_number_of_cells_say_where_the_cost_is():
    spec = SPECS["depths"]
    assert [cell.section for cell in complexity(spec).cells] == [1] + [2] * 4 + [3] * 2
    assert complexity(replace(spec, cells=3)) == complexity(spec)


def test_a_cell_counted_by_hand():
    """The first layer of a plain network: 3x3 kernels of 3 channels at each of 16 x 16 places, and its BN."""
    cost = complexity(SPECS["plain"])
    assert [section.name for section in cost.sections] == ["stage 1", "stage 2", "stage 3", "classifier"]
    assert cost.cells == ()
    stage = cost.sections[0]
    assert stage.macs == 16 * 16 * 8 * (9 * 3 + 9 * 8)
    assert stage.parameters == 8 * (9 * 3 + 9 * 8) + 2 * 2 * 8
    assert (cost.sections[-1].macs, cost.sections[-1].parameters) == (200, 210)


def test_the_auxiliary_head_is_not_deployed():
    spec = SPECS["digits"]
    assert complexity(replace(spec, auxiliary=True)) == complexity(spec)


def test_masks_change_neither_size_nor_macs_but_the_nonzero_count():
    spec = spec_of(dsara.SPACE.random(seeded(6)), channels=4, shape=(1, 8, 8), auxiliary=True)
    dense = spec.build()
    assert nonzero_parameters(dense) == parameter_count(dense)
    plan = MagnitudePruning(keep=0.3).plan(dense)
    pruned = plan.apply(dense)
    again = MagnitudePruning(keep=0.1).plan(pruned).apply(pruned)
    sparse_spec = with_plan(spec, plan)
    assert complexity(sparse_spec) == complexity(spec)
    assert parameters_of(sparse_spec) == parameters_of(spec)
    assert complexity(sparse_spec).macs == torch_macs(sparse_spec)
    for model in (pruned, again):
        zeros = sum(
            int((module.weight == 0).sum())
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
        )
        assert 0 < zeros == parameter_count(model) - nonzero_parameters(model)
    assert nonzero_parameters(again) < nonzero_parameters(pruned)


def test_a_weight_that_happens_to_be_zero_is_counted():
    model = SPECS["plain"].build()
    torch.nn.init.zeros_(model.classifier.weight)
    assert nonzero_parameters(model) == parameter_count(model)


def test_counting_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    complexity(SPECS["digits"])
    assert torch.equal(torch.get_rng_state(), before)


def test_data_is_plain():
    data = complexity(SPECS["digits"]).to_data()
    assert set(data) == {"parameters", "macs", "sections", "cells"}
    assert set(data["sections"][0]) == {"name", "parameters", "macs"}
    assert set(data["cells"][0]) == {"index", "kind", "channels", "section", "parameters", "macs"}
