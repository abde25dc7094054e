"""Temporary states of a model: context managers that leave it exactly as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from nas.folding import constant_convolutions


@contextmanager
def crafting(model: nn.Module, *, batch_statistics: bool = False) -> Iterator[None]:
    """Within it, gradients reach the input only, dropout is off and nothing of the model can change.

    Batch normalisation uses its running statistics or, with ``batch_statistics``, those of the batch; its
    buffers are not touched either way. What derives from constant weights is computed once, and running statistics
    are folded into the convolutions before them: the same function up to rounding.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for module, _ in modes:
        module.training = False
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        if batch_statistics:
            for module, _ in modes:
                if isinstance(module, _BatchNorm):
                    module.training = True
        with frozen_statistics(model), constant(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


@contextmanager
def constant(model: nn.Module) -> Iterator[None]:
    """Within it weights and running statistics must not change and need no gradients: what derives from them is kept.

    States within it may still switch batch normalisation to the statistics of the batch.
    """
    # Traced before anything is cached: what a trace computes is no weight.
    with constant_convolutions(model), parametrize.cached():
        yield


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Within it, batch normalisation in train mode uses the batch's statistics without recording them."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    tracking = [module.track_running_stats for module in norms]
    for module in norms:
        # In eval mode a layer that does not track would also switch to batch statistics.
        module.track_running_stats = module.track_running_stats and not module.training
    try:
        yield
    finally:
        for module, tracked in zip(norms, tracking, strict=True):
            module.track_running_stats = tracked


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, the model is in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
