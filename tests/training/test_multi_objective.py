"""Min-norm adversarial training: a direction along which both losses fall, its limits, its normalisations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.models.vision_transformer import VisionTransformer

from nas.attacks.fixed import Fixed
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.objective import Batch, Gradients, State, gradients_of
from nas.threat_model import ThreatModel
from nas.training.multi_objective import MultiObjective
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from search_spaces.layers import Normalise

NORMALISATIONS = ("none", "l2", "loss", "loss+")
ATTACK = Pgd(ThreatModel("linf", 0.1), steps=2)


def _batch(seed=0, n=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(x, torch.arange(n) % 3, torch.arange(n))


def _state():
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 100)]
    return State(epoch=0, step=0, progress=0.0, attack_generator=generators[0], method_generator=generators[1])


def _gradients(method, model, batch):
    loss, gradients, metrics = gradients_of(method, model, batch, _state(), list(model.parameters()))
    return loss, torch.cat([g.flatten() for g in gradients]), metrics


def _both(model, batch):
    """Natural and adversarial loss and their gradients, by hand."""
    x_adv = ATTACK(model, batch.x, batch.y, generator=_state().attack_generator)
    losses = [F.cross_entropy(model(x), batch.y) for x in (batch.x, x_adv)]
    found = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]) for loss in losses]
    return losses, found, x_adv


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_both_losses_fall_along_the_step(network, normalisation, seed):
    """To first order and in fact; the sign or the halves exchanged would fail it."""
    model, batch = network(seed).double().eval(), _batch(seed)
    (natural, adversarial), (g_n, g_a), x_adv = _both(model, batch)
    _, step, metrics = _gradients(MultiObjective(ATTACK, normalisation, floor=0.0), model, batch)
    assert float(step @ g_n) > 0 and float(step @ g_a) > 0
    weight = float(metrics["adversarial_weight"])
    torch.testing.assert_close(step, weight * g_a + (1 - weight) * g_n, rtol=1e-10, atol=1e-14)
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat - 1e-3 * step, model.parameters())
    assert F.cross_entropy(model(batch.x), batch.y) < natural
    assert F.cross_entropy(model(x_adv), batch.y) < adversarial


def test_the_step_is_the_shortest_combination_of_the_scaled_gradients(network):
    """By brute force over the weight of the scaled gradients."""
    model, batch = network(3).double().eval(), _batch(3)
    losses, gradients, _ = _both(model, batch)
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64)[:, None]
    for normalisation in NORMALISATIONS:
        scales = [1.0, 1.0]
        if "l2" in normalisation or "+" in normalisation:
            scales = [scale / float(g.norm()) for scale, g in zip(scales, gradients, strict=True)]
        if "loss" in normalisation:
            scales = [scale / float(loss.detach()) for scale, loss in zip(scales, losses, strict=True)]
        u_n, u_a = (scale * g for scale, g in zip(scales, gradients, strict=True))
        best = float(grid[((1 - grid) * u_n + grid * u_a).norm(dim=1).argmin()])
        wanted = best * scales[1] / (best * scales[1] + (1 - best) * scales[0])
        _, _, metrics = _gradients(MultiObjective(ATTACK, normalisation, floor=0.0), model, batch)
        assert float(metrics["adversarial_weight"]) == pytest.approx(wanted, abs=2e-4), normalisation


def test_normalisation_by_loss_leans_to_the_higher_one(network):
    """What it is there for: the adversarial loss is the higher one."""
    model, batch = network(4).double().eval(), _batch(4)
    weights = {
        name: float(_gradients(MultiObjective(ATTACK, name, floor=0.0), model, batch)[2]["adversarial_weight"])
        for name in NORMALISATIONS
    }
    assert weights["loss"] > weights["none"] and weights["loss+"] > weights["l2"]


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_loss_and_gradients_tell_the_same(network, normalisation):
    method, batch = MultiObjective(ATTACK, normalisation, floor=0.0), _batch()
    assert isinstance(method, Gradients)
    one, other = network().double().train(), network().double().train()
    loss, step, told = _gradients(method, one, batch)
    same, metrics = method(other, batch, _state())
    found = torch.autograd.grad(same, list(other.parameters()))
    torch.testing.assert_close(loss, same.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(step, torch.cat([g.flatten() for g in found]), rtol=1e-10, atol=1e-15)
    assert told == metrics
    for ours, theirs in zip(one.buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(parameter.grad is None for parameter in one.parameters())


def test_a_floor_of_one_is_adversarial_training_and_no_room_standard_training(network):
    batch = _batch()
    model = network().double().eval()
    ours, theirs = _gradients(MultiObjective(ATTACK, floor=1.0), model, batch), _gradients(PgdAt(ATTACK), model, batch)
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-12, atol=1e-16)
    still = Pgd(ThreatModel("linf", 0.0), steps=2)
    for normalisation in NORMALISATIONS:
        ours = _gradients(MultiObjective(still, normalisation), model, batch)
        torch.testing.assert_close(ours[:2], _gradients(Standard(), model, batch)[:2], rtol=1e-12, atol=1e-16)


def test_the_floor_binds(network):
    model, batch = network().double().eval(), _batch()
    free = float(_gradients(MultiObjective(ATTACK, "none", floor=0.0), model, batch)[2]["adversarial_weight"])
    assert free < 0.9
    bound = _gradients(MultiObjective(ATTACK, "none", floor=0.9), model, batch)
    assert float(bound[2]["adversarial_weight"]) == pytest.approx(0.9)
    (natural, adversarial), (g_n, g_a), _ = _both(model, batch)
    torch.testing.assert_close(bound[1], 0.9 * g_a + 0.1 * g_n, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(bound[0], (0.9 * adversarial + 0.1 * natural).detach(), rtol=1e-12, atol=0)


class Opposed(nn.Module):
    """One weight; images of grey 0 want it small, grey 1 want it large."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        sign = 2 * x.mean((1, 2, 3)) - 1
        return torch.stack([sign * self.weight, -sign * self.weight], 1)


