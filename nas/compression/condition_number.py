"""Condition numbers that can be trained, and penalties that make matrices sparse.

A [m, n] has singular values s_1 >= ... >= s_r, r = min(m, n), and the condition number kappa = s_1 / s_r. Every
surrogate R below is at least 0, and 0 exactly where kappa = 1. All are computed in float64, as differences of nearly
equal squares are: under mixed precision, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TAU = 1e-8
"""Added to squared singular values in units of their mean: a singular matrix has a finite R and a gradient."""


def amgm(matrix: Tensor) -> Tensor:
    """Log of the arithmetic over the geometric mean of the squared singular values.

    R = log mean_i(s_i^2 + t) - mean_i log(s_i^2 + t), t = ``TAU`` mean_i s_i^2, by the determinant of the smaller Gram
    matrix. Does not depend on the scale of A; R(A (x) B) = R(A) + R(B) where both are wide or both are tall; bounds the
    condition number, see ``largest_condition_number``.
    """
    gram = _gram(matrix)
    r = len(gram)
    mean = gram.diagonal().mean().clamp_min(1e-30)
    shifted = gram / mean + TAU * torch.eye(r, dtype=gram.dtype, device=gram.device)
    return shifted.diagonal().mean().log() - 2 * torch.linalg.cholesky(shifted).diagonal().log().mean()


def gap(matrix: Tensor) -> Tensor:
    """R = s_1^2 / 2 - |A|_F^2 / (2 r): how far the largest squared singular value is above the mean."""
    gram = _gram(matrix)
    return torch.linalg.matrix_norm(gram, 2) / 2 - gram.diagonal().mean() / 2


def tight_frame(matrix: Tensor) -> Tensor:
    """R = | G - (tr G / r) I |_F of the smaller Gram matrix G (the form of arXiv 2505.08022 for low-rank cores)."""
    gram = _gram(matrix)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.matrix_norm(gram - gram.diagonal().mean() * eye)


def exact(matrix: Tensor) -> Tensor:
    """R = log kappa by singular values; not smooth where they repeat, and s_i^2 + t as in ``amgm``."""
    squares = torch.linalg.svdvals(matrix.double()).square()
    shifted = squares + TAU * squares.mean().clamp_min(1e-30)
    return (shifted[0].log() - shifted[-1].log()) / 2


def log_sparsity(matrix: Tensor) -> Tensor:
    """S = sum_ij log(1 + nu a_ij^2) / log(1 + nu), nu = 1000: nearly the count of entries of about 1."""
    nu = 1e3
    return torch.log1p(nu * matrix.double().square()).sum() / math.log1p(nu)


def l1(matrix: Tensor) -> Tensor:
    """S = sum_ij |a_ij|."""
    return matrix.double().abs().sum()


CONDITION_TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "amgm": amgm,
    "gap": gap,
    "tight-frame": tight_frame,
    "exact": exact,
}
SPARSITY_TERMS: dict[str, Callable[[Tensor], Tensor]] = {"log": log_sparsity, "l1": l1}


def largest_condition_number(r: int, surrogate: float) -> float:
    """The largest condition number that r singular values with ``amgm`` = ``surrogate`` can have.

    The other singular values only raise the sum: with arithmetic mean fixed, the product of s_1^2 and s_r^2 alone
    gives kappa^2 <= (1 + q) / (1 - q), q^2 = 1 - exp(-r R).
    """
    q = math.sqrt(-math.expm1(-r * max(surrogate, 0.0)))
    return math.inf if q == 1 else math.sqrt((1 + q) / (1 - q))


def condition_number(matrix: Tensor) -> float:
    """kappa as it is; infinite for a singular matrix, to the precision of its entries."""
    values = torch.linalg.svdvals(matrix.detach().double())
    return math.inf if rank(matrix) < len(values) else float(values[0] / values[-1])


def rank(matrix: Tensor) -> int:
    """Number of singular values above what rounding of the entries, in their own precision, can make of zero."""
    precision = torch.finfo(matrix.dtype).eps * max(matrix.shape)
    return int(torch.linalg.matrix_rank(matrix.detach().double(), rtol=precision))


def _gram(matrix: Tensor) -> Tensor:
    """The smaller of A A^T and A^T A, [r, r] float64."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    with torch.autocast(matrix.device.type, enabled=False):
        return wide @ wide.T
