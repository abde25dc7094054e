"""LADDER: latents, boundaries among them, images back from them, fine-tuning, and all of it as a method."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.svm import SVC
from torch import nn
from torchvision.models import VisionTransformer, resnet18

from nas.attacks.pgd import Pgd
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import Failure, InputError
from nas.objective import Batch, Setting, State
from nas.optimisation import Sgd
from nas.randomness import derived_seed, generator
from nas.tensor_file import write_tree
from nas.threat_model import ThreatModel
from nas.training import ladder as ladder_module
from nas.training import latent_boundary
from nas.training.cost import measure
from nas.training.ladder import FineTuning, Ladder
from nas.training.latent_boundary import Boundaries, Decoder, fit_boundaries, fit_decoder, latent
from nas.training.loop import Training, train
from nas.training.stage import Stage
from nas.training.standard import Standard
from search_spaces.catalogue import load_genotype, space_of
from search_spaces.layers import Normalise

ATTACK = Pgd(ThreatModel("linf", 0.08), steps=1)
CLASSIFIER = Training(epochs=6, batch_size=16, optimiser=Sgd(0.1))
QUICK = Ladder(
    classifier=CLASSIFIER, decoder_steps=150, decoder_batch=32, decoder_rate=5e-3, decoder_width=8, svm_batch=4
)
NOWHERE = Stage(None, "nowhere", ())


def _rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def _networks():
    def vit():
        model = VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=4
        )
        nn.init.normal_(model.heads.head.weight, 0, 0.1)  # 0 as torchvision makes it
        return model

    def cells():
        genotype = load_genotype("arnas")
        sizes = {"channels": 4, "cells": 5, "input_shape": (3, 32, 32), "classes": 4}
        return space_of(genotype).build(genotype, **sizes, mean=(0.5,) * 3, std=(0.25,) * 3)

    normalise = Normalise((0.5,) * 3, (0.25,) * 3)
    return {
        "cells": (cells, "cells.3"),
        "resnet": (lambda: nn.Sequential(normalise, resnet18(num_classes=4)), "1.layer4"),
        "vit": (lambda: nn.Sequential(normalise, vit()), "1.encoder"),
    }


# Latents


def test_the_latent_is_the_input_of_the_last_layer(network):
    model, x = network().double(), _rand(5, 1, 8, 8)
    encode, shift = latent(model, "", x), _rand(5, 64, seed=1)
    model.eval()
    features = model.features(model.normalise(x)).detach()
    torch.testing.assert_close(encode(x, batch_size=2), features)
    torch.testing.assert_close(encode.logits(x, shift), model.classifier(features + shift).detach())
    torch.testing.assert_close(encode.logits(x, torch.zeros_like(shift)), model(x).detach())


def test_maps_are_averaged_and_moved_at_every_position(network):
    model, x = network().double().eval(), _rand(5, 1, 8, 8)
    encode, shift = latent(model, "features.1", x), _rand(5, 4, seed=1)
    maps = model.features[:2](model.normalise(x)).detach()
    torch.testing.assert_close(encode(x), maps.mean((2, 3)))
    wanted = model.classifier(model.features[2:](maps + shift[:, :, None, None])).detach()
    torch.testing.assert_close(encode.logits(x, shift), wanted)


@pytest.mark.parametrize("name", ["cells", "resnet", "vit"])
def test_latents_of_any_network(name):
    """Found or named; as found, hooks and modes included."""
    make, layer = _networks()[name]
    model, x = _seeded(make).train(), _rand(3, 3, 32, 32, dtype=torch.float32)
    before = [buffer.clone() for buffer in model.buffers()]
    for encode in (latent(model, "", x), latent(model, layer, x)):
        z = encode(x)
        assert z.dim() == 2 and len(z) == 3 and z.std(0).max() > 0
        with torch.no_grad():
            logits = model.eval()(x)
        torch.testing.assert_close(encode.logits(x, torch.zeros_like(z)), logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(encode.logits(x, torch.randn(z.shape)), logits, atol=1e-3)
        model.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_layer_that_cannot_be_used_is_refused(network):
    x = _rand(2, 1, 8, 8, dtype=torch.float32)
    with pytest.raises(InputError, match=r"did you mean 'features\.1'"):
        latent(network(), "featured.1", x)
    unused = network()
    unused.spare = nn.Linear(2, 2)
    with pytest.raises(InputError, match="not used"):
        latent(unused, "spare", x)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(64, 3, batch_first=True)

        def forward(self, x):
            return self.layer(x.flatten(1).unsqueeze(1))[0][:, 0] * 2.0

    with pytest.raises(InputError, match="neither a map"):
        latent(Pair(), "layer", x)
    with pytest.raises(InputError, match="name the latent layer"):
        latent(Pair(), "", x)


# Boundaries


def _boundaries(classes=3, d=5, seed=0):
    pairs = classes * (classes - 1) // 2
    stream = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=stream, dtype=torch.float64)

    return Boundaries(draw(pairs, d), draw(pairs), (draw(pairs, d, d), draw(pairs, d)), classes, torch.ones(pairs))


def test_attention_reweighs_and_never_removes():
    attended = _boundaries().attended(1, _rand(7, 5))
    assert bool((attended > 1).all()) and bool((attended <= np.e).all())
    torch.testing.assert_close(attended.log().sum(1), torch.ones(7, dtype=torch.float64))


def test_the_score_rises_towards_the_target():
    """By epsilon |a w|^2 exactly with a held fast; the other way about with the classes exchanged."""
    found, z = _boundaries(), _rand(6, 5)
    for pair, (low, high) in enumerate([(0, 1), (0, 2), (1, 2)]):
        source, target = torch.full((6,), low), torch.full((6,), high)
        direction = found.towards(z, source, target)
        attended = found.attended(pair, z)
        rise = (attended * (z + 0.7 * direction)) @ found.weight[pair] + found.bias[pair] - found.score(pair, z)
        torch.testing.assert_close(rise, 0.7 * (attended * found.weight[pair]).square().sum(1))
        assert bool((rise > 0).all())
        torch.testing.assert_close(found.towards(z, target, source), -direction)


def test_units_of_the_direction():
    found, z = _boundaries(), _rand(6, 5)
    source, target = torch.zeros(6, dtype=torch.int64), torch.tensor([1, 2] * 3)
    plain, unit, reaching = (found.towards(z, source, target, name) for name in ("normal", "length", "distance"))
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(F.cosine_similarity(plain, unit), torch.ones(6, dtype=torch.float64))
    for row in range(6):
        pair = int(target[row]) - 1
        before = found.score(pair, z[row : row + 1])
        attended = found.attended(pair, z[row : row + 1])
        after = (attended * (z[row] + reaching[row])) @ found.weight[pair] + found.bias[pair]
        torch.testing.assert_close(after, before.clamp_min(0), rtol=0, atol=1e-12)


SVM = {"per_class": 10_000, "epochs": 300, "batch_size": 10_000, "learning_rate": 0.1, "seed": 0}


def _gaussians(means, n=300, d=2):
    noise = torch.randn(len(means) * n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(len(means)).repeat_interleave(n)
    return torch.tensor(means, dtype=torch.float64)[y] + noise, y


def test_the_normal_of_two_gaussians_is_the_difference_of_their_means():
    z, y = _gaussians([(-1.5, -2.0), (1.5, 2.0)], n=3000)
    found = fit_boundaries(z, y, 2, attention=False, hinge=1.0, **SVM)
    angle = torch.rad2deg(F.cosine_similarity(found.weight, torch.tensor([[3.0, 4.0]])).acos())
    assert angle.item() < 5
    assert found.accuracy.item() > 0.98
    assert fit_boundaries(z, y, 2, attention=False, hinge=0.0, **SVM).weight.abs().max() == 0


def test_the_boundary_is_that_of_a_support_vector_machine():
    """Same objective as scikit-learn's: |w|^2/d + hinge mean max(0, 1 - s), its C being hinge d / (2 n)."""
    z, y = _gaussians([(-1.0, 0.0), (1.0, 0.5)])
    settings = {**SVM, "epochs": 2000, "learning_rate": 0.03}
    found = fit_boundaries(z, y, 2, attention=False, hinge=1.0, **settings)
    # The part it was trained on: two thirds of each class, in the order it drew.
    order = torch.randperm(300, generator=generator(0, "boundaries"))[:200]
    rows = torch.cat([order, 300 + order])
    side = 2.0 * y[rows] - 1

    def value(weight, bias):
        return float(weight.square().mean() + (1 - side * (z[rows] @ weight + bias)).clamp_min(0).mean())

    best = SVC(kernel="linear", C=2 / (2 * 400), tol=1e-6).fit(z[rows].numpy(), side.numpy())
    reference = value(torch.tensor(best.coef_[0]), float(best.intercept_[0]))
    assert reference - 1e-6 <= value(found.weight[0], found.bias[0]) < 1.005 * reference


