"""Random architectures of a given size."""

import pytest
import torch

from nas.errors import InputError
from nas.search.random_cells import random_cells
from search_spaces.dsara import SPACE as DSARA

WEIGHTS = {"dil_conv_3x3": 9, "dil_conv_5x5": 25, "sep_conv_3x3": 18, "sep_conv_5x5": 50}


def _size(genotype, channels):
    """Depthwise weights of one cell of each kind: the order of the true sizes without building networks."""
    edges = [edge for _, cell in genotype.cells for node in cell.nodes for edge in node]
    return channels * sum(WEIGHTS.get(edge.operation, 0) for edge in edges)


def _fit(genotype):
    _, channels = min((abs(_size(genotype, channels) - 3000), channels) for channels in range(2, 12))
    return channels, _size(genotype, channels)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_they_are_distinct_and_of_the_size_asked_for():
    found = random_cells(DSARA, 6, _fit, 3000, 0.1, _generator())
    assert len({genotype for genotype, _ in found}) == 6
    for genotype, channels in found:
        DSARA.check(genotype)
        assert abs(_size(genotype, channels) - 3000) <= 300
        assert channels == _fit(genotype)[0]
    assert found == random_cells(DSARA, 6, _fit, 3000, 0.1, _generator())
    assert found != random_cells(DSARA, 6, _fit, 3000, 0.1, _generator(1))


def test_they_are_the_draws_that_fit_in_order():
    """Nothing but the size and repetition decides: the rest is the space's uniform draw."""
    generator, expected = _generator(3), []
    while len(expected) < 4:
        genotype = DSARA.random(generator)
        if abs(_fit(genotype)[1] - 3000) <= 0.03 * 3000 and genotype not in expected:
            expected.append(genotype)
    assert [genotype for genotype, _ in random_cells(DSARA, 4, _fit, 3000, 0.03, _generator(3))] == expected


def test_repetitions_are_dropped():
    class Two:
        def random(self, generator):
            return DSARA.random(_generator(int(torch.randint(2, (), generator=generator))))

    assert len({genotype for genotype, _ in random_cells(Two(), 2, lambda g: (1, 5), 5, 0.0, _generator())}) == 2
    with pytest.raises(InputError, match="only 2 of 3"):
        random_cells(Two(), 3, lambda g: (1, 5), 5, 0.0, _generator(), draws=50)


def test_the_impossible_is_told():
    with pytest.raises(InputError, match="only 0 of 2"):
        random_cells(DSARA, 2, lambda genotype: (4, 100), 1000, 0.5, _generator(), draws=30)


def test_the_last_draw_counts():
    assert len(random_cells(DSARA, 3, lambda genotype: (1, 5), 5, 0.0, _generator(), draws=3)) == 3
    assert random_cells(DSARA, 0, lambda genotype: (1, 5), 5, 0.0, _generator()) == []
