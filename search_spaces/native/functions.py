"""Autograd functions over the native kernels.

A second differentiation (``create_graph=True``) goes through the same computation in torch's own operations,
which each call brings along as its ``reference``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from search_spaces.native import edges
from search_spaces.native.edges import Kept, Source, Statistics


def batch_last(x: Tensor) -> Tensor:
    """[C, H, W, N], contiguous; free of charge where ``x`` [N, C, H, W] lies so in memory."""
    return x.permute(1, 2, 3, 0).contiguous()


def _batch_first(x: Tensor) -> Tensor:
    return x.permute(3, 0, 1, 2)


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenation along the channels of [N, C_i, H, W] that keeps the memory order."""
    if all(x.permute(1, 2, 3, 0).is_contiguous() for x in tensors):
        return _batch_first(torch.cat([x.permute(1, 2, 3, 0) for x in tensors], dim=0))
    return torch.cat([*tensors], dim=1)


@dataclass
class Run:
    """What one evaluation needs beside tensors.

    statistics: one for each source; reference: the same function of the same tensors in torch's own operations.
    """

    statistics: Sequence[Statistics]
    reference: Callable[..., Tensor]


class Operation(torch.autograd.Function):
    """One candidate of a discrete cell: x [N, C, H, W] -> [N, C', H', W'], batch last in memory."""

    @staticmethod
    def forward(ctx: Any, source: Source, run: Run, x: Tensor, *parameters: Tensor) -> Tensor:
        rows = batch_last(x)
        out = rows.new_empty(_output_shape(source, rows, source.out_channels))
        kept = edges.forward(source, rows, rows.new_ones(1), parameters, run.statistics[0], [out], [False])
        ctx.source, ctx.run = source, run
        ctx.save_for_backward(x, *parameters, *kept.tensors())
        return _batch_first(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        source, wanted = ctx.source, ctx.needs_input_grad[2:]
        inputs = ctx.saved_tensors[: len(wanted)]
        if torch.is_grad_enabled():
            return None, None, *_by_reference(ctx.run.reference, inputs, wanted, gradients[0])
        kept = _kept(source, iter(ctx.saved_tensors[len(wanted) :]))
        rows = batch_last(inputs[0])
        g_x = torch.empty_like(rows) if wanted[0] else None
        g_parameters = [torch.empty_like(p) for p in inputs[1:]] if any(wanted[1:]) else None
        g_outputs = [batch_last(gradients[0])]
        statistics = ctx.run.statistics[0]
        edges.backward(
            source, rows, rows.new_ones(1), inputs[1:], statistics, kept, g_outputs, g_x, False, None, g_parameters
        )
        return None, None, None if g_x is None else _batch_first(g_x), *_only(g_parameters, wanted[1:])


class Edges(torch.autograd.Function):
    """The edges leaving one node: x [N, C, H, W] and mixing weights -> [N, E * C', H', W'], batch last in memory.

    mixing: flat, [edges, columns].
    """

    @staticmethod
    def forward(ctx: Any, source: Source, run: Run, x: Tensor, mixing: Tensor, *parameters: Tensor) -> Tensor:
        rows, mixing = batch_last(x), mixing.contiguous()
        out = rows.new_empty(_output_shape(source, rows, source.edges * source.out_channels))
        targets = out.split(source.out_channels)
        add = [False] * len(targets)
        kept = edges.forward(source, rows, mixing, parameters, run.statistics[0], targets, add)
        ctx.source, ctx.run = source, run
        ctx.save_for_backward(x, mixing, *parameters, *kept.tensors())
        return _batch_first(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        source, wanted = ctx.source, ctx.needs_input_grad[2:]
        inputs = ctx.saved_tensors[: len(wanted)]
        if torch.is_grad_enabled():
            return None, None, *_by_reference(ctx.run.reference, inputs, wanted, gradients[0])
        x, mixing, *parameters = inputs
        kept = _kept(source, iter(ctx.saved_tensors[len(wanted) :]))
        rows = batch_last(x)
        g_x = torch.empty_like(rows) if wanted[0] else None
        g_mixing = mixing.new_empty(mixing.shape, dtype=torch.float64)
        g_parameters = [torch.empty_like(p) for p in parameters] if any(wanted[2:]) else None
        edges.backward(
            source, rows, mixing, parameters, ctx.run.statistics[0], kept,
            batch_last(gradients[0]).split(source.out_channels), g_x, False, g_mixing, g_parameters,
        )  # fmt: skip
        return (
            None,
            None,
            None if g_x is None else _batch_first(g_x),
            g_mixing.to(mixing.dtype) if wanted[1] else None,
            *_only(g_parameters, wanted[2:]),
        )


class Cell(torch.autograd.Function):
    """A cell of the supernet: two inputs [N, C, H, W] and mixing weights -> [N, nodes * C, H', W'], batch last.

    mixing: flat, [edges, columns] of each source after that of the one before. Intermediate node i is the sum of what
    it gets from sources 0 to i + 1; source i + 2 is node i. The nodes are written side by side: that is the output.
    """

    @staticmethod
    def forward(
        ctx: Any, sources: Sequence[Source], run: Run, input0: Tensor, input1: Tensor, mixing: Tensor,
        *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        values = [batch_last(input0), batch_last(input1)]
        channels = sources[0].out_channels
        out = values[0].new_empty(_output_shape(sources[0], values[0], (len(sources) - 1) * channels))
        nodes = out.split(channels)
        mixing = mixing.contiguous()
        kept: list[Tensor] = []
        for index, (source, own, weights) in enumerate(_parts(sources, parameters, mixing)):
            targets = nodes[max(index - 1, 0) :]
            x = [*values, *nodes][index]
            add = [index > 0] * len(targets)
            kept += edges.forward(source, x, weights, own, run.statistics[index], targets, add).tensors()
        result = _batch_first(out)
        ctx.sources, ctx.run = sources, run
        ctx.save_for_backward(input0, input1, mixing, *parameters, result, *kept)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        sources, wanted = ctx.sources, ctx.needs_input_grad[2:]
        inputs = ctx.saved_tensors[: len(wanted)]
        if torch.is_grad_enabled():
            return None, None, *_by_reference(ctx.run.reference, inputs, wanted, gradients[0])
        input0, input1, mixing, *parameters = inputs
        result, *tensors = ctx.saved_tensors[len(wanted) :]
        stored = iter(tensors)
        channels = sources[0].out_channels
        values = [batch_last(input0), batch_last(input1), *batch_last(result).split(channels)]
        # Gradients of the nodes; to each the sources behind it add theirs. Never the tensor that came in.
        whole = batch_last(gradients[0])
        g_nodes = (whole.clone() if whole.data_ptr() == gradients[0].data_ptr() else whole).split(channels)
        g_values = [torch.empty_like(value) if want else None for value, want in zip(values[:2], wanted, strict=False)]
        g_mixing = mixing.new_empty(mixing.shape, dtype=torch.float64)
        g_parameters = [torch.empty_like(p) for p in parameters] if any(wanted[3:]) else None
        kept = [_kept(source, stored) for source in sources]
        parts = list(_parts(sources, parameters, mixing))
        g_parts = list(_parts(sources, g_parameters or parameters, g_mixing))
        for index in reversed(range(len(sources))):
            source, own, weights = parts[index]
            _, g_own, g_weights = g_parts[index]
            g_x = g_values[index] if index < 2 else g_nodes[index - 2]
            edges.backward(
                source, values[index], weights, own, ctx.run.statistics[index], kept[index],
                g_nodes[max(index - 1, 0) :], g_x, index >= 2, g_weights, g_own if g_parameters else None,
            )  # fmt: skip
        return (
            None,
            None,
            *(None if g is None else _batch_first(g) for g in g_values),
            g_mixing.to(mixing.dtype) if wanted[2] else None,
            *_only(g_parameters, wanted[3:]),
        )


def _parts(
    sources: Sequence[Source], parameters: Sequence[Tensor], mixing: Tensor
) -> Iterator[tuple[Source, Sequence[Tensor], Tensor]]:
    """Each source with its own parameters and mixing weights."""
    parameter = weight = 0
    for source in sources:
        count, size = source.parameters, source.edges * source.columns
        yield source, parameters[parameter : parameter + count], mixing[weight : weight + size]
        parameter, weight = parameter + count, weight + size


def _kept(source: Source, tensors: Iterator[Tensor]) -> Kept:
    return Kept(
        [(next(tensors), next(tensors) if op.repeats == 2 else None) for op in source.convolutions],
        [(next(tensors), next(tensors) if pool == "max_pool" else None) for pool in source.pools],
    )


def _output_shape(source: Source, rows: Tensor, channels: int) -> tuple[int, int, int, int]:
    _, height, width, batch = rows.shape
    return channels, edges.output_size(height, source.stride), edges.output_size(width, source.stride), batch


def _only(gradients: Sequence[Tensor] | None, wanted: Sequence[bool]) -> list[Tensor | None]:
    if gradients is None:
        return [None] * len(wanted)
    return [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]


def _by_reference(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """Gradients that can be differentiated again."""
    differentiable = [x for x, want in zip(inputs, wanted, strict=True) if want]
    found = iter(
        torch.autograd.grad(
            reference(*inputs), differentiable, gradient, create_graph=True, allow_unused=True, materialize_grads=True
        )
    )
    return [next(found) if want else None for want in wanted]
