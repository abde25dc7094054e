"""The topology of genotypes as plain data."""

import json

import torch

from nas.analysis.topology import topology
from search_spaces import dsara
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import StageGenotype


def test_arnas_by_kind():
    accurate, reduction, robust = topology(load_genotype("arnas"))
    assert accurate.to_data() == {
        "kind": "accurate",
        "depth": 3,
        "input_edges": 6,
        "edges": 8,
        "antichain": 2,
        "paths": 11,
        "operations": {"sep_conv_5x5": 3, "skip_connect": 3, "sep_conv_3x3": 2},
    }
    assert (reduction.kind, robust.kind, robust.depth, robust.input_edges) == ("reduction", "robust", 4, 3)


def test_data_survives_json():
    genotype = dsara.SPACE.random(torch.Generator().manual_seed(3))
    for row in topology(genotype):
        assert json.loads(json.dumps(row.to_data())) == row.to_data()
        assert sum(row.operations.values()) == row.edges == 8


def test_a_chain_of_layers_has_no_cells():
    assert topology(StageGenotype("plain", (2, 2), (16, 32))) == ()
