"""Cost-sensitive training: the expected cost, the Min-Max property, protected classes by name, both schedules."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18
from torchvision.models.vision_transformer import VisionTransformer

from nas.attacks.fgsm import Fgsm
from nas.attacks.pgd import Pgd
from nas.data.augmentation import Augmentation
from nas.errors import InputError
from nas.model_file import ModelSpec
from nas.objective import Batch, Setting, State
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training.auxiliary import WithAuxiliary
from nas.training.cost_sensitive import CostSensitive, class_table, cost_matrix, cost_sensitive, min_max, small_weights
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from search_spaces.catalogue import load_genotype
from search_spaces.layers import Normalise

ATTACK = Pgd(ThreatModel("linf", 0.1), steps=2)
STILL = Pgd(ThreatModel("linf", 0.0), steps=2)
TRAINING = Training(epochs=3, batch_size=20, optimiser=Sgd(0.05), augmentation=Augmentation())


def _batch(seed=0, n=12):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(x, torch.arange(n) % 3, torch.arange(n))


def _state(step=0):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 100)]
    return State(epoch=0, step=step, progress=0.0, attack_generator=generators[0], method_generator=generators[1])


def _told(method, model, batch, step=0):
    loss, _ = method(model, batch, _state(step))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


def _normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The loss.

ASYMMETRIC = torch.tensor([[0, 2, 3], [5, 0, 7], [11, 13, 0]], dtype=torch.float64)


def test_costs_are_those_of_the_answer_given_the_truth():
    """With a table that is not symmetric: C[j, y], not C[y, j]."""
    logits, y = _normal(6, 3), torch.arange(6) % 3
    p = logits.softmax(1)
    for n in range(6):
        expected = sum(float(ASYMMETRIC[j, y[n]] * p[n, j]) for j in range(3))
        found = cost_sensitive(logits, y, ASYMMETRIC, 0.5)[n] - F.cross_entropy(logits[n : n + 1], y[n : n + 1])
        assert float(found) == pytest.approx(0.5 * expected, rel=1e-12)


def test_the_gradient_of_the_expected_cost():
    """p_j (C_jy - sum_k p_k C_ky)."""
    logits, y = _normal(6, 3).requires_grad_(True), torch.arange(6) % 3
    loss = (cost_sensitive(logits, y, ASYMMETRIC, 1.0) - F.cross_entropy(logits, y, reduction="none")).sum()
    p, costs = logits.softmax(1).detach(), ASYMMETRIC.T[y]
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits)[0], p * (costs - (p * costs).sum(1, keepdim=True)), rtol=1e-10, atol=1e-14
    )


def test_limits_of_the_costs():
    logits, y = _normal(6, 4), torch.arange(6) % 4
    plain = F.cross_entropy(logits, y, reduction="none")
    right = logits.softmax(1).gather(1, y[:, None])[:, 0]
    ones = cost_matrix([1], 1.0, 4).double()
    torch.testing.assert_close(cost_sensitive(logits, y, ones, 3.0), plain + 3 * (1 - right), rtol=1e-12, atol=0)
    assert torch.equal(cost_sensitive(logits, y, ones, 0.0), plain)
    assert torch.equal(cost_sensitive(logits, y, 0 * ones, 2.0), plain)
    order = torch.tensor([2, 0, 3, 1])  # classes renamed, and the costs with them
    renamed = order.argsort()
    torch.testing.assert_close(
        cost_sensitive(logits[:, order], renamed[y], cost_matrix([int(renamed[1])], 9.0, 4).double(), 1.0),
        cost_sensitive(logits, y, cost_matrix([1], 9.0, 4).double(), 1.0),
    )


def test_the_cost_table_of_protected_classes():
    wanted = [[0, 10, 1, 10], [10, 0, 10, 10], [1, 10, 0, 10], [10, 10, 10, 0]]
    assert cost_matrix([1, 3], 10.0, 4).tolist() == wanted


# The Min-Max property.


def test_the_min_max_term_is_zero_for_one_weight_alone():
    sparse = torch.zeros(2, 1, 3, 3)
    assert float(min_max(sparse)) == 0
    sparse[1, 0, 2, 1] = -4.0
    assert float(min_max(sparse)) == 0
    sparse[0, 0, 0, 0] = 3.0
    assert float(min_max(sparse)) == pytest.approx(7 - 5)
    weight = _normal(4, 3, 3, 3)
    assert float(min_max(-2.5 * weight)) == pytest.approx(2.5 * float(min_max(weight)))


def test_its_gradient_shrinks_small_weights_more_than_large_ones():
    weight = torch.tensor([0.01, -0.5, 3.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(min_max(weight), weight)
    torch.testing.assert_close(gradient, (weight.sign() - weight / weight.norm()).detach())
    shrinks = (gradient * weight.sign()).detach()
    assert shrinks[0] > shrinks[1] > shrinks[2] > 0
    zero = torch.zeros(3, requires_grad=True)
    assert torch.autograd.grad(min_max(zero), zero)[0].tolist() == [0, 0, 0]


def test_weights_become_few_and_large(network, data, parts):
    """CSE; without its term, or with its sign turned, this fails."""
    left = {}
    for mode in ("csa", "cse"):
        method = CostSensitive(STILL, mode=mode, min_max=(0.5,))
        model = network()
        train(model, data, parts, method, dataclasses.replace(TRAINING, epochs=10), validation_attack=STILL, seed=1)
        weight = model.features[0].weight.detach()
        left[mode] = float(weight.abs().sum() / weight.norm())
    assert left["cse"] < 0.8 * left["csa"]


def test_small_weights_are_counted():
    assert float(small_weights(torch.tensor([100.0, 0.5, -0.99, 1.0, 30.0]))) == pytest.approx(0.4)


# The method.


def test_without_costs_it_is_half_clean_half_adversarial_training(network):
    batch, model = _batch(), network().double().eval()
    clean, adversarial = _told(Standard(), model, batch), _told(PgdAt(ATTACK), model, batch)
    for inner in ("cost", "attack"):
        ours = _told(CostSensitive(ATTACK, cost_weight=0.0, inner=inner), model, batch)
        torch.testing.assert_close(ours[0], (clean[0] + adversarial[0]) / 2, rtol=1e-12, atol=0)
        torch.testing.assert_close(ours[1], (clean[1] + adversarial[1]) / 2, rtol=1e-10, atol=1e-15)


def test_the_loss_by_hand(network):
    """Both halves and all terms; protected as named."""
    model, batch = network().double().eval(), _batch()
    method = CostSensitive(ATTACK, (1,), cost=5.0, cost_weight=0.7, mode="csa+cse", inner="attack", min_max=(0.3,))
    loss, metrics = method(model, batch, _state())
    x_adv = ATTACK(model, batch.x, batch.y, generator=_state().attack_generator)
    wanted = []
    for x in (batch.x, x_adv):
        p, total = model(x).softmax(1), 0.0
        for n, y in enumerate(batch.y.tolist()):
            total = total - p[n, y].log() + 0.7 * sum(p[n, j] * (5 if 1 in (j, y) else 1) for j in range(3) if j != y)
        wanted.append(total / 12)
    w = model.features[0].weight
    term = 0.3 * (w.abs().sum() - w.square().sum().sqrt())
    torch.testing.assert_close(loss, (wanted[0] + wanted[1]) / 2 + term, rtol=1e-10, atol=0)
    torch.testing.assert_close(metrics["min_max"], term.detach())
    answers, costs = model(x_adv).argmax(1), cost_matrix([1], 5.0, 3)
    assert float(metrics["cost"]) == pytest.approx(float(costs[answers, batch.y].mean()))
    assert wanted[0].item() != pytest.approx(wanted[1].item(), rel=1e-3)


def test_the_attack_climbs_what_is_minimised(network):
    """Of two attacks of the same steps, the one up the cost-sensitive loss finds more of it."""
    model, batch = network(1).double().eval(), _batch(1, 96)
    attack = Pgd(ThreatModel("linf", 0.05), steps=10)
    values = {}
    for inner in ("cost", "attack"):
        method = CostSensitive(attack, (1,), cost=50.0, inner=inner, two_steps=True)
        values[inner] = float(method(model, batch, _state(step=1))[0].detach())
    assert values["cost"] > values["attack"] + 0.01


def test_extension_alone_sees_clean_images_only(network):
    def fails(model, x, y, *, generator):
        raise AssertionError

    batch, model = _batch(), network().double().eval()
    ours = _told(CostSensitive(fails, cost_weight=0.0, mode="cse", min_max=(0.5,)), model, batch)
    clean = _told(Standard(), model, batch)
    torch.testing.assert_close(ours[0], clean[0] + 0.5 * min_max(model.features[0].weight).detach())


def test_two_steps_see_the_batch_clean_then_attacked_for_the_weights_after(network, data, parts):
    """The published schedule, carried out by the loop."""
    crafted, model, seen = [], network(), []

    def attack(network, x, y, *, generator):
        crafted.append((x.clone(), torch.cat([p.detach().flatten() for p in network.parameters()])))
        return ATTACK(network, x, y, generator=generator)

    handle = model.register_forward_pre_hook(
        lambda module, given: (
            seen.append((given[0].detach().clone(), torch.cat([p.detach().flatten() for p in module.parameters()])))
            if module.training
            else None
        )
    )
    method = CostSensitive(attack, two_steps=True, inner="attack")
    train(model, data, parts, method, dataclasses.replace(TRAINING, epochs=1), validation_attack=ATTACK, seed=0)
    handle.remove()
    assert len(crafted) == len(parts.training) // 20 and len(seen) == 2 * len(crafted)
    for (images, weights), clean, attacked in zip(crafted, seen[::2], seen[1::2], strict=True):
        assert torch.equal(images, clean[0]) and not torch.equal(images, attacked[0])
        assert torch.equal(weights, attacked[1]) and not torch.equal(weights, clean[1])


def test_protection_raises_the_recall_of_the_protected_class():
    """Classes that overlap: what costs more is answered more often."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(2000, generator=generator) < 0.2).long()
    x = (0.5 + 0.1 * torch.randn(2000, 1, 2, 2, generator=generator) + 0.05 * y.view(-1, 1, 1, 1)).clamp(0, 1).double()
    costs = ((0.0, 1.0), (1.0, 0.0)), ((0.0, 10.0), (1.0, 0.0))
    recalls, others = [], []
    for table in costs:
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
        with torch.no_grad():
            [parameter.zero_() for parameter in model.parameters()]
        optimiser = torch.optim.LBFGS(model.parameters(), max_iter=100)
        method, batch = CostSensitive(STILL, costs=table), Batch(x, y, torch.arange(2000))

        def closure(model=model, optimiser=optimiser, method=method, batch=batch):
            optimiser.zero_grad()
            loss, _ = method(model, batch, _state())
            loss.backward()
            return loss

        optimiser.step(closure)
        right = model(x).argmax(1) == y
        recalls.append(float(right[y == 1].double().mean()))
        others.append(float(right[y == 0].double().mean()))
    assert recalls[1] > recalls[0] + 0.3, "errors with truth 1 cost ten times as much: column 1, row 0"
    assert others[1] < others[0], "and others pay for it"


