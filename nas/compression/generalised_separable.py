"""Generalised depthwise-separable convolutions, and how many kernels each input channel of one should get.

A convolution with weight [O, I / groups, kh, kw] is seen as one block W_c [M, K2] for each input channel c, with
M = O / groups and K2 = kh kw. Channel c gets g_c >= 0 depthwise kernels, whose outputs a 1x1 convolution combines: what
such a layer can compute are the convolutions with rank(Q_c) <= g_c (Dbouk & Shanbhag, NeurIPS 2021, arXiv 2110.14871).
All g_c = 1 is the ordinary depthwise-separable convolution.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.errors import InputError


class GeneralisedSeparableConv2d(nn.Module):
    """x [N, I, H, W] -> [N, O, H', W']: channels repeated, a depthwise convolution of G channels, a 1x1 convolution.

    kernels: g_c of each input channel; their sum G is shared evenly by the groups. geometry: stride, padding, dilation
    and padding_mode of the depthwise convolution; the bias is that of the 1x1 convolution. Where all channels have the
    same number of kernels, the depthwise convolution itself repeats them (a depthwise multiplier); otherwise they are
    gathered by ``index`` [G], which follows from ``kernels`` and is not stored.
    """

    index: Tensor | None

    def __init__(
        self,
        kernels: Sequence[int],
        out_channels: int,
        kernel_size: tuple[int, int],
        *,
        groups: int = 1,
        bias: bool = True,
        **geometry: Any,
    ) -> None:
        super().__init__()
        self.kernels, self.out_channels, self.groups = tuple(kernels), out_channels, groups
        total, gathers = sum(kernels), len(set(kernels)) > 1
        self.register_buffer("index", self._owners() if gathers else None, persistent=False)
        channels = total if gathers else len(kernels)
        self.depthwise = nn.Conv2d(channels, total, kernel_size, groups=channels, bias=False, **geometry)
        self.pointwise = nn.Conv2d(total, out_channels, 1, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.index is not None:
            x = _gathered(x, self.index)
        return self.pointwise(self.depthwise(x))

    def dense_weight(self) -> Tensor:
        """Q [O, I / groups, kh, kw]: the weight of the one convolution that computes the same."""
        columns = self.pointwise.weight.flatten(1).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        products = columns[:, :, None] * self.depthwise.weight.flatten(1)[:, None, :]
        blocks = products.new_zeros(len(self.kernels), *products.shape[1:])
        blocks = blocks.index_add(0, self._owners().to(products.device), products)
        weight = blocks.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.unflatten(2, self.depthwise.kernel_size)

    def extra_repr(self) -> str:
        return f"{len(self.kernels)}, {self.out_channels}, kernels={sum(self.kernels)}, groups={self.groups}"

    def _owners(self) -> Tensor:
        """The input channel that each kernel looks at: [G], ascending."""
        return torch.tensor([channel for channel, count in enumerate(self.kernels) for _ in range(count)])


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """Channels ``index`` of ``x``, in the memory order of ``x``: torch's own selection falls back to channels first.

    The depthwise convolution would then rearrange them: twice its time on a CPU.
    """
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.index_select(1, index)
    pixels = x.permute(0, 2, 3, 1)
    return pixels.flatten(0, 2).index_select(1, index).unflatten(0, pixels.shape[:3]).permute(0, 3, 1, 2)


def most_kernels(shape: Sequence[int], groups: int) -> int:
    """n: the largest rank of a block of a weight of ``shape``; more kernels of one channel compute nothing new."""
    return min(shape[0] // groups, math.prod(shape[2:]))


def step_cost(shape: Sequence[int], groups: int) -> int:
    """Numbers in one more kernel of each group, which is also what it costs per output pixel: groups (K2 + M)."""
    return groups * math.prod(shape[2:]) + shape[0]


def kernel_squares(weight: Tensor, groups: int) -> Tensor:
    """Squared singular values of each block, largest first: [I, n], in float64, on the CPU.

    Those that rounding in the type of ``weight`` could have made are 0, by the threshold usual for numerical ranks.
    """
    blocks = _blocks(weight, groups)
    values = torch.linalg.svdvals(blocks)
    threshold = values[:, :1] * max(blocks.shape[1:]) * torch.finfo(weight.dtype).eps
    return torch.where(values > threshold, values, 0.0).square()


def separated(layer: nn.Conv2d, kernels: Sequence[int], *, fit: bool = True) -> GeneralisedSeparableConv2d:
    """What stands in place of ``layer`` with g_c = ``kernels[c]``.

    fit: with the weights nearest to the layer's: of every block the largest singular triplets (Eckart & Young), their
    singular values shared evenly by both factors, which then have like magnitudes; else with fresh ones.
    """
    with torch.enable_grad():
        weight = layer.weight  # of a parametrised layer: as computed, which needs gradients where its origin does
    with torch.random.fork_rng(devices=[], enabled=fit):
        new = GeneralisedSeparableConv2d(
            kernels,
            layer.out_channels,
            (layer.kernel_size[0], layer.kernel_size[1]),
            groups=layer.groups,
            bias=layer.bias is not None,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            padding_mode=layer.padding_mode,
        )
    new.to(weight.device, weight.dtype).train(layer.training)
    for part in (new.depthwise, new.pointwise):
        part.weight.requires_grad_(weight.requires_grad)
    if layer.bias is not None and new.pointwise.bias is not None:
        new.pointwise.bias.requires_grad_(layer.bias.requires_grad)
    if fit:
        _fit(new, layer, weight)
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        new.to(memory_format=torch.channels_last)
    return new


@torch.no_grad()
def _fit(new: GeneralisedSeparableConv2d, layer: nn.Conv2d, weight: Tensor) -> None:
    u, s, v = torch.linalg.svd(_blocks(weight, layer.groups), full_matrices=False)
    kept = torch.arange(s.shape[1], device=s.device) < torch.tensor(new.kernels, device=s.device)[:, None]
    root = s.sqrt()[:, :, None]
    rows, columns = (root * v)[kept], (root * u.transpose(1, 2))[kept]  # [G, K2], [G, M], channel by channel
    new.depthwise.weight.copy_(rows.view_as(new.depthwise.weight))
    columns = columns.unflatten(0, (layer.groups, -1)).transpose(1, 2)
    new.pointwise.weight.copy_(columns.reshape(new.pointwise.weight.shape))
    if layer.bias is not None and new.pointwise.bias is not None:
        new.pointwise.bias.copy_(layer.bias)


def _blocks(weight: Tensor, groups: int) -> Tensor:
    """W_c of each input channel: [I, M, K2], in float64, on the CPU."""
    exact = weight.detach().to("cpu", torch.float64)  # accelerators are slower at many small decompositions
    if not bool(exact.isfinite().all()):
        raise InputError("separable kernels need weights that are finite numbers, and some are not")
    return exact.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(2)


@dataclass(frozen=True, eq=False)
class Choice:
    """How many kernels a layer may have and what error is left: one step adds ``size`` kernels to each group.

    Every group gets the same number, as the 1x1 convolution of a grouped layer needs it. gains: [S] squared weighted
    error that each step removes, falling;  errors: [S + 1], what is left after so many steps;  cost: numbers of a step;
    dense: numbers of the layer as it is;  taken: [groups, T] the input channel, of the ``inside`` of its group, whose
    kernel comes next;  useful: kernels of a group after which no error is left.
    """

    gains: Tensor
    errors: Tensor
    cost: int
    dense: int
    taken: Tensor
    inside: int
    size: int
    useful: int

    @staticmethod
    def of(weight: Tensor, groups: int, channel_weights: Tensor | None = None, multiple: int = 1) -> Choice:
        """The choice for a convolution. channel_weights: alpha [I] of each block's squared error; 1 if not given.

        multiple: of how many the sum of all kernels is one after every step; of one where the layer is too small.
        """
        squares = kernel_squares(weight, groups)
        if channel_weights is not None:
            squares = squares * channel_weights.to(squares)[:, None]
        # Of all kernels of a group the best first: within a channel they already fall, so any such set is a prefix.
        values, order = squares.view(groups, -1).sort(dim=1, descending=True, stable=True)
        singles, cost = values.sum(0), step_cost(weight.shape, groups)
        size = multiple // math.gcd(multiple, groups)
        if size * cost >= weight.numel():
            size = 1
        # What does not fill a step is past the break-even: kernels of full rank cost more than the layer.
        gains = singles[: len(singles) // size * size].view(-1, size).sum(1)
        left = torch.cat([singles.flip(0).cumsum(0).flip(0), singles.new_zeros(1)])
        useful = max(1, int((singles > 0).sum()))
        taken = order // squares.shape[1]
        return Choice(gains, left[::size], size * cost, weight.numel(), taken, weight.shape[1], size, useful)

    @property
    def limit(self) -> int:
        """Steps up to which the layer costs less than as it is: the break-even.

        At least one where kernels have two pixels and groups two inputs: K2 + M < 2 M K2.
        """
        return min(len(self.gains), (self.dense - 1) // self.cost)

    def kernels(self, steps: int) -> list[int]:
        """g_c of each input channel after so many steps: least error at this complexity (MEGO), no useless kernels."""
        counts = [group[: min(steps * self.size, self.useful)].bincount(minlength=self.inside) for group in self.taken]
        return [int(count) for count in torch.cat(counts)]

    def steps_within(self, error: float) -> int:
        """The fewest steps, at least one, that leave no more than ``error`` (LEGO); they may be past the break-even."""
        return max(1, int((self.errors > error).sum()))


def shared_out(choices: Sequence[Choice], budget: int) -> list[int | None]:
    """Steps of each layer, at least one, within ``budget`` numbers in all; None for a layer that stays as it is.

    Greedy, from one step each: always the move that removes most error per number it adds, be it one more step or,
    where that removes more, to leave the layer as it is; in place of a move that does not fit, the next one that does.
    For one layer this is the optimum. For several it is as long as every move has fitted (each layer then stands on the
    lower convex hull of what it may cost and lose), so that no more error is left than the best choice leaves of a
    budget that is smaller by the largest move.
    """
    steps: list[int | None] = [1] * len(choices)
    left = budget - sum(choice.cost for choice in choices)
    if left < 0:
        raise InputError(f"one kernel for each group of each layer needs {budget - left} numbers, not {budget}")
    gains = [choice.gains.tolist() for choice in choices]
    errors = [choice.errors.tolist() for choice in choices]
    heap: list[tuple[float, int, bool]] = []

    def offer(index: int, *, whole: bool) -> None:
        """Put the next move of a layer on the heap: its rate, the layer, and whether it is to leave it as it is."""
        now, choice = steps[index], choices[index]
        if now is None or errors[index][now] == 0:
            return
        step = gains[index][now] / choice.cost if now < choice.limit else -1.0
        rest = errors[index][now] / (choice.dense - now * choice.cost) if whole else -1.0
        if max(step, rest) >= 0:
            heapq.heappush(heap, (-max(step, rest), index, rest > step))

    for index in range(len(choices)):
        offer(index, whole=True)
    refused: set[int] = set()
    while heap:
        _, index, whole = heapq.heappop(heap)
        now, choice = steps[index], choices[index]
        assert now is not None
        price = choice.dense - now * choice.cost if whole else choice.cost
        if price <= left:
            left -= price
            steps[index] = None if whole else now + 1
        elif whole:
            refused.add(index)  # what it lacks does not shrink faster than the budget
        else:
            continue  # every later step of this layer costs the same
        offer(index, whole=index not in refused)
    return steps
