"""Programs under autograd.

A second differentiation (``create_graph=True``) goes through the same computation in torch's own operations,
which each call brings along as its ``reference``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from search_spaces.native.program import Program


def batch_last(x: Tensor) -> Tensor:
    """[C, H, W, N], contiguous; free of charge where ``x`` [N, C, H, W] lies so in memory."""
    return x.permute(1, 2, 3, 0).contiguous()


def padded(x: Tensor, batch: int) -> Tensor:
    """``batch_last`` with zero images behind the last, to ``batch`` of them."""
    if x.shape[0] == batch:
        return batch_last(x)
    rows = x.new_zeros(*x.shape[1:], batch)
    rows[..., : x.shape[0]] = x.permute(1, 2, 3, 0)
    return rows


@dataclass
class Call:
    """What one evaluation needs beside tensors.

    norms: of the program; record: update their running statistics; reference: the same function of the same tensors
    (inputs, mixing weights, parameters) in torch's own operations.
    """

    program: Program
    norms: Sequence[nn.BatchNorm2d]
    record: bool
    reference: Callable[..., Tensor]


class Evaluate(torch.autograd.Function):
    """Mixing weights [flat], inputs [N, C, H, W] and parameters -> [N, C', H', W'], batch last in memory."""

    @staticmethod
    def forward(ctx: Any, call: Call, mixing: Tensor, *tensors: Tensor) -> Tensor:
        program = call.program
        inputs, parameters = tensors[: program.inputs], tensors[program.inputs :]
        rows = [padded(x, program.batch) for x in inputs]
        out, workspace = program.forward(rows, mixing.contiguous(), parameters, call.norms, call.record)
        ctx.call = call
        ctx.save_for_backward(mixing, *tensors, out, workspace)
        return out[..., : inputs[0].shape[0]].permute(3, 0, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        program, wanted = ctx.call.program, ctx.needs_input_grad[1:]
        mixing, *tensors, out, workspace = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Both inputs of a first cell are one tensor: views tell their gradients apart.
            inputs = [x.view_as(x) for x in tensors[: program.inputs]]
            given = [mixing, *inputs, *tensors[program.inputs :]]
            return None, *_by_reference(ctx.call.reference, given, wanted, gradients[0])
        inputs, parameters = tensors[: program.inputs], tensors[program.inputs :]
        of_inputs, of_parameters = wanted[1 : 1 + program.inputs], wanted[1 + program.inputs :]
        rows = [padded(x, program.batch) for x in inputs]
        # Steps add to the gradients of what they wrote: never to the tensor that came in.
        g_out = padded(gradients[0], program.batch)
        g_out = g_out.clone() if g_out.data_ptr() == gradients[0].data_ptr() else g_out
        g_inputs = [torch.empty_like(x) if want else None for x, want in zip(rows, of_inputs, strict=True)]
        g_mixing = mixing.new_empty(mixing.shape, dtype=torch.float64)
        g_parameters = [torch.empty_like(p) for p in parameters] if any(of_parameters) else None
        program.backward(rows, mixing.contiguous(), parameters, workspace, out, g_out, g_inputs, g_mixing, g_parameters)
        count = inputs[0].shape[0]
        return (
            None,
            g_mixing.to(mixing.dtype) if wanted[0] else None,
            *(None if g is None else g[..., :count].permute(3, 0, 1, 2) for g in g_inputs),
            *(
                [None] * len(parameters)
                if g_parameters is None
                else [g if want else None for g, want in zip(g_parameters, of_parameters, strict=True)]
            ),
        )


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
