"""Magnitude pruning: exactly the share asked for, and the same function as a dense network with zeros."""

import base64
import copy
import json
import math
import random
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from nas import plugins
from nas.attacks.pgd import Pgd
from nas.compression.magnitude import MagnitudePruning
from nas.compression.plan import LayerPlan, Plan
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt


class Stopped(Exception):
    pass


def _layers(model):
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not name.startswith("auxiliary.")
    }


def _masks(model):
    """Name -> product of the masks of a layer."""
    masks = {}
    for name, layer in _layers(model).items():
        if parametrize.is_parametrized(layer):
            masks[name] = torch.stack([part.mask for part in layer.parametrizations.weight]).prod(0)
    return masks


def _zeroed(model, masks):
    """A dense copy of ``model`` with the masked weights set to zero: what pruning means."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            _layers(dense)[name].weight.mul_(mask)
    return dense


def _x(n=6, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.333, 0.1, 1e-9])
def test_the_share_is_exact_and_the_largest_weights_stay(keep, kind, make):
    _, model = make(kind)
    pruned = MagnitudePruning(keep, floor=0.0).plan(model).apply(model)
    masks, layers = _masks(pruned), _layers(model)
    total = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == max(1, round(keep * total))
    weights = torch.cat([layers[name].weight.detach().abs().flatten() for name in masks])
    chosen = torch.cat([mask.flatten() for mask in masks.values()]).bool()
    if kept < total:
        assert float(weights[chosen].min()) >= float(weights[~chosen].max()), "one threshold for the network"


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.1])
def test_layers_may_keep_the_same_share_each(keep, kind, make):
    _, model = make(kind)
    pruned = MagnitudePruning(keep, "layer").plan(model).apply(model)
    for name, mask in _masks(pruned).items():
        weight = _layers(model)[name].weight.detach().abs()
        assert int(mask.sum()) == math.ceil(keep * mask.numel() - 1e-6)
        if keep < 1:
            assert float(weight[mask == 1].min()) >= float(weight[mask == 0].max())


@pytest.mark.parametrize("options", [{"score": "lamp"}, {"score": "normalised"}, {"floor": 0.2}], ids=str)
def test_other_rankings_and_a_floor_move_weights_between_layers(options, kind, make):
    _, model = make(kind)
    with torch.no_grad():  # a layer that one threshold would leave nothing of
        small = next(name for name in _masks(MagnitudePruning().plan(model).apply(model)))
        _layers(model)[small].weight.mul_(1e-3)
    others = MagnitudePruning(0.3, floor=0.0), MagnitudePruning(0.3, **({"floor": 0.0} | options))
    plain, other = (_masks(method.plan(model).apply(model)) for method in others)
    assert sum(int(mask.sum()) for mask in other.values()) == sum(int(mask.sum()) for mask in plain.values())
    assert not bool(plain[small].any())
    default = _masks(MagnitudePruning(0.3).plan(model).apply(model))[small]
    assert int(default.sum()) == math.ceil(0.005 * default.numel()), "a network without a layer is dead"
    assert int(other[small].sum()) >= max(1, options.get("floor", 0) * other[small].numel())


def test_steps_of_it_prune_gradually(make):
    """What is masked stays so, and the share is always of all weights: s_t = s (1 - (1 - t/T)^3) by hand."""
    _, model = make("plain")
    network, chance = model, torch.Generator().manual_seed(0)
    for step in range(1, 5):
        keep = 1 - 0.9 * (1 - (1 - step / 4) ** 3)
        before = _masks(network)
        network = MagnitudePruning(keep).plan(network).apply(network)
        masks = _masks(network)
        assert sum(int(mask.sum()) for mask in masks.values()) == round(keep * sum(m.numel() for m in masks.values()))
        assert all(bool((masks[name] <= mask).all()) for name, mask in before.items())
        with torch.no_grad():  # fine-tuning between the steps
            for layer in _layers(network).values():
                weight = layer.parametrizations.weight.original if parametrize.is_parametrized(layer) else layer.weight
                weight.add_(torch.randn(weight.shape, generator=chance) * 0.1)
    assert keep == pytest.approx(0.1)


def test_ties_are_decided_so_that_the_share_stays_exact(make):
    _, model = make("plain")
    with torch.no_grad():
        for layer in _layers(model).values():
            layer.weight.fill_(0.5)
    plan = MagnitudePruning(0.4).plan(model)
    masks = _masks(plan.apply(model))
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.4 * total)
    assert plan == MagnitudePruning(0.4).plan(model)


def test_every_layer_is_named_with_action_and_reason(kind, make):
    _, model = make(kind)
    plan = MagnitudePruning(0.5).plan(model)
    assert [layer.name for layer in plan.layers] == list(_layers(model)), "all layers, in order, no auxiliary head"
    skipped = {layer.name: layer.reason for layer in plan.layers if layer.action == "skipped"}
    first = "stem.0" if kind == "cells" else "features.0"
    assert skipped == {first: "first convolution", "classifier": "classifier"}
    pruned = plan.apply(model)
    masks = _masks(pruned)
    assert set(masks) == {layer.name for layer in plan.layers if layer.action == "masked"}
    for layer in plan.layers:
        if layer.action == "masked":
            mask = masks[layer.name]
            assert layer.reason == f"{int(mask.sum())} of {mask.numel()} weights kept"
        else:
            assert not layer.data
    if kind == "cells":
        assert not any(parametrize.is_parametrized(module) for module in pruned.auxiliary.modules())


def test_masked_weights_are_zeros(kind, make):
    """Logits of the pruned network are bit for bit those of the dense one with those weights zeroed."""
    _, model = make(kind)
    state = copy.deepcopy(model.state_dict())
    pruned = MagnitudePruning(0.4).plan(model).apply(model)
    masks = _masks(pruned)
    dense = _zeroed(model, masks)
    for mode in (False, True):
        assert torch.equal(pruned.train(mode)(_x()), dense.train(mode)(_x()))
    assert not torch.allclose(pruned.eval()(_x()), model(_x()))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), "the model itself is left alone"
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    for name, mask in masks.items():
        weight = _layers(pruned)[name].weight
        assert torch.equal(weight == 0, (mask == 0) | (_layers(model)[name].weight == 0))


def test_keeping_everything_changes_nothing(kind, make):
    _, model = make(kind)
    pruned = MagnitudePruning(1.0).plan(model).apply(model)
    assert torch.equal(pruned(_x()), model(_x()))


def test_masked_weights_get_no_gradient(kind, make):
    _, model = make(kind)
    pruned = MagnitudePruning(0.4).plan(model).apply(model).train()
    originals = {name: _layers(pruned)[name].parametrizations.weight.original for name in _masks(pruned)}
    loss = F.cross_entropy(pruned(_x()), torch.arange(6) % 3)
    gradients = dict(zip(originals, torch.autograd.grad(loss, list(originals.values())), strict=True))
    for name, mask in _masks(pruned).items():
        assert float(gradients[name][mask == 0].abs().sum()) == 0
    assert any(float(gradients[name].abs().sum()) > 0 for name in originals)
    dense = _zeroed(model, _masks(pruned)).train()
    expected = F.cross_entropy(dense(_x()), torch.arange(6) % 3)
    for name, mask in _masks(pruned).items():
        (gradient,) = torch.autograd.grad(expected, _layers(dense)[name].weight, retain_graph=True)
        torch.testing.assert_close(gradients[name], gradient * mask, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "ema"), [("plain", 0.0), ("cells", 0.9)])
def test_masked_weights_stay_zero_through_training(ema, kind, make, tmp_path):
    """With momentum, weight decay, adversarial images, averaging, and a stop in the middle."""
    _, model = make(kind)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (40, 1, 8, 8), generator=generator).to(torch.uint8)
    data = ImageData("noise", x, torch.arange(40) % 3, x[:4], torch.arange(4) % 3, ("a", "b", "c"))
    parts = split(data.y_train, architecture=0.0, validation=0.2, seed=0)
    attack = Pgd(ThreatModel("linf", 0.05), steps=1)
    training = Training(epochs=2, batch_size=16, optimiser=Sgd(0.1, weight_decay=0.01), ema=ema)
    pruned = MagnitudePruning(0.4).plan(model).apply(model)
    masks, before = copy.deepcopy(_masks(pruned)), copy.deepcopy(pruned.state_dict())
    arguments = data, parts, PgdAt(attack), training
    more = {"validation_attack": attack, "seed": 0}
    interrupted = copy.deepcopy(pruned)
    train(pruned, *arguments, **more)

    def stop(record):
        if record["epoch"] == 1:
            raise Stopped

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        train(interrupted, *arguments, **more, checkpoint=path, log=stop)
    train(interrupted, *arguments, **more, checkpoint=path)
    for name, mask in masks.items():
        layer = _layers(pruned)[name]
        assert torch.equal(_masks(pruned)[name], mask)
        assert not bool(layer.weight[mask == 0].any())
    moved = [not torch.equal(value, before[name]) for name, value in pruned.state_dict().items() if "original" in name]
    assert all(moved)
    for name, value in interrupted.state_dict().items():
        assert torch.equal(value, pruned.state_dict()[name])


def test_a_plan_survives_json_and_gives_the_same_network_again(kind, make):
    _, model = make(kind)
    plan = MagnitudePruning(0.3).plan(model)
    again = Plan.from_data(json.loads(json.dumps(plan.to_data())))
    assert again == plan
    assert again.method == "magnitude"
    first, second = plan.apply(model), again.apply(model)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    _, other = make(kind, weights_seed=9)  # other weights, the same masks
    for name, mask in _masks(again.apply(other)).items():
        assert torch.equal(mask, _masks(first)[name])


def test_pruning_a_pruned_network_prunes_further(kind, make):
    _, model = make(kind)
    once = MagnitudePruning(0.6).plan(model).apply(model)
    twice = MagnitudePruning(0.3).plan(once).apply(once)
    direct = MagnitudePruning(0.3).plan(model).apply(model)
    for name, mask in _masks(twice).items():
        assert torch.equal(mask, _masks(direct)[name])
        assert bool((mask <= _masks(once)[name]).all())
    assert torch.equal(twice(_x()), direct(_x()))
    looser = MagnitudePruning(0.9).plan(once).apply(once)  # nothing comes back
    for name, mask in _masks(looser).items():
        assert torch.equal(mask, _masks(once)[name])


def test_weights_regrown_behind_a_mask_do_not_count(make):
    """Masked originals move under weight decay; only what the network uses competes."""
    _, model = make("plain")
    once = MagnitudePruning(0.5).plan(model).apply(model)
    with torch.no_grad():
        for layer in _layers(once).values():
            if parametrize.is_parametrized(layer):
                mask, original = layer.parametrizations.weight[0].mask, layer.parametrizations.weight.original
                original.add_(100 * (1 - mask))
    twice = MagnitudePruning(0.25).plan(once).apply(once)
    total = sum(mask.numel() for mask in _masks(twice).values())
    assert sum(int(mask.sum()) for mask in _masks(twice).values()) == round(0.25 * total)


def test_a_plan_of_another_network_is_refused(make):
    plans = {kind: MagnitudePruning(0.5).plan(make(kind)[1]) for kind in ("cells", "plain")}
    with pytest.raises(InputError, match="another network"):
        plans["cells"].apply(make("plain")[1])
    with pytest.raises(InputError, match="another network"):
        plans["plain"].apply(make("cells")[1])
    _, wider = make("plain")
    wider.features[3] = nn.Conv2d(4, 4, 5)
    with pytest.raises(InputError, match="another network"):
        plans["plain"].apply(wider)


def _masked(plan):
    return next(i for i, layer in enumerate(plan.layers) if layer.action == "masked")


def _with_data(plan, **data):
    """The plan with entries of its first mask replaced."""
    index = _masked(plan)
    layer = plan.layers[index]
    changed = LayerPlan(layer.name, layer.action, layer.reason, {**layer.data, **data})
    return Plan(plan.method, (*plan.layers[:index], changed, *plan.layers[index + 1 :]))


def _packed(bits):
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes())).decode()


@pytest.fixture
def plan(make):
    return MagnitudePruning(0.5).plan(make("plain")[1])


def _wrong_masks(plan):
    data = plan.layers[_masked(plan)].data
    shape, mask = data["shape"], data["mask"]
    count = int(np.prod(shape))
    raw = base64.b64decode(mask)
    return {
        "no mask": {"mask": None}, "not base64": {"mask": "!!" + mask}, "empty": {"mask": ""}, "number": {"mask": 5},
        "not zlib": {"mask": base64.b64encode(b"hello").decode()},
        "cut": {"mask": base64.b64encode(raw[:-6]).decode()},
        "half": {"mask": base64.b64encode(raw[: len(raw) // 2]).decode()},
        "too short": {"mask": _packed(np.ones(count - 16, bool))},
        "too long": {"mask": _packed(np.ones(count + 16, bool))},
        "bomb": {"mask": base64.b64encode(zlib.compress(bytes(10**7))).decode()},
        "no shape": {"shape": None}, "shape of texts": {"shape": ["a"]}, "shape of fractions": {"shape": [1.5, 2]},
        "negative shape": {"shape": [-1, -count]}, "huge shape": {"shape": [10**12]}, "endless": {"shape": [10**40]},
        "other shape": {"shape": [count]}, "shape as text": {"shape": "44"}, "shape as number": {"shape": count},
        "flat zeros": {"shape": [0]},
    }  # fmt: skip


def test_a_damaged_mask_is_an_input_error(plan, make):
    _, model = make("plain")
    accepted = []
    for name, data in _wrong_masks(plan).items():
        try:
            _with_data(plan, **data).apply(model)
        except InputError:
            continue
        accepted.append(name)
    assert accepted == []


def test_random_damage_to_a_mask_is_an_input_error_or_harmless(plan, make):
    """The checksum notices; the few bits of a stream that mean nothing may differ."""
    _, model = make("plain")
    chance, raw = random.Random(0), base64.b64decode(plan.layers[_masked(plan)].data["mask"])
    expected, refused = _masks(plan.apply(model)), 0
    for _ in range(150):
        damaged = bytearray(raw)
        damaged[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        try:
            found = _masks(_with_data(plan, mask=base64.b64encode(damaged).decode()).apply(model))
        except InputError:
            refused += 1
        else:
            assert all(torch.equal(mask, expected[name]) for name, mask in found.items())
    assert refused > 130


def test_malformed_plans_are_input_errors(plan):
    layer = plan.to_data()["layers"][0]
    for data in (
        None, [], "plan", 5, {}, {"method": "magnitude"}, {"layers": []}, {"method": "magnitude", "layers": 5},
        {"method": "magnitude", "layers": None}, {"method": "magnitude", "layers": ["x"]},
        {"method": "magnitude", "layers": [{}]}, {"method": "magnitude", "layers": [{**layer, "action": "deleted"}]},
        {"method": "magnitude", "layers": [{**layer, "data": []}]},
        {"method": "magnitude", "layers": [{**layer, "data": None}]},
        {"method": "magnitude", "layers": {"a": 1}},
    ):  # fmt: skip
        with pytest.raises(InputError):
            Plan.from_data(data)


def test_an_unknown_method_is_an_input_error(plan, make):
    with pytest.raises(InputError, match="magnitude"):
        Plan("magnitud", plan.layers).apply(make("plain")[1])


def test_wrong_settings_are_refused():
    for keep in (0.0, -0.5, 1.01, float("nan")):
        with pytest.raises(InputError):
            MagnitudePruning(keep)
    with pytest.raises(InputError):
        MagnitudePruning(0.5).plan(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


@pytest.mark.parametrize("name", plugins.available("compression"))
def test_every_method_makes_plans_that_leave_the_model_alone(name, make, setting):
    """Whatever is in nas/compression, as it comes by default."""
    _, model = make("cells")
    before, streams = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    try:
        plan = plugins.load("compression", name)().plan(model, setting)
    except InputError as error:
        assert "no layer" in str(error) and "\n" not in str(error), "nothing here for it, and it says so"
        plan = Plan(name, ())
    assert plan.method == name
    assert {layer.name for layer in plan.layers} <= set(dict(model.named_modules()))
    assert all(layer.reason for layer in plan.layers)
    compressed = Plan.from_data(json.loads(json.dumps(plan.to_data()))).apply(model)
    assert compressed is not model
    assert compressed(_x()).shape == (6, 3)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), streams)
