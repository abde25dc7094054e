"""Surrogates of the condition number: zero at 1 alone, bounds, scale, gradients."""

import math

import pytest
import torch

from nas.compression.condition_number import (
    CONDITION_TERMS,
    SPARSITY_TERMS,
    amgm,
    condition_number,
    largest_condition_number,
    rank,
)


def _matrix(m, n, seed=0, dtype=torch.float64):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _orthogonal(m, n, seed=0):
    """All singular values 1."""
    q = torch.linalg.qr(_matrix(max(m, n), min(m, n), seed)).Q
    return q if m >= n else q.T


@pytest.mark.parametrize("term", CONDITION_TERMS.values(), ids=CONDITION_TERMS)
@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (1, 6), (1, 1)])
def test_zero_exactly_where_all_singular_values_are_equal(term, shape):
    perfect = 3.7 * _orthogonal(*shape)
    assert abs(float(term(perfect))) < 1e-9
    if min(shape) > 1:
        u, s, v = torch.linalg.svd(perfect, full_matrices=False)
        s[0] *= 1.1
        assert float(term((u * s) @ v)) > 1e-4
        for seed in range(20):
            assert float(term(_matrix(*shape, seed))) > 1e-4


@pytest.mark.parametrize("name", ["amgm", "exact"])
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1e4])
def test_the_scale_does_not_matter(name, scale):
    matrix = _matrix(4, 6)
    term = CONDITION_TERMS[name]
    assert float(term(scale * matrix)) == pytest.approx(float(term(matrix)), rel=1e-9)


def test_amgm_is_the_log_of_the_ratio_of_means():
    squares = torch.linalg.svdvals(_matrix(4, 6)).square()
    expected = math.log(float(squares.mean())) - float(squares.log().mean())
    assert float(amgm(_matrix(4, 6))) == pytest.approx(expected, abs=1e-6)


def test_exact_is_log_kappa():
    matrix = _matrix(5, 8)
    assert float(CONDITION_TERMS["exact"](matrix)) == pytest.approx(math.log(condition_number(matrix)), abs=1e-6)


def test_gap_and_tight_frame_by_singular_values():
    squares = torch.linalg.svdvals(_matrix(4, 6)).square()
    assert float(CONDITION_TERMS["gap"](_matrix(4, 6))) == pytest.approx(float(squares[0] - squares.mean()) / 2)
    expected = float((squares - squares.mean()).square().sum().sqrt())
    assert float(CONDITION_TERMS["tight-frame"](_matrix(4, 6))) == pytest.approx(expected)


def test_amgm_adds_up_over_kronecker_factors_that_are_all_wide_or_all_tall():
    for shapes in (((3, 4), (2, 5)), ((4, 3), (5, 2)), ((3, 3), (2, 2))):
        a, b = (_matrix(*shape, seed) for seed, shape in enumerate(shapes))
        assert float(amgm(torch.kron(a, b))) == pytest.approx(float(amgm(a) + amgm(b)), abs=1e-5)


def test_the_bound_on_kappa_holds_and_is_reached():
    for seed in range(300):
        matrix = _matrix(4, 6, seed)
        bound = largest_condition_number(4, float(amgm(matrix)))
        assert condition_number(matrix) <= bound * (1 + 1e-5)
    matrix = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert largest_condition_number(2, float(amgm(matrix))) == pytest.approx(3, rel=1e-5)
    assert largest_condition_number(3, 0.0) == 1
    assert largest_condition_number(3, 1e9) == math.inf


@pytest.mark.parametrize("term", [*CONDITION_TERMS.values(), *SPARSITY_TERMS.values()])
def test_gradients_are_right(term):
    for shape in ((3, 5), (5, 3), (4, 4)):
        matrix = _matrix(*shape).requires_grad_(True)
        assert torch.autograd.gradcheck(term, (matrix,))


@pytest.mark.parametrize("term", CONDITION_TERMS.values(), ids=CONDITION_TERMS)
@pytest.mark.parametrize(
    "matrix", [torch.zeros(3, 4), torch.ones(3, 4), torch.eye(3, 4), torch.diag(torch.ones(3)) * 0]
)
def test_singular_and_perfect_matrices_have_finite_values_and_gradients(term, matrix):
    matrix = matrix.clone().requires_grad_(True)
    value = term(matrix)
    (gradient,) = torch.autograd.grad(value, matrix)
    assert bool(value.isfinite()) and bool(gradient.isfinite().all())


def test_mixed_precision_changes_nothing():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        matrix = _matrix(6, 8).to(dtype)
        for term in (*CONDITION_TERMS.values(), *SPARSITY_TERMS.values()):
            expected = float(term(matrix.double()))
            with torch.autocast("cpu", torch.bfloat16):
                assert float(term(matrix)) == expected


def test_sparsity_terms():
    matrix = torch.tensor([[0.0, 1.0], [-1.0, 0.5]])
    assert float(SPARSITY_TERMS["l1"](matrix)) == 2.5
    expected = 2 + math.log(1 + 1000 * 0.25) / math.log(1001)
    assert float(SPARSITY_TERMS["log"](matrix)) == pytest.approx(expected)


def test_true_condition_and_rank():
    assert condition_number(torch.diag(torch.tensor([4.0, 2.0, 1.0]))) == pytest.approx(4)
    assert condition_number(torch.diag(torch.tensor([4.0, 2.0, 0.0]))) == math.inf
    singular = _matrix(6, 2, dtype=torch.float32) @ _matrix(2, 6, 1, dtype=torch.float32)
    assert rank(singular) == 2 and condition_number(singular) == math.inf, "rounding is no rank"
    assert rank(torch.zeros(3, 3)) == 0
    a, b = _matrix(3, 4), _matrix(2, 5, 1)
    assert condition_number(torch.kron(a, b)) == pytest.approx(condition_number(a) * condition_number(b))
    # Wide with tall: the product is singular though neither factor is.
    assert condition_number(torch.kron(_matrix(2, 4), _matrix(4, 2, 1))) == math.inf
