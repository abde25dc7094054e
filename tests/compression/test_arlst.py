"""ARLST: the budget, the choice of modes, what plans and files carry, the penalties, and what follows on it."""

import copy
import json
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.vgg import VGG, make_layers
from torchvision.models.vision_transformer import VisionTransformer

from nas.attacks.pgd import Pgd
from nas.compression import arlst
from nas.compression.arlst import Arlst, factor_report, feature_maps, materialised, quicker_dense, separable_factors
from nas.compression.condition_number import CONDITION_TERMS, SPARSITY_TERMS
from nas.compression.layers import deployed_layers
from nas.compression.magnitude import MagnitudePruning
from nas.compression.plan import LayerPlan, Plan, Recovers, plan_for
from nas.compression.separable_linear import SeparableLinear, SeparablePointwise, Separation, separations
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError
from nas.model_file import ModelSpec, load_model, save_model, with_plan
from nas.objective import Batch, Gradients, Setting, State, gradients_of
from nas.optimisation import Sgd, gradient_step
from nas.prediction import MeanOfParticles
from nas.threat_model import ThreatModel
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt
from nas.training.weight_perturbation import WeightPerturbation
from search_spaces.genotype import StageGenotype


def _spec(space, depths, widths, shape=(1, 8, 8), **more):
    genotype = StageGenotype(space, depths, widths)
    mean, std = (0.4,) * shape[0], (0.25,) * shape[0]
    return ModelSpec(genotype, 0, 0, shape, ("a", "b", "c"), mean, std, **more)


def _build(spec, seed=0):
    return copy.deepcopy(_built(spec, seed))


@cache
def _built(spec, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return spec.build().eval()


MLP = _spec("mlp", (2, 1), (32, 24))
VGG_SPEC = _spec("vgg", (1, 1), (4, 8))
VIT = _spec("vit", (2,), (32,), (3, 16, 16))


def _mlp(seed=0):
    return _build(MLP, seed)


def _vit():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
        )
        nn.init.normal_(model.heads.head.weight, std=0.2)
    return model.eval()