def test_opposed_gradients_leave_no_step():
    """A Pareto-stationary point: nothing can be lowered without raising the other."""
    x = torch.zeros(4, 1, 8, 8, dtype=torch.float64)
    batch = Batch(x, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    method = MultiObjective(Fixed(x + 1), "none", floor=0.0)
    model = Opposed()
    _, step, metrics = _gradients(method, model, batch)
    assert float(step.abs().max()) < 1e-15
    assert float(metrics["gradient_cosine"]) == pytest.approx(-1)
    assert float(metrics["adversarial_weight"]) == pytest.approx(0.5)


def test_weights_without_gradient_stay_without_one(network):
    model, batch = network().double(), _batch()
    model.unused = nn.Linear(2, 2)
    _, gradients, _ = gradients_of(MultiObjective(ATTACK), model, batch, _state(), list(model.parameters()))
    assert gradients[-1] is None and gradients[-2] is None and gradients[0] is not None


@pytest.mark.parametrize(
    "build",
    [
        lambda: resnet18(num_classes=10),
        lambda: VisionTransformer(
            image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
        ),
    ],
)
def test_it_runs_on_ordinary_networks(build):
    torch.manual_seed(0)
    model = nn.Sequential(Normalise((0.5,) * 3, (0.25,) * 3), build()).train()
    batch = Batch(torch.rand(8, 3, 32, 32), torch.arange(8), torch.arange(8))
    loss, gradients, _ = gradients_of(MultiObjective(ATTACK), model, batch, _state(), list(model.parameters()))
    assert torch.isfinite(loss)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("settings", [{"normalisation": "l1"}, {"floor": 1.5}, {"floor": float("nan")}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(InputError):
        MultiObjective(**settings)
