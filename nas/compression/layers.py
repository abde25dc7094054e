"""The layers that compression methods look at, and what they have in common."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

Layer = nn.Conv2d | nn.Linear


def deployed_layers(model: nn.Module) -> dict[str, Layer]:
    """All convolutions and linear layers of the deployed network, by name; one that is used twice stands once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not name.startswith("auxiliary.")
    }


def kept_dense(layers: Mapping[str, Layer]) -> dict[str, str]:
    """Layers that are left alone by custom, with the reason: the first convolution and the classifier."""
    reasons = {}
    convolutions = [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    if convolutions:
        reasons[convolutions[0]] = "first convolution"
    linears = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    if linears:
        reasons[linears[-1]] = "classifier"
    return reasons


def exchanged(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in place of the module ``name`` of ``model``, wherever that one is used."""
    old = model.get_submodule(name)
    for place, found in [*model.named_modules(remove_duplicate=False)]:
        if found is old:
            model.set_submodule(place, module)