def _x(n=6, shape=(1, 8, 8), seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def _replaced(plan):
    return {layer.name: layer for layer in plan.layers if layer.action == "replaced"}


def _separation(layer):
    return Separation(tuple(layer.data["in_modes"]), tuple(layer.data["out_modes"]), layer.data["terms"])


def _error(layer, separable):
    """Squared distance of two layers' matrices."""
    return float((layer.weight - separable.weight).detach().double().square().sum())


def _competing(model):
    linear = {name: layer for name, layer in deployed_layers(model).items() if type(layer) is nn.Linear}
    return dict([*linear.items()][:-1])  # the last is the classifier


NETWORKS = {
    "mlp": (_mlp, (1, 8, 8)),
    "vgg": (lambda: _build(VGG_SPEC), (1, 8, 8)),
    "vit": (_vit, (3, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_is_named_and_the_linear_ones_are_replaced(name):
    build, shape = NETWORKS[name]
    model = build()
    before, streams = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plan = Arlst(keep=0.15).plan(model)
    assert [layer.name for layer in plan.layers] == [*deployed_layers(model)] and plan.method == "arlst"
    reasons = {layer.name: layer.reason for layer in plan.layers}
    actions = {layer.name: layer.action for layer in plan.layers}
    last = [*deployed_layers(model)][-1]
    assert (actions.pop(last), reasons[last]) == ("skipped", "classifier")
    for layer, action in actions.items():
        module = model.get_submodule(layer)
        if layer.endswith("out_proj"):
            assert action == "skipped" and "attention" in reasons[layer]
        elif isinstance(module, nn.Conv2d):
            assert action == "skipped" and "larger than 1x1" in reasons[layer]
        else:
            assert action == "replaced" and f"of {module.weight.numel()} weights" in reasons[layer]
    compressed = plan.apply(model)
    for layer in _replaced(plan):
        assert isinstance(compressed.get_submodule(layer), SeparableLinear)
    x = _x(3, shape)
    assert compressed(x).shape == model(x).shape and not torch.allclose(compressed(x), model(x))
    assert torch.equal(torch.get_rng_state(), streams), "no random numbers but its own"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_replaced_layers_compute_as_their_dense_products(name):
    """The whole network, and its gradient with respect to the image, as attacks need it."""
    build, shape = NETWORKS[name]
    model = build()
    compressed = Arlst(keep=0.2, terms=3).plan(model).apply(model)
    dense = copy.deepcopy(model)
    for layer, module in compressed.named_modules():
        if isinstance(module, SeparableLinear):
            with torch.no_grad():
                dense.get_submodule(layer).weight.copy_(module.weight)
                dense.get_submodule(layer).bias.copy_(module.bias)
    x = _x(3, shape).requires_grad_(True)
    y = torch.arange(3) % 3
    torch.testing.assert_close(compressed(x), dense(x), rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(F.cross_entropy(network(x), y), x)[0] for network in (compressed, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(materialised(compressed)(x), dense(x), rtol=1e-4, atol=1e-5)


def test_keeping_everything_changes_nothing():
    for name, (build, shape) in NETWORKS.items():
        model = build()
        plan = Arlst(keep=1.0).plan(model)
        assert not _replaced(plan), name
        assert any("kept whole" in layer.reason for layer in plan.layers)
        x = _x(1000 if name == "mlp" else 20, shape)
        assert torch.equal(plan.apply(model)(x), model(x))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("terms", "start"), [(1, "dense"), (4, "nearest"), (1, "scratch"), (4, "scratch")])
def test_the_budget_holds_and_more_of_it_never_makes_a_layer_worse(name, terms, start):
    model = NETWORKS[name][0]()
    layers = _competing(model)
    total = sum(layer.weight.numel() for layer in layers.values())
    errors, counts = dict.fromkeys(layers, math.inf), []
    for keep in (0.1, 0.15, 0.25, 0.4, 0.7, 1.0):
        plan = Arlst(keep, terms=terms, start=start).plan(model)
        compressed = plan.apply(model)
        stored = sum(p.numel() for name in layers for p in compressed.get_submodule(name).parameters() if p.dim() > 1)
        assert stored <= keep * total
        counts.append(stored)
        for layer, module in layers.items():
            if start != "scratch":
                error = _error(module, compressed.get_submodule(layer))
                assert error <= errors[layer] * (1 + 1e-5) + 1e-6
                errors[layer] = error
    assert counts == sorted(counts) and counts[-1] == total
    assert len(set(counts)) > (1 if name == "vgg" and terms == 1 else 2), "few structures follow its 7x7 map"
    if start != "scratch":
        assert max(errors.values()) == 0


def test_the_modes_are_those_that_come_nearest():
    """Of all separable layers within the share, by singular values of each rearranged matrix."""
    model = nn.Sequential(nn.Linear(24, 36), nn.ReLU(), nn.Linear(36, 5))
    for seed in range(3):
        with torch.no_grad():
            model[0].weight.normal_(generator=torch.Generator().manual_seed(seed))
            if seed == 2:  # such that a smaller structure is nearer than all larger ones within the budget
                a, b = (torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in (7, 8))
                b = torch.randn(6, 6, generator=torch.Generator().manual_seed(8))
                model[0].weight.copy_(torch.kron(a, b))
        (layer,) = _replaced(Arlst(keep=0.3, terms=2).plan(model)).values()
        errors = {}
        for candidate in separations(36, 24, shape=None, modes=2, terms=2):
            if candidate.weights <= 0.3 * 24 * 36:
                (m1, m2), (n1, n2) = candidate.out_modes, candidate.in_modes
                weight = model[0].weight.detach().double()
                rearranged = weight.view(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
                errors[candidate] = float(torch.linalg.svdvals(rearranged)[candidate.terms :].square().sum())
        assert errors[_separation(layer)] <= min(errors.values()) + 1e-4
        if seed == 2:
            assert _separation(layer) == Separation((4, 6), (6, 6)), "found again, though larger ones are allowed"


def test_the_dense_layer_gives_direction_and_norm():
    """The nearest product by default keeps the norm of the layer; as it is, it has the smallest error."""
    model = _mlp()
    nearest, scaled = (Arlst(keep=0.2, start=start).plan(model).apply(model) for start in ("nearest", "dense"))
    for name in ("features.0", "features.2"):
        weight = model.get_submodule(name).weight.detach()
        one, other = (network.get_submodule(name).weight.detach() for network in (nearest, scaled))
        assert float(other.norm()) == pytest.approx(float(weight.norm()), rel=1e-4)
        torch.testing.assert_close(other / other.norm(), one / one.norm(), rtol=1e-4, atol=1e-6)
        error, captured = float((weight - one).square().sum()), float(one.square().sum())
        assert error == pytest.approx(float(weight.square().sum()) - captured, rel=1e-4), "orthogonal to what is left"
        assert error < float((weight - 1.1 * one).square().sum()) < float((weight - other).square().sum())
    zero = copy.deepcopy(model)
    with torch.no_grad():
        zero.features[0].weight.zero_()
    assert bool(Arlst(keep=0.2).plan(zero).apply(zero)(_x()).isfinite().all())


def test_from_scratch_the_largest_structure_is_taken_and_the_weights_do_not_matter():
    plans = [Arlst(keep=0.3, start="scratch").plan(_mlp(seed)) for seed in (0, 1)]
    assert plans[0] == plans[1]
    first, second = (plan.apply(_mlp(seed)) for seed, plan in enumerate(plans))
    for (_, _, _, a), (_, _, _, b) in zip(separable_factors(first), separable_factors(second), strict=True):
        assert torch.equal(a.weight, b.weight), "by the seed of the plan"
    factors = [factor.weight for _, _, _, factor in separable_factors(first)]
    same = [a is not b and a.shape == b.shape and torch.equal(a, b) for a in factors for b in factors]
    assert not any(same), "each layer has factors of its own"
    for module in first.modules():
        if isinstance(module, SeparableLinear):
            assert not bool(module.bias.any())
    dense = Arlst(keep=0.3).plan(_mlp()).apply(_mlp())
    assert torch.equal(dense.features[0].bias, _mlp().features[0].bias)


def test_ratios_of_two_hundred_are_within_reach_on_vgg_16():
    """torchvision's VGG-16 for 32x32 images: 512 maps of 7x7, the shapes alone."""
    config = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
    with torch.device("meta"):
        model = VGG(make_layers(config), num_classes=10)
    plan = Arlst(keep=1 / 200, start="scratch").plan(model)
    replaced = _replaced(plan)
    assert [*replaced] == ["classifier.0", "classifier.3"]
    assert _separation(replaced["classifier.0"]).in_modes in ((512, 7, 7), (512, 49), (3584, 7))
    stored = sum(_separation(layer).weights for layer in replaced.values())
    assert stored * 200 <= 25088 * 4096 + 4096 * 4096
    assert "only" not in replaced["classifier.0"].reason, "the linear layers are most of this network"


def test_modes_follow_the_feature_map():
    vgg = _build(VGG_SPEC)
    assert feature_maps(vgg) == {"classifier.0": (8, 7, 7)}
    (first, _) = _replaced(Arlst(keep=0.15).plan(vgg)).values()
    assert _separation(first).in_modes in ((8, 7, 7), (8, 49), (56, 7))
    assert feature_maps(_mlp()) == {"features.0": (1, 8, 8)}
    colour = _build(_spec("mlp", (1,), (32,), (3, 8, 8)))
    assert feature_maps(colour) == {"features.0": (3, 8, 8)}
    own = nn.Sequential(nn.Flatten(), nn.Linear(96, 16), nn.ReLU(), nn.Linear(16, 3))
    assert feature_maps(own) == {}
    assert feature_maps(own, (2, 6, 8)) == {"1": (2, 6, 8)}
    assert feature_maps(_vit()) == {}, "tokens are no map"
    pooled = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d((2, 5)), nn.Flatten(), nn.Linear(60, 4))
    assert feature_maps(pooled) == {"3": (6, 2, 5)}


def test_a_layer_that_is_separable_on_the_map_is_found_again_in_the_network():
    """The order of flattening: channels, then rows, then columns."""
    model = _build(VGG_SPEC)
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(8, k, generator=g) / k for k in (8, 7, 7))
    layer = model.classifier[0]
    layer_modes = (8, 4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.kron(torch.kron(a, b[:4]), c[:2]))
    x = _x()
    maps = model.avgpool(model.features(model.normalise(x)))
    expected = torch.einsum("nchw,ac,bh,dw->nabd", maps, a, b[:4], c[:2]).flatten(1) + layer.bias
    plan = Arlst(keep=0.05).plan(model)
    assert _separation(_replaced(plan)["classifier.0"]) == Separation((8, 7, 7), layer_modes)
    torch.testing.assert_close(plan.apply(model).classifier[0](maps.flatten(1)), expected, rtol=1e-4, atol=1e-5)


def test_the_reason_warns_where_linear_layers_are_the_smaller_part():
    reasons = [layer.reason for layer in _replaced(Arlst(keep=0.15).plan(_vit())).values()]
    share = sum(layer.weight.numel() for layer in _competing(_vit()).values()) / sum(
        parameter.numel() for parameter in _vit().parameters()
    )
    assert share < 0.5 and all(f"only {share:.1%} of the network" in reason for reason in reasons)
    assert not any("only" in layer.reason for layer in Arlst(keep=0.15).plan(_mlp()).layers)


def test_where_nothing_can_be_replaced_it_is_refused_with_a_remedy(kind, make):
    _, model = make(kind)
    with pytest.raises(InputError, match="classifier") as told:
        Arlst().plan(model)
    assert "\n" not in str(told.value) and "classifier and convolutions = true" in str(told.value)
    with pytest.raises(InputError, match="no separable layer is smaller"):
        Arlst(classifier=True, convolutions=True).plan(nn.Sequential(nn.Linear(7, 5)))


def test_an_impossible_share_is_refused_naming_what_is_possible():
    model = _mlp()
    with pytest.raises(InputError, match=r"keep = 0\.001 is not possible") as told:
        Arlst(keep=0.001).plan(model)
    least = float(str(told.value).split("have ")[1].split(" ")[0])
    assert _replaced(Arlst(keep=least).plan(model))
    with pytest.raises(InputError):
        Arlst(keep=least * 0.99).plan(model)
    more = Arlst(keep=least * 0.9, modes=3).plan(model)
    assert any(len(layer.data["in_modes"]) == 3 for layer in _replaced(more).values())


def test_the_classifier_may_compete():
    model = _mlp()
    replaced = _replaced(Arlst(keep=0.3, classifier=True).plan(model))
    assert "classifier" in replaced
    compressed = Arlst(keep=0.3, classifier=True).plan(model).apply(model)
    assert compressed(_x()).shape == (6, 3)


def test_pointwise_convolutions_of_cells_may_compete(make):
    """Against the same network with dense products for weights, by the native kernels and by torch's operations."""
    _, model = make("cells")
    plan = Arlst(keep=0.6, convolutions=True, terms=2).plan(model)
    replaced = _replaced(plan)
    assert len(replaced) > 3
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        if layer.action == "replaced":
            assert module.kernel_size == (1, 1)
        elif isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            assert layer.reason in ("convolution larger than 1x1", "grouped convolution")
    compressed = plan.apply(model)
    dense = copy.deepcopy(model)
    for name in replaced:
        module = compressed.get_submodule(name)
        assert isinstance(module, SeparablePointwise)
        with torch.no_grad():
            dense.get_submodule(name).weight.copy_(module.linear.weight[:, :, None, None])
    x, y = _x().requires_grad_(True), torch.arange(6) % 3
    for mode in (False, True):
        outputs = [network.train(mode)(x) for network in (compressed, dense)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(F.cross_entropy(output, y), x)[0] for output in outputs]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_pointwise_convolutions_keep_their_stride():
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.Conv2d(12, 12, 1, stride=2),
        nn.Conv2d(12, 8, 1, padding=1),
        nn.Conv2d(8, 8, 1, groups=2),
    ).eval()
    plan = Arlst(keep=0.9, convolutions=True).plan(model)
    assert [layer.action for layer in plan.layers] == ["skipped", "replaced", "skipped", "skipped"]
    assert [layer.reason for layer in plan.layers[2:]] == ["padded 1x1 convolution", "grouped convolution"]
    compressed = plan.apply(model)
    x = _x(2, (3, 9, 9))
    assert compressed(x).shape == model(x).shape
    weight = compressed[1].linear.weight[:, :, None, None]
    expected = F.conv2d(compressed[0](x), weight, model[1].bias, stride=2)
    torch.testing.assert_close(compressed[1](compressed[0](x)), expected, rtol=1e-4, atol=1e-5)


def test_properties_of_the_layer_stay():
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16), nn.Linear(16, 3)).double()
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    model[1].eval()
    compressed = Arlst(keep=0.5).plan(model).apply(model)
    first, second = compressed[0], compressed[1]
    assert first.bias is None and first.training and not second.training
    assert [p.requires_grad for p in first.parameters()] == [False, False]
    assert {name: p.requires_grad for name, p in second.named_parameters()} == {
        "bias": False, "terms.0.0.weight": True, "terms.0.1.weight": True
    }  # fmt: skip
    assert {p.dtype for p in compressed.parameters()} == {torch.float64}


def test_a_layer_that_is_used_twice_is_replaced_once():
    shared = nn.Linear(16, 16)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(16, 3))
    plan = Arlst(keep=0.5).plan(model)
    assert [layer.name for layer in plan.layers] == ["0", "3"]
    compressed = plan.apply(model)
    assert compressed[0] is compressed[2] and isinstance(compressed[0], SeparableLinear)


