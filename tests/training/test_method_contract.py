"""What every training method promises, prepared as training prepares it, on whatever is in nas/training (T0)."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from nas import plugins
from nas.data.augmentation import Augmentation
from nas.model_file import ModelSpec, save_model
from nas.objective import Batch, Gradients, Setting, State, TrainsOn, gradients_of, kept_by, prediction_of, prepared
from nas.optimisation import Sgd
from nas.precision import passes_in
from nas.prediction import networks_in
from nas.threat_model import ThreatModel
from nas.training.loop import Training, train
from nas.training.weight_perturbation import WeightPerturbation
from runs.recipe import attack_from, method_from
from search_spaces.dsara import SPACE
from search_spaces.genotype import StageGenotype
from search_spaces.layers import Normalise

METHODS = plugins.available("training")
TEACHER = "the folder of a finished network"
QUICK = {
    "adv_kip": {"images": 9, "steps": 2, "target_images": 9, "validate_every": 1},
    "ard": {"teacher": TEACHER},
    "information_gain": {"particles": 2},
    "jsigr": {"adversarial": True},
    "ladder": {
        "classifier": {"epochs": 1, "batch_size": 20}, "decoder_steps": 5, "decoder_batch": 16, "decoder_width": 4,
        "svm_images": 5, "svm_epochs": 1, "svm_batch": 8, "least_kept": 0.0,
    },
    "rslad": {"teacher": TEACHER},
    "self_ensemble": {"draws": 2},
}  # fmt: skip
"""Settings that methods need to be quick, or to attack at all."""
UNMIXED = {"gaussian_augmentation": {"noise": {"sigma": 0.0}}, "interpolated": {"alpha": 0.0}}
"""Settings with which methods that mix images, or add noise to them, leave them alone."""
BEYOND = {"n_fgsm": 3.0}
"""Methods that leave the ball by design, and by how much."""
STAGES_IN_FLOAT32 = ("ladder",)
"""Methods that train networks of their own, in single precision, before training."""
LIMITS = {
    "free": ({}, "standard", {}, 0.0),
    "gaussian_augmentation": ({"noise": {"sigma": 0.0}}, "standard", {}, 0.1),
    "grad_align": ({"weight": 0.0}, "pgd_at", {}, 0.1),
    "info_at": ({"gamma": 0.0, "beta": 0.0}, "pgd_at", {}, 0.1),
    "interpolated": ({"alpha": 0.0, "adversarial_share": 1.0}, "pgd_at", {}, 0.1),
    "jsigr": ({"jacobian_weight": 0.0, "saliency_weight": 0.0, "adversarial": True}, "pgd_at", {}, 0.1),
    "krylov_at": ({}, "standard", {}, 0.0),
    "ladder": ({"mix": 0.0}, "standard", {}, 0.1),
    "multi_objective": ({"floor": 1.0}, "pgd_at", {}, 0.1),
    "n_fgsm": ({}, "standard", {}, 0.0),
    "pgd_at": ({}, "standard", {}, 0.0),
    "self_ensemble": ({"noise": {"first": 0.0, "inner": 0.0}}, "standard", {}, 0.1),
    "trades": ({"beta": 0.0}, "standard", {}, 0.1),
}
"""What a method is without its idea: its settings, the other method, the settings of that one, epsilon."""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a network for the images of ``data``."""
    folder = tmp_path_factory.mktemp("teacher")
    spec = ModelSpec(StageGenotype("plain", (1,), (4,)), 0, 0, (1, 8, 8), ("a", "b", "c"), (0.5,), (0.25,))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        save_model(spec, spec.build(), folder)
    return folder


@pytest.fixture
def method(teacher):
    """Makes a method as a recipe does: by name, attack and threat model of the recipe, in two steps of attack."""

    def make(name, epsilon=0.1, norm="linf", **settings):
        cls = METHODS[name]
        settings = {key: str(teacher) if value is TEACHER else value for key, value in settings.items()}
        attack = {"name": getattr(cls, "inner_attack", "pgd"), "steps": 2}
        return method_from({"name": name, **settings}, "method", attack, "attack", ThreatModel(norm, epsilon))

    return make


def _cells():
    return SPACE.build(
        SPACE.random(torch.Generator().manual_seed(4)),
        channels=4, cells=5, input_shape=(1, 8, 8), classes=3, mean=(0.5,), std=(0.25,),
    )  # fmt: skip


def _residual():
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    model.conv1, model.maxpool = nn.Conv2d(1, 64, 3, 1, 1, bias=False), nn.Identity()
    return nn.Sequential(Normalise((0.5,), (0.25,)), model)


def _transformer():
    model = VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=3
    )
    model.conv_proj = nn.Conv2d(1, 32, 4, 4)
    nn.init.normal_(model.heads.head.weight, std=0.3)  # it begins with zeros, and no input gradient
    return nn.Sequential(Normalise((0.5,), (0.25,)), model)