def test_boundaries_of_all_pairs_with_attention():
    z, y = _gaussians([(3.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 3.0), (-3.0, -3.0, 0.0)], d=3)
    found = fit_boundaries(
        z, y, 4, attention=True, hinge=1.0, per_class=90, epochs=20, batch_size=1, learning_rate=0.01, seed=0
    )
    assert found.accuracy.shape == (6,) and found.accuracy.min() > 0.9
    for pair, (low, high) in enumerate([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]):
        assert (found.score(pair, z[y == low]) < 0).double().mean() > 0.9
        assert (found.score(pair, z[y == high]) > 0).double().mean() > 0.9


def test_boundaries_that_cannot_be_are_refused():
    z, y = _gaussians([(0.0, 0.0), (1.0, 1.0)], n=2)
    with pytest.raises(InputError, match="at least 3 images"):
        fit_boundaries(z, y, 2, attention=True, hinge=1.0, **SVM)
    wide = torch.zeros(6, 40_000)
    with pytest.raises(InputError, match="attention = false"):
        fit_boundaries(wide, torch.arange(6) // 3, 2, attention=True, hinge=1.0, **SVM)


# Decoder


@pytest.mark.parametrize("image", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 40, 24), (2, 9, 17)])
def test_images_of_any_size(image):
    decoder = Decoder(torch.zeros(5), torch.ones(5), image, 4)
    images = decoder(torch.randn(3, 5))
    assert images.shape == (3, *image) and images.min() >= 0 and images.max() <= 1
    assert decoder.images(torch.randn(3, 5)).dtype == torch.uint8


