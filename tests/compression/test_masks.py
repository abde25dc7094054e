"""Which weights a mask leaves: counts, rankings, floors, ties, and layers that get none."""

import copy
import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from nas.compression.magnitude import MagnitudePruning
from nas.compression.masks import Selection, competing, lamp, largest, left_dense, share, weights_of
from nas.errors import InputError

SHAPES = {"a": (4, 3), "b": (2, 2, 3, 3), "c": (20,)}


def _weights(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) * 3.0**index
        for index, (name, shape) in enumerate(SHAPES.items())
    }


def _kept(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def test_the_largest_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    for values in (
        torch.randn(7, 5, generator=generator),
        torch.randint(3, (7, 5), generator=generator).float(),
        torch.zeros(35),
        torch.full((35,), math.inf),
    ):
        order = values.flatten().argsort(descending=True, stable=True)
        for count in range(36):
            expected = torch.zeros(35, dtype=torch.bool)
            expected[order[:count]] = True
            found = largest(values, count)
            assert found.shape == values.shape and torch.equal(found.flatten(), expected)


def test_shares_are_exact_fractions_rounded_up():
    for keep, count in itertools.product(
        ("0.1", "0.9", "0.3", "0.005", "0.35", "1", "1e-9"), (1, 3, 10, 30, 100, 144, 1000)
    ):
        exact = Fraction(keep) * count
        # As HYDRA counts: int((1 - k) n) zeros, with no harm from rounding.
        assert count - share(float(keep), count) == min(int(count - exact), count - 1), (keep, count)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_choice_keeps_most_of_the_norm_by_brute_force(scope):
    """The projection on tensors with as many non-zeros: no other choice is nearer."""
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(size, generator=generator) for name, size in {"a": 5, "b": 7}.items()}
    masks = Selection(0.4, scope)(weights)
    kept = _kept(masks)
    assert kept == {"a": 2, "b": 3} if scope == "layer" else sum(kept.values()) == 5
    found = sum(float(weights[name][masks[name]].square().sum()) for name in weights)
    flat = torch.cat([*weights.values()]).square()
    if scope == "global":
        best = max(float(flat[list(rows)].sum()) for rows in itertools.combinations(range(12), 5))
    else:
        best = sum(
            max(float(weights[name].square()[list(rows)].sum()) for rows in itertools.combinations(range(n), k))
            for name, n, k in (("a", 5, 2), ("b", 7, 3))
        )
    assert found == pytest.approx(best)
    projected = {name: weight * masks[name] for name, weight in weights.items()}
    again = Selection(0.4, scope)(projected)
    assert all(torch.equal(projected[name] * again[name], projected[name]) for name in weights), "idempotent"


def test_lamp_scores_are_their_formula():
    weight = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    squares = weight.square()
    expected = torch.empty_like(weight)
    for place in itertools.product(*map(range, weight.shape)):
        expected[place] = squares[place] / squares[squares >= squares[place]].sum()
    torch.testing.assert_close(lamp(weight), expected)
    assert float(lamp(weight).max()) == 1
    assert not bool(lamp(torch.zeros(3, 3)).any())


@pytest.mark.parametrize("score", ["lamp", "normalised"])
def test_scores_beside_magnitude_do_not_depend_on_the_scale_of_a_layer(score):
    weights = _weights()
    scaled = {**weights, "b": weights["b"] * 50}
    masks, magnitude = Selection(0.4, score=score)(weights), Selection(0.4)(weights)
    assert all(torch.equal(mask, masks[name]) for name, mask in Selection(0.4, score=score)(scaled).items())
    assert _kept(Selection(0.4)(scaled)) != _kept(magnitude)
    assert _kept(masks) != _kept(magnitude)
    assert sum(_kept(masks).values()) == sum(_kept(magnitude).values()) == round(0.4 * 68)


def test_normalised_is_the_weight_over_the_norm_of_its_layer():
    weights = _weights()
    divided = {name: weight / weight.norm() for name, weight in weights.items()}
    masks = Selection(0.3, score="normalised")(weights)
    assert all(torch.equal(mask, masks[name]) for name, mask in Selection(0.3)(divided).items())


def test_lamp_leaves_no_layer_without_weights():
    weights = {str(i): torch.rand(50, generator=torch.Generator().manual_seed(i)) * 10.0**-i for i in range(5)}
    assert min(_kept(Selection(0.1)(weights)).values()) == 0
    assert min(_kept(Selection(0.1, score="lamp")(weights)).values()) >= 1