# Names and bad input.


def _prepared(method, data, parts, network):
    return method.prepare(Setting(network, data, parts, 0, 1, 20))


def test_classes_are_named_or_numbered(data, parts, network):
    method = _prepared(CostSensitive(ATTACK, ("c", 0)), data, parts, network())
    assert method.protected == (0, 2)
    named = dataclasses.replace(data, classes=("airplane", "automobile", "bird"))
    with pytest.raises(InputError, match="unknown class 'automobil': did you mean 'automobile'"):
        _prepared(CostSensitive(ATTACK, ("automobil",)), named, parts, network())
    with pytest.raises(InputError, match=r"no class 3: classes are numbered 0\.\.2"):
        _prepared(CostSensitive(ATTACK, (3,)), data, parts, network())
    absent = dataclasses.replace(data, classes=("a", "b", "c", "d"))
    with pytest.raises(InputError, match="no training image shows the protected class 'd'"):
        _prepared(CostSensitive(ATTACK, ("d",)), absent, parts, network())
    with pytest.raises(InputError, match="give its number"):
        CostSensitive(ATTACK, ("c",))(network().double(), _batch(), _state())


def test_layers_and_tables_are_checked_before_training(data, parts, network):
    with pytest.raises(InputError, match="no convolution 'features'"):
        _prepared(CostSensitive(ATTACK, mode="cse", min_max=(1.0,), layers=("features",)), data, parts, network())
    with pytest.raises(InputError, match="1 convolutions for the 2 weights"):
        _prepared(CostSensitive(ATTACK, mode="cse"), data, parts, network())
    with pytest.raises(InputError, match="2 rows for the 3 classes"):
        _prepared(CostSensitive(ATTACK, costs=((0.0, 1.0), (1.0, 0.0))), data, parts, network())


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"costs": ((0.0, 0.0), (0.0, 0.0))}, "sum to nothing"),
        ({"mode": "cse", "min_max": (0.0, 0.0)}, "sum to nothing"),
        ({"mode": "cse", "min_max": ()}, "sum to nothing"),
        ({"costs": ((0.0, 1.0),)}, "square"),
        ({"costs": ((0.0, -1.0), (1.0, 0.0))}, "at least 0"),
        ({"costs": ((1.0, 1.0), (1.0, 0.0))}, "diagonal"),
        ({"protected": ()}, "no class is protected"),
        ({"mode": "csaa"}, "did you mean 'csa'"),
        ({"cost": -1.0}, "at least 0"),
        ({"cost_weight": float("nan")}, "at least 0"),
        ({"layers": ("a",)}, "give one for each"),
        ({"attack": Fgsm()}, "'pgd'"),
    ],
)
def test_wrong_settings_are_refused(settings, what):
    with pytest.raises(InputError, match=what):
        CostSensitive(**settings)


