"""Temporary states of a model: context managers that leave it exactly as they found it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
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
    # Entered for every attack, thus written for networks of hundreds of modules: they are gone through once.
    modules = [*model.modules()]
    modes = [(module, module.training) for module in modules]
    parameters = (parameter for module in modules for parameter in module._parameters.values())
    trainable = dict.fromkeys(p for p in parameters if p is not None and p.requires_grad)
    norms = [module for module in modules if isinstance(module, _BatchNorm)]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        _set_modes((module, False) for module in modules)
        if batch_statistics:
            _set_modes((norm, True) for norm in norms)
        with _without_recording(norms), constant(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        _set_modes(modes)


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
    with _without_recording([module for module in model.modules() if isinstance(module, _BatchNorm)]):
        yield


@contextmanager
def _without_recording(norms: Sequence[_BatchNorm]) -> Iterator[None]:
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
def twice_differentiable() -> Iterator[None]:
    """Passes within it can be differentiated twice: the fused kernels of attention have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it, the model is in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        _set_modes(modes)


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        # nn.Module looks at every assignment as if it might be a parameter, at ten times the cost.
        plain = type(module).__setattr__ is nn.Module.__setattr__
        (object.__setattr__ if plain else setattr)(module, "training", training)