@pytest.mark.parametrize("spec", [MLP, VGG_SPEC, VIT], ids=["mlp", "vgg", "vit"])
@pytest.mark.parametrize("start", ["dense", "scratch"])
def test_a_saved_network_is_the_same_one_when_loaded(spec, start, tmp_path, monkeypatch):
    model = _build(spec)
    plan = Arlst(keep=0.2, terms=2, start=start).plan(model)
    again = Plan.from_data(json.loads(json.dumps(plan.to_data())))
    assert again == plan
    compressed = plan.apply(model)
    for name, value in again.apply(model).state_dict().items():
        assert torch.equal(value, compressed.state_dict()[name])
    with torch.no_grad():
        for parameter in compressed.parameters():
            parameter.add_(0.01)  # as if trained: nothing of it is in the plan
    save_model(with_plan(spec, plan), compressed, tmp_path)

    def never(*_, **__):
        raise AssertionError("loading needs shapes, no decomposition")

    monkeypatch.setattr(arlst, "nearest_kronecker", never)
    loaded_spec, loaded = load_model(tmp_path)
    assert loaded_spec == with_plan(spec, plan)
    x = _x(3, spec.input_shape)
    assert torch.equal(loaded(x), compressed(x))


def test_ensembles_are_compressed_network_by_network():
    spec = _spec("mlp", (1,), (32,), prediction=MeanOfParticles(2))
    model = _build(spec)
    plan = plan_for(Arlst(keep=0.2), model)
    assert [layer.action for layer in plan.layers] == ["replaced", "skipped"] * 2
    compressed = plan.apply(model)
    for i in range(2):
        alone = Arlst(keep=0.2).plan(model.members[i]).apply(model.members[i])
        assert torch.equal(compressed.members[i](_x()), alone(_x()))