def test_the_table_by_class_says_which_are_protected():
    rows = [{"class": 0, "n": 3, "natural": 1.0}, {"class": 2, "n": 2, "natural": 0.5}]
    table = class_table(rows, ("a", "b", "c"), WithAuxiliary(CostSensitive(ATTACK, ("c",)), 0.4))
    assert [(row["name"], row["protected"], row["natural"]) for row in table] == [("a", False, 1.0), ("c", True, 0.5)]
    assert not any(row["protected"] for row in class_table(rows, ("a", "b", "c"), PgdAt()))


# Any network.


def _cell_network():
    torch.manual_seed(0)
    return ModelSpec(load_genotype("arnas"), 4, 5, (1, 8, 8), ("a", "b", "c"), (0.5,), (0.25,)).build()


def _wrapped(module):
    return nn.Sequential(Normalise((0.5,) * 3, (0.25,) * 3), module)


NETWORKS = {
    "cells": (_cell_network, (1, 8, 8), (1.0, 1.0)),
    "resnet": (lambda: _wrapped(resnet18(num_classes=3)), (3, 32, 32), (1.0, 1.0)),
    "transformer": (
        lambda: _wrapped(
            VisionTransformer(
                image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=3
            )
        ),
        (3, 32, 32),
        (1.0,),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_runs_on_any_network(name):
    build, shape, weights = NETWORKS[name]
    model = build().train()
    batch = Batch(torch.rand(8, *shape), torch.arange(8) % 3, torch.arange(8))
    loss, _ = CostSensitive(ATTACK, mode="csa+cse", min_max=weights)(model, batch, _state())
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert torch.isfinite(loss)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("two_steps", [False, True])
def test_training_resumes_to_the_same_weights(network, data, parts, tmp_path, two_steps):
    method = CostSensitive(ATTACK, ("b",), two_steps=two_steps, mode="csa+cse", min_max=(0.01,))

    class Stopped(Exception):
        pass

    def stop(record):
        if record["epoch"] == 1:
            raise Stopped

    def run(model, **more):
        return train(model, data, parts, method, TRAINING, validation_attack=ATTACK, seed=4, **more)

    whole, resumed, checkpoint = network(), network(), tmp_path / "checkpoint.safetensors"
    records = run(whole)
    with pytest.raises(Stopped):
        run(resumed, checkpoint=checkpoint, log=stop)
    assert run(resumed, checkpoint=checkpoint) == records
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
