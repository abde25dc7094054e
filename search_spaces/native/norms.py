"""Batch normalisation layers as the native kernels see them: statistics in, statistics out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from search_spaces.native.edges import LANES, Statistics
from search_spaces.native.library import library


def runs(x: Tensor) -> bool:
    """Whether the kernels take ``x`` [N, C, H, W]: on a CPU, a batch that is a multiple of four, nobody tracing."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.dim() == 4
        and x.shape[0] % LANES == 0
        and x.numel() > 0
        and not torch.compiler.is_exporting()
        and not torch.compiler.is_compiling()
        and not torch.onnx.is_in_onnx_export()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        # Counters, fake tensors and function transforms have to see torch's own operations.
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and library() is not None
    )


def uses_batch(norm: nn.BatchNorm2d) -> bool:
    """Whether ``norm`` normalises by the statistics of the batch."""
    return norm.training or norm.running_mean is None


def statistics(norms: Sequence[nn.BatchNorm2d], x: Tensor) -> Statistics | None:
    """The statistics of ``norms`` for an evaluation of ``x``; None where some use the batch's and some do not."""
    batch = {uses_batch(norm) for norm in norms}
    epsilons = {norm.eps for norm in norms}
    if len(batch) > 1 or len(epsilons) > 1:
        return None
    epsilon = epsilons.pop() if epsilons else 0.0
    if not norms or batch.pop():
        sizes = [norm.num_features for norm in norms]
        return Statistics([x.new_empty(n) for n in sizes], [x.new_empty(n) for n in sizes], bool(norms), epsilon)
    means, rstds = [], []
    for norm in norms:
        assert norm.running_mean is not None and norm.running_var is not None
        means.append(norm.running_mean)
        rstds.append(torch.rsqrt(norm.running_var + norm.eps))
    return Statistics(means, rstds, False, epsilon)


@torch.no_grad()
def record(norms: Sequence[nn.BatchNorm2d], found: Statistics, count: int) -> None:
    """Update the running statistics from those of a batch of ``count`` numbers a channel, as nn.BatchNorm2d does."""
    if not found.training:
        return
    for norm, mean, rstd in zip(norms, found.means, found.rstds, strict=True):
        if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
            continue
        variance = (rstd.double() ** -2 - norm.eps).clamp_min(0) * (count / max(count - 1, 1))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        momentum = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked or 1)
        # As in torch's own, a graph that is still alive may have read them: no new version for autograd.
        norm.running_mean.data.lerp_(mean, momentum)
        norm.running_var.data.lerp_(variance.to(norm.running_var.dtype), momentum)


def hooked(*modules: nn.Module) -> bool:
    """Whether a hook wants to see ``modules`` or a part of them at work."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for module in modules
        for part in module.modules()
    )