def _with_data(plan, **data):
    index = next(i for i, layer in enumerate(plan.layers) if layer.action == "replaced")
    layer = plan.layers[index]
    changed = {**layer.data, **data}
    changed = LayerPlan(layer.name, layer.action, layer.reason, {k: v for k, v in changed.items() if v is not ...})
    return Plan(plan.method, (*plan.layers[:index], changed, *plan.layers[index + 1 :]))


def test_damaged_plans_are_input_errors():
    model = _mlp()
    plan = Arlst(keep=0.2).plan(model)
    assert _replaced(plan)["features.0"].data["in_modes"] == [8, 8]
    wrong = [
        {"in_modes": ...}, {"in_modes": None}, {"in_modes": []}, {"in_modes": "88"}, {"in_modes": [8, 8.0]},
        {"in_modes": [-8, -8]}, {"in_modes": [0, 64]}, {"in_modes": [8, 9]}, {"in_modes": [64]},
        {"in_modes": [True, 64]},
        {"in_modes": [64] + [1] * 30}, {"in_modes": [10**30, 64]}, {"in_modes": [[8], [8]]}, {"out_modes": [32]},
        {"out_modes": [5, 5]}, {"out_modes": {}}, {"terms": 0}, {"terms": -1}, {"terms": 10**9}, {"terms": "1"},
        {"terms": 1.0}, {"terms": True}, {"terms": ...}, {"start": "middle"}, {"start": ...}, {"start": []},
        {"seed": -1}, {"seed": "x"}, {"seed": ...},
    ]  # fmt: skip
    for fit in (True, False):
        for data in wrong:
            with pytest.raises(InputError) as told:
                _with_data(plan, **data).apply(model, fit=fit)
            assert "\n" not in str(told.value) and "features.0" in str(told.value), data
    assert _with_data(plan, seed=10**40).apply(model) is not None


