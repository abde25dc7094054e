"""Second-order adversarial examples in a Krylov subspace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from nas.attacks.gradient import check_loss, check_start, clean_logits_for, objective_gradient, per_image
from nas.attacks.losses import LOSSES
from nas.errors import InputError
from nas.model_state import crafting, twice_differentiable
from nas.threat_model import ThreatModel

BISECTIONS = 100

Product = Callable[[Tensor], Tensor]
"""Directions [N, D] -> the Hessian of each sample's loss times its direction [N, D]."""


@dataclass(frozen=True)
class Krylov:
    """Second-order attack: steps that climb the quadratic model of the loss in a Krylov subspace, without a Hessian.

    Reconstruction after Qian et al., arXiv 2207.01396 (and Int. J. Appl. Math. Comput. Sci. 34(3), 2024), of which the
    abstracts alone were read. At every step the gradient g and products with the Hessian H span {g, Hg, ...,
    H^(m-1) g}, m = ``dimensions``; Lanczos with full reorthogonalisation gives an orthonormal basis Q and T = Q'HQ.

    solver: "trust" (inferred, the default): the maximum of g.d + d'Hd / 2 over the subspace and the l_2 ball around the
    ball of the step, hence always an ascent direction; "gmres" (the abstract's): the Newton direction that minimises
    |Hd + g|, turned round where it would descend, and g itself where there is no curvature.
    products: "exact" by differentiating twice, or central "differences" of the gradient.
    towards: how a direction becomes a step, its "steepest" direction in the norm (sign(d) for l_inf: with one
    dimension the attack is PGD), or "scaled" to the l_2 length of that one and projected.

    A step costs a gradient and ``dimensions`` products of about two gradients each: compare with PGD at equal cost. For
    piecewise linear networks all curvature comes from the loss, and on the margin there is none; differences of
    their gradients see the kinks instead. step_size is in pixel units; 0 means 2.5 epsilon / steps, but no more
    than epsilon.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 5
    step_size: float = 0.0
    dimensions: int = 3
    loss: str = "cross_entropy"
    random_start: bool = True
    solver: Literal["trust", "gmres"] = "trust"
    products: Literal["exact", "differences"] = "exact"
    towards: Literal["steepest", "scaled"] = "steepest"

    def __post_init__(self) -> None:
        check_loss(self.loss)
        check_start(self.loss, self.random_start)
        if self.steps < 1:
            raise InputError(f"attack steps must be at least 1, not {self.steps}")
        if self.dimensions < 1:
            raise InputError(f"a Krylov subspace has at least 1 dimension, not {self.dimensions}")
        if not self.step_size >= 0:
            raise InputError(f"attack step_size must be at least 0 (0 = automatic), not {self.step_size}")

    @property
    def step(self) -> float:
        """The step size in force."""
        return self.step_size or min(2.5 / self.steps, 1.0) * self.threat_model.epsilon

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]."""
        threat_model, loss = self.threat_model, LOSSES[self.loss]
        x_adv = threat_model.random_start(x, generator) if self.random_start else x
        with crafting(model):
            clean_logits = clean_logits_for(self.loss, model, x)
            for _ in range(self.steps):
                direction = self._direction(lambda images: loss(model(images), y, clean_logits), x_adv)
                x_adv = threat_model.project(x_adv + self._stepped(direction), x)
        return x_adv

    def _direction(self, objective: Callable[[Tensor], Tensor], x_adv: Tensor) -> Tensor:
        """The direction [N, C, H, W] in which the quadratic model of ``objective`` at ``x_adv`` rises."""
        if self.dimensions == 1:
            return objective_gradient(objective, x_adv)[0]
        gradient, product = second_order(objective, x_adv, exact=self.products == "exact")
        # The l_2 ball that touches the step along the gradient from outside.
        radius = self.step * self._length(gradient)
        flat = gradient.flatten(1).double()
        basis, tridiagonal, dimensions = lanczos(flat, product, self.dimensions)
        if self.solver == "trust":
            inner = trust_region(tridiagonal[:, :-1], flat.norm(dim=1), radius.double(), dimensions)
        else:
            inner = newton(tridiagonal, flat.norm(dim=1))
        direction = torch.einsum("nmd,nm->nd", basis, inner)
        ascends = (direction * flat).sum(1, keepdim=True)
        direction = torch.where(ascends > 0, direction, torch.where(ascends < 0, -direction, flat))
        return _unit(direction).to(x_adv.dtype).view_as(x_adv)

    def _length(self, direction: Tensor) -> Tensor:
        """Euclidean length [N] of the steepest step of size 1 along ``direction``."""
        return self.threat_model.geometry.steepest(direction).flatten(1).norm(dim=1)

    def _stepped(self, direction: Tensor) -> Tensor:
        steepest = self.threat_model.geometry.steepest(direction)
        if self.towards == "steepest":
            return self.step * steepest
        unit = _unit(direction.flatten(1)).view_as(direction)
        return self.step * per_image(self._length(direction), direction) * unit

    def __str__(self) -> str:
        start = "random start" if self.random_start else "no random start"
        return (
            f"Krylov-{self.dimensions} second order, {self.threat_model}, {self.steps} steps of {self.step:.6g}, "
            f"{self.loss}, {self.solver}, {self.products} products, {self.towards}, {start}"
        )


