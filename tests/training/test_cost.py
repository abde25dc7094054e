"""The cost of a training method: passes counted on one real step, against what is known of each method."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nas.attacks.pgd import Pgd
from nas.data.image_data import ImageData
from nas.data.split import Split
from nas.training.cost import Cost, _peak_memory, counted, measure
from nas.training.loop import Training
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from nas.training.trades import Trades


def network():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2))


def data():
    x = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(50) % 2
    return ImageData("random", x, y, x[:10], y[:10], ("a", "b"))


def split():
    return Split(torch.arange(20), torch.arange(20, 44), torch.arange(44, 50))


def cost_of(objective, **training):
    return measure(
        network(), data(), split(), objective, Training(**{"batch_size": 10, "epochs": 4, **training}), seed=0
    )


@pytest.mark.parametrize("steps", [1, 4])
def test_passes_of_known_methods(steps):
    standard, at = cost_of(Standard()), cost_of(PgdAt(Pgd(steps=steps)))
    assert (standard.forward, standard.backward) == (1, 1)
    assert (at.forward, at.backward) == (1 + steps, 1 + steps)
    # Clean logits are computed for the attack's loss and for the weights' loss.
    trades = cost_of(Trades(Pgd(steps=steps, loss="kl")))
    assert (trades.forward, trades.backward) == (3 + steps, 2 + steps)


def test_a_gradient_of_a_gradient_is_two_more_passes():
    model, x = network(), torch.rand(5, 1, 8, 8)

    def penalised(order):
        with counted(model) as passes:
            point = x.clone().requires_grad_(True)
            loss = model(point).log_softmax(1)[:, 0].sum()
            if order == 2:
                (gradient,) = torch.autograd.grad(loss, point, create_graph=True)
                loss = loss + gradient.square().sum()
            torch.autograd.grad(loss, [*model.parameters()])
        return passes.forward / 5, passes.backward / 5

    assert penalised(1) == (1, 1)
    assert penalised(2) == (1, 3)


def test_copies_count_and_nothing_stays():
    model, x = network(), torch.rand(4, 1, 8, 8)
    with counted(model) as passes:
        copy.deepcopy(model)(x)
        with torch.no_grad():
            model(x)
        model[0](x)
    assert (passes.forward, passes.backward) == (8, 0)
    model(x)
    assert passes.forward == 8 and not model._forward_hooks


def test_replays_own_images_and_preparation_are_counted():
    class Odd:
        replays = 3

        def prepare(self, setting):
            with torch.no_grad():
                setting.model(setting.data.x_train[:7].float())
            return self

        def training_images(self):
            own = data()
            return own.x_train[:31], own.y_train[:31]

        def __call__(self, model, batch, state):
            return Standard()(model, batch, state)

    cost = cost_of(Odd())
    assert (cost.steps, cost.images, cost.preparation) == (9, 10, 7)
    assert cost.epoch == 2 * 10 * 9 and cost.passes(2) == 7 + 2 * cost.epoch


def test_the_step_is_in_the_middle_of_the_training():
    seen = []

    class Late:
        def __call__(self, model, batch, state):
            seen.append((state.epoch, state.step, state.progress))
            return Standard()(model, batch, state)

    assert cost_of(Late(), epochs=8).steps == 4
    assert set(seen) == {(4, 16, 0.5)}


def test_epochs_for_equal_passes():
    cost = Cost(2, 1, images=10, steps=5, preparation=100, memory=None)
    assert cost.epoch == 150
    assert cost.epochs_for(cost.passes(7)) == 7
    assert cost.epochs_for(cost.passes(7) + 80) == 8
    assert cost.epochs_for(0) == 1


def test_memory_grows_with_the_batch():
    class Large:
        def __call__(self, model, batch, state):
            kept = torch.ones(len(batch.x), 2**18)  # 1 MiB an image
            loss, metrics = Standard()(model, batch, state)
            return loss + 0 * kept.mean(), metrics

    small, large, again = (cost_of(Large(), batch_size=size).memory or 0 for size in (4, 24, 24))
    assert large == again
    # What else a step takes grows with the batch, too, but is little.
    assert 20 * 2**20 < large - small < 25 * 2**20 and small > 4 * 2**20


def test_memory_is_of_what_lives_at_once():
    before = torch.ones(2**16)
    with _peak_memory(before.device) as found:
        made = before * 2  # 256 KiB
        made = made + 1  # as much beside it, before the first goes
        before.mul_(2)
        kept = made.view(2, -1), made[:5]
        made = kept[0].sum()
    assert found[0] == 2 * 2**18
    leaf = torch.ones(2**16, requires_grad=True)
    with _peak_memory(before.device) as found:
        (gradient,) = torch.autograd.grad((leaf * leaf).exp().sum(), leaf)
    assert 2 * 2**18 <= found[0] <= 5 * 2**18 and bool(gradient.isfinite().all())