def test_a_plan_of_another_network_is_refused(make):
    plan = Arlst(keep=0.2).plan(_mlp())
    for other in (make("plain")[1], _build(_spec("mlp", (1,), (32,))), _build(_spec("mlp", (2, 1), (16, 24)))):
        with pytest.raises(InputError, match="another network"):
            plan.apply(other)
    layers = tuple(
        LayerPlan(layer.name, "replaced", "", _replaced(plan)["features.0"].data) if "out_proj" in layer.name else layer
        for layer in Arlst(keep=0.2).plan(_vit()).layers
    )
    with pytest.raises(InputError, match="attention"):
        Plan("arlst", layers).apply(_vit())


def test_wrong_settings_are_refused():
    for settings in (
        {"keep": 0}, {"keep": 1.5}, {"keep": math.nan}, {"terms": 0}, {"terms": 65}, {"modes": 1}, {"modes": 5},
        {"start": "svd"}, {"sparsity": -1}, {"sparsity": math.inf}, {"sparsity_term": "l2"}, {"conditioning": -1e-9},
        {"conditioning": math.nan}, {"condition_term": "kappa"}, {"warmup": -0.1}, {"warmup": 1.1},
    ):  # fmt: skip
        with pytest.raises(InputError):
            Arlst(**settings)


