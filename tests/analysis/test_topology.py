"""The topology of genotypes as plain data."""

import json

import pytest
import torch

from nas.analysis.topology import STATISTICS, cell_topology, differences, topology
from search_spaces import darts, dsara
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import Cell, Edge, StageGenotype
from search_spaces.network import DiscreteCell
from search_spaces.operations import OPERATIONS


def test_arnas_by_kind():
    accurate, reduction, robust = topology(load_genotype("arnas"))
    assert accurate.to_data() == {
        "kind": "accurate",
        "depth": 3,
        "input_edges": 6,
        "edges": 8,
        "antichain": 2,
        "paths": 11,
        "path_lengths": [6, 3, 2],
        "operations": {"sep_conv_5x5": 3, "skip_connect": 3, "sep_conv_3x3": 2},
        "by_depth": [
            {"skip_connect": 2, "sep_conv_3x3": 1, "sep_conv_5x5": 1},
            {"sep_conv_3x3": 1, "sep_conv_5x5": 1},
            {"sep_conv_5x5": 1, "skip_connect": 1},
        ],
        "by_source": {
            "input": {"skip_connect": 3, "sep_conv_3x3": 2, "sep_conv_5x5": 1},
            "intermediate": {"sep_conv_5x5": 2},
        },
        "parameter_free": 3 / 8,
        "reach": 25,
    }
    assert (reduction.kind, robust.kind, robust.depth, robust.input_edges) == ("reduction", "robust", 4, 3)


def test_data_survives_json():
    genotype = dsara.SPACE.random(torch.Generator().manual_seed(3))
    for row in topology(genotype):
        assert json.loads(json.dumps(row.to_data())) == row.to_data()
        assert sum(row.operations.values()) == row.edges == 8


def test_a_chain_of_layers_has_no_cells():
    assert topology(StageGenotype("plain", (2, 2), (16, 32))) == ()


def random_cell(seed, operations):
    generator = torch.Generator().manual_seed(seed)

    def below(n):
        return int(torch.randint(n, (), generator=generator))

    return Cell(
        tuple(tuple(Edge(operations[below(len(operations))], below(node)) for _ in "ab") for node in range(2, 5))
    )


@pytest.mark.parametrize("seed", range(6))
def test_reach_is_the_field_of_the_cell_that_is_built(seed):
    """The square of pixels that a gradient comes back to. A maximum hides most of its window, hence no max pooling."""
    cell = random_cell(seed, [name for name in dsara.SPACE.operations if name != "max_pool_3x3"])
    torch.manual_seed(seed)
    built = DiscreteCell(cell, (2, 2), 2, reduces=False, previous_reduces=False).double().eval()
    # ReLU would hide pixels, too.
    for name, module in [*built.named_modules()]:
        if isinstance(module, torch.nn.ReLU):
            built.set_submodule(name, torch.nn.Identity())
    inputs = [torch.randn(1, 2, 61, 61, dtype=torch.float64, requires_grad=True) for _ in "ab"]
    built(*inputs)[..., 30, 30].sum().backward()
    seen = sum((x.grad.abs().sum((0, 1)) for x in inputs if x.grad is not None), torch.zeros(61, 61)) > 0
    rows = torch.nonzero(seen.any(1)).flatten()
    assert cell_topology("", cell).reach == int(rows.max() - rows.min()) + 1


def test_statistics_of_cells_told_by_hand():
    """Two fans and a chain: everything that they are compared by."""
    cell = Cell(
        (
            (Edge("skip_connect", 0), Edge("dil_conv_5x5", 1)),
            (Edge("max_pool_3x3", 0), Edge("sep_conv_3x3", 2)),
        )
    )
    assert cell_topology("", cell).statistics == {
        "depth": 2,
        "input edges": 3,
        "antichain": 1,
        "paths": 5,  # two through node 2, three through node 3
        "path length": (3 * 1 + 2 * 2) / 5,
        "reach": 1 + 8 + 4,
        "parameter-free": 2 / 4,
        "parameter-free at inputs": 2 / 3,
        "skips": 1 / 4,
        "dilated": 1 / 4,
    }


def test_every_operation_has_its_part_in_the_statistics():
    """Cells of one operation: the share of its family is 1, those of all others 0."""
    for name, operation in OPERATIONS.items():
        found = cell_topology("", Cell(((Edge(name, 0), Edge(name, 1)),))).statistics
        assert list(found) == list(STATISTICS)
        assert found["parameter-free"] == found["parameter-free at inputs"] == operation.parameter_free
        assert found["skips"] == (name == "skip_connect")
        assert found["dilated"] == name.startswith("dil")


def test_accurate_less_robust():
    found = differences(load_genotype("arnas"))
    # As the published cells are read: three of eight skips against eight of eight dilated, six inputs against three.
    assert (found["depth"], found["input edges"], found["parameter-free"], found["dilated"]) == (-1, 3, 3 / 8, -1)
    assert differences(darts.SPACE.random(torch.Generator())) == {}
