"""InfoAT-style training: bounds and closed forms of the estimators, limits, and what information does."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from torchvision.models import resnet18
from torchvision.models.vision_transformer import VisionTransformer

from nas.attacks.fgsm import Fgsm
from nas.attacks.pgd import Pgd
from nas.data.augmentation import Augmentation
from nas.errors import InputError
from nas.model_file import ModelSpec
from nas.objective import Batch, State
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training.info_at import InfoAt, auroc, gaussian_rate, label_information, noisy_information
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt
from search_spaces.catalogue import load_genotype
from search_spaces.layers import Normalise

ATTACK = Pgd(ThreatModel("linf", 0.1), steps=3)
KINDS = ("infonce", "vib", "label")


def _batch(seed=0, n=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(x, torch.arange(n) % 3, torch.arange(n))


def _state(seed=0, progress=0.5):
    generators = [torch.Generator().manual_seed(seed + offset) for offset in (0, 100)]
    return State(epoch=0, step=0, progress=progress, attack_generator=generators[0], method_generator=generators[1])


def _told(method, model, batch, **state):
    loss, metrics = method(model, batch, _state(**state))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), torch.cat([g.flatten() for g in gradients]), metrics


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The estimators.


def test_equal_features_tell_nothing_and_distant_ones_all():
    noise = _normal(16, 5)
    same = torch.ones(16, 5, dtype=torch.float64)
    torch.testing.assert_close(noisy_information(same, same, noise, 0.3), torch.zeros(16).double(), rtol=0, atol=1e-9)
    apart = 100.0 * torch.arange(16).double()[:, None] * same
    torch.testing.assert_close(
        noisy_information(apart, apart, noise, 0.3),
        torch.full((16,), math.log(16), dtype=torch.float64),
        rtol=1e-9,
        atol=0,
    )
    single = _normal(1, 5, seed=2)
    assert float(noisy_information(single, single, noise[:1], 0.3)) == 0


def test_noisy_information_is_the_log_of_a_density_over_its_mean():
    features, reference, noise, scale = _normal(7, 4), _normal(7, 4, seed=1), _normal(7, 4, seed=2), 0.7
    t, wanted = features + scale * noise, []
    for k in range(7):
        centres = reference.clone()
        centres[k] = features[k]
        density = MultivariateNormal(centres, scale**2 * torch.eye(4).double()).log_prob(t[k])
        wanted.append(density[k] - density.logsumexp(0) + math.log(7))
    found = noisy_information(features, reference, noise, scale)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-10, atol=1e-12)
    assert float(found.max()) <= math.log(7)


def test_noisy_information_of_gaussians_rises_to_what_there_is():
    """I(X; T) = log(1 + 1 / scale^2) / 2 of X ~ N(0, 1); from below as the batch grows."""
    scale, means = 0.25, []
    for n in (4, 32, 256):
        rounds = [
            float(
                noisy_information(
                    _normal(n, 1, seed=s), _normal(n, 1, seed=s), _normal(n, 1, seed=s + 10**6), scale
                ).mean()
            )
            for s in range(4096 // n)
        ]
        means.append(sum(rounds) / len(rounds))
    exact = 0.5 * math.log(1 + 1 / scale**2)
    assert means[0] < means[1] < means[2] < exact + 0.02
    assert means[2] == pytest.approx(exact, abs=0.05)


def test_the_gaussian_rate_is_the_divergence_from_a_standard_normal():
    mean, eye = _normal(6, 3), torch.eye(3).double()
    wanted = kl_divergence(MultivariateNormal(mean, 0.3**2 * eye), MultivariateNormal(torch.zeros(3).double(), eye))
    torch.testing.assert_close(gaussian_rate(mean, 0.3), wanted, rtol=1e-10, atol=0)
    assert float(gaussian_rate(torch.zeros(2, 3), 1.0).abs().max()) == 0
    # Monte Carlo of the definition.
    t = mean[:1] + 0.3 * _normal(200_000, 3, seed=5)
    densities = MultivariateNormal(mean[0], 0.09 * eye).log_prob(t) - MultivariateNormal(0 * mean[0], eye).log_prob(t)
    assert float(densities.mean()) == pytest.approx(float(wanted[0]), abs=1e-2)


def test_label_information_is_the_mutual_information_of_the_predicted_label():
    constant = _normal(1, 5).expand(10, 5)
    torch.testing.assert_close(label_information(constant, constant), torch.zeros(10).double(), rtol=0, atol=1e-12)
    sure = 1000 * torch.eye(5).double().repeat(2, 1)
    torch.testing.assert_close(label_information(sure, sure), torch.full((10,), math.log(5), dtype=torch.float64))
    logits = _normal(40, 5)
    p = logits.softmax(1)
    entropy = -(p.mean(0) * p.mean(0).log()).sum() + (p * p.log()).sum(1).mean()
    torch.testing.assert_close(label_information(logits, logits).mean(), entropy)
    assert 0 <= float(entropy) <= math.log(5)


def test_auroc_counts_pairs():
    score, positive = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])
    assert float(auroc(score, positive)) == pytest.approx(0.75)
    assert float(auroc(torch.ones(4), positive)) == 0.5
    assert float(auroc(score, torch.ones(4, dtype=torch.bool))) == 0.5


# The method.


@pytest.mark.parametrize("kind", ["infonce", "label"])
def test_without_weights_it_is_adversarial_training(network, kind):
    batch = _batch()
    ours, theirs = network().double().train(), network().double().train()
    found = _told(InfoAt(ATTACK, kind, gamma=0.0, beta=0.0), ours, batch)
    wanted = _told(PgdAt(ATTACK), theirs, batch)
    torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-12, atol=1e-16)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
    nearly = _told(InfoAt(ATTACK, kind, mode="reweight", temperature=1e12), network().double().train(), batch)
    torch.testing.assert_close(nearly[:2], wanted[:2], rtol=1e-9, atol=1e-12)


def test_the_rate_is_trained_with_noise_in_the_features(network):
    batch, model = _batch(), network().double().eval()
    found = _told(InfoAt(ATTACK, "vib", gamma=0.0, beta=0.2, warmup=0.0), model, batch)
    x_adv = ATTACK(model, batch.x, batch.y, generator=_state().attack_generator)
    features = model.features(model.normalise(x_adv))
    noise = torch.randn(12, 64, generator=_state().method_generator, dtype=torch.float64)
    wanted = (
        F.cross_entropy(model.classifier(features + 0.3 * noise), batch.y) + 0.2 * gaussian_rate(features, 0.3).mean()
    )
    torch.testing.assert_close(found[0], wanted.detach(), rtol=1e-12, atol=0)
    assert not model.classifier._forward_pre_hooks


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_by_hand(network, kind):
    """Cross-entropy and beta times information at images that maximise it with gamma."""
    batch, model = _batch(), network().double().eval()
    loss, _, metrics = _told(InfoAt(ATTACK, kind, gamma=2.0, beta=0.5, warmup=1.0), model, batch, progress=0.25)
    without, _, same = _told(InfoAt(ATTACK, kind, gamma=2.0, beta=0.0), model, batch)
    assert float(metrics["adversarial_information"]) == pytest.approx(float(same["adversarial_information"]))
    # A quarter of the warm-up is over: beta counts a quarter.
    assert float(loss - without) == pytest.approx(0.125 * float(metrics["adversarial_information"]))
    assert abs(float(loss - without)) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_attack_climbs_cross_entropy_with_information(network, kind):
    """gamma finds images of more information; with the wrong sign it would find those of less."""
    model, batch = network(2).double().eval(), _batch(2)
    without, more = (
        float(_told(InfoAt(ATTACK, kind, gamma=gamma, beta=0.0), model, batch)[2]["adversarial_information"])
        for gamma in (0.0, 20.0)
    )
    assert more > without


def test_the_attack_is_carried_out_on_one_function(network, monkeypatch):
    """Noise and reference stand still while it climbs, so that its last iterate is higher than its start."""
    model, batch, values = network(2).double().eval(), _batch(2), []
    found = Pgd.maximise

    def watched(self, model, objective, x, *, generator):
        with torch.no_grad():
            assert torch.equal(objective(x), objective(x))
        x_adv = found(self, model, objective, x, generator=generator)
        with torch.no_grad():
            values.append((objective(x), objective(x_adv)))
        return x_adv

    monkeypatch.setattr(Pgd, "maximise", watched)
    _told(InfoAt(Pgd(ThreatModel("linf", 0.05), steps=5)), model, batch)
    ((before, after),) = values
    assert bool((after > before).all())


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_beta_keeps_less_information(network, kind, data, parts):
    """What the outer term is there for; without it, or with its sign turned, this fails."""
    attack = Pgd(ThreatModel("linf", 0.05), steps=2)
    training = Training(epochs=4, batch_size=16, optimiser=Sgd(0.05), augmentation=Augmentation())
    left = []
    for beta in (0.0, 1.0):
        method = InfoAt(attack, kind, gamma=0.0, beta=beta, warmup=0.0)
        model = network()
        records = train(model, data, parts, method, training, validation_attack=attack, seed=1)
        left.append(records[-1]["adversarial_information"])
    assert left[1] < 0.97 * left[0]


def test_weights_of_images_sum_to_the_batch_and_grow_with_information(network):
    batch, model = _batch(), network().double().eval()
    method = InfoAt(ATTACK, "label", mode="reweight", temperature=0.01)
    loss, _, _ = _told(method, model, batch)
    x_adv = ATTACK(model, batch.x, batch.y, generator=_state().attack_generator)
    with torch.no_grad():
        weights = 12 * (label_information(model(batch.x), model(batch.x)) / 0.01).softmax(0)
        wanted = (weights * F.cross_entropy(model(x_adv), batch.y, reduction="none")).mean()
    assert float(weights.sum()) == pytest.approx(12) and float(weights.max()) > 1.2
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)


def _cell_network():
    torch.manual_seed(0)
    return ModelSpec(load_genotype("arnas"), 4, 5, (1, 8, 8), ("a", "b", "c"), (0.5,), (0.25,)).build()


def _wrapped(module):
    return nn.Sequential(Normalise((0.5,) * 3, (0.25,) * 3), module)


NETWORKS = {
    "cells": (_cell_network, (1, 8, 8), "cells.4"),
    "resnet": (lambda: _wrapped(resnet18(num_classes=3)), (3, 32, 32), "1.avgpool"),
    "transformer": (
        lambda: _wrapped(
            VisionTransformer(
                image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=3
            )
        ),
        (3, 32, 32),
        "1.encoder",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_runs_on_any_network(name):
    build, shape, layer = NETWORKS[name]
    model = build().train()
    batch = Batch(torch.rand(8, *shape), torch.arange(8) % 3, torch.arange(8))
    for kind in KINDS:
        for place in ("auto", layer):
            loss, _ = InfoAt(ATTACK, kind, layer=place)(model, batch, _state())
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            assert torch.isfinite(loss)
            assert all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)


def test_a_convolution_is_watched_before_it_is_folded_away(network):
    """Within an attack a convolution and its normalisation are one, unless somebody looks at it."""
    model, batch = network().double().eval(), _batch()
    _, metrics = InfoAt(ATTACK, "vib", gamma=0.0, layer="features.0")(model, batch, _state())
    wanted = gaussian_rate(model.features[0](model.normalise(batch.x)).flatten(1), 0.3).mean()
    torch.testing.assert_close(metrics["information"], wanted.detach())


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return 2 * self.head(x.flatten(1))


def test_layers_that_cannot_be_found_are_refused(network):
    batch = _batch()
    with pytest.raises(InputError, match="no layer 'clasifier': did you mean 'classifier'"):
        InfoAt(ATTACK, layer="clasifier")(network().double(), batch, _state())
    with pytest.raises(InputError, match=r"do not come out of a linear layer.*head"):
        InfoAt(ATTACK)(Functional().double(), batch, _state())
    InfoAt(ATTACK, layer="head")(Functional().double(), batch, _state())


def test_other_attacks_serve_where_information_is_not_climbed(network):
    batch, fgsm = _batch(), Fgsm(ThreatModel("linf", 0.1))
    InfoAt(fgsm, gamma=0.0)(network().double(), batch, _state())
    InfoAt(fgsm, mode="reweight")(network().double(), batch, _state())
    with pytest.raises(InputError, match="pgd"):
        InfoAt(fgsm)


def test_training_resumes_to_the_same_weights(network, data, parts, tmp_path):
    training = Training(epochs=3, batch_size=20, optimiser=Sgd(0.05), augmentation=Augmentation())

    class Stopped(Exception):
        pass

    def stop(record):
        if record["epoch"] == 1:
            raise Stopped

    def run(model, **more):
        return train(model, data, parts, InfoAt(ATTACK), training, validation_attack=ATTACK, seed=4, **more)

    whole, resumed, checkpoint = network(), network(), tmp_path / "checkpoint.safetensors"
    records = run(whole)
    with pytest.raises(Stopped):
        run(resumed, checkpoint=checkpoint, log=stop)
    assert run(resumed, checkpoint=checkpoint) == records
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"information": "info"}, {"mode": "weigh"}, {"gamma": -1.0}, {"beta": float("nan")}, {"noise": 0.0},
        {"temperature": 0.0}, {"warmup": 2.0},
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(settings):
    with pytest.raises(InputError):
        InfoAt(**settings)