# Fine-tuning


def _data(n=48):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (n, 1, 8, 8), generator=generator).to(torch.uint8)
    return ImageData("noise", x, torch.arange(n) % 3, x[:4], torch.arange(4) % 3, ("a", "b", "c"))


ATTACK = Pgd(ThreatModel("linf", 0.05), steps=2)


def _trained(model, objective, epochs=2, rate=0.05):
    model, data = copy.deepcopy(model), _data()
    parts = split(data.y_train, architecture=0.0, validation=0.25, seed=0)
    training = Training(epochs=epochs, batch_size=12, optimiser=Sgd(rate, schedule="constant"))
    records = train(model, data, parts, objective, training, validation_attack=ATTACK, seed=0)
    return model, records


def _state(progress=1.0):
    return State(0, 0, progress, torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))


def _compressed(**settings):
    return Arlst(keep=0.2, **settings).plan(_mlp()).apply(_mlp()).train()


def _batch():
    return Batch(_x(9), torch.arange(9) % 3, torch.arange(9))


def test_without_penalties_fine_tuning_is_adversarial_training_step_for_step():
    model = _compressed()
    plain, records = _trained(model, PgdAt(ATTACK))
    method = Arlst(sparsity=0.0, conditioning=0.0)
    assert isinstance(method, Recovers)
    same, same_records = _trained(model, method.recovery(PgdAt(ATTACK), _mlp()))
    assert records == same_records
    for name, value in plain.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    other, _ = _trained(model, Arlst().recovery(PgdAt(ATTACK), _mlp()))
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(("sparsity_term", "condition_term"), [("log", "amgm"), ("l1", "exact"), ("l1", "tight-frame")])
def test_the_penalties_are_sums_over_factors_that_rise_over_the_first_tenth(sparsity_term, condition_term):
    model = _compressed(terms=2)
    method = Arlst(
        sparsity=0.01, conditioning=0.1, sparsity_term=sparsity_term, condition_term=condition_term, warmup=0.1
    )
    weights = [
        factor.weight.detach() for module in model.modules() if isinstance(module, SeparableLinear)
        for factors in module.factors() for factor in factors
    ]  # fmt: skip
    assert len(weights) > 2 * len([m for m in model.modules() if isinstance(m, SeparableLinear)]), "several terms"
    sparse = sum(float(SPARSITY_TERMS[sparsity_term](weight)) for weight in weights)
    condition = sum(float(CONDITION_TERMS[condition_term](weight)) for weight in weights)
    alone, _ = PgdAt(ATTACK)(model, _batch(), _state())
    for progress, share in ((0.0, 0.0), (0.03, 0.3), (0.1, 1.0), (0.7, 1.0)):
        loss, metrics = method.recovery(PgdAt(ATTACK), model)(model, _batch(), _state(progress))
        assert loss.dtype == torch.float32
        expected = float(alone.detach()) + share * (0.01 * sparse + 0.1 * condition)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
        assert float(metrics["sparsity"]) == pytest.approx(sparse)
        assert float(metrics["conditioning"]) == pytest.approx(condition)
        assert "accuracy" in metrics and not any(value.requires_grad for value in metrics.values())
    at_once, _ = Arlst(sparsity=0.01, sparsity_term=sparsity_term, conditioning=0.0, warmup=0.0).recovery(
        PgdAt(ATTACK), model
    )(model, _batch(), _state(0.0))
    assert float(at_once.detach()) == pytest.approx(float(alone.detach()) + 0.01 * sparse, rel=1e-5)


def test_masked_factors_are_penalised_as_they_are_used():
    model = _compressed()
    pruned = MagnitudePruning(0.5).plan(model).apply(model)
    method = Arlst(sparsity=1.0, conditioning=0.0, sparsity_term="l1")
    _, metrics = method.recovery(PgdAt(ATTACK), model)(pruned, _batch(), _state())
    used = sum(float(factor.weight.detach().abs().sum()) for _, _, _, factor in separable_factors(pruned))
    assert float(metrics["sparsity"]) == pytest.approx(used, rel=1e-5)


