"""Convolutions with constant weights: batch normalisation folded in, and 3x3 kernels in their fastest form.

``constant_convolutions`` is the one place where ordinary networks (any ``nn.Module``) become faster while they are
attacked; the layers of cell spaces have their own form (search_spaces.layers.constant_weights).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from nas import winograd
from search_spaces.layers import BatchNorm2d


@contextmanager
def constant_convolutions(model: nn.Module) -> Iterator[None]:
    """Within it the weights and running statistics of ``model`` must not change and need no gradients.

    A batch normalisation that takes the output of a convolution, which nothing else takes, is computed within that
    convolution: (W * x + b - mean) s + shift with s = scale / sqrt(variance + eps) is a convolution with the kernels
    s W. 3x3 convolutions of many channels are computed by ``winograd``. The same function up to rounding.

    Left alone are modules with a forward pass of their own, with hooks or in train mode, and normalisations with
    batch statistics; nothing is folded in a network whose forward pass cannot be traced (see ``foldable``).
    """
    replaced: list[nn.Module] = []
    try:
        with torch.no_grad():
            folds = foldable(model)
            fast = [
                module
                for module in model.modules()
                if _plain(module, nn.Conv2d) and winograd.suits(module, module.weight)  # type: ignore[arg-type]
            ]
            if fast and winograd.kernels() is None:
                fast = []
            for convolution in dict.fromkeys([*folds, *fast]):
                assert isinstance(convolution, nn.Conv2d)
                norm = folds.get(convolution)
                forward = _forward(convolution, norm, is_fast=convolution in fast, channels_last=bool(fast))
                convolution.forward = forward  # type: ignore[method-assign,assignment]
                replaced.append(convolution)
                if norm is not None:
                    norm.forward = _passes_through(norm)  # type: ignore[method-assign,assignment]
                    replaced.append(norm)
        yield
    finally:
        for module in replaced:
            del module.forward


def _forward(
    convolution: nn.Conv2d, norm: nn.BatchNorm2d | None, *, is_fast: bool, channels_last: bool
) -> Callable[[Tensor], Tensor]:
    """What ``convolution``, then ``norm``, computes, in one; nested states of the model may still undo the fold."""
    original = convolution.forward
    weight, bias = convolution.weight, convolution.bias
    if norm is not None:
        weight, bias = folded(weight, bias, norm)
    constant = winograd.Convolution(weight, bias) if is_fast else None

    def forward(x: Tensor) -> Tensor:
        if norm is not None and norm.training:
            return original(x)
        if constant is not None:
            return constant(x)
        if channels_last and x.dim() == 4:
            # The order of the fast convolutions, so that maps need not be rearranged on their way to them.
            x = x.contiguous(memory_format=torch.channels_last)
        return convolution._conv_forward(x, weight, bias)

    return forward


def _passes_through(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    original = norm.forward

    def forward(x: Tensor) -> Tensor:
        return original(x) if norm.training else x

    return forward


def folded(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight [K, C, H, W] and bias [K] of a convolution followed by ``norm`` in eval mode."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return weight * scale.view(-1, 1, 1, 1), shift


def foldable(model: nn.Module) -> dict[nn.Conv2d, nn.BatchNorm2d]:
    """Convolutions and the normalisation each can take over, as seen in a symbolic trace of the forward pass.

    Both are called once, at one place; the normalisation alone takes what the convolution gives; both have the same
    type of numbers. A forward pass that cannot be traced (it depends on values or shapes) gives none.
    """
    norms = [module for module in model.modules() if _plain(module, nn.BatchNorm2d, BatchNorm2d)]
    if not norms or torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return {}
    graph = _graph(model)
    if graph is None:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    places = Counter(map(id, modules.values()))
    calls: Counter[int] = Counter()
    opaque: list[str] = []  # modules the trace did not look into, and tensors it read directly
    for node in graph.nodes:
        if node.op == "call_module":
            calls[id(modules[str(node.target)])] += 1
            opaque.append(f"{node.target}.")
        elif node.op == "get_attr":
            opaque.append(str(node.target))
    pairs: dict[nn.Conv2d, nn.BatchNorm2d] = {}
    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            continue
        before = node.args[0]
        if before.op != "call_module" or list(before.users) != [node]:
            continue
        norm, convolution = modules[str(node.target)], modules[str(before.target)]
        if not (_plain(convolution, nn.Conv2d) and _plain(norm, nn.BatchNorm2d, BatchNorm2d)):
            continue
        assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        names = f"{before.target}.", f"{node.target}."
        elsewhere = any(
            name.startswith(seen) or seen.startswith(name) for name in names for seen in opaque if seen not in names
        )
        once = all(calls[id(module)] == places[id(module)] == 1 for module in (convolution, norm))
        if once and not elsewhere and _constant(norm, convolution.weight):
            pairs[convolution] = norm
    return pairs


def _constant(norm: nn.BatchNorm2d, weight: Tensor) -> bool:
    """Whether ``norm`` is a fixed affine map per channel of ``weight``'s outputs, in the same type of numbers."""
    if norm.training or norm.running_mean is None or norm.running_var is None:
        return False
    tensors = [norm.running_mean, norm.running_var, norm.weight, norm.bias]
    return len(norm.running_mean) == len(weight) and all(
        tensor is None or tensor.dtype == weight.dtype for tensor in tensors
    )


def _plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether ``module`` computes what one of ``kinds`` does, with nobody watching."""
    return (
        any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)
        and "forward" not in vars(module)
        and not _hooked(module)
    )


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _Tracer(fx.Tracer):
    """Looks into every module but layers and those with hooks, which only real tensors may reach."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _hooked(m) or isinstance(m, BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def _graph(model: nn.Module) -> fx.Graph | None:
    """The forward pass of ``model`` as a graph, or None where it cannot be traced; nothing outside notices."""
    parameters: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    device = next((parameter.device for parameter in parameters.values() if parameter.is_cuda), None)
    try:
        # Of a copy (that shares the weights), for what a forward pass may keep or count.
        shadow = copy.deepcopy(model, parameters)
        with torch.random.fork_rng([] if device is None else [device]):
            return _Tracer().trace(shadow)
    except Exception:  # whatever a forward pass may do with what is not a tensor
        return None
