"""Separable linear layers: sums of Kronecker products of small matrices, applied along the axes of the input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
from torch import Tensor, nn

Modes = tuple[int, ...]

EXACT_SVD = 2**28
"""Largest product of entries and shorter side up to which a singular value decomposition is complete."""

SMALL_GRAM = 256
"""Largest shorter side of a larger matrix up to which its Gram matrix costs less than subspace iteration."""


@dataclass(frozen=True)
class Separation:
    """The structure of a separable layer: n = prod ``in_modes`` features to m = prod ``out_modes``, ``terms`` T."""

    in_modes: Modes
    out_modes: Modes
    terms: int = 1

    @property
    def weights(self) -> int:
        """Stored numbers: T sum_k m_k n_k."""
        return self.terms * sum(m * n for m, n in zip(self.out_modes, self.in_modes, strict=True))

    @property
    def order(self) -> tuple[int, ...]:
        """The axes in the order that takes the fewest multiplications.

        Whether i or its neighbour j goes first changes the cost by the same factor of all else, and i first is the
        cheaper if 1/n_i - 1/m_i < 1/n_j - 1/m_j: hence sorted.
        """
        keys = [1 / n - 1 / m for m, n in zip(self.out_modes, self.in_modes, strict=True)]
        return tuple(sorted(range(len(keys)), key=keys.__getitem__))

    @property
    def multiply_adds(self) -> int:
        """Multiplications of one sample, in ``order``."""
        size, total = math.prod(self.in_modes), 0
        for k in self.order:
            total += size * self.out_modes[k]
            size = size // self.in_modes[k] * self.out_modes[k]
        return self.terms * total

    @property
    def rank(self) -> int:
        """Largest rank of one term; that of an [m, n] matrix only where all factors are wide, or all tall."""
        return math.prod(map(min, self.out_modes, self.in_modes))

    @property
    def sufficient_terms(self) -> int:
        """Number of terms that reproduces any matrix: the product of all m_k n_k but the largest."""
        sizes = [m * n for m, n in zip(self.out_modes, self.in_modes, strict=True)]
        return math.prod(sizes) // max(sizes)

    def __str__(self) -> str:
        terms = f"{self.terms} terms of " if self.terms > 1 else ""
        return f"{terms}({', '.join(map(str, self.in_modes))}) -> ({', '.join(map(str, self.out_modes))})"


class SeparableLinear(nn.Module):
    """y = sum_t (A_1^t (x) ... (x) A_d^t) x + b, without ever forming the product.

    x: [..., n], any axes before the last are batch axes, and its last one is the row-major flattening of a tensor
    [n_1, ..., n_d];  y: [..., m], likewise of [m_1, ..., m_d]. Factor k, [m_k, n_k], is applied along axis k. Each
    factor is an ``nn.Linear`` without bias, ``terms[t][k]``: masks, quantisation and counters find it. It begins with
    random factors of ``generator`` such that the product has the variance 2 / n (He et al., arXiv 1502.01852), and
    with b = 0.
    """

    def __init__(
        self, separation: Separation, *, bias: bool = True, dtype: torch.dtype | None = None,
        device: torch.device | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.separation, self._order = separation, separation.order
        self.in_features, self.out_features = math.prod(separation.in_modes), math.prod(separation.out_modes)
        pairs = [*zip(separation.out_modes, separation.in_modes, strict=True)]
        self.terms = nn.ModuleList(
            nn.ModuleList(_linear(n, m, dtype, device) for m, n in pairs) for _ in range(separation.terms)
        )
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if bias else None
        generator = generator or torch.Generator().manual_seed(0)
        for factors in self.factors():
            for k, (m, n) in enumerate(pairs):
                variance = 2 / (n * separation.terms) if k == 0 else 1 / n
                self._set(factors[k], torch.randn(m, n, generator=generator) * math.sqrt(variance))

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] to [..., m]."""
        modes = len(self.separation.in_modes)
        x = x.unflatten(-1, self.separation.in_modes)
        y: Tensor | None = None
        for factors in self.factors():
            term = x
            for k in self._order:
                term = factors[k](term.movedim(k - modes, -1)).movedim(-1, k - modes)
            y = term if y is None else y + term
        assert y is not None
        y = y.flatten(-modes)
        return y if self.bias is None else y + self.bias

    def factors(self) -> Iterator[list[nn.Linear]]:
        """The factors A_1 ... A_d of each term."""
        for term in self.terms:
            assert isinstance(term, nn.ModuleList)
            yield [*term]  # type: ignore[misc]

    def set_factors(self, terms: Sequence[Sequence[Tensor]]) -> None:
        """Take these matrices as factors of the terms."""
        for factors, values in zip(self.factors(), terms, strict=True):
            for factor, value in zip(factors, values, strict=True):
                self._set(factor, value)

    @property
    def weight(self) -> Tensor:
        """The matrix [m, n] that the layer stands for, computed: for whoever takes it and does not call the layer."""
        products = [reduce(torch.kron, [factor.weight for factor in factors]) for factors in self.factors()]
        return torch.stack(products).sum(0)

    def lipschitz_bound(self) -> Tensor:
        """Sum over the terms of products of the factors' spectral norms; with one term the spectral norm itself."""
        norms = [[torch.linalg.matrix_norm(factor.weight, 2) for factor in factors] for factors in self.factors()]
        return torch.stack([torch.stack(own).prod() for own in norms]).sum()

    def extra_repr(self) -> str:
        return f"{self.separation}, bias={self.bias is not None}"

    @staticmethod
    def _set(factor: nn.Linear, value: Tensor) -> None:
        with torch.no_grad():
            factor.weight.copy_(value)