def test_the_decoder_learns_and_goes_on_where_it_was_cut_off(data, tmp_path, monkeypatch):
    z = data.x_train.float().flatten(1)[:, ::2] / 50
    settings = {"batch_size": 16, "learning_rate": 5e-3, "width": 8, "seed": 1}
    whole = fit_decoder(z, data.x_train, steps=600, **settings, stage=NOWHERE)
    error = (whole.images(z).float() - data.x_train.float()).square().mean()
    assert error < 0.3 * data.x_train.float().var(0).mean()

    stage, calls = Stage(tmp_path, "decoder", ("a",)), []
    original = latent_boundary.weight_step

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 550:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(latent_boundary, "weight_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit_decoder(z, data.x_train, steps=600, **settings, stage=stage)
    resumed = fit_decoder(z, data.x_train, steps=600, **settings, stage=stage)
    assert len(calls) == 550 + 100
    assert torch.equal(whole.images(z), resumed.images(z))


def test_a_stage_made_from_something_else_is_made_again(tmp_path):
    Stage(tmp_path, "a", (1, "x")).write({"value": torch.ones(2)})
    assert torch.equal(Stage(tmp_path, "a", (1, "x")).read()["value"], torch.ones(2))
    assert Stage(tmp_path, "a", (2, "x")).read() == {} == Stage(None, "a", (1, "x")).read()


# The method


def _prepared(method, model, data, parts, folder=None):
    return method.prepare(Setting(model, data, parts, 3, 2, 16, folder))


def test_epsilon_zero_is_reconstruction_and_labels_stay(data, parts, network, tmp_path):
    objective = _prepared(replace(QUICK, epsilons=(0.0,)), network(), data, parts, tmp_path)
    pairs, y = objective.training_images()
    x = data.x_train[parts.training]
    assert torch.equal(pairs[:, :1], x) and torch.equal(y, data.y_train[parts.training])
    trained = network()
    trained.load_state_dict(objective.initial_weights())
    z = latent(trained, "", x)(x)
    settings = {"steps": 150, "batch_size": 32, "learning_rate": 5e-3, "width": 8}
    decoder = fit_decoder(z, x, **settings, seed=derived_seed(3, "ladder"), stage=NOWHERE)
    assert torch.equal(pairs[:, 1:], decoder.images(z))
    report = json.loads((tmp_path / "ladder.json").read_text())
    assert report["accuracy"] > 0.95 and report["boundary_accuracy"] > 0.9 and report["latent_size"] == 64
    assert report["latents_misclassified"] == [pytest.approx(1 - report["accuracy"])]


def test_further_along_the_normal_the_classifier_takes_images_for_the_target(data, parts, network, tmp_path):
    """Both the latents and the images decoded from them; backwards, or along a random direction, they would not be."""
    method = replace(QUICK, epsilons=(0.0, 0.5, 1.0, 2.0, 4.0), unit="distance")
    objective = _prepared(method, network(), data, parts, tmp_path)
    report = json.loads((tmp_path / "ladder.json").read_text())
    for name in ("latents_misclassified", "images_misclassified"):
        rates = report[name]
        assert rates == sorted(rates) and rates[0] < 0.1 and rates[-1] > 0.9, (name, rates)
    assert report["latents_misclassified"][1] < 0.3
    pairs, y = objective.training_images()
    assert len(pairs) == 5 * len(parts.training) and torch.equal(y, data.y_train[parts.training].repeat(5))
    assert 0 < report["mean_linf"] < 1 and report["mean_l2"] > report["mean_linf"]


def test_adaptive_epsilons_stop_at_the_first_image_that_is_mistaken(data, parts, network, tmp_path):
    few = replace(QUICK, epsilons=(0.0,), unit="distance", adaptive=True, attempts=4)
    many = replace(few, attempts=16)
    rates = []
    for name, method in (("few", few), ("many", many)):
        (tmp_path / name).mkdir()
        objective = _prepared(method, network(), data, parts, tmp_path / name)
        report = json.loads((tmp_path / name / "ladder.json").read_text())
        rates.append(report["images_misclassified"][0])
        assert len(objective.training_images()[1]) == len(parts.training)
        assert report["epsilon"][0] < (0.41 if name == "few" else 6.5)
    assert rates[0] < 0.5 < 0.9 < rates[1]


def _state():
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return State(0, 0, 0.0, *generators)


def _loss_and_gradients(objective, model, batch):
    loss, _ = objective(model, batch, _state())
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def test_fine_tuning_weighs_both_halves(network):
    x, other, y = _rand(8, 1, 8, 8), _rand(8, 1, 8, 8, seed=5), torch.arange(8) % 3
    batch = Batch(torch.cat([x, other], 1), y, torch.arange(8))

    def method(mix):
        return FineTuning(torch.zeros(0), y, {}, mix)

    clean = _loss_and_gradients(Standard(), network().double(), Batch(x, y, torch.arange(8)))
    moved = _loss_and_gradients(Standard(), network().double(), Batch(other, y, torch.arange(8)))
    for mix in (0.0, 0.3, 1.0):
        loss, gradients = _loss_and_gradients(method(mix), network().double(), batch)
        torch.testing.assert_close(loss, mix * moved[0] + (1 - mix) * clean[0], rtol=1e-10, atol=0)
        for found, a, b in zip(gradients, moved[1], clean[1], strict=True):
            torch.testing.assert_close(found, mix * a + (1 - mix) * b, rtol=1e-10, atol=1e-13)
    same = Batch(torch.cat([x, x], 1), y, torch.arange(8))
    loss, gradients = _loss_and_gradients(method(0.5), network().double(), same)
    torch.testing.assert_close((loss, *gradients), (clean[0], *clean[1]), rtol=1e-10, atol=1e-13)


def _train(model, data, parts, method, **more):
    training = Training(epochs=2, batch_size=16, optimiser=Sgd(0.01))
    return train(model, data, parts, method, training, validation_attack=ATTACK, seed=3, **more)


def _weights(model):
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


def test_training_goes_on_from_the_classifier_and_the_network_given_is_left_alone(data, parts, network):
    model, untouched = network(), network()
    objective = _prepared(QUICK, model, data, parts)
    assert torch.equal(_weights(model), _weights(untouched))
    classifier = network()
    classifier.load_state_dict(objective.initial_weights())
    still = Training(epochs=1, batch_size=16, optimiser=Sgd(1e-12, weight_decay=0.0))
    train(model, data, parts, QUICK, still, validation_attack=ATTACK, seed=3)
    for ours, theirs in zip(model.parameters(), classifier.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert all(module.training for module in network().modules())


@pytest.mark.parametrize("where", ["fit_decoder", "fit_boundaries", "fine-tuning"])
def test_training_cut_off_in_any_stage_comes_to_the_same(where, data, parts, network, tmp_path, monkeypatch):
    whole = network()
    records = _train(whole, data, parts, QUICK)

    def stop(*arguments, **more):
        raise KeyboardInterrupt

    resumed, checkpoint = network(), tmp_path / "checkpoint.safetensors"
    more = {"log": lambda record: stop() if record["epoch"] == 1 else None} if where == "fine-tuning" else {}
    with monkeypatch.context() as patch:
        if where != "fine-tuning":
            patch.setattr(ladder_module, where, stop)
        with pytest.raises(KeyboardInterrupt):
            _train(resumed, data, parts, QUICK, checkpoint=checkpoint, **more)
    assert (tmp_path / "ladder-classifier.safetensors").exists()
    assert _train(resumed, data, parts, QUICK, checkpoint=checkpoint) == records
    assert torch.equal(_weights(whole), _weights(resumed))


def test_stages_are_not_made_twice(data, parts, network, tmp_path, monkeypatch):
    first = _prepared(QUICK, network(), data, parts, tmp_path)
    monkeypatch.setattr(ladder_module, "fit_boundaries", None)  # calling it would fail
    again = _prepared(QUICK, network(), data, parts, tmp_path)
    assert torch.equal(first.pairs, again.pairs)


def test_what_measuring_the_cost_prepares_the_training_finds(data, parts, network, tmp_path, monkeypatch):
    whole = network()
    records = _train(whole, data, parts, QUICK)
    measure(network(), data, parts, QUICK, Training(epochs=2, batch_size=16), seed=3, folder=tmp_path)
    monkeypatch.setattr(ladder_module, "fit_boundaries", None)  # calling it would fail
    trained = network()
    assert _train(trained, data, parts, QUICK, checkpoint=tmp_path / "checkpoint.safetensors") == records
    assert torch.equal(_weights(trained), _weights(whole))


@pytest.mark.parametrize("name", ["cells", "resnet", "vit"])
def test_any_network_can_be_trained(name, tmp_path):
    make, layer = _networks()[name]
    x = (256 * _rand(40, 3, 32, 32)).to(torch.uint8)
    y = torch.arange(40) % 4
    data = ImageData("noise", x[:32], y[:32], x[32:], y[32:], tuple("abcd"))
    parts = split(data.y_train, architecture=0.5, validation=0.25, seed=0)
    method = replace(
        QUICK,
        classifier=replace(CLASSIFIER, epochs=1, batch_size=8),
        decoder_steps=2,
        svm_epochs=1,
        svm_images=3,
        least_kept=0,
    )
    for chosen in ("", layer):
        model = _seeded(make)
        records = train(
            model, data, parts, replace(method, layer=chosen), Training(epochs=1, batch_size=8, optimiser=Sgd(0.01)),
            validation_attack=ATTACK, seed=0,
        )  # fmt: skip
        assert np.isfinite(records[0]["loss"]) and {"boundary_loss", "natural_loss"} < records[0].keys()


def test_a_trained_network_can_be_given(data, parts, network, tmp_path):
    objective = _prepared(QUICK, network(), data, parts)
    save_file({name: value.contiguous() for name, value in objective.weights.items()}, tmp_path / "model.safetensors")
    given = replace(QUICK, weights=str(tmp_path / "model.safetensors"))
    assert torch.equal(_prepared(given, network(5), data, parts).pairs, objective.pairs)
    write_tree({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="another network"):
        _prepared(replace(given, weights=str(tmp_path / "other.safetensors")), network(), data, parts)


def test_a_decoder_that_loses_the_classes_stops_it(data, parts, network):
    with pytest.raises(Failure, match="raise decoder_steps"):
        _prepared(replace(QUICK, decoder_steps=1), network(), data, parts)
    _prepared(replace(QUICK, decoder_steps=1, least_kept=0.0), network(), data, parts)


def test_a_wrong_layer_is_told_before_the_classifier_is_trained(data, parts, network, tmp_path):
    with pytest.raises(InputError, match="did you mean 'classifier'"):
        _prepared(replace(QUICK, layer="clasifier"), network(), data, parts, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [
        {"decoder_steps": 0},
        {"svm_epochs": 0},
        {"attempts": 0},
        {"decoder_rate": 0.0},
        {"svm_hinge": -1.0},
        {"epsilons": ()},
        {"epsilons": (-1.0,)},
        {"epsilons": (float("nan"),)},
        {"mix": 1.5},
        {"least_kept": -0.1},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match="LADDER"):
        Ladder(**settings)
