"""Convolutions with constant weights: batch normalisation folded in, and 3x3 kernels in their fastest form.

``constant_convolutions`` is the one place where ordinary networks (any ``nn.Module``) become faster while they are
attacked; the operations of cell spaces have their own kernels (search_spaces.native).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from nas import winograd
from nas.activations.activation import Placed, Shared


@dataclass(frozen=True)
class Followers:
    """Modules that alone take the output of a convolution, one after the other."""

    norm: nn.BatchNorm2d | None = None
    relu: nn.ReLU | None = None


@contextmanager
def constant_convolutions(model: nn.Module) -> Iterator[None]:
    """Within it the weights and running statistics of ``model`` must not change and need no gradients.

    A batch normalisation that takes the output of a convolution, which nothing else takes, is computed within that
    convolution: (W * x + b - mean) s + shift with s = scale / sqrt(variance + eps) is a convolution with the kernels
    s W. 3x3 convolutions of many channels, and a ReLU after them, are computed by ``winograd``. The same function up
    to rounding.

    Left alone are modules with a forward pass of their own, with hooks or in train mode, and normalisations with
    batch statistics; nothing is joined in a network whose forward pass cannot be traced (see ``joinable``).
    """
    replaced: list[nn.Module] = []

    def replace(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        module.forward = forward
        replaced.append(module)

    try:
        with torch.no_grad():
            convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and _plain_convolution(m)]
            joined = joinable(model) if convolutions else {}
            fast = [convolution for convolution in convolutions if winograd.suits(convolution, convolution.weight)]
            if fast and winograd.kernels() is None:
                fast = []
            for convolution in dict.fromkeys([*joined, *fast]):
                assert isinstance(convolution, nn.Conv2d)
                followers, is_fast = joined.get(convolution, Followers()), convolution in fast
                if followers.norm is None and not is_fast:
                    continue
                replace(convolution, _forward(convolution, followers, is_fast=is_fast, channels_last=bool(fast)))
                if followers.norm is not None:
                    replace(followers.norm, _unless_folded(followers.norm))
                if followers.relu is not None and is_fast and followers.relu not in replaced:
                    replace(followers.relu, _unless_rectified(followers.relu))
        yield
    finally:
        for module in replaced:
            del module.forward


def _forward(
    convolution: nn.Conv2d, followers: Followers, *, is_fast: bool, channels_last: bool
) -> Callable[[Tensor], Tensor]:
    """What ``convolution`` and its followers compute, in one; nested states of the model may still undo that."""
    original, norm = convolution.forward, followers.norm
    weight, bias = convolution.weight, convolution.bias
    if norm is not None:
        weight, bias = folded(weight, bias, norm)
    constant = winograd.Convolution(weight, bias, rectifies=followers.relu is not None) if is_fast else None

    def forward(x: Tensor) -> Tensor:
        if norm is not None and norm.training:
            return original(x)
        if constant is not None and winograd.pays(x):
            y = constant(x)
            if constant.rectifies:
                _mark_rectified(y)
            return y
        if channels_last and x.dim() == 4:
            # The order of the fast convolutions, so that maps need not be rearranged on their way to them.
            x = x.contiguous(memory_format=torch.channels_last)
        return convolution._conv_forward(x, weight, bias)

    return forward


def _unless_folded(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    original = norm.forward

    def forward(x: Tensor) -> Tensor:
        return original(x) if norm.training else x

    return forward


def _unless_rectified(relu: nn.ReLU) -> Callable[[Tensor], Tensor]:
    original = relu.forward

    def forward(x: Tensor) -> Tensor:
        return x if _is_rectified(x) else original(x)

    return forward


def _mark_rectified(y: Tensor) -> None:
    y._rectified_version = y._version  # type: ignore[attr-defined]


def _is_rectified(x: Tensor) -> bool:
    """Whether ``x`` left a convolution without negative values, and has not been changed since."""
    return getattr(x, "_rectified_version", None) == x._version


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


def joinable(model: nn.Module) -> dict[nn.Conv2d, Followers]:
    """Convolutions and what each can take over, as seen in a symbolic trace of the forward pass.

    That is a normalisation, then a ReLU, or one of them, each the only one to take what comes before. Convolution and
    normalisation are called once, at one place, and have the same type of numbers. A forward pass that cannot be
    traced (it depends on values or shapes) gives none.
    """
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return {}
    if model in _UNTRACEABLE:
        return {}
    graph = _graph(model)
    if graph is None:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    places = Counter(map(id, modules.values()))
    called = {node: str(node.target) for node in graph.nodes if node.op == "call_module"}
    calls = Counter(id(modules[name]) for name in called.values())
    # What the trace did not look into, and tensors it read directly.
    opaque = {f"{name}." for name in called.values()} | {
        str(node.target) for node in graph.nodes if node.op == "get_attr"
    }

    def called_once(name: str) -> bool:
        read = any(f"{name}.".startswith(seen) or seen.startswith(f"{name}.") for seen in opaque - {f"{name}."})
        return calls[id(modules[name])] == places[id(modules[name])] == 1 and not read

    def only_taker(node: fx.Node) -> fx.Node | None:
        """The module call that alone takes the result of ``node``, as its one argument."""
        takers = list(node.users)
        if len(takers) != 1 or takers[0] not in called or takers[0].args != (node,) or takers[0].kwargs:
            return None
        return takers[0]

    found: dict[nn.Conv2d, Followers] = {}
    for node, name in called.items():
        convolution = modules[name]
        if not (_plain_convolution(convolution) and called_once(name)):
            continue
        assert isinstance(convolution, nn.Conv2d)
        norm = relu = None
        taker = only_taker(node)
        if taker is not None and _plain_norm(follower := modules[called[taker]]):
            assert isinstance(follower, nn.BatchNorm2d)
            if not (called_once(called[taker]) and _constant(follower, convolution.weight)):
                continue
            norm, taker = follower, only_taker(taker)
        if taker is not None and _plain_relu(follower := modules[called[taker]]):
            assert isinstance(follower, nn.ReLU)
            relu = follower
        if norm is not None or relu is not None:
            found[convolution] = Followers(norm, relu)
    return found


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


def _plain_convolution(module: nn.Module) -> bool:
    return _plain(module, nn.Conv2d)


def _plain_norm(module: nn.Module) -> bool:
    return _plain(module, nn.BatchNorm2d)


def _plain_relu(module: nn.Module) -> bool:
    return _plain(module, nn.ReLU)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


_UNTRACEABLE: WeakSet[nn.Module] = WeakSet()
"""Networks whose forward pass could not be traced: a search attacks the same one at every step, and does not ask anew.
The other answer is not kept: what a trace shows may change with the settings of the network."""


class _Tracer(fx.Tracer):
    """Looks into every module but layers, activations and those with hooks, which only real tensors may reach."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _hooked(m) or isinstance(m, Placed | Shared) or super().is_leaf_module(m, module_qualified_name)


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
        _UNTRACEABLE.add(model)
        return None
