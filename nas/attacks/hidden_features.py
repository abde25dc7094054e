"""What a network computes on the way to its logits, as attacks on hidden layers see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nas.errors import InputError, nearest

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Features = dict[str, Tensor]
"""Names of layers to their outputs [N, ...] in the last forward pass."""


@contextmanager
def recorded(model: nn.Module, layers: Sequence[str]) -> Iterator[Features]:
    """Within it every forward pass leaves the outputs of ``layers`` (module names) in the dictionary it yields.

    Raises ``InputError`` for a name that is not one of the model's modules.
    """
    modules = dict(model.named_modules())
    for name in layers:
        if not name or name not in modules:
            raise InputError(f"the network has no layer '{name}': {nearest(name, [n for n in modules if n])}")
    features: Features = {}

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            features[name] = output

        return keep

    handles = [modules[name].register_forward_hook(keeper(name)) for name in layers]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def hidden_layers(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """The last block of every stage of ``model``, as seen in a forward pass of one image of ``x`` [N, C, H, W].

    Blocks are the modules below the network, its lists and sequences opened (and, where a single one holds all
    parameters, as in a wrapper that normalises, that one opened too): cells, residual blocks, plain layers. A stage
    is a run of blocks with outputs of equal height and width, or of vectors. A stage without parameters (a
    normalisation of pixels, a pooling) is none, and the logits are not hidden: a linear network has no hidden layer.
    """
    blocks = dict(blocks_of(model))
    order: list[tuple[str, Tensor]] = []

    def keeper(name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1:
                order.append((name, output))

        return keep

    handles = [block.register_forward_hook(keeper(name)) for name, block in blocks.items()]
    try:
        with torch.no_grad():
            logits = model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    stages: list[list[str]] = []
    size: torch.Size | None = None
    for name, output in order:
        if output is logits:
            continue
        if output.shape[2:] != size:
            stages.append([])
            size = output.shape[2:]
        stages[-1].append(name)
    return tuple(dict.fromkeys(stage[-1] for stage in stages if any(_has_parameters(blocks[name]) for name in stage)))


def blocks_of(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Names and modules of the blocks of a network (see ``hidden_layers``)."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        found += blocks_of(child, path + ".") if type(child) in CONTAINERS else [(path, child)]
    large = [index for index, (_, block) in enumerate(found) if _has_parameters(block)]
    if len(large) == 1 and any(True for _ in found[large[0]][1].children()):
        (index,) = large
        name, block = found[index]
        found[index : index + 1] = blocks_of(block, name + ".")
    return found


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def relative_change(features: Features, clean: Features) -> Tensor:
    """Sum over the layers of |F - F_clean|_2 / |F_clean|_2 [N], in the order of ``clean``, of which one at least."""
    changes = []
    for name, before in clean.items():
        length = before.flatten(1).norm(dim=1).clamp_min(1e-12)
        changes.append((features[name] - before).flatten(1).norm(dim=1) / length)
    return torch.stack(changes).sum(0)


def features_of(model: nn.Module, x: Tensor, features: Features) -> Features:
    """The outputs of the recorded layers for images ``x``, detached; ``features`` as yielded by ``recorded``."""
    with torch.no_grad():
        model(x)
    return {name: output.detach().clone() for name, output in features.items()}
