"""One operation of a discrete cell on the native kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.layers import offset_halves, padding_of
from search_spaces.native import functions, norms
from search_spaces.native.edges import DEPTHWISE, HALVES, POINTWISE, Convolution, Slot, Source

__all__ = ["DEPTHWISE", "HALVES", "POINTWISE", "evaluate", "pool", "single"]


def single(
    kind: int, in_channels: int, out_channels: int, stride: int, *, kernel: int = 0, dilation: int = 1,
    repeats: int = 1, affine: bool = True,
) -> Source:  # fmt: skip
    """[ReLU, convolution, BN] ``repeats`` times as a source of one edge; see ``evaluate`` for its parameters."""
    weights = 1 if kind == POINTWISE else 2
    stage = weights + 2 * affine
    second = repeats == 2
    operation = Convolution(
        kind,
        Slot(0 if kind != DEPTHWISE else 1),
        Slot(0),
        kernel,
        dilation,
        depthwise1=Slot(0) if kind == DEPTHWISE else None,
        odd1=Slot(1) if kind == HALVES else None,
        depthwise2=Slot(stage) if second else None,
        pointwise2=Slot(stage + 1) if second else None,
        norm2=Slot(1) if second else None,
        scale1=Slot(weights) if affine else None,
        shift1=Slot(weights + 1) if affine else None,
        scale2=Slot(stage + weights) if affine and second else None,
        shift2=Slot(stage + weights + 1) if affine and second else None,
    )
    return Source(1, in_channels, out_channels, stride, (operation,), parameters=repeats * stage)


def pool(kind: str, channels: int, stride: int) -> Source:
    """A pool as a source of one edge."""
    return Source(1, channels, channels, stride, pools=(kind,))


def evaluate(
    source: Source, x: Tensor, stages: Sequence[tuple[Sequence[Tensor], nn.BatchNorm2d]], owner: nn.Module
) -> Tensor | None:
    """The operation's output for ``x`` [N, C, H, W], or None where it has to be computed by torch.

    stages: weights and normalisation of each repeat. DEPTHWISE has a depthwise and a 1x1 weight, POINTWISE a 1x1
    weight, HALVES those of the even and of the odd pixels. owner: the module whose parts nobody may be watching.
    """
    if not norms.runs(x) or norms.hooked(*owner.children()):
        return None
    layers = [norm for _, norm in stages]
    found = norms.statistics(layers, x)
    if found is None:
        return None
    parameters = [
        tensor for weights, norm in stages for tensor in (*weights, norm.weight, norm.bias) if tensor is not None
    ]
    if len(parameters) != source.parameters:
        return None
    kept = [(norm.running_mean, norm.running_var, norms.uses_batch(norm), norm.eps) for norm in layers]

    def reference(x: Tensor, *given: Tensor) -> Tensor:
        return _by_torch(source, kept, x, list(given))

    out = functions.Operation.apply(source, functions.Run([found], reference), x, *parameters)
    norms.record(layers, found, out.shape[0] * out.shape[2] * out.shape[3])
    return out


def _by_torch(
    source: Source, kept: Sequence[tuple[Tensor | None, Tensor | None, bool, float]], x: Tensor, given: list[Tensor]
) -> Tensor:
    """The same in torch's own operations, without recording statistics."""
    if source.pools:
        if source.pools[0] == "max_pool":
            return F.max_pool2d(x, 3, source.stride, 1)
        return F.avg_pool2d(x, 3, source.stride, 1, count_include_pad=False)
    (op,) = source.convolutions
    stride = source.stride
    for mean, variance, batch, epsilon in kept:
        x = torch.relu(x)
        if op.kind == HALVES:
            pairs = zip(offset_halves(x), (given.pop(0), given.pop(0)), strict=True)
            x = torch.cat([F.conv2d(half, weight) for half, weight in pairs], 1)
        elif op.kind == POINTWISE:
            x = F.conv2d(x, given.pop(0))
        else:
            padding = padding_of(op.kernel, op.dilation)
            x = F.conv2d(x, given.pop(0), None, stride, padding, op.dilation, groups=x.shape[1])
            x = F.conv2d(x, given.pop(0))
            stride = 1
        scale, shift = (given.pop(0), given.pop(0)) if op.scale1 is not None else (None, None)
        if batch:
            mean = variance = None
        x = F.batch_norm(x, mean, variance, scale, shift, batch, 0.0, epsilon)
    return x
