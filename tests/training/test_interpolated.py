"""Interpolated adversarial training: its limits, its mixtures by hand, and mixing inside any network."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.models.vision_transformer import VisionTransformer

from nas.attacks.pgd import Pgd
from nas.data.augmentation import Augmentation
from nas.errors import InputError
from nas.model_file import ModelSpec
from nas.objective import Batch, State
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training.auxiliary import WithAuxiliary
from nas.training.interpolated import Interpolated
from nas.training.loop import Training, train
from nas.training.mixture import Mixture, cuts, drawn, joined, mixable, mixed_pass
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from search_spaces.catalogue import load_genotype
from search_spaces.layers import Normalise

ATTACK = Pgd(ThreatModel("linf", 0.1), steps=2)
STILL = Pgd(ThreatModel("linf", 0.0), steps=2)


def _batch(seed=0, n=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(x, torch.arange(n) % 3, torch.arange(n))


def _state(seed=0):
    generators = [torch.Generator().manual_seed(seed + offset) for offset in (0, 100)]
    return State(epoch=0, step=0, progress=0.0, attack_generator=generators[0], method_generator=generators[1])


def _told(method, model, batch, seed=0):
    loss, _ = method(model, batch, _state(seed))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


def _mixture(n=12, seed=0, *, per_sample=False, alpha=1.0):
    y = torch.zeros(n, dtype=torch.int64)
    return drawn(alpha, y, 1, torch.Generator().manual_seed(seed), per_sample=per_sample)[0]


def test_nothing_mixed_is_half_clean_half_adversarial_training(network):
    """alpha = 0; both shares, and all of one of them."""
    batch, model = _batch(), network().double().eval()
    standard, adversarial = _told(Standard(), model, batch), _told(PgdAt(ATTACK), model, batch)
    loss, gradient = _told(Interpolated(ATTACK, alpha=0.0), model, batch)
    torch.testing.assert_close(loss, (standard[0] + adversarial[0]) / 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, (standard[1] + adversarial[1]) / 2, rtol=1e-10, atol=1e-15)
    for share, wanted in ((0.0, Standard()), (1.0, PgdAt(ATTACK))):
        ours, theirs = network().double().train(), network().double().train()
        found = _told(Interpolated(ATTACK, alpha=0.0, adversarial_share=share), ours, batch)
        same = _told(wanted, theirs, batch)
        torch.testing.assert_close(found, same, rtol=1e-12, atol=1e-16)
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def test_the_loss_by_hand(network):
    """Both halves, each with its own weight and pairs, against soft labels; wrong labels or halves would fail it."""
    batch, model = _batch(), network().double().eval()
    loss, metrics = Interpolated(ATTACK, adversarial_share=0.3)(model, batch, _state())
    x_adv = ATTACK(model, batch.x, batch.y, generator=_state().attack_generator)
    stream, losses = _state().method_generator, []
    labels = F.one_hot(batch.y, 3).double()
    for images in (batch.x, x_adv):
        mixture, _ = drawn(1.0, batch.y, 1, stream, per_sample=False)
        share, partners = float(mixture.weights[0]), mixture.partners
        x, soft = (share * v + (1 - share) * v[partners] for v in (images, labels))
        losses.append(F.cross_entropy(model(x), soft))
    torch.testing.assert_close(loss, 0.7 * losses[0] + 0.3 * losses[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["clean_loss"], losses[0].detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["adversarial_loss"], losses[1].detach(), rtol=1e-12, atol=0)
    plain = (Standard()(model, batch, _state())[0] + PgdAt(ATTACK)(model, batch, _state())[0]) / 2
    assert abs(float((loss - plain).detach())) > 1e-3, "it mixes"


@pytest.mark.parametrize("settings", [{}, {"per_sample": True}, {"joint": True}, {"layers": ("input", "features.2")}])
def test_the_halves_are_those_of_the_shares_alone(network, settings):
    """L(r) = (1 - r) L(0) + r L(1): what a half draws does not depend on the other."""
    batch, model = _batch(), network().double().eval()
    method = Interpolated(ATTACK, adversarial_share=0.25, **settings)
    if settings.get("joint"):  # which may share no layer with a pass alone; one pass over both halves is the sum
        settings = {}
    clean, adversarial = (
        _told(Interpolated(ATTACK, adversarial_share=share, **settings), model, batch) for share in (0.0, 1.0)
    )
    loss, gradient = _told(method, model, batch)
    torch.testing.assert_close(loss, 0.75 * clean[0] + 0.25 * adversarial[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, 0.75 * clean[1] + 0.25 * adversarial[1], rtol=1e-9, atol=1e-15)


def test_one_pass_over_both_halves_shares_batch_statistics(network):
    batch = _batch()
    apart, together = network().double().train(), network().double().train()
    first, _ = Interpolated(ATTACK)(apart, batch, _state())
    second, _ = Interpolated(ATTACK, joint=True)(together, batch, _state())
    assert abs(float((first - second).detach())) > 1e-6
    assert int(apart.features[1].num_batches_tracked) == 2 and int(together.features[1].num_batches_tracked) == 1


def test_without_room_to_move_both_halves_are_mixup(network):
    batch, model = _batch(), network().double().eval()
    same = _told(Interpolated(STILL, adversarial_share=1.0), model, batch)
    stream = _state().method_generator
    drawn(1.0, batch.y, 1, stream, per_sample=False)
    mixture, _ = drawn(1.0, batch.y, 1, stream, per_sample=False)
    torch.testing.assert_close(same[0], mixture.cross_entropy(model(mixture(batch.x)), batch.y).detach())


def test_the_adversarial_images_know_nothing_of_the_mixture(network):
    batch, model, found = _batch(), network().double(), []

    def attack(model, x, y, *, generator):
        assert torch.equal(x, batch.x) and torch.equal(y, batch.y), "crafted for the images as they are"
        found.append(ATTACK(model, x, y, generator=generator))
        return found[-1]

    for seed in (1, 2):
        state = dataclasses.replace(_state(), method_generator=torch.Generator().manual_seed(seed))
        Interpolated(attack)(model.eval(), batch, state)
    assert torch.equal(*found)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_weights_are_beta_variables_of_which_the_larger_share_is_taken(alpha):
    weights = _mixture(200_000, per_sample=True, alpha=alpha).weights
    assert bool((weights >= 0.5).all()) and bool((weights <= 1).all())
    # E(l) = 1/2 and Var(l) = 1 / (4 (2 alpha + 1)), thus (l - 1/2)^2, which does not care which share is taken.
    assert float((weights - 0.5).square().mean()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.01)
    one = _mixture(8, alpha=alpha).weights
    assert bool((one == one[0]).all())


def test_the_larger_share_makes_the_same_pairs():
    """Mixing with 1 - l and the inverse permutation: same images, same labels, in another order."""
    x, y = torch.rand(12, 1, 8, 8, dtype=torch.float64), torch.arange(12)
    mixture = _mixture()
    inverse = Mixture(1 - mixture.weights, mixture.partners.argsort())
    torch.testing.assert_close(mixture(x), inverse(x)[mixture.partners])
    torch.testing.assert_close(mixture(F.one_hot(y).double()), inverse(F.one_hot(y).double())[mixture.partners])


def test_a_linear_model_predicts_mixtures_of_its_predictions(network):
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double(), _batch().x
    for mixture in (_mixture(), _mixture(per_sample=True)):
        torch.testing.assert_close(mixed_pass(model, x, mixture, "input"), mixture(model(x)))
        torch.testing.assert_close(mixed_pass(model, x, mixture, "0"), mixture(model(x)))


def test_the_accuracy_counts_the_weight_of_the_label_that_is_answered():
    mixture = Mixture(torch.tensor([0.7, 0.7, 0.7]), torch.tensor([1, 2, 0]))
    logits, y = torch.eye(3)[torch.tensor([0, 2, 0])], torch.tensor([0, 1, 2])
    assert float(mixture.accuracy(logits, y)) == pytest.approx((0.7 + 0.3 + 0.3) / 3)


def test_manifold_mixup_mixes_what_leaves_the_layer(network):
    model, batch = network().double().eval(), _batch()
    mixture = _mixture(per_sample=True)
    logits = mixed_pass(model, batch.x, mixture, "features.2")
    tail = nn.Sequential(model.features[3], model.classifier)
    hidden = model.features[:3](model.normalise(batch.x))
    torch.testing.assert_close(logits, tail(mixture(hidden)), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(logits, mixed_pass(model, batch.x, mixture, "input"))
    assert torch.equal(model(batch.x), model.classifier(model.features(model.normalise(batch.x)))), "hooks are gone"


def test_mixing_at_the_input_is_mixing_what_the_network_sees(network):
    """The normalisation is affine, so that both give the same, but for rounding."""
    model, batch, mixture = network().double().eval(), _batch(), _mixture()
    torch.testing.assert_close(
        mixed_pass(model, batch.x, mixture, "normalise"), mixed_pass(model, batch.x, mixture, "input")
    )


def _cell_network(auxiliary=False):
    genotype, classes = load_genotype("arnas"), ("a", "b", "c")
    torch.manual_seed(0)
    return ModelSpec(genotype, 4, 5, (1, 8, 8), classes, (0.5,), (0.25,), auxiliary).build()


def test_cells_are_mixed_with_what_passes_them_by():
    """A cell sees the outputs of two before it: mixing one alone would not cut the network."""
    model, x = _cell_network().eval(), torch.rand(8, 1, 8, 8)
    exchange = Mixture(torch.zeros(8), torch.arange(8).roll(3))
    wanted = model(x)[exchange.partners].detach()
    for layer in ("stem", "cells.0", "cells.1", "cells.3"):
        torch.testing.assert_close(mixed_pass(model, x, exchange, layer), wanted, rtol=1e-4, atol=1e-4)
        assert cuts(model, x, layer)

    def alone(module, inputs, output):
        return exchange(output)

    handle = model.cells[1].register_forward_hook(alone)
    with torch.no_grad():
        half = model(x)
    handle.remove()
    spread = float((wanted - wanted.roll(1, 0)).abs().max())
    assert float((half - wanted).abs().max()) > 0.05 * spread


class Shortcut(nn.Module):
    """Something passes by ``layer``."""

    def __init__(self):
        super().__init__()
        self.layer, self.unused, self.classifier = nn.Linear(64, 64), nn.Linear(2, 2), nn.Linear(64, 3)

    def forward(self, x):
        return self.classifier(x.flatten(1) + self.layer(x.flatten(1)))


def test_a_layer_that_does_not_cut_or_does_not_exist_is_refused(network, data, parts):
    x, model = torch.rand(6, 1, 8, 8), Shortcut()
    assert not cuts(model, x, "layer") and cuts(model, x, "classifier")
    with pytest.raises(InputError, match="pass it by"):
        mixable(model, ("input", "layer"), x)
    with pytest.raises(InputError, match="takes no part"):
        mixable(model, ("unused",), x)
    with pytest.raises(InputError, match="did you mean 'classifier'"):
        mixable(model, ("clasifier",), x)
    training = Training(epochs=1, batch_size=16, augmentation=Augmentation())
    with pytest.raises(InputError, match=r"no layer 'feature'.*did you mean 'features'"):
        train(
            network(),
            data,
            parts,
            Interpolated(ATTACK, layers=("feature",)),
            training,
            validation_attack=ATTACK,
            seed=0,
        )


def _wrapped(module):
    return nn.Sequential(Normalise((0.5,) * 3, (0.25,) * 3), module)


NETWORKS = {
    "cells": (_cell_network, (1, 8, 8), ("input", "cells.0", "cells.2")),
    "resnet": (
        lambda: _wrapped(resnet18(num_classes=3)),
        (3, 32, 32),
        ("input", "1.relu", "1.layer1.1", "1.layer2.1", "1.layer3.1"),
    ),
    "transformer": (
        lambda: _wrapped(
            VisionTransformer(
                image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=3
            )
        ),
        (3, 32, 32),
        ("input", "1.conv_proj"),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_places_to_mix_are_found_in_any_network(name):
    build, shape, wanted = NETWORKS[name]
    torch.manual_seed(0)
    model = build()
    model.train()
    batch = Batch(torch.rand(8, *shape), torch.arange(8) % 3, torch.arange(8))
    before = [buffer.clone() for buffer in model.buffers()]
    assert mixable(model, ("auto",), batch.x) == wanted
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    for settings in ({"alpha": 2.0, "layers": ("auto",)}, {"layers": (wanted[-1],), "joint": True}):
        loss, metrics = Interpolated(ATTACK, **settings)(model, batch, _state())
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        assert torch.isfinite(loss) and 0 <= float(metrics["accuracy"]) <= 1
        assert all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
    if name == "transformer":
        assert not bool(model[1].heads.head.weight.any()), "tells no images apart as it begins"
        assert cuts(model, batch.x, "1.encoder.layers.encoder_layer_0")
        assert not cuts(model, batch.x, "1.encoder.layers.encoder_layer_0.mlp")


def test_the_layer_is_drawn_anew(network):
    batch, model = _batch(), network().double().eval()
    method = Interpolated(ATTACK, adversarial_share=0.0, layers=("input", "features.2"))
    both = {float(_told(method, model, batch, seed)[0]) for seed in range(8)}
    single = [
        {float(_told(dataclasses.replace(method, layers=(layer,)), model, batch, seed)[0]) for seed in range(8)}
        for layer in method.layers
    ]
    assert both <= single[0] | single[1] and both & single[0] and both & single[1]


def test_joined_mixtures_stay_within_their_halves():
    first, second = _mixture(5, 1, per_sample=True), _mixture(5, 2)
    x = torch.rand(10, 3, dtype=torch.float64)
    torch.testing.assert_close(joined(first, second)(x), torch.cat([first(x[:5]), second(x[5:])]))


def test_an_auxiliary_head_hears_both_halves():
    batch = Batch(torch.rand(8, 1, 8, 8), torch.arange(8) % 3, torch.arange(8))
    for joint in (False, True):
        model = _cell_network(auxiliary=True).train()
        loss, metrics = WithAuxiliary(Interpolated(ATTACK, joint=joint), 0.4)(model, batch, _state())
        assert torch.isfinite(loss) and float(metrics["auxiliary_loss"]) > 0


def test_training_resumes_to_the_same_weights(network, data, parts, tmp_path):
    training = Training(epochs=3, batch_size=20, optimiser=Sgd(0.05), augmentation=Augmentation())
    method = Interpolated(ATTACK, alpha=2.0, layers=("auto",))

    class Stopped(Exception):
        pass

    def stop(record):
        if record["epoch"] == 1:
            raise Stopped

    def run(model, **more):
        return train(model, data, parts, method, training, validation_attack=ATTACK, seed=4, **more)

    whole, resumed, checkpoint = network(), network(), tmp_path / "checkpoint.safetensors"
    records = run(whole)
    with pytest.raises(Stopped):
        run(resumed, checkpoint=checkpoint, log=stop)
    assert run(resumed, checkpoint=checkpoint) == records
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings", [{"alpha": -1.0}, {"alpha": float("nan")}, {"adversarial_share": 1.1}, {"layers": ()}]
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(InputError):
        Interpolated(**settings)