KINDS = {"cells": _cells, "residual": _residual, "transformer": _transformer}


def _network(build, method=None, seed=0):
    """A network, or as many as the method predicts with, in train mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prediction = None if method is None else prediction_of(method)
        return (build() if prediction is None else prediction.predictor(build)).train()


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _state(seed=0):
    return State(
        epoch=1, step=3, progress=0.5, attack_generator=_generator(seed), method_generator=_generator(seed + 1)
    )


def _ready(name, method, model, data, parts):
    basis = copy.deepcopy(model).float() if name in STAGES_IN_FLOAT32 else model
    return prepared(method, Setting(basis, data, parts, 0, 2, 12))


def _batch(objective, data, dtype=torch.float32):
    """Twelve of the images that the loop would give to ``objective``."""
    own = kept_by(objective, TrainsOn)
    x, y = (data.x_train, data.y_train) if own is None else own.training_images()
    rows = torch.arange(min(12, len(y)))
    return Batch(x[rows].to(dtype) / 255, y[rows], rows)


def _gradients(objective, model, batch, state=None):
    loss, gradients, metrics = gradients_of(objective, model, batch, state or _state(), [*model.parameters()])
    return loss, gradients, metrics


class Learning:
    """Watches the passes that weights learn from: what they see, and how many there are."""

    def __init__(self, model):
        self.seen = []
        self.handles = [network.register_forward_pre_hook(self._look) for network in networks_in(model).values()]

    def _look(self, network, inputs):
        if network.training and torch.is_grad_enabled() and any(p.requires_grad for p in network.parameters()):
            self.seen.append(inputs[0].detach().clone())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def distances(self, batch):
        """Of each image seen from the nearest image of the batch, in the maximum norm."""
        seen = torch.cat(self.seen)
        images = torch.cat(batch.x.split(seen.shape[1], 1))  # a method may have two images in one
        return torch.cdist(seen.flatten(1), images.flatten(1), p=math.inf).amin(1)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("cells", torch.float32), ("cells", torch.float64), ("residual", torch.float32), ("transformer", torch.float32)],
    ids=["cells", "cells in float64", "residual", "transformer"],
)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_any_network_and_changes_nothing_else(name, kind, dtype, method, data, parts):
    chosen = method(name, **QUICK.get(name, {}))
    model = _network(KINDS[kind], chosen).to(dtype)
    streams = torch.get_rng_state()
    ready = _ready(name, chosen, model, data, parts)
    batch = _batch(ready, data, dtype)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    x, y, hooks = (
        batch.x.clone(),
        batch.y.clone(),
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )
    with Learning(model) as passes:
        loss, gradients, metrics = _gradients(ready, model, batch)
    assert loss.dim() == 0 and not loss.requires_grad and math.isfinite(loss.item())
    assert all(module.training for module in model.modules()), "modes are as they were"
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), weights, strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), streams)
    assert torch.equal(batch.x, x) and torch.equal(batch.y, y) and not batch.x.requires_grad
    assert "accuracy" in metrics, "the progress line and the watch over training show it"
    assert all(value.dim() == 0 and not value.requires_grad and math.isfinite(value) for value in metrics.values())
    # Statistics are recorded by passes that weights learn from, at least once, and by no other.
    counts = {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert all(1 <= count <= len(passes.seen) for count in counts)
    # Every weight that answers depend on learns.
    clean = torch.cat(batch.x.split(1, 1))[:12]
    reference = torch.autograd.grad(model(clean).square().sum(), [*model.parameters()], allow_unused=True)
    largest = max(float(slope.abs().max()) for slope in reference if slope is not None)
    for (place, weight), gradient, slope in zip(model.named_parameters(), gradients, reference, strict=True):
        if slope is None or float(slope.abs().max()) < 1e-6 * largest:
            continue  # such as a bias before batch normalisation
        assert gradient is not None, place
        assert gradient.shape == weight.shape and gradient.dtype == dtype, place
        assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0, place


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("name", METHODS)
def test_weights_learn_from_images_in_the_ball_alone(name, epsilon, norm, method, data, parts, network):
    """With epsilon 0 from the clean images to the bit."""
    chosen = method(name, epsilon, norm, **{**QUICK.get(name, {}), **UNMIXED.get(name, {})})
    model = _network(network, chosen)
    ready = _ready(name, chosen, model, data, parts)
    batch = _batch(ready, data)
    with Learning(model) as passes:
        for _ in range(2):  # what is carried from step to step moves from the second on
            _gradients(ready, model, batch)
    farthest = float(passes.distances(batch).max())
    if kept_by(ready, TrainsOn) is not None:
        assert farthest == 0, "attacks took place before training"
        return
    largest = epsilon * BEYOND.get(name, 1.0)
    assert farthest <= (largest + 1e-6 if epsilon else 0)
    attacks = "attack" in METHODS[name].__dataclass_fields__ or "threat_model" in METHODS[name].__dataclass_fields__
    assert (farthest > 0.1 * epsilon) == (attacks and epsilon > 0)


@pytest.mark.parametrize("name", LIMITS)
def test_without_its_idea_a_method_is_another(name, method, data, parts, network):
    """Loss and gradients alike, in float64."""
    settings, other, its_settings, epsilon = LIMITS[name]
    chosen = method(name, epsilon, **{**QUICK.get(name, {}), **settings})
    ready = _ready(name, chosen, _network(network, chosen).double(), data, parts)
    batch = _batch(ready, data, torch.float64)
    loss, gradients, _ = _gradients(ready, _network(network, chosen).double(), batch)
    batch = dataclasses.replace(batch, x=batch.x[:, :1])  # a method may have two images in one
    expected, slopes, _ = _gradients(method(other, epsilon, **its_settings), _network(network).double(), batch)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for gradient, slope in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_is_the_same_step_but_for_rounding(name, method, data, parts, network, monkeypatch):
    """At clean images, as a sign of an attack's gradient that rounding turns would make another batch."""
    chosen = method(name, 0.0, **{**QUICK.get(name, {}), **UNMIXED.get(name, {})})
    model = _network(network, chosen)
    ready = _ready(name, chosen, model, data, parts)
    batch = _batch(ready, data)
    loss, gradients, _ = _gradients(ready, model, batch)
    monkeypatch.setattr("nas.precision.check_bfloat16", lambda device: None)  # emulated where there is none
    with passes_in("bfloat16", model, torch.device("cpu")):
        rounded, slopes, metrics = _gradients(ready, model, batch)
    assert not any("forward" in vars(module) for module in model.modules()) and not torch.is_autocast_enabled("cpu")
    assert all(slope is None or slope.dtype == torch.float32 for slope in slopes)
    assert math.isfinite(rounded) and all(math.isfinite(value) for value in metrics.values())
    ours, theirs = (torch.cat([g.flatten() for g in one if g is not None]) for one in (slopes, gradients))
    assert 0.98 < torch.cosine_similarity(ours, theirs, 0).item() < 1
    assert rounded.item() == pytest.approx(loss.item(), rel=0.05, abs=0.02)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", METHODS)
