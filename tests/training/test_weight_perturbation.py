"""Adversarial weight perturbation: the size of the step, the way back, one crafting, and what it reduces to."""

import pytest
import torch
import torch.nn.functional as F
from methods import batch_of, loss_and_gradients, state_of

from nas.attacks.fixed import Fixed
from nas.attacks.pgd import Pgd
from nas.data.augmentation import Augmentation
from nas.errors import InputError
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training.auxiliary import WithAuxiliary
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from nas.training.weight_perturbation import WeightPerturbation, perturbation

ATTACK = Pgd(ThreatModel("linf", 0.1), steps=2)


class _Watched(Standard):
    """Cross-entropy that keeps the weights it was asked at."""

    def __init__(self):
        object.__setattr__(self, "seen", [])

    def __call__(self, model, batch, state):
        self.seen.append([parameter.detach().clone() for parameter in model.parameters()])
        return F.cross_entropy(model(batch.x), batch.y), {}


def test_every_weight_moves_by_gamma_of_its_size_along_its_gradient(network):
    model, batch, watched = network().double(), batch_of(), _Watched()
    loss_and_gradients(WeightPerturbation(watched, gamma=0.01), model, batch)
    before, after = watched.seen
    twin = network().double()
    gradients = torch.autograd.grad(F.cross_entropy(twin(batch.x), batch.y), list(twin.parameters()))
    for weight, moved, gradient in zip(before, after, gradients, strict=True):
        if weight.dim() < 2:
            assert torch.equal(weight, moved)
            continue
        torch.testing.assert_close((moved - weight).norm(), 0.01 * weight.norm(), rtol=1e-10, atol=0)
        cosine = F.cosine_similarity((moved - weight).flatten(), gradient.flatten(), 0)
        assert float(cosine) == pytest.approx(1, abs=1e-9)


def test_the_gradient_is_that_at_the_perturbed_weights(network):
    """By hand: climb, differentiate there."""
    batch, gamma = batch_of(), 0.02
    x_adv = (batch.x + 0.05).clamp(0, 1)
    loss, gradients = loss_and_gradients(WeightPerturbation(PgdAt(Fixed(x_adv)), gamma), network().double(), batch)
    twin = network().double()
    here = F.cross_entropy(twin(x_adv), batch.y)
    upwards = torch.autograd.grad(here, list(twin.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(twin.parameters(), upwards, strict=True):
            if parameter.dim() > 1:
                parameter += gamma * parameter.norm() * gradient / gradient.norm()
    there = F.cross_entropy(twin(x_adv), batch.y)
    assert there.item() > here.item()
    torch.testing.assert_close(loss, there.detach(), rtol=1e-10, atol=0)
    for ours, theirs in zip(gradients, torch.autograd.grad(there, list(twin.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("method", [Standard(), PgdAt(ATTACK)], ids=["standard", "pgd_at"])
def test_weights_come_back_to_the_bit_and_statistics_are_recorded_once(method, network):
    model, twin, batch = network(), network(), batch_of()
    batch = type(batch)(batch.x.float(), batch.y, batch.indices)
    loss_and_gradients(WeightPerturbation(method, 0.05), model, batch)
    for now, then in zip(model.parameters(), network().parameters(), strict=True):
        assert torch.equal(now, then)
    twin(batch.x)
    assert torch.equal(model.features[1].num_batches_tracked, twin.features[1].num_batches_tracked)


@pytest.mark.parametrize("setting", [{"gamma": 0.0}, {"begins": 0.5}], ids=str)
def test_without_perturbation_it_is_the_method_itself(setting, network):
    batch = batch_of()
    plain = loss_and_gradients(PgdAt(ATTACK), network().double(), batch)
    ours = loss_and_gradients(WeightPerturbation(PgdAt(ATTACK), **setting), network().double(), batch)
    assert torch.equal(plain[0], ours[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], ours[1], strict=True))
    later = loss_and_gradients(
        WeightPerturbation(PgdAt(ATTACK), begins=0.5), network().double(), batch, state_of(progress=0.6)
    )
    assert not torch.equal(later[0], plain[0])


def test_images_are_crafted_once_at_the_weights_as_they_are(network):
    batch, asked = batch_of(), []

    class Counted:
        def __call__(self, model, x, y, *, generator):
            asked.append([parameter.detach().clone() for parameter in model.parameters()])
            return ATTACK(model, x, y, generator=generator)

    loss_and_gradients(
        WeightPerturbation(WithAuxiliary(PgdAt(Counted()), 0.4)), network(auxiliary=True).double(), batch
    )
    (weights,) = asked
    for now, then in zip(weights, network(auxiliary=True).double().parameters(), strict=True):
        assert torch.equal(now, then)


def test_a_training_with_it_learns_and_resumes(data, parts, network, tmp_path):
    training = Training(epochs=3, batch_size=20, optimiser=Sgd(0.05), augmentation=Augmentation(), ema=0.5)
    method = WeightPerturbation(WithAuxiliary(PgdAt(ATTACK), 0.3), 0.01)
    settings = {"validation_attack": ATTACK, "seed": 1}
    whole = network(auxiliary=True)
    records = train(whole, data, parts, method, training, **settings)
    assert records[-1]["loss"] < records[0]["loss"]

    def stop(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    again, checkpoint = network(auxiliary=True), tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(again, data, parts, method, training, checkpoint=checkpoint, log=stop, **settings)
    assert train(again, data, parts, method, training, checkpoint=checkpoint, **settings) == records
    for ours, theirs in zip(again.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_has_gradients_of_its_own_is_refused():
    with pytest.raises(InputError, match="gradients of its own"):
        WeightPerturbation(_Prepared())
    for setting in ({"gamma": -1.0}, {"gamma": float("nan")}, {"begins": 2.0}):
        with pytest.raises(InputError):
            WeightPerturbation(Standard(), **setting)


class _Prepared(Standard):
    def gradients(self, model, batch, state, parameters):
        raise NotImplementedError


def test_a_weight_without_gradient_stays():
    weight = torch.ones(3, 3)
    assert torch.equal(perturbation(weight, torch.zeros(3, 3), 0.1), torch.zeros(3, 3))