def test_it_wraps_methods_with_gradients_of_their_own_and_may_be_wrapped_by_them():
    model = _compressed()
    parameters = [*model.parameters()]
    method, perturbed = Arlst(sparsity=0.01, conditioning=0.1), WeightPerturbation(PgdAt(ATTACK), 0.01)
    around = method.recovery(perturbed, model)
    assert isinstance(around, Gradients) and not isinstance(method.recovery(PgdAt(ATTACK), model), Gradients)
    loss, gradients, metrics = gradients_of(around, model, _batch(), _state(), parameters)
    inner_loss, inner, _ = gradients_of(perturbed, model, _batch(), _state(), parameters)
    weights = [factor.weight for _, _, _, factor in separable_factors(model)]
    penalty = sum(0.01 * SPARSITY_TERMS["log"](w) + 0.1 * CONDITION_TERMS["amgm"](w) for w in weights)
    more = torch.autograd.grad(penalty, parameters, allow_unused=True)
    assert any(extra is None for extra in more) and any(extra is not None for extra in more)
    for found, own, extra in zip(gradients, inner, more, strict=True):
        torch.testing.assert_close(found, own if extra is None else own + extra)
    assert float(loss) == pytest.approx(float(inner_loss) + float(penalty.detach()), rel=1e-5)
    assert metrics["sparsity"] > 0
    inside = WeightPerturbation(method.recovery(PgdAt(ATTACK), model), 0.01)
    assert len(gradients_of(inside, model, _batch(), _state(), parameters)[1]) == len(parameters)
    _, records = _trained(model, around, epochs=1)
    assert records[0]["conditioning"] > 0


def test_frozen_factors_are_no_obstacle():
    model = _compressed()
    for _, _, _, factor in separable_factors(model):
        factor.weight.requires_grad_(False)
    for objective in (PgdAt(ATTACK), WeightPerturbation(PgdAt(ATTACK), 0.01)):
        trained = [p for p in model.parameters() if p.requires_grad]
        _, gradients, _ = gradients_of(Arlst().recovery(objective, model), model, _batch(), _state(), trained)
        assert all(gradient is not None for gradient in gradients)


def test_a_larger_weight_on_the_condition_number_makes_it_smaller():
    """On every surrogate, by the true condition numbers of the layers after as many steps on the same batch."""
    found = {}
    for term in CONDITION_TERMS:
        for weight in (0.0, 0.1, 1.0, 10.0):
            model = _compressed(start="scratch")
            objective = Arlst(sparsity=0.0, conditioning=weight, condition_term=term).recovery(PgdAt(ATTACK), model)
            parameters = [*model.parameters()]
            optimiser = torch.optim.SGD(parameters, lr=0.01)
            for _ in range(60):
                _, gradients, _ = gradients_of(objective, model, _batch(), _state(), parameters)
                gradient_step(gradients, parameters, optimiser, 0.01, clip=5.0)
            kappas = torch.tensor([factor.condition_number for factor in factor_report(model)])
            found[term, weight] = float(kappas.log().sum())
        measured = [found[term, weight] for weight in (0.0, 0.1, 1.0, 10.0)]
        assert measured == sorted(measured, reverse=True), term
        assert measured[-1] < measured[0] - 1, term


def test_the_sparsity_terms_bring_weights_near_zero():
    model = _compressed()
    small = []
    for term, weight in (("log", 0.0), ("log", 0.03), ("l1", 0.03)):
        method = Arlst(sparsity=weight, sparsity_term=term, conditioning=0.0)
        trained, _ = _trained(model, method.recovery(PgdAt(ATTACK), model), epochs=12)
        weights = torch.cat([factor.weight.detach().flatten() for _, _, _, factor in separable_factors(trained)])
        small.append(float((weights.abs() < 0.01).float().mean()))
    assert small[1] > 2 * small[0] and small[2] > 2 * small[0]


# What follows