class SeparablePointwise(nn.Module):
    """A 1x1 convolution that is separable over its channels: [N, C, H, W] to [N, C', H', W']."""

    def __init__(self, linear: SeparableLinear, stride: tuple[int, int]) -> None:
        super().__init__()
        self.linear, self.stride = linear, stride

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x[:, :, :: self.stride[0], :: self.stride[1]].movedim(1, -1))
        return y.movedim(-1, 1)


def nearest_kronecker(
    weight: Tensor, separation: Separation, *, vectors: bool = True
) -> tuple[list[list[Tensor]], Tensor]:
    """The sum of Kronecker products nearest to ``weight`` [m, n], and the Frobenius norms of its terms.

    The entries of the matrix, rearranged to a tensor [m_1 n_1, ..., m_d n_d], turn Kronecker products into outer
    products (Van Loan & Pitsianis, 1993). Of two factors the singular value decomposition gives the best terms. Of
    more, one axis is split off after the other, smallest first; all terms then are orthogonal to each other, and the
    largest are taken (Batselier & Wong, arXiv 1507.08805): the best choice among these, not the best there is. Either
    way the squared error is |weight|_F^2 less the sum of the squared norms. Fewer terms come back where fewer suffice.
    vectors: whether the factors are wanted, or the norms alone.
    """
    pairs = [*zip(separation.out_modes, separation.in_modes, strict=True)]
    d = len(pairs)
    tensor = weight.detach()
    tensor = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    tensor = tensor.reshape(*separation.out_modes, *separation.in_modes)
    # Largest first, so that what is split off last is split into the fewest terms.
    largest_first = sorted(range(d), key=lambda k: -pairs[k][0] * pairs[k][1])
    tensor = tensor.permute([axis for k in largest_first for axis in (k, d + k)])
    tensor = tensor.reshape([pairs[k][0] * pairs[k][1] for k in largest_first])
    found = _orthogonal_terms(tensor, separation.terms)
    norms = torch.stack([norm for norm, _ in found])
    terms = []
    for norm, unit in found if vectors else ():
        factors = [unit[largest_first.index(k)].view(pairs[k]) for k in range(d)]
        # Equal norms: gradients, weight decay and thresholds then mean the same for each.
        terms.append([factor * norm ** (1 / d) for factor in factors])
    return terms, norms


def _orthogonal_terms(tensor: Tensor, count: int) -> list[tuple[Tensor, list[Tensor]]]:
    """Up to ``count`` outer products, as norm and unit vectors, largest first, that stand for ``tensor``."""
    if tensor.dim() == 1:
        norm = tensor.norm()
        return [(norm, [tensor / norm.clamp_min(torch.finfo(tensor.dtype).tiny)])]
    matrix = tensor.reshape(-1, tensor.shape[-1])
    left, values, right = _singular(matrix, count if tensor.dim() == 2 else min(matrix.shape))
    if tensor.dim() == 2:
        return [(values[i], [left[:, i], right[:, i]]) for i in range(min(count, len(values)))]
    terms: list[tuple[Tensor, list[Tensor]]] = []
    for i, value in enumerate(values):
        if len(terms) >= count and value <= terms[count - 1][0]:
            break  # none of what is split from here on is larger
        parts = _orthogonal_terms(left[:, i].reshape(tensor.shape[:-1]), count)
        terms += [(value * norm, [*unit, right[:, i]]) for norm, unit in parts]
        terms = sorted(terms, key=lambda term: -float(term[0]))[:count]
    return terms