def second_order(
    objective: Callable[[Tensor], Tensor], x: Tensor, *, exact: bool = True, distance: float = 1e-2
) -> tuple[Tensor, Product]:
    """The gradient [N, C, H, W] of the summed ``objective`` at ``x``, and products with each sample's Hessian.

    Samples must not interact (running statistics): the products of a whole batch then take one differentiation.
    Not exact, they are central differences of gradients at ``distance`` (l_2, in pixel units) to either side.
    """
    if not exact:

        def difference(directions: Tensor) -> Tensor:
            offset = distance * _unit(directions).to(x.dtype).view_as(x)
            after, _ = objective_gradient(objective, x + offset)
            before, _ = objective_gradient(objective, x - offset)
            lengths = directions.norm(dim=1, keepdim=True)
            return (after - before).flatten(1).to(directions.dtype) * lengths / (2 * distance)

        return objective_gradient(objective, x)[0], difference

    with torch.enable_grad(), twice_differentiable():
        point = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(point).sum(), point, create_graph=True)

    def product(directions: Tensor) -> Tensor:
        if not gradient.requires_grad:  # linear in the images
            return torch.zeros_like(directions)
        with torch.enable_grad():
            weighted = (gradient * directions.to(x.dtype).view_as(x)).sum()
        (found,) = torch.autograd.grad(weighted, point, retain_graph=True, materialize_grads=True)
        return found.flatten(1).to(directions.dtype)

    return gradient.detach(), product


def lanczos(gradient: Tensor, product: Product, dimensions: int) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis of the Krylov subspace of ``gradient`` [N, D], and the Hessian in it.

    Returns the basis [N, m, D], the tridiagonal matrix [N, m + 1, m] (its last row is what leads out of the subspace)
    and how many dimensions [N] each sample has: fewer where the subspace is exhausted, whose further basis vectors are
    0. A gradient of 0 has none.
    """
    n = len(gradient)
    length = gradient.norm(dim=1)
    vector = _unit(gradient)
    basis = [vector]
    matrix = gradient.new_zeros(n, dimensions + 1, dimensions)
    counts = (length > 0).long()
    for j in range(dimensions):
        image = product(vector) * (counts > j).unsqueeze(1)
        matrix[:, j, j] = (image * vector).sum(1)
        stacked = torch.stack(basis, 1)
        for _ in range(2):  # orthogonal to all of the basis, to rounding
            image = image - torch.einsum("nmd,nm->nd", stacked, torch.einsum("nmd,nd->nm", stacked, image))
        beta = image.norm(dim=1)
        goes_on = beta > 1e-8 * length
        matrix[:, j + 1, j] = torch.where(goes_on, beta, 0)
        vector = _unit(image) * goes_on.unsqueeze(1)
        if j + 1 < dimensions:
            matrix[:, j, j + 1] = matrix[:, j + 1, j]
            basis.append(vector)
            counts = counts + (goes_on & (counts == j + 1)).long()
    return torch.stack(basis, 1), matrix, counts


def trust_region(matrix: Tensor, length: Tensor, radius: Tensor, dimensions: Tensor | None = None) -> Tensor:
    """The maximum [N, m] of c.a + a'Ta / 2 over |a|_2 <= radius, for c = length e_1.

    matrix: T [N, m, m], symmetric; length, radius: [N]; dimensions: [N], of which T counts the leading rows and columns
    only (all if None). a = (mu - T)^-1 c, mu the least number above 0 and every eigenvalue at which it is no longer
    than radius; where c has nothing along the top eigenvector, that vector fills up what is missing to the radius.
    """
    m = matrix.shape[1]
    if dimensions is not None:
        # A curvature below all others in what does not count keeps the maximum out of it.
        outside = torch.arange(m, device=matrix.device) >= dimensions.unsqueeze(1)
        bottom = -1 - matrix.abs().sum(2).amax(1)
        diagonal = torch.where(outside, bottom.unsqueeze(1), 0)
        both = outside.unsqueeze(1) | outside.unsqueeze(2)
        matrix = matrix.masked_fill(both, 0) + torch.diag_embed(diagonal)
    values, vectors = torch.linalg.eigh(matrix)  # ascending
    along = vectors[:, 0] * length.unsqueeze(1)
    tiny = torch.finfo(matrix.dtype).tiny

    def solution(mu: Tensor) -> Tensor:
        gap = mu.unsqueeze(1) - values
        return torch.where(along.abs() > 0, along / gap.clamp_min(tiny), 0)

    # The root mu in [low, high] of |a(mu)| = radius; |a| falls with mu.
    low = values[:, -1].clamp_min(0)
    high = low + length / radius.clamp_min(tiny)
    floor = low.clone()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        long = solution(middle).norm(dim=1) > radius
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    inner = solution(high)
    # Short of the radius although mu has come down to an eigenvalue above 0: the rest goes along its vector.
    missing = (radius.square() - inner.square().sum(1)).clamp_min(0).sqrt()
    hard = (floor > 0) & (high - floor <= 1e-12 * floor) & (missing > 1e-6 * radius)
    top = torch.zeros_like(inner)
    top[:, -1] = torch.where(hard, missing, 0)
    return torch.einsum("nij,nj->ni", vectors, inner + top)


def newton(matrix: Tensor, length: Tensor) -> Tensor:
    """The a [N, m] of least |length e_1 + T a|_2, and of these the shortest; T: [N, m + 1, m]."""
    target = torch.zeros_like(matrix[:, :, 0])
    target[:, 0] = length
    return -torch.einsum("nij,nj->ni", torch.linalg.pinv(matrix), target)


def _unit(vectors: Tensor) -> Tensor:
    """Of length one [N, D]; 0 where they are 0."""
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)


PLUGIN = Krylov