def test_a_training_that_was_cut_off_ends_with_the_same_bits(name, method, data, parts, network, tmp_path):
    """In the preparation's folder as well as after an epoch; the global random stream plays no part."""
    chosen = method(name, **QUICK.get(name, {}))
    settings = {"validation_attack": attack_from({"name": "fgsm"}, "", ThreatModel("linf", 0.1)), "seed": 1}
    training = Training(epochs=2, batch_size=16, optimiser=Sgd(0.02), augmentation=Augmentation(), ema=0.5)
    whole = _network(network, chosen)
    records = train(whole, data, parts, chosen, training, **settings)
    assert any(
        not torch.equal(now, then)
        for now, then in zip(whole.parameters(), _network(network, chosen).parameters(), strict=True)
    ), "the training did something"

    def stop(record):
        if record["epoch"] == 1:
            raise Stopped

    again, checkpoint = _network(network, chosen), tmp_path / "checkpoint.safetensors"
    torch.manual_seed(99)
    with pytest.raises(Stopped):
        train(again, data, parts, chosen, training, checkpoint=checkpoint, log=stop, **settings)
    again = _network(network, chosen)
    assert train(again, data, parts, chosen, training, checkpoint=checkpoint, **settings) == records
    for place, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[place], value), place


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_perturbed_at_the_images_and_draws_of_the_step(name, method, data, parts, network):
    """The climb and the descent see the same images, crafted once; what has gradients of its own is refused."""
    chosen = method(name, **QUICK.get(name, {}))
    model = _network(network, chosen).double()
    ready = _ready(name, chosen, model, data, parts)
    if kept_by(ready, Gradients) is not None:
        assert kept_by(chosen, Gradients) is not None, "known before anything was prepared"
        return
    batch = _batch(ready, data, torch.float64)
    with Learning(model) as passes:
        _, gradients, _ = _gradients(WeightPerturbation(ready, gamma=0.2), model, batch)
    half = len(passes.seen) // 2
    assert half > 0
    assert all(torch.equal(a, b) for a, b in zip(passes.seen[:half], passes.seen[half:], strict=True))
    plain = _gradients(ready, _network(network, chosen).double(), batch)[1]
    nearly = _gradients(WeightPerturbation(ready, gamma=1e-9), _network(network, chosen).double(), batch)[1]
    for ours, theirs in zip(nearly, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(gradients, plain, strict=True))