def _singular(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest ``count`` singular triples at least: left [p, c], values [c], right [q, c].

    Of a matrix too large for a complete decomposition: by its smaller Gram matrix, where that is small, else by
    subspace iteration from a fixed start, whose values are exact for the subspace found.
    """
    side = min(matrix.shape)
    if matrix.numel() * side <= EXACT_SVD:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right.mT
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = _singular(matrix.mT, count)
        return left, values, right
    if side <= SMALL_GRAM or 2 * count + 8 >= side:
        _, vectors = torch.linalg.eigh((matrix.mT @ matrix).double())
        right = vectors.flip(1)[:, :count].to(matrix.dtype)
        left = matrix @ right
        values = torch.linalg.vector_norm(left, dim=0)
        return left / values.clamp_min(torch.finfo(matrix.dtype).tiny), values, right
    guess = torch.randn(side, 2 * count + 8, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ guess.to(matrix)).Q
    for _ in range(6):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return (basis @ left)[:, :count], values[:count], right.mT[:, :count]


@lru_cache(maxsize=4096)
def ordered_factorisations(number: int, length: int) -> tuple[Modes, ...]:
    """All tuples of ``length`` positive integers whose product is ``number``."""
    if length == 1:
        return ((number,),)
    small = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    divisors = sorted({*small, *(number // k for k in small)})
    return tuple((first, *rest) for first in divisors for rest in ordered_factorisations(number // first, length - 1))


def groupings(shape: Modes) -> tuple[Modes, ...]:
    """The axes of a feature map, and what neighbouring axes can be merged to; at least two remain.

    Axes of size 1 are left out: (C, H, W) gives (C, H, W), (C H, W) and (C, H W).
    """
    shape = tuple(size for size in shape if size > 1)
    if len(shape) < 2:
        return ()
    found = [shape]
    for i in range(len(shape) - 1):
        found += groupings((*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]))
    return tuple(dict.fromkeys(found))


def separations(m: int, n: int, *, shape: Modes | None, modes: int, terms: int) -> list[Separation]:
    """The separable layers that can stand for an [m, n] matrix with fewer weights and no more multiplications.

    shape: of the feature map that the input is the flattening of; its axes, or groups of neighbouring ones, then are
    the modes of n. None: any factors of n. modes: most factors of a term; terms: most terms. Only structures of the
    largest rank there is come: less than that of the matrix means an infinite condition number, and rank 1 is nothing
    to put in place of a layer. Fewest weights first, then fewest multiplications, then larger modes first.
    """
    given = [group for group in groupings(shape or ()) if len(group) <= max(modes, 3)]
    if not given:
        given = [own for length in range(2, modes + 1) for own in ordered_factorisations(n, length)]
    found = []
    for in_modes in given:
        for out_modes in ordered_factorisations(m, len(in_modes)):
            if any(a == b == 1 for a, b in zip(in_modes, out_modes, strict=True)):
                continue
            one = Separation(in_modes, out_modes)
            for count in range(1, min(terms, one.sufficient_terms) + 1):
                separation = Separation(in_modes, out_modes, count)
                if separation.weights < m * n and separation.multiply_adds <= m * n:
                    found.append(separation)
    rank = max((separation.rank for separation in found), default=0)
    found = [separation for separation in found if separation.rank == rank > 1]

    def cost(separation: Separation) -> tuple[object, ...]:
        larger_first = tuple(-size for size in (*separation.in_modes, *separation.out_modes))
        return separation.weights, separation.multiply_adds, separation.terms, larger_first

    return sorted(found, key=cost)  # type: ignore[arg-type]


def _linear(n: int, m: int, dtype: torch.dtype | None, device: torch.device | None) -> nn.Linear:
    """Without initialisation, which would draw from the global stream."""
    factor: nn.Linear = nn.utils.skip_init(nn.Linear, n, m, bias=False, dtype=dtype, device=device or "cpu")
    return factor
