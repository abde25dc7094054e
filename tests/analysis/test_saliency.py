"""Saliency maps and their measures against networks whose eyes are known, and against other implementations."""

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from nas.analysis.saliency import (
    PerturbationSaliency,
    deletion_and_insertion,
    gradient_saliency,
    interpretability,
    most_salient,
    rank_correlation,
    share_inside,
    sparsity,
)
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.threat_model import ThreatModel


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _images(n=5, shape=(2, 12, 16)):
    return torch.rand(n, *shape, generator=_generator(1), dtype=torch.float64)


class _Block(nn.Module):
    """Looks at one block of the image alone, at its texture: blurring it changes the answer."""

    def __init__(self, rows=slice(0, 3), columns=slice(12, 16)):
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, x):
        seen = x[:, :, self.rows, self.columns].flatten(1)
        sign = torch.where(torch.arange(seen.shape[1]) % 2 == 0, 1.0, -1.0).to(x)
        evidence = seen @ sign
        return torch.stack([evidence, -evidence], 1)


def test_perturbation_saliency_is_highest_where_the_network_looks():
    x = _images()
    saliency = PerturbationSaliency(windows=4)(_Block(), x)
    assert saliency.shape == (5, 12, 16)
    peaks = saliency.flatten(1).argmax(1)
    assert bool((peaks // 16 < 3).all()) and bool((peaks % 16 >= 12).all())
    other = PerturbationSaliency(windows=4)(_Block(slice(9, 12), slice(0, 4)), x).flatten(1).argmax(1)
    assert bool((other // 16 >= 9).all()) and bool((other % 16 < 4).all())


def test_perturbation_saliency_is_half_the_squared_change_of_the_prediction():
    """At the middle of a window, by hand; three windows on each side of 9 pixels meet the pixels 1, 4 and 7."""
    x = _images(3, (1, 9, 9))
    model = nn.Sequential(nn.Flatten(), nn.Linear(81, 4)).double()
    measure = PerturbationSaliency(windows=3, blur=0.1)
    saliency, blurred = measure(model, x), measure.blurred(x)
    place = torch.arange(9, dtype=torch.float64)
    for row in (1, 4, 7):
        for column in (1, 4, 7):
            distance = (place[:, None] - row) ** 2 + (place - column) ** 2
            window = torch.exp(-distance / (2 * 1.5**2))
            moved = x * (1 - window) + blurred * window
            change = model(moved).softmax(1) - model(x).softmax(1)
            torch.testing.assert_close(saliency[:, row, column], change.square().sum(1).detach() / 2)
    assert float((blurred - x).abs().max()) > 0.1


def test_a_network_that_sees_nothing_has_no_saliency():
    blind = nn.Sequential(nn.Flatten(), nn.Linear(2 * 12 * 16, 3)).double()
    nn.init.zeros_(blind[1].weight)
    saliency = PerturbationSaliency()(blind, _images())
    assert float(saliency.abs().max()) == 0
    assert not bool(most_salient(saliency, 0.5).any())
    assert bool((PerturbationSaliency()(_Block(), torch.full((2, 2, 12, 16), 0.3)) < 1e-12).all()), "an even image"


def test_saliency_leaves_the_network_as_found():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(3)).double()
    x = _images()
    model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = PerturbationSaliency()(model, x)
    alone = torch.cat([PerturbationSaliency()(model, image[None]) for image in x])
    torch.testing.assert_close(first, alone, msg="images do not meet, not even in train mode")
    gradient_saliency(model, x, torch.zeros(5).long())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradient_saliency_is_the_size_of_the_gradient_over_the_channels():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 12 * 16, 3)).double()
    x, y = _images(), torch.arange(5) % 3
    error = (model(x).softmax(1) - nn.functional.one_hot(y, 3)).detach()
    gradient = (error @ model[1].weight.detach()).view_as(x)
    torch.testing.assert_close(gradient_saliency(model, x, y), gradient.square().sum(1).sqrt())


def test_the_most_salient_pixels():
    saliency = torch.tensor([[[1.0, 5.0], [3.0, 0.0]], [[0.0, 0.0], [2.0, 0.0]], [[2.0, 2.0], [2.0, 1.0]]])
    assert most_salient(saliency, 0.5).int().tolist() == [[[0, 1], [1, 0]], [[0, 0], [1, 0]], [[1, 1], [1, 0]]]
    assert not bool(most_salient(saliency, 0.0).any())
    many = torch.rand(3, 10, 10, generator=_generator())
    assert most_salient(many, 0.2).flatten(1).sum(1).tolist() == [20] * 3


def test_sparsity_is_the_gini_index():
    even, single = torch.ones(1, 4, 5), torch.zeros(1, 4, 5)
    single[0, 2, 3] = 7
    drawn = torch.rand(1, 4, 5, generator=_generator()).double() ** 2
    flat = drawn.flatten()
    gini = (flat[:, None] - flat).abs().sum() / (2 * 20 * flat.sum())  # its definition
    found = torch.cat([sparsity(maps) for maps in (even, single, drawn, torch.zeros(1, 4, 5))])
    torch.testing.assert_close(found, torch.tensor([0, 19 / 20, float(gini), 0], dtype=torch.float64))


def test_rank_correlation_is_spearmans():
    first = torch.rand(3, 6, 7, generator=_generator(), dtype=torch.float64)
    second = (first * 4).round() + torch.rand(3, 6, 7, generator=_generator(1), dtype=torch.float64).round()  # has ties
    found = rank_correlation(first, second)
    for i in range(3):
        assert float(found[i]) == pytest.approx(spearmanr(first[i].flatten(), second[i].flatten()).statistic)
    torch.testing.assert_close(rank_correlation(first, first.exp()), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(rank_correlation(first, -first), -torch.ones(3, dtype=torch.float64))
    assert float(rank_correlation(first, torch.ones(3, 6, 7)).abs().max()) == 0


def test_the_share_inside_a_mask():
    gradient = torch.tensor([[[[3.0, 1.0]], [[4.0, 2.0]]]])
    assert float(share_inside(gradient, torch.tensor([[[True, False]]]))) == pytest.approx(25 / 30)
    assert float(share_inside(0 * gradient, torch.tensor([[[True, True]]]))) == 0


def test_deletion_and_insertion_tell_a_good_map_from_a_bad_one():
    """The network looks at one block: deleting it first drops the answer at once, last only at the end."""
    model, x = _Block(), _images()
    y = model(x).argmax(1)
    good = torch.zeros(5, 12, 16, dtype=torch.float64)
    good[:, 0:3, 12:16] = 1
    baseline = torch.full_like(x, 0.5)
    low, high = deletion_and_insertion(model, x, y, good, baseline=baseline)
    bad_low, bad_high = deletion_and_insertion(model, x, y, -good, baseline=baseline)
    assert bool((low < bad_low).all()) and bool((high > bad_high).all())
    # The block is a sixteenth of the image and gone after one step of 16: half, and the part before, remain.
    chance = model(x).softmax(1).amax(1)
    torch.testing.assert_close(low, 0.5 + (chance - 0.5) / 32)
    torch.testing.assert_close(high, chance - (chance - 0.5) / 32)


def test_interpretability_of_a_network():
    model, x = _Block(), _images()
    y = model(x).argmax(1)
    attack = Pgd(ThreatModel("linf", 0.05), steps=2)
    measured = interpretability(model, x, y, attack=attack, generator=_generator())
    assert list(measured) == ["deletion", "insertion", "sparsity", "alignment", "inside", "stability"]
    assert all(values.shape == (5,) and bool(values.isfinite().all()) for values in measured.values())
    # Both maps have the one block, and the sizes of its gradient hardly change.
    assert float(measured["inside"].min()) > 0.95
    assert float(measured["stability"].min()) > 0.9
    assert bool((measured["insertion"] > measured["deletion"]).all())


def test_wrong_settings_are_refused():
    for settings in ({"windows": 0}, {"blur": 0.0}, {"blur": float("nan")}):
        with pytest.raises(InputError):
            PerturbationSaliency(**settings)
    with pytest.raises(InputError, match="8 pixels"):
        PerturbationSaliency(windows=9)(_Block(), torch.rand(1, 1, 8, 20))