@pytest.mark.parametrize("score", ["magnitude", "lamp", "normalised"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_order_of_layers_does_not_matter(score, scope):
    weights = _weights(4)
    masks = Selection(0.3, scope, score)(weights)
    turned = Selection(0.3, scope, score)(dict(reversed(weights.items())))
    assert all(torch.equal(mask, turned[name]) for name, mask in masks.items())


def test_layers_keep_the_same_share_by_each_score():
    weights = _weights()
    masks = [Selection(0.3, "layer", score)(weights) for score in ("magnitude", "lamp", "normalised")]
    for name, shape in SHAPES.items():
        assert int(masks[0][name].sum()) == math.ceil(0.3 * math.prod(shape))
        assert torch.equal(masks[0][name], masks[1][name]) and torch.equal(masks[0][name], masks[2][name])


def test_the_floor_holds_and_leaves_the_rest_to_the_ranking():
    weights = _weights()
    free, held = Selection(0.3)(weights), Selection(0.3, floor=0.2)(weights)
    assert _kept(free)["a"] < math.ceil(0.2 * 12), "else there is nothing to see"
    assert sum(_kept(held).values()) == sum(_kept(free).values()) == round(0.3 * 68)
    for name, mask in held.items():
        least = math.ceil(0.2 * mask.numel())
        assert int(mask.sum()) >= least
        if int(mask.sum()):  # of each layer the largest, whatever their number
            assert torch.equal(mask, largest(weights[name].abs(), int(mask.sum())))
    above = [name for name, mask in held.items() if int(mask.sum()) > math.ceil(0.2 * mask.numel())]
    last = min(float(weights[name].abs()[held[name]].min()) for name in above)
    assert all(float(weights[n].abs()[~held[n]].max()) <= last for n in weights if not held[n].all()), "one threshold"
    assert all(torch.equal(mask, free[name]) for name, mask in Selection(0.3, floor=0.0)(weights).items())
    with pytest.raises(InputError, match="lower it"):
        Selection(0.3, floor=0.3)({str(i): torch.rand(4) for i in range(9)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ties_are_decided_by_place_in_any_type(dtype):
    weights = {name: torch.ones(shape, dtype=dtype) for name, shape in SHAPES.items()}
    masks = Selection(0.25)(weights)
    flat = torch.cat([mask.flatten() for mask in masks.values()])
    assert flat.tolist() == [True] * 17 + [False] * 51


def test_impossible_selections_are_input_errors():
    for wrong in (
        {"keep": 0.0}, {"keep": 1.1}, {"keep": math.nan}, {"scope": "network"}, {"score": "lam"}, {"floor": -0.1},
        {"floor": 0.6}, {"floor": math.nan},
    ):  # fmt: skip
        with pytest.raises(InputError):
            Selection(**{"keep": 0.5, **wrong})
        with pytest.raises(InputError):
            MagnitudePruning(**wrong)
    with pytest.raises(InputError, match="'b'"):
        Selection(0.5)({"a": torch.ones(3), "b": torch.tensor([1.0, math.nan])})


# --- networks


def _resnet():
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def _vit():
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )


@pytest.mark.parametrize("build", [_resnet, _vit])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_work_in_residual_networks_and_transformers(build, scope):
    """Attention reads the weight of its output projection without calling it: by way of the mask all the same."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():  # heads and projections start at zero, where masks would not be seen
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    plan = MagnitudePruning(0.3, scope).plan(model)
    pruned, zeroed = plan.apply(model), copy.deepcopy(model)
    counts = {layer.name: layer for layer in plan.layers if layer.action == "masked"}
    with torch.no_grad():
        for name in counts:
            zeroed.get_submodule(name).weight.copy_(pruned.get_submodule(name).weight)
    assert len(counts) == len(competing(model)) > 5
    x = torch.rand(2, 3, 32, 32)
    for mode in (False, True):
        outputs = [network.train(mode)(x) for network in (pruned, zeroed, copy.deepcopy(model))]
        torch.testing.assert_close(outputs[0], outputs[1])
        assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
    for name in counts:
        if name.endswith("out_proj"):
            assert not torch.equal(pruned.get_submodule(name).weight, model.get_submodule(name).weight)
            with torch.no_grad():
                unmasked = copy.deepcopy(zeroed.eval())
                unmasked.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
                assert not torch.allclose(unmasked(x), pruned.eval()(x))


def test_a_weight_of_two_layers_gets_no_mask():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[1].weight
    assert left_dense(model) == {
        "1": "shares its weight with another layer", "2": "shares its weight with another layer", "3": "classifier",
    }  # fmt: skip
    twice = nn.Sequential(model[0], model[0], model[3])  # one layer used twice has one weight
    assert [*weights_of(twice)] == ["0"]
    pruned = MagnitudePruning(0.5).plan(twice).apply(twice)
    assert pruned[0] is pruned[1] and int((pruned[0].weight != 0).sum()) == 8


def test_memory_format_and_device_of_weights_are_kept():
    model = _resnet().to(memory_format=torch.channels_last)
    pruned = MagnitudePruning(0.5).plan(model).apply(model)
    weight = pruned.layer2[0].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("score", ["magnitude", "lamp", "normalised"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_more_compression_never_brings_a_weight_back(score, scope, make):
    for kind in ("cells", "plain"):
        _, model = make(kind)
        before = None
        for keep in (1.0, 0.7, 0.5, 0.2, 0.05):
            masks = Selection(keep, scope, score)(weights_of(model))
            assert before is None or all(bool((mask <= before[name]).all()) for name, mask in masks.items())
            before = masks
        assert all(bool(mask.all()) for mask in Selection(1.0, scope, score)(weights_of(model)).values())
