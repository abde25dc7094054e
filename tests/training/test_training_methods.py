"""What every training method promises, on whatever is in nas/training, and how the methods reduce to each other."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas import plugins
from nas.attacks.fixed import Fixed
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.objective import Batch, State
from nas.threat_model import ThreatModel
from nas.training.auxiliary import WithAuxiliary
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from nas.training.trades import Trades

METHODS = {name: cls for name, cls in plugins.available("training").items() if not hasattr(cls, "prepare")}
"""Methods that need to be prepared first are tested in files of their own."""
SETTINGS = {"jsigr": {"adversarial": True}}
"""Where a method attacks only if it is told to."""
THREAT = ThreatModel("linf", 0.1)


def _takes_attack(cls):
    return "attack" in {field.name for field in dataclasses.fields(cls)}


def _attack(cls, threat_model=THREAT):
    loss = getattr(cls, "inner_loss", "cross_entropy")
    return Pgd(threat_model, steps=2, loss=loss)


def _method(cls, **settings):
    if _takes_attack(cls):
        settings.setdefault("attack", _attack(cls))
    return cls(**SETTINGS.get(cls.__module__.rpartition(".")[2], {}), **settings)


def _batch(seed=0, n=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(x, torch.arange(n) % 3, torch.arange(n))


def _state(seed=0):
    generators = [torch.Generator().manual_seed(seed + offset) for offset in (0, 100)]
    return State(epoch=0, step=0, progress=0.0, attack_generator=generators[0], method_generator=generators[1])


def _loss_and_gradients(objective, model, batch, state=None):
    loss, _ = objective(model, batch, state or _state())
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    zeros = [torch.zeros_like(parameter) for parameter in model.parameters()]
    return loss.detach(), [g if g is not None else zero for g, zero in zip(gradients, zeros, strict=True)]


def _assert_same(first, second, tolerance=1e-10):
    torch.testing.assert_close(first[0], second[0], rtol=tolerance, atol=0)
    for ours, theirs in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-13)


@dataclasses.dataclass(frozen=True, eq=False)
class _Recorded:
    """An attack that keeps what it found and how often it was asked."""

    attack: object
    found: list

    def __call__(self, model, x, y, *, generator):
        x_adv = self.attack(model, x, y, generator=generator)
        self.found.append(x_adv)
        return x_adv

    def maximise(self, model, objective, x, *, generator):
        x_adv = self.attack.maximise(model, objective, x, generator=generator)
        self.found.append(x_adv)
        return x_adv


@pytest.mark.parametrize("name", METHODS)
def test_an_objective_computes_and_changes_nothing_else(name, network):
    model = network().double().train()
    model.features[2].eval()  # a mixed state is left mixed
    batch = _batch()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    streams, x, y = torch.get_rng_state(), batch.x.clone(), batch.y.clone()
    loss, metrics = _method(METHODS[name])(model, batch, _state())
    assert loss.dim() == 0
    assert math.isfinite(loss.item())
    assert loss.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), weights, strict=True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), streams)
    assert torch.equal(batch.x, x)
    assert torch.equal(batch.y, y)
    assert batch.x.grad is None
    assert "accuracy" in metrics, "the search and the progress line show it"
    for value in metrics.values():
        assert value.dim() == 0
        assert not value.requires_grad
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(float(gradient.abs().amax()) > 0 for gradient in gradients)


@pytest.mark.parametrize("name", METHODS)
def test_an_objective_is_a_function_of_its_arguments(name, network):
    method, batch = _method(METHODS[name]), _batch()
    first = _loss_and_gradients(method, network().double(), batch, _state(3))
    torch.manual_seed(12345)
    second = _loss_and_gradients(method, network().double(), batch, _state(3))
    _assert_same(first, second, tolerance=0)


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if _takes_attack(cls)])
def test_the_adversarial_example_is_a_constant(name, network):
    """The gradient is the one at fixed images (Danskin), and crafting them records no batch statistics."""
    cls, batch = METHODS[name], _batch()
    found = []
    model = network().double().train()
    real = _loss_and_gradients(_method(cls, attack=_Recorded(_attack(cls), found)), model, batch)
    assert len(found) == 1
    assert not found[0].requires_grad
    assert float((found[0] - batch.x).abs().max()) > 0.05
    again = network().double().train()
    fixed = _loss_and_gradients(_method(cls, attack=Fixed(found[0])), again, batch)
    _assert_same(real, fixed, tolerance=0)
    for ours, theirs in zip(model.buffers(), again.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_pgd_at_without_room_to_move_is_standard_training(network):
    """T0: epsilon 0, loss and gradients alike."""
    batch = _batch()
    for norm in ("linf", "l2"):
        method = PgdAt(_attack(PgdAt, ThreatModel(norm, 0.0)))
        ours = _loss_and_gradients(method, network().double(), batch)
        _assert_same(ours, _loss_and_gradients(Standard(), network().double(), batch))


def test_trades_reduces_to_standard_training(network):
    """T0: beta 0 at any epsilon, and epsilon 0 at any beta."""
    batch = _batch()
    standard = _loss_and_gradients(Standard(), network().double(), batch)
    _assert_same(_loss_and_gradients(Trades(_attack(Trades), beta=0.0), network().double(), batch), standard)
    method = Trades(_attack(Trades, ThreatModel("linf", 0.0)), beta=6.0)
    _assert_same(_loss_and_gradients(method, network().double(), batch), standard)


def test_pgd_at_is_the_cross_entropy_at_the_adversarial_images(network):
    model, batch, found = network().double(), _batch(), []
    loss, metrics = PgdAt(_Recorded(_attack(PgdAt), found))(model, batch, _state())
    logits = model(found[0])
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.y), rtol=1e-12, atol=0)
    assert float(metrics["accuracy"]) == pytest.approx(float((logits.argmax(1) == batch.y).double().mean()))
    clean, _ = Standard()(model, batch, _state())
    assert loss.item() > clean.item()


def test_trades_compares_clean_with_adversarial_logits(network):
    """By hand; the official code of ARNAS compares the clean logits with themselves."""
    model, batch, found = network().double(), _batch(), []
    loss, metrics = Trades(_Recorded(_attack(Trades), found), beta=2.5)(model, batch, _state())
    p, q = model(batch.x).softmax(1), model(found[0]).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(metrics["divergence"], divergence.detach(), rtol=1e-10, atol=0)
    assert divergence.item() > 1e-3
    natural = -model(batch.x).log_softmax(1)[torch.arange(12), batch.y].mean()
    torch.testing.assert_close(loss, natural + 2.5 * divergence, rtol=1e-10, atol=0)
    torch.testing.assert_close(metrics["natural_loss"], natural.detach(), rtol=1e-10, atol=0)


def test_trades_follows_both_sides_of_the_divergence(network):
    """The clean logits are no constant: their gradient counts (eq. 5 differentiates both)."""
    model, batch, found = network().double(), _batch(), []
    ours = _loss_and_gradients(Trades(_Recorded(_attack(Trades), found), beta=3.0), model, batch)
    clean, adversarial = model(batch.x), model(found[0])
    p, q = clean.softmax(1), adversarial.softmax(1)
    loss = F.cross_entropy(clean, batch.y) + 3.0 * (p * (p / q).log()).sum(1).mean()
    _assert_same(ours, (loss.detach(), torch.autograd.grad(loss, list(model.parameters()))), tolerance=1e-9)


def test_trades_default_attack_maximises_the_divergence():
    assert Trades().attack.loss == Trades.inner_loss == "kl"
    with pytest.raises(InputError):
        Trades(beta=-1.0)
    with pytest.raises(InputError):
        Trades(beta=float("nan"))


@pytest.mark.parametrize("name", METHODS)
def test_an_auxiliary_head_of_no_weight_changes_nothing(name, network):
    method, batch = _method(METHODS[name]), _batch()
    base = _loss_and_gradients(method, network(auxiliary=True).double(), batch)
    _assert_same(_loss_and_gradients(WithAuxiliary(method, 0.0), network(auxiliary=True).double(), batch), base)


@pytest.mark.parametrize("name", METHODS)
def test_the_auxiliary_head_adds_its_cross_entropy_averaged_over_the_passes(name, network):
    """It sees what the objective passes in train mode; passes of the attack do not count."""
    model, batch = network(auxiliary=True).double(), _batch()
    seen, logits = [], []
    model.features.register_forward_pre_hook(
        lambda module, given: seen.append(given[0].detach()) if model.training and torch.is_grad_enabled() else None
    )
    model.auxiliary.register_forward_hook(lambda module, given, result: logits.append(result.detach()))
    method = _method(METHODS[name])
    base, _ = method(model, batch, _state())
    passes, expected = len(seen), torch.stack([F.cross_entropy(result, batch.y) for result in logits]).mean()
    assert len(logits) == passes > 0
    logits.clear()
    model.load_state_dict(network(auxiliary=True).double().state_dict())  # batch statistics moved on
    loss, metrics = WithAuxiliary(method, 0.4)(model, batch, _state())
    assert len(logits) == passes
    torch.testing.assert_close(metrics["auxiliary_loss"], expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.detach(), base.detach() + 0.4 * expected, rtol=1e-10, atol=0)
    assert len(model.auxiliary._forward_hooks) == 1, "its own hook is taken away again"


def test_the_auxiliary_head_is_fed_adversarial_images_under_adversarial_training(network):
    """The released ARNAS code feeds it clean ones."""
    model, batch, found, heard = network(auxiliary=True).double(), _batch(), [], []
    model.auxiliary.register_forward_pre_hook(lambda module, given: heard.append(given[0].detach()))
    WithAuxiliary(PgdAt(_Recorded(_attack(PgdAt), found)), 0.4)(model, batch, _state())
    (features,) = heard
    torch.testing.assert_close(features, model.features(model.normalise(found[0])).detach(), rtol=1e-12, atol=0)
    assert not torch.allclose(features, model.features(model.normalise(batch.x)).detach())


def test_auxiliary_gradients_reach_head_and_trunk(network):
    model, batch = network(auxiliary=True).double(), _batch()
    base = _loss_and_gradients(Standard(), model, batch)
    both = _loss_and_gradients(WithAuxiliary(Standard(), 1.0), model, batch)
    names = [name for name, _ in model.named_parameters()]
    for name, without, gradient in zip(names, base[1], both[1], strict=True):
        differs = float((without - gradient).abs().max()) > 1e-8
        # A bias before batch normalisation has no gradient from anywhere.
        assert differs == (name != "features.0.bias" and not name.startswith("classifier")), name


def test_a_head_that_is_never_reached_is_an_error(network):
    model = network(auxiliary=True).double().eval()
    with pytest.raises(RuntimeError, match="auxiliary"):
        WithAuxiliary(Standard(), 0.4)(model, _batch(), _state())
    assert not model.auxiliary._forward_hooks

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.Identity()

        def forward(self, x):
            raise FloatingPointError

    fails = Fails()
    with pytest.raises(FloatingPointError):
        WithAuxiliary(Standard(), 0.4)(fails, _batch(), _state())
    assert not fails.auxiliary._forward_hooks


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("cls", [Standard, PgdAt, Trades])
def test_labels_are_smoothed_by_hand(cls, share, network):
    """(1 - s) of the label, s spread over all classes; images are still crafted for the label as it is."""
    batch, settings, found = _batch(), {}, []
    if cls is not Standard:
        settings["attack"] = _Recorded(_attack(cls), found)
    ours = _loss_and_gradients(cls(label_smoothing=share, **settings), network().double(), batch)
    model = network().double()
    x = found[0] if cls is PgdAt else batch.x
    wanted = (1 - share) * F.one_hot(batch.y, 3).double() + share / 3
    loss = -(wanted * model(x).log_softmax(1)).sum(1).mean()
    if cls is Trades:
        p, q = model(batch.x).softmax(1), model(found[0]).softmax(1)
        loss = loss + 6.0 * (p * (p / q).log()).sum(1).mean()
    _assert_same(ours, (loss.detach(), torch.autograd.grad(loss, list(model.parameters()))), tolerance=1e-8)
    if settings:
        hard = cls(**{**settings, "attack": _Recorded(_attack(cls), found)})
        _loss_and_gradients(hard, network().double(), batch)
        assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("cls", [Standard, PgdAt, Trades])
def test_a_share_of_the_label_is_one(cls):
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="label_smoothing"):
            cls(label_smoothing=share)
