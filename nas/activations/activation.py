"""What an activation is, and how it takes the place of every ReLU of a network.

An activation is a value (a frozen dataclass, PLUGIN of its file). At each place where a network rectifies stands a
module of it: one of its own, or one that all places of a stage and width share (``Activation.key``). A shared module is
registered at the first of its places only, so that weights are stored, counted and trained once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from nas import plugins
from nas.compression.layers import exchanged
from nas.errors import InputError, nearest

Groups = Mapping[str, str]
"""Prefixes of module names ("cells.0.") to the group of places below them; other places are grouped by map size."""


@runtime_checkable
class Activation(Protocol):
    """A frozen dataclass whose fields are its settings.

    ``module(channels)`` is the module for maps [N, channels, H, W], vectors [N, channels] and tokens [N, T, channels];
    its initial weights may be drawn from the global random state. ``key(group, channels)`` names the parameters that
    places of a group and width share; None gives each place a module of its own.
    first: so many places, in the order of a forward pass, get it and the rest stay as they are; 0 means all.
    """

    @property
    def first(self) -> int: ...

    def module(self, channels: int) -> nn.Module: ...

    def key(self, group: str, channels: int) -> str | None: ...


@dataclasses.dataclass(frozen=True)
class PerPlace:
    """Base of activations of which every place has a module of its own."""

    @property
    def first(self) -> int:
        """All places."""
        return 0

    def key(self, group: str, channels: int) -> str | None:
        """None: nothing is shared."""
        del group, channels
        return None


class Placed(nn.Module):
    """Base of the modules of activations with parameters or buffers; ``nas.activations.transfer`` knows them by it."""


class Shared(nn.Module):
    """A place whose activation other places use too, by its width: maps [N, C, H, W] to the same shape.

    own: the modules that are registered here; the others are registered at the place that came first.
    """

    def __init__(self, keys: Mapping[int, str], modules: Mapping[int, nn.Module], own: set[int]) -> None:
        super().__init__()
        self.keys = dict(keys)
        self.own = nn.ModuleDict({str(width): modules[width] for width in modules if width in own})
        # In a plain dictionary, which registers nothing: copies of the network copy it along with the owners.
        self.by_width = dict(modules)

    def forward(self, x: Tensor) -> Tensor:
        modules = [*self.by_width.values()]
        y: Tensor = (modules[0] if len(modules) == 1 else self.by_width[_width(x)])(x)
        return y


PLACES = (nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus, Placed, Shared)
"""Modules that are exchanged. GELU stands where a transformer has its only activations."""


def with_activation(
    model: nn.Module, activation: Activation, input_shape: tuple[int, int, int], groups: Groups | None = None
) -> nn.Module:
    """A copy of ``model`` with ``activation`` in the place of every one it has; see ``place``."""
    changed = copy.deepcopy(model)
    place(changed, activation, input_shape, groups)
    return changed


def place(
    model: nn.Module, activation: Activation, input_shape: tuple[int, int, int], groups: Groups | None = None
) -> None:
    """Put ``activation`` in the place of every ReLU (GELU, SiLU, Softplus, or what was put there before).

    input_shape: (C, H, W) of the images, for a forward pass of black ones that shows width and size of the maps.
    Places below a prefix of ``groups`` form that group; the others of maps of one size are "stage1", "stage2", ... in
    the order in which sizes appear, those of tokens "tokens", of vectors "vectors". Functional ReLUs of foreign
    networks stay: only modules are found. Raises ``InputError`` where there is nothing to exchange.
    """
    seen = _seen(model, input_shape)
    if not seen:
        raise InputError("the network has no activation to exchange: it needs ReLU or GELU modules")
    grouped = _grouped(seen, groups or {})
    like = next(model.parameters(), torch.empty(0))
    shared: dict[str, nn.Module] = {}
    for index, (name, shapes) in enumerate(seen.items()):
        if activation.first and index >= activation.first:
            break
        widths = [*dict.fromkeys(_width_of(shape) for shape in shapes)]
        keys = {width: activation.key(grouped[name], width) for width in widths}
        if len(widths) == 1 and keys[widths[0]] is None:
            new = activation.module(widths[0])
        else:
            named = {width: key or f"{name.replace('.', '_')}-{width}" for width, key in keys.items()}
            own = {width for width in widths if named[width] not in shared}
            for width in widths:
                if named[width] not in shared:
                    shared[named[width]] = activation.module(width)
            new = Shared(named, {width: shared[named[width]] for width in widths}, own)
        new.to(like.device, like.dtype if like.is_floating_point() else None).train(model.training)
        exchanged(model, name, new)


def places(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` that are exchanged, by name; one that is used under several names stands once."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PLACES) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _seen(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, list[torch.Size]]:
    """The shapes [2, ...] that reach each place, in the order of a forward pass; what is never reached is left out."""
    # A copy that shares the weights, in train mode so that auxiliary heads run: statistics and counters are its own.
    shadow = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).train()
    shapes: dict[str, list[torch.Size]] = {}

    def watch(name: str, module: nn.Module) -> None:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            shapes.setdefault(name, []).append(inputs[0].shape)

        module.register_forward_pre_hook(look)

    for name, module in places(shadow).items():
        watch(name, module)
    like = next(model.parameters(), torch.empty(0))
    images = torch.zeros(2, *input_shape, device=like.device, dtype=like.dtype)
    with torch.no_grad(), torch.random.fork_rng([like.device] if like.is_cuda else []):
        shadow(images)
    return shapes


def _grouped(seen: Mapping[str, list[torch.Size]], groups: Groups) -> dict[str, str]:
    """The group of every place."""
    found: dict[str, str] = {}
    sizes: list[tuple[int, ...]] = []
    for name, shapes in seen.items():
        given = next((group for prefix, group in groups.items() if name.startswith(prefix)), None)
        # A module that is used at two sizes belongs to the stage that its block ends in.
        shape = shapes[-1]
        if given is None and len(shape) == 4:
            size = tuple(shape[2:])
            if size not in sizes:
                sizes.append(size)
            given = f"stage{sizes.index(size) + 1}"
        found[name] = given or ("tokens" if len(shape) == 3 else "vectors")
    return {name: group.replace(".", "_") for name, group in found.items()}


def _width_of(shape: torch.Size) -> int:
    return shape[-1] if len(shape) == 3 else shape[1]


def _width(x: Tensor) -> int:
    return _width_of(x.shape)


def activation_to_data(activation: Activation | None) -> dict[str, Any] | None:
    """Name and settings as written to JSON; None for ReLU."""
    if activation is None:
        return None
    name = type(activation).__module__.rpartition(".")[2]
    return {"name": name, **dataclasses.asdict(activation)}  # type: ignore[call-overload]


def activation_from_data(data: object) -> Activation | None:
    """The activation in parsed JSON. Raises ``InputError`` naming what is wrong."""
    if data is None:
        return None
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise InputError("'activation' must be null or an object with a name")
    entries = dict(data)
    cls = plugins.load("activations", entries.pop("name")[:60])
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for key, value in entries.items():
        if key not in defaults:
            raise InputError(f"'activation' has an unknown setting '{str(key)[:40]}': {nearest(str(key), defaults)}")
        wanted = type(defaults[key])
        if wanted is float and type(value) is int and abs(value) < 2**53:
            entries[key] = float(value)
        elif type(value) is not wanted:
            raise InputError(f"'activation': {key} must be of type {wanted.__name__}, not {value!r}"[:200])
    activation: Activation = cls(**entries)
    return activation
