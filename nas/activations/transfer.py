"""Parameters of activations by themselves: kept, put into another network, frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from nas.activations.activation import Placed, Shared, places
from nas.errors import InputError
from nas.model_file import load_model
from nas.prediction import networks_in
from nas.tensor_file import read_tensors, write_bytes


def activation_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of activations with what they are called: the key of a shared one, else its name in the network."""
    for name, module in places(model).items():
        if isinstance(module, Shared):
            for width, own in module.own.items():
                yield module.keys[int(width)], own
        elif isinstance(module, Placed):
            yield name, module


def activation_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the activations alone ("stage1-16.beta")."""
    return {
        f"{key}.{name}": tensor
        for key, module in activation_modules(model)
        for name, tensor in module.state_dict().items()
    }


def activation_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What of the activations is trained, frozen or not."""
    return [parameter for _, module in activation_modules(model) for parameter in module.parameters()]


def save_activation(model: nn.Module, path: Path) -> None:
    """Write ``activation_state`` as a safetensors file."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in activation_state(model).items()}
    if not state:
        raise InputError("the activation of this network has no parameters to keep")
    write_bytes(save(state), path)


def load_activation(model: nn.Module, source: Path) -> None:
    """Give the activations of ``model`` the parameters that ``source`` holds, by their keys.

    source: a file of ``save_activation`` or the folder of a network (model.json, model.safetensors), which may be
    deeper and of other data. It may hold more than is needed. Each network of an ensemble is given the same. Raises
    ``InputError`` where something is missing.
    """
    found = _read(source)
    for network in networks_in(model).values():
        _give(network, found, source)


def _give(model: nn.Module, found: Mapping[str, Tensor], source: Path) -> None:
    own = activation_state(model)
    if not own:
        raise InputError("activation transfer: the activation of this network has no parameters to be given")
    missing = sorted(own.keys() - found.keys())
    if missing:
        known = ", ".join(sorted({name.rpartition(".")[0] for name in found}))
        raise InputError(
            f"activation transfer: '{source}' has no parameters for '{missing[0].rpartition('.')[0]}', only for "
            f"{known or 'none'}: stages and widths must be those of this network (kind 'shared' needs no equal widths)"
        )
    for name, tensor in own.items():
        if found[name].shape != tensor.shape or not found[name].is_floating_point():
            raise InputError(
                f"activation transfer: '{name}' of '{source}' has shape {tuple(found[name].shape)}, this network needs "
                f"{tuple(tensor.shape)}: kind and kernel of the activations must be equal"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])


def freeze_activation(model: nn.Module) -> None:
    """Take the parameters of the activations out of training."""
    for parameter in activation_parameters(model):
        parameter.requires_grad_(False)


def check_source(source: Path) -> None:
    """Raise ``InputError`` where ``source`` is nothing that ``load_activation`` could read."""
    if (source / "model.json").exists() or source.is_file():
        return
    raise InputError(
        f"activation transfer: '{source}' is neither the folder of a network (model.json) nor a file of parameters"
    )


def _read(source: Path) -> dict[str, Tensor]:
    check_source(source)
    if source.is_file():
        return read_tensors(source)
    networks = [*networks_in(load_model(source)[1]).values()]
    if len(networks) > 1:
        raise InputError(f"activation transfer: '{source}' is an ensemble of {len(networks)} networks, not one")
    return activation_state(networks[0])
