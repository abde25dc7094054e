"""Low-rank layers: Tucker-2 factors of convolutions, singular value factors of matrices, and which ranks to give them.

A *matrix* here is the weight of a linear layer or of a 1x1 convolution, [O, I]; it has one rank. Any other kernel
[O, I, kh, kw] has two: of its output mode, unfold_0 [O, I kh kw], and of its input mode, unfold_1 [I, O kh kw].
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from nas.compression.layers import Layer
from nas.errors import InputError

Ranks = tuple[int, ...]
"""(r,) of a matrix, (r0, r1) of another kernel: of its output and of its input mode."""

SWEEPS = 10


def full_ranks(shape: Sequence[int]) -> Ranks:
    """The largest ranks that a weight of ``shape`` can have."""
    outputs, inputs, pixels = _sizes(shape)
    if pixels == 1:
        return (min(outputs, inputs),)
    return min(outputs, inputs * pixels), min(inputs, outputs * pixels)


def parameters_of(shape: Sequence[int], ranks: Ranks) -> int:
    """Numbers in the factors: r (O + I) of a matrix, O r0 + I r1 + r0 r1 kh kw of another kernel."""
    outputs, inputs, pixels = _sizes(shape)
    if pixels == 1:
        return ranks[0] * (outputs + inputs)
    return outputs * ranks[0] + inputs * ranks[1] + ranks[0] * ranks[1] * pixels


def spectra(weight: Tensor) -> tuple[list[float], ...]:
    """Squared singular values of each unfolding (of the matrix itself: one), largest first."""
    tensor = _exact(weight)
    found = []
    for unfolded, rank in zip(_unfoldings(tensor), full_ranks(weight.shape), strict=False):
        values = torch.linalg.eigvalsh(_gram(unfolded)).flip(0)[:rank]
        found.append(values.clamp_min(0).tolist())
    return tuple(found)


def tucker2(weight: Tensor, ranks: Ranks, sweeps: int = SWEEPS) -> tuple[Tensor, Tensor, Tensor]:
    """P [O, r0], core [r0, r1, kh, kw] and Q [I, r1] with weight [O, I, kh, kw] ~ core x_0 P x_1 Q, in float64.

    Higher-order orthogonal iteration (De Lathauwer, De Moor & Vandewalle, SIAM J. Matrix Anal. Appl. 21, 2000) on the
    first two modes: P and Q have orthonormal columns, each is the best for the other in turn, at most ``sweeps`` times,
    beginning with the leading singular vectors of both unfoldings (0 sweeps: these, the truncated HOSVD). The error
    never rises from one sweep to the next.
    """
    outputs, inputs, height, width = weight.shape
    tensor = _exact(weight).reshape(outputs, inputs, height * width)
    p, q = (_leading(unfolded, rank) for unfolded, rank in zip(_unfoldings(tensor), ranks, strict=True))
    energy = 0.0
    for _ in range(sweeps):
        p = _leading(torch.einsum("oik,ij->ojk", tensor, q).flatten(1), ranks[0])
        reduced = torch.einsum("oik,oj->ijk", tensor, p).flatten(1)
        q = _leading(reduced, ranks[1])
        before, energy = energy, float((q.T @ reduced).square().sum())
        if energy - before <= 1e-9 * energy:
            break
    core = torch.einsum("oik,op,iq->pqk", tensor, p, q)
    return p, core.reshape(*ranks, height, width), q


def matrix_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [O, r] and B [r, I] with A B the best approximation of ``matrix`` [O, I] of that rank, in float64.

    The singular values are shared evenly, |A| = |B|: both factors then move alike in training and under weight decay.
    """
    exact = _exact(matrix)
    wide = exact if exact.shape[0] <= exact.shape[1] else exact.T
    basis = _leading(wide, rank)
    coordinates = basis.T @ wide
    root = coordinates.norm(dim=1).sqrt()
    # Rows of zeros stay zeros; they belong to singular values that vanish.
    inverse = torch.where(root > 0, 1 / root.clamp_min(1e-150), 0.0)
    left, right = basis * root, inverse[:, None] * coordinates
    return (left, right) if wide is exact else (right.T, left.T)