def test_magnitude_masks_the_factors_and_the_report_tells_what_that_does():
    model = _compressed().eval()
    report = factor_report(model)
    assert [(f.layer, f.term, f.index) for f in report[:2]] == [("features.0", 0, 0), ("features.0", 0, 1)]
    for factor, (_, _, _, module) in zip(report, separable_factors(model), strict=True):
        values = torch.linalg.svdvals(module.weight.detach().double())
        assert factor.shape == module.weight.shape and factor.nonzeros == module.weight.numel()
        assert factor.rank == min(factor.shape) and (factor.empty_rows, factor.empty_columns) == (0, 0)
        assert factor.condition_number == pytest.approx(float(values[0] / values[-1]), rel=1e-4)
    plan = MagnitudePruning(0.1).plan(model)
    pruned = plan.apply(model)
    masked = {layer.name for layer in plan.layers if layer.action == "masked"}
    assert masked == {f"features.{i}.terms.0.{k}" for i in (0, 2, 4) for k in (0, 1)}
    after = factor_report(pruned)
    assert sum(f.nonzeros for f in after) == round(0.1 * sum(f.nonzeros for f in report))
    assert any(f.empty_rows and f.condition_number == math.inf and f.rank < min(f.shape) for f in after)
    layer = pruned.features[0]
    own = [f.nonzeros for f in after if f.layer == "features.0"]
    assert int((layer.weight != 0).sum()) == math.prod(own), "non-zeros of the product"


def test_a_masked_layer_is_taken_as_it_is_used():
    model = _mlp()
    pruned = MagnitudePruning(0.5).plan(model).apply(model)
    compressed = Arlst(keep=0.2).plan(pruned).apply(pruned)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in deployed_layers(pruned).items():
            zeroed.get_submodule(name).weight.copy_(layer.weight)
    expected = Arlst(keep=0.2).plan(zeroed).apply(zeroed)
    torch.testing.assert_close(compressed(_x()), expected(_x()), rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in compressed.parameters())


def test_plans_compose_through_a_file(tmp_path):
    """Separable, then masked, then separable again."""
    model, spec = _mlp(), MLP
    for method in (Arlst(keep=0.3), MagnitudePruning(0.5), Arlst(keep=0.9)):
        plan = method.plan(model)
        model, spec = plan.apply(model).eval(), with_plan(spec, plan)
    save_model(spec, model, tmp_path)
    _, loaded = load_model(tmp_path)
    assert torch.equal(loaded(_x()), model(_x()))


def test_attacks_and_exports_see_the_compressed_network(tmp_path):
    pytest.importorskip("onnxscript")
    import onnxruntime

    model = _build(VGG_SPEC)
    compressed = Arlst(keep=0.05).plan(model).apply(model).eval()
    x = _x(4)
    x_adv = ATTACK(compressed, x, torch.arange(4) % 3, generator=torch.Generator().manual_seed(0))
    assert 0 < float((x_adv - x).abs().max()) <= 0.05 + 1e-6
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(compressed, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "network.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "network.pt2").module()(x[:3]), compressed(x[:3]))
    torch.onnx.export(
        compressed, (x,), tmp_path / "network.onnx", dynamic_shapes=({0: batch},), dynamo=True, verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: x[:2].numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), compressed(x[:2]).detach(), rtol=1e-4, atol=1e-5)


def test_layers_are_materialised_where_the_dense_product_is_quicker():
    model = nn.Sequential(nn.Linear(2048, 2048), nn.Linear(2048, 16), nn.Linear(16, 16), nn.Linear(16, 3)).eval()
    separable = copy.deepcopy(model)
    separable[0] = SeparableLinear(Separation((32, 64), (32, 64)))
    separable[2] = SeparableLinear(Separation((2, 2, 4), (2, 2, 4)))
    x = torch.rand(64, 2048)
    quicker = quicker_dense(separable, x)
    assert quicker == ["2"], "few features are multiplied faster than they are rearranged"
    mixed = materialised(separable, quicker)
    assert isinstance(mixed[0], SeparableLinear) and type(mixed[2]) is nn.Linear
    torch.testing.assert_close(mixed(x), separable(x), rtol=1e-4, atol=1e-4)
    assert isinstance(separable[2], SeparableLinear), "a copy"


def test_the_setting_s_image_and_seed_are_used():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
    data = _data()
    parts = split(data.y_train, architecture=0.0, validation=0.25, seed=0)
    plan = Arlst(keep=0.1, start="scratch").plan(model, Setting(model, data, parts, 5, 1, 8))
    assert plan.layers[0].data["in_modes"] == [8, 8] and plan.layers[0].data["seed"] == 5
    other = Arlst(keep=0.1, start="scratch").plan(model, Setting(model, data, parts, 6, 1, 8))
    assert not torch.equal(plan.apply(model)[1].weight, other.apply(model)[1].weight)
