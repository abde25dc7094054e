"""2:4 sparsity: the best mask of that pattern, and nothing else changed."""

import base64
import copy
import itertools
import json
import zlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models.vision_transformer import VisionTransformer

from nas.compression.layers import deployed_layers
from nas.compression.magnitude import MagnitudePruning
from nas.compression.packing import pack
from nas.compression.plan import LayerPlan, Plan
from nas.compression.semi_structured import SemiStructuredPruning, largest_two
from nas.errors import InputError
from nas.model_file import load_model, save_model, with_plan


def _masks(model):
    return {
        name: layer.parametrizations.weight[-1].mask
        for name, layer in deployed_layers(model).items()
        if parametrize.is_parametrized(layer)
    }


def _network():
    """Layers of a multiple of four inputs, and some that are not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 3, groups=2), nn.ReLU(), nn.Conv2d(16, 6, 1),
            nn.ReLU(), nn.Conv2d(6, 12, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 20), nn.Linear(20, 3),
        ).eval()  # fmt: skip


@pytest.mark.parametrize("shape", [(5, 8), (3, 12, 2, 3), (2, 4, 1, 1)])
def test_no_other_mask_of_the_pattern_keeps_more(shape):
    """Against all six masks of every four weights."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = largest_two(weight)
    assert mask.shape == weight.shape
    rows = weight.movedim(1, -1).reshape(-1, 4)
    chosen = mask.movedim(1, -1).reshape(-1, 4)
    assert bool((chosen.sum(1) == 2).all()), "exactly two of every four"
    for row, kept in zip(rows, chosen, strict=True):
        best = max(row[list(pair)].square().sum() for pair in itertools.combinations(range(4), 2))
        torch.testing.assert_close(row[kept].square().sum(), best)


def test_equal_weights_are_decided():
    assert largest_two(torch.ones(1, 8)).tolist() == [[True, True, False, False] * 2]
    assert largest_two(-torch.tensor([[0.0, 0.0, 0.0, 1.0]])).tolist() == [[True, False, False, True]]


def test_it_is_the_dense_network_with_zeros():
    model = _network()
    plan = SemiStructuredPruning().plan(model)
    actions = {layer.name: layer.action for layer in plan.layers}
    assert {name for name, action in actions.items() if action == "masked"} == {"2", "5", "7", "12"}
    reasons = {layer.name: layer.reason for layer in plan.layers}
    assert reasons["0"] == "first convolution"
    assert reasons["13"] == "classifier"
    assert "multiple of 4" in reasons["4"]
    assert "Ampere" in reasons["2"]
    pruned = plan.apply(model)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in _masks(pruned).items():
            assert torch.equal(mask.bool(), largest_two(deployed_layers(model)[name].weight))
            deployed_layers(zeroed)[name].weight.mul_(mask)
    x = torch.rand(3, 4, 9, 9)
    assert torch.equal(pruned(x), zeroed(x))
    assert not torch.allclose(pruned(x), model(x))
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_masked_weights_stay_zero_under_training():
    model = _network()
    pruned = SemiStructuredPruning().plan(model).apply(model).train()
    masks = copy.deepcopy(_masks(pruned))
    optimiser = torch.optim.SGD(pruned.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimiser.zero_grad()
        F.cross_entropy(pruned(torch.rand(4, 4, 9, 9)), torch.arange(4) % 3).backward()
        optimiser.step()
    for name, mask in masks.items():
        assert torch.equal(mask, _masks(pruned)[name])
        assert not bool(deployed_layers(pruned)[name].weight[mask == 0].any())


def test_cells_run_on_their_kernels_as_with_zeros(make, tmp_path):
    """And through model.json."""
    for kind in ("cells", "plain"):
        spec, model = make(kind)
        plan = Plan.from_data(json.loads(json.dumps(SemiStructuredPruning().plan(model).to_data())))
        pruned = plan.apply(model)
        zeroed = copy.deepcopy(model)
        with torch.no_grad():
            for name, mask in _masks(pruned).items():
                deployed_layers(zeroed)[name].weight.mul_(mask)
        x = torch.rand(6, 1, 8, 8)
        assert _masks(pruned)
        assert torch.equal(pruned(x), zeroed(x))
        save_model(with_plan(spec, plan), pruned, tmp_path)
        assert torch.equal(load_model(tmp_path)[1](x), pruned(x))


def test_keeping_everything_changes_nothing(make):
    _, model = make("plain")
    plan = SemiStructuredPruning(1.0).plan(model)
    assert torch.equal(plan.apply(model)(x := torch.rand(4, 1, 8, 8)), model(x))


def test_masks_that_are_there_count():
    """Weights that are zero already do not take a place from others."""
    model = _network()
    masked = MagnitudePruning(0.6).plan(model).apply(model)
    with torch.no_grad():
        for layer in deployed_layers(masked).values():
            if parametrize.is_parametrized(layer):
                mask = layer.parametrizations.weight[0].mask
                layer.parametrizations.weight.original.add_(100 * (1 - mask))
    both = SemiStructuredPruning().plan(masked).apply(masked)
    for name, layer in deployed_layers(both).items():
        if name in ("2", "5", "7", "12"):
            before = deployed_layers(masked)[name].weight
            expected = before * largest_two(before)
            assert torch.equal(layer.weight, expected)


def test_a_vision_transformer():
    with torch.random.fork_rng():
        model = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10).eval()
    plan = SemiStructuredPruning().plan(model)
    x = torch.rand(2, 3, 32, 32)
    pruned = plan.apply(model)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in _masks(pruned).items():
            deployed_layers(zeroed)[name].weight.mul_(mask)
    assert any("mlp" in name for name in _masks(pruned))
    torch.testing.assert_close(pruned(x), zeroed(x))


@pytest.mark.parametrize("keep", [0.0, 0.25, 0.75, 2.0, float("nan")])
def test_other_shares_are_refused(keep):
    with pytest.raises(InputError, match="keeps half"):
        SemiStructuredPruning(keep)


def test_bad_input_is_refused(make):
    with pytest.raises(InputError, match="multiple of 4"):
        SemiStructuredPruning().plan(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2)))
    model = _network()
    plan = SemiStructuredPruning().plan(model)
    with pytest.raises(InputError, match="another network"):
        plan.apply(make("plain")[1])
    index = next(i for i, layer in enumerate(plan.layers) if layer.action == "masked")
    layer = plan.layers[index]
    for data in (
        {"mask": None}, {"mask": 5}, {"mask": "!!"}, {"mask": pack(torch.ones(3, dtype=torch.bool))}, {"shape": [1]},
        {"mask": base64.b64encode(zlib.compress(bytes(10**7))).decode()}, {"shape": None},
    ):  # fmt: skip
        wrong = LayerPlan(layer.name, "masked", "wrong", {**layer.data, **data})
        with pytest.raises(InputError, match=r"damaged|another network"):
            Plan("semi_structured", (*plan.layers[:index], wrong, *plan.layers[index + 1 :])).apply(model)
