"""Trainings that attack in one step: Free, GradAlign, N-FGSM."""

import pytest
import torch
import torch.nn.functional as F
from methods import batch_of, loss_and_gradients, state_of
from torch import nn

from nas.attacks.fgsm import Fgsm
from nas.data.augmentation import Augmentation
from nas.errors import InputError
from nas.objective import Setting
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training.free import Free, FreeTraining
from nas.training.grad_align import GradAlign, cosine
from nas.training.loop import Training, train
from nas.training.n_fgsm import NoiseFgsm
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard

BALL = ThreatModel("linf", 0.1)
TRAINING = Training(epochs=3, batch_size=20, optimiser=Sgd(0.05), augmentation=Augmentation())


def test_free_without_replay_and_without_ball_is_standard_training(data, parts, network):
    ours, plain = network(), network()
    for model, method in ((ours, Free(ThreatModel("linf", 0.0), replays=1)), (plain, Standard())):
        train(model, data, parts, method, TRAINING, validation_attack=Fgsm(BALL), seed=0)
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_free_climbs_by_epsilon_along_the_gradient_of_its_own_pass(norm, network):
    ball, model, batch = ThreatModel(norm, 0.1), network().double(), batch_of()
    first = ball.geometry.draw(batch.x, 0.1, torch.Generator().manual_seed(5))
    training = FreeTraining(ball, 4, torch.cat([first, torch.ones(3, 1, 8, 8)]).double())
    point = (batch.x + first).clamp(0, 1).requires_grad_(True)
    twin = network().double()
    loss = F.cross_entropy(twin(point), batch.y)
    *expected, towards = torch.autograd.grad(loss, [*twin.parameters(), point])
    found, gradients = loss_and_gradients(training, model, batch)
    assert torch.equal(found, loss.detach())
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    moved = ball.geometry.shrink(first + 0.1 * ball.geometry.steepest(towards), 0.1)
    assert torch.equal(training.delta[:12], moved) and not torch.equal(moved, first)
    assert bool((ball.geometry.size(training.delta[:12]) <= 0.1 + 1e-9).all())
    assert bool((training.delta[12:] == 1).all()), "a short batch leaves the rest as it was"


def test_free_makes_one_pass_a_step_and_sees_each_batch_several_times(data, parts, network):
    model, passes = network(), []
    model.classifier.register_forward_hook(
        lambda module, inputs, output: passes.append(len(output)) if model.training else None
    )
    records = train(model, data, parts, Free(BALL, replays=3), TRAINING, validation_attack=Fgsm(BALL), seed=0)
    assert len(passes) == 3 * 3 * (len(parts.training) // 20) and set(passes) == {20}
    assert records[-1]["loss"] < records[0]["loss"]


def test_free_goes_on_with_its_perturbation_after_a_crash(data, parts, network, tmp_path):
    settings = {"validation_attack": Fgsm(BALL), "seed": 0}
    whole, again, checkpoint = network(), network(), tmp_path / "checkpoint.safetensors"
    records = train(whole, data, parts, Free(BALL, replays=2), TRAINING, **settings)

    def stop(record):
        if record["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(again, data, parts, Free(BALL, 2), TRAINING, checkpoint=checkpoint, log=stop, **settings)
    assert train(again, data, parts, Free(BALL, 2), TRAINING, checkpoint=checkpoint, **settings) == records
    for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_free_is_prepared_for_the_batches_of_its_data(data, parts, network):
    ready = Free(BALL).prepare(Setting(network(), data, parts, 0, 3, 20))
    assert ready.delta.shape == (20, 1, 8, 8) and float(ready.delta.abs().max()) == 0
    with pytest.raises(InputError, match="20 images"):
        ready.gradients(network().double(), batch_of(n=24), state_of(), [])
    with pytest.raises(InputError):
        Free(BALL, replays=0)


class _Linear(nn.Module):
    """Logits are linear in the pixels; the loss is not, but its gradients all have one direction."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 2).double()

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_grad_align_is_content_with_a_linear_model_and_not_with_another(network):
    x = batch_of()
    two = type(x)(x.x, x.y.clamp_max(1), x.indices)
    _, straight = GradAlign(Fgsm(BALL), BALL)(_Linear(), two, state_of())
    assert float(straight["alignment"]) == pytest.approx(1, abs=1e-12)
    _, bent = GradAlign(Fgsm(BALL), BALL)(network().double(), x, state_of())
    assert -1 <= float(bent["alignment"]) < 0.999


def test_grad_align_without_weight_is_adversarial_training(network):
    batch = batch_of()
    plain = loss_and_gradients(PgdAt(Fgsm(BALL)), network().double(), batch)
    ours = loss_and_gradients(GradAlign(Fgsm(BALL), BALL, weight=0.0), network().double(), batch)
    assert torch.equal(plain[0], ours[0]) and all(map(torch.equal, plain[1], ours[1]))


def test_the_gradient_of_grad_align_is_that_of_its_definition(network):
    """By finite differences along random directions of the weights, with the gradient at the clean images held."""
    model, batch = network().double().eval(), batch_of()
    method, parameters = GradAlign(Fgsm(BALL), BALL, weight=3.0), list(model.parameters())
    loss, gradients = loss_and_gradients(method, model, batch)
    x_adv = Fgsm(BALL)(model, batch.x, batch.y, generator=state_of().attack_generator)
    nearby = BALL.random_start(batch.x, state_of().method_generator)

    def input_gradient(x):
        point = x.clone().requires_grad_(True)
        return torch.autograd.grad(F.cross_entropy(model(point), batch.y, reduction="sum"), point)[0]

    held = input_gradient(batch.x)

    def value():
        angle = F.cosine_similarity(held.flatten(1), input_gradient(nearby).flatten(1), 1)
        return F.cross_entropy(model(x_adv), batch.y).item() + 3.0 * (1 - angle.mean()).item()

    assert float(loss) == pytest.approx(value(), rel=1e-10)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        slope, step = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True)), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p += sign * step * d
            values.append(value())
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p -= sign * step * d
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_the_cosine_of_nothing_is_nothing():
    a = torch.zeros(2, 3, requires_grad=True)
    value = cosine(a, torch.ones(2, 3))
    (gradient,) = torch.autograd.grad(value.sum(), a)
    assert torch.equal(value.detach(), torch.zeros(2)) and torch.equal(gradient, torch.zeros(2, 3))


def test_n_fgsm_by_hand(network):
    """Noise of twice the ball, a step of epsilon from there, clipped to the pixels only."""
    model, batch, seen = network().double().eval(), batch_of(), []
    hook = model.normalise.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    loss, _ = NoiseFgsm(BALL)(model, batch, state_of(3))
    hook.remove()
    noise = BALL.geometry.draw(batch.x, 0.2, state_of(3).attack_generator)
    point = (batch.x + noise).clamp(0, 1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), batch.y, reduction="sum"), point)
    expected = (batch.x + noise + 0.1 * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(seen[-1], expected, rtol=0, atol=0)
    torch.testing.assert_close(loss, F.cross_entropy(model(expected), batch.y))
    assert 0.1 < float((expected - batch.x).abs().max()) <= 0.3 + 1e-12


def test_n_fgsm_without_noise_is_training_on_fgsm(network):
    batch = batch_of()
    ours = loss_and_gradients(NoiseFgsm(BALL, noise=0.0), network().double(), batch)
    plain = loss_and_gradients(PgdAt(Fgsm(BALL)), network().double(), batch)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-12, atol=0)
    with pytest.raises(InputError):
        NoiseFgsm(BALL, noise=-1.0)
