"""Bytes of stored networks."""

from __future__ import annotations

import torch
from torch import nn

from nas.analysis.complexity import complexity
from nas.compression.int8 import Int8Quantisation
from nas.compression.magnitude import MagnitudePruning
from nas.compression.size import Size, stored_size
from nas.model_file import with_plan


def test_every_number_is_counted_once() -> None:
    shared = nn.Linear(5, 5)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), shared, shared)
    numbers = 2 * 9 + 2 + 4 * 2 + 25 + 5
    assert stored_size(model) == Size(4 * numbers, 4 * numbers)
    assert stored_size(model.double()).dense == 8 * numbers
    model.register_buffer("constant", torch.zeros(100), persistent=False)
    assert stored_size(model).dense == 8 * numbers


def test_masks_save_what_they_hold_at_zero_but_one_bit(make) -> None:
    _, model = make("plain")
    dense = stored_size(model)
    assert dense.dense == dense.sparse
    previous = dense.sparse
    for keep in (0.5, 0.25):
        masked = MagnitudePruning(keep).plan(model).apply(model)
        size = stored_size(masked)
        competing = [layer for layer in MagnitudePruning(keep).plan(model).layers if layer.action == "masked"]
        weights = [model.get_submodule(layer.name).weight.numel() for layer in competing]
        assert size.dense == dense.dense
        kept = round(keep * sum(weights))
        assert size.sparse == dense.dense - 4 * (sum(weights) - kept) + sum(-(-count // 8) for count in weights)
        assert size.sparse < previous
        previous = size.sparse
    # Nothing masked: the bits are not worth it.
    assert stored_size(MagnitudePruning(1.0).plan(model).apply(model)).sparse == dense.dense


def test_what_is_stored_in_fewer_bytes_says_so() -> None:
    class Small(nn.Linear):
        def stored_bytes(self, *, sparse: bool = False) -> int:
            return 5 if sparse else 7

    assert stored_size(nn.Sequential(Small(3, 3), nn.Linear(1, 1))) == Size(15, 13)


def test_the_auxiliary_head_is_not_deployed(make) -> None:
    _, model = make("cells")
    without = stored_size(model)
    del model.auxiliary
    assert stored_size(model) == without


def test_int8_takes_a_byte_a_weight(make, setting) -> None:
    _, model = make("plain")
    dense, plan = stored_size(model), Int8Quantisation(images=8).plan(model, setting)
    size = stored_size(plan.apply(model))
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights, outputs = sum(layer.weight.numel() for layer in layers), sum(len(layer.weight) for layer in layers)
    # The norms are folded: a bias and a step for each output, and some bytes a layer for its activations.
    assert 0 <= size.dense - weights - 8 * outputs <= 10 * len(layers)
    assert size.dense == size.sparse < dense.dense


def test_operations_of_layers_that_are_no_torch_layers_are_counted(make, setting) -> None:
    spec, model = make("plain")
    plan = Int8Quantisation(images=8).plan(model, setting)
    assert complexity(with_plan(spec, plan)).macs == complexity(spec).macs
