"""SimBA on a linear function is solved exactly by one pass over an orthonormal basis."""

import math

import pytest
import torch
from scipy.fft import dct

from nas.attacks.simba import Simba, cosines
from nas.errors import InputError
from nas.threat_model import ThreatModel


def test_the_cosines_are_those_of_the_orthonormal_transform():
    for length in (1, 5, 8):
        basis = cosines(length)
        torch.testing.assert_close(basis @ basis.T, torch.eye(length, dtype=torch.float64))
        expected = dct(torch.eye(length, dtype=torch.float64).numpy(), norm="ortho", axis=0)
        torch.testing.assert_close(basis, torch.from_numpy(expected))


@pytest.mark.parametrize("basis", ["pixels", "dct"])
def test_one_pass_is_the_greedy_optimum_and_costs_what_it_should(half_space, basis):
    """Every direction ends with the sign of its coefficient of w: one query where that is up, two where it is down."""
    model, x, y = half_space(distance=9.0, n=2)
    axis = cosines(8) if basis == "dct" else torch.eye(8, dtype=torch.float64)
    coefficients = axis @ model.w[0] @ axis.T
    cost = 1 + int(torch.where(coefficients > 0, 1, 2).sum())
    attack = Simba(ThreatModel("l2", 99.0), queries=cost, basis=basis, frequencies=1.0, step_size=0.01)
    attempt = attack.attempt(model, x, y, generator=torch.Generator().manual_seed(0))
    assert attempt.queries.tolist() == [cost] * 2
    expected = 0.01 * (axis.T @ coefficients.sign() @ axis)
    torch.testing.assert_close(attempt.x_adv - x, expected.expand_as(x), rtol=0, atol=1e-12)
    sizes = (attempt.x_adv - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(sizes, torch.full_like(sizes, 0.01 * math.sqrt(64)))


@pytest.mark.parametrize("queries", [5, 20, 60])
def test_steps_move_an_image_by_at_most_their_root(half_space, queries):
    """At most queries - 1 steps, each at right angles to the others."""
    model, x, y = half_space(distance=9.0)
    attack = Simba(ThreatModel("l2", 99.0), queries=queries, basis="dct", frequencies=1.0, step_size=0.05)
    size = (attack(model, x, y, generator=torch.Generator().manual_seed(0)) - x).flatten(1).norm(dim=1)
    assert 0.05 * math.sqrt(queries // 2) - 1e-9 <= float(size.min())
    assert float(size.max()) <= 0.05 * math.sqrt(queries - 1) + 1e-9


def test_in_l_inf_it_reaches_the_exact_worst_case_and_then_stops(half_space):
    model, x, y = half_space(distance=9.0)
    attempt = Simba(ThreatModel("linf", 0.05)).attempt(model, x, y, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attempt.x_adv, x + 0.05 * model.w.sign(), rtol=0, atol=1e-12)
    assert int(attempt.queries.max()) < 400, "no direction helps any more"


def test_low_frequencies_come_first(half_space):
    model, x, y = half_space(distance=9.0)
    attack = Simba(ThreatModel("l2", 99.0), queries=5, basis="dct", frequencies=0.25, step_size=0.05)
    spectrum = cosines(8) @ (attack(model, x, y, generator=torch.Generator()) - x) @ cosines(8).T
    assert float(spectrum[..., :2, :2].abs().amax()) > 0.04
    spectrum[..., :2, :2] = 0
    assert float(spectrum.abs().amax()) < 1e-12
    with pytest.raises(InputError, match="frequencies"):
        Simba(frequencies=0.0)