def low_rank(weight: Tensor, ranks: Ranks) -> Tensor:
    """The projection of ``weight`` on the given ranks, with its type: exact for matrices, ``tucker2`` for others."""
    if len(ranks) == 1:
        a, b = matrix_factors(weight.flatten(1), ranks[0])
        return (a @ b).to(weight).reshape(weight.shape)
    p, core, q = tucker2(weight, ranks)
    return torch.einsum("pqhw,op,iq->oihw", core, p, q).to(weight)


def allocate(
    shapes: Sequence[Sequence[int]],
    squares: Sequence[tuple[Sequence[float], ...]],
    budget: int,
    *,
    step: int = 1,
    floor: int = 1,
) -> list[Ranks | None]:
    """Ranks of weights that share ``budget`` numbers; None for one that stays as it is.

    shapes: of the weights;  squares: their ``spectra``;  step: ranks are multiples of it, as far as ``floor``, the
    least rank, and the weight's own size allow.

    Greedy, from full ranks on: of all weights and modes the one is lowered that loses least of the logarithm of its
    energy (the sum of the squared singular values it has left) per number saved, until the sum fits. What is maximised
    is thus the product of the energies that all modes keep (after Zhang, Zou, He & Sun, TPAMI 2016, arXiv 1505.06798,
    who have one mode a layer): a sum would rather destroy one layer, whose loss is bounded, than weaken several. A
    weight counts with its own numbers as long as its factors are no fewer. The price of a move only rises as ranks
    fall, so that a heap finds each next one; the budget is met with less than one move to spare. Raises ``InputError``
    for a budget that the floor does not allow.
    """
    ranks = [list(full_ranks(shape)) for shape in shapes]
    dense = [math.prod(shape) for shape in shapes]
    energies = [[[0.0, *accumulate(values)] for values in modes] for modes in squares]

    def numbers(index: int) -> int:
        return min(dense[index], parameters_of(shapes[index], tuple(ranks[index])))

    def lowered(index: int, mode: int) -> list[int]:
        after = list(ranks[index])
        after[mode] = max(min(floor, after[mode]), (after[mode] - 1) // step * step)
        return after

    def price(index: int, mode: int) -> float | None:
        """Loss of log energy per number saved; None at the floor."""
        before, after = ranks[index], lowered(index, mode)
        if after == before:
            return None
        saved = parameters_of(shapes[index], tuple(before)) - parameters_of(shapes[index], tuple(after))
        removed, energy = sum(squares[index][mode][after[mode] : before[mode]]), energies[index][mode][before[mode]]
        return -math.log1p(-removed / energy) / saved if removed else 0.0

    total = sum(dense)
    heap = [(0.0, index, mode) for index, modes in enumerate(ranks) for mode in range(len(modes))]
    heapq.heapify(heap)
    while total > budget:
        if not heap:
            raise InputError(f"ranks of {floor} leave {total} numbers, above the budget of {budget}")
        known, index, mode = heapq.heappop(heap)
        now = price(index, mode)
        if now is None:
            continue
        if now > known:
            heapq.heappush(heap, (now, index, mode))
            continue
        total -= numbers(index)
        ranks[index] = _useful(shapes[index], lowered(index, mode))
        total += numbers(index)
        heapq.heappush(heap, (now, index, mode))
    return [
        tuple(found) if parameters_of(shape, tuple(found)) < size else None
        for shape, size, found in zip(shapes, dense, ranks, strict=True)
    ]


def factorised(layer: Layer, ranks: Ranks, *, fit: bool = True) -> nn.Sequential:
    """What stands in place of ``layer``: two layers where its weight is a matrix, else three convolutions.

    A linear layer becomes I -> r -> O; a convolution a 1x1 one of I -> r1 channels, one of r1 -> r0 with kernel,
    stride, padding and dilation of the layer, and a 1x1 one of r0 -> O with its bias; a 1x1 convolution two, the first
    with its stride. Nothing stands between them. fit: with the factors of its weight; else with fresh ones.
    """
    with torch.enable_grad():
        weight = layer.weight  # of a parametrised layer: as computed, which needs gradients where its origin does
    outputs, inputs = weight.shape[:2]
    like, biased = {"device": weight.device, "dtype": weight.dtype}, layer.bias is not None
    parts: list[Layer]
    if isinstance(layer, nn.Linear):
        parts = [skip_init(nn.Linear, inputs, ranks[0], bias=False, **like)]
        parts += [skip_init(nn.Linear, ranks[0], outputs, bias=biased, **like)]
    else:
        geometry = {
            "kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding,
            "dilation": layer.dilation, "padding_mode": layer.padding_mode,
        }  # fmt: skip
        if len(ranks) == 1:
            parts = [skip_init(nn.Conv2d, inputs, ranks[0], bias=False, **geometry, **like)]
        else:
            parts = [skip_init(nn.Conv2d, inputs, ranks[1], 1, bias=False, **like)]
            parts += [skip_init(nn.Conv2d, ranks[1], ranks[0], bias=False, **geometry, **like)]
        parts += [skip_init(nn.Conv2d, ranks[0], outputs, 1, bias=biased, **like)]
    factors = _factors(weight, ranks) if fit else []
    for part in parts:
        if not fit:
            part.reset_parameters()
        part.weight.requires_grad_(weight.requires_grad)
    last: Tensor | None = parts[-1].bias
    bias: Tensor | None = layer.bias
    with torch.no_grad():
        for part, factor in zip(parts, factors, strict=False):
            part.weight.copy_(factor.reshape(part.weight.shape))
        if last is not None and bias is not None:
            last.requires_grad_(bias.requires_grad)
            if fit:
                last.copy_(bias)
    if weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        parts = [part.to(memory_format=torch.channels_last) for part in parts]
    return nn.Sequential(*parts).train(layer.training)


def condition_numbers(replacement: nn.Sequential) -> list[float]:
    """Largest over smallest singular value of each factor of ``factorised``, unfolded to [outputs, rest].

    1 for the outer factors of a fresh Tucker-2 layer, whose columns are orthonormal; low-rank cores tend to be large.
    """
    found = []
    for part in replacement:
        assert isinstance(part, nn.Conv2d | nn.Linear)
        values = torch.linalg.svdvals(_exact(part.weight).flatten(1))
        found.append(float(values[0] / values[-1]))
    return found


def _factors(weight: Tensor, ranks: Ranks) -> list[Tensor]:
    """Weights of the layers in place of one with ``weight``, in the order they are passed."""
    if len(ranks) == 1:
        a, b = matrix_factors(weight.flatten(1), ranks[0])
        return [b, a]
    p, core, q = tucker2(weight, ranks)
    return [q.T, core, p]


def _exact(weight: Tensor) -> Tensor:
    exact = weight.detach().to("cpu" if weight.device.type == "mps" else weight.device, torch.float64)
    if not bool(exact.isfinite().all()):
        raise InputError("low-rank factors need weights that are finite numbers, and some are not")
    return exact


def _unfoldings(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor.flatten(1), tensor.transpose(0, 1).flatten(1)


def _gram(matrix: Tensor) -> Tensor:
    """Of the smaller side: its eigenvalues are the squared singular values that may differ from 0."""
    return matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """Orthonormal [rows, rank]: the leading left singular vectors, largest first."""
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]


def _useful(shape: Sequence[int], ranks: list[int]) -> list[int]:
    """Without ranks that the other mode's rank makes impossible: they would cost numbers and gain nothing."""
    if len(ranks) == 1:
        return ranks
    pixels = _sizes(shape)[2]
    return [min(ranks[0], ranks[1] * pixels), min(ranks[1], ranks[0] * pixels)]


def _sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    """Outputs, inputs and pixels of the kernel."""
    return shape[0], shape[1], math.prod(shape[2:])
