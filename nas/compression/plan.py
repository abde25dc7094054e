"""Plan: what a compression method decided, per layer, as pure data that can be kept, applied and applied again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import nn

from nas import plugins
from nas.errors import InputError
from nas.objective import Objective, Setting
from nas.prediction import networks_in


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer: "masked", "replaced", or "skipped" with the reason.

    data: method-specific JSON values, e.g. a packed mask.
    """

    name: str
    action: Literal["masked", "replaced", "skipped"]
    reason: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """The decisions of compression method ``method`` for every convolution and linear layer of a model."""

    method: str
    layers: tuple[LayerPlan, ...]

    def apply(self, model: nn.Module, *, fit: bool = True) -> nn.Module:
        """A compressed copy of ``model``, which is left alone. Raises ``InputError`` for a plan of another network.

        Of an ensemble, each network is compressed by the layers of the plan that are named after it. fit: whether the
        weights of what is put in place follow from those that were there; without, they have the right shapes only, and
        are about to be loaded.
        """
        method = plugins.load("compression", self.method)
        networks = networks_in(model)
        parts = {prefix: [layer for layer in self.layers if layer.name.startswith(prefix)] for prefix in networks}
        if sum(map(len, parts.values())) != len(self.layers):
            raise InputError(f"the plan is for another network: this one consists of {', '.join(networks)}")
        if "" in networks:
            alone: nn.Module = method.apply(self, model, fit=fit)
            return alone
        compressed = copy.deepcopy(model)
        for prefix, layers in parts.items():
            own = Plan(self.method, tuple(replace(layer, name=layer.name.removeprefix(prefix)) for layer in layers))
            compressed.set_submodule(prefix.removesuffix("."), method.apply(own, networks[prefix], fit=fit))
        return compressed

    def to_data(self) -> dict[str, Any]:
        """Plain lists and dictionaries, as written to JSON."""
        layers = [
            {"name": layer.name, "action": layer.action, "reason": layer.reason, "data": dict(layer.data)}
            for layer in self.layers
        ]
        return {"method": self.method, "layers": layers}

    @staticmethod
    def from_data(data: object) -> Plan:
        """The plan in parsed JSON. Raises ``InputError`` naming what is wrong."""
        wrong = InputError("a compression plan must have 'method' and 'layers' with name, action, reason and data")
        try:
            layers = []
            for layer in data["layers"]:  # type: ignore[index]
                if layer["action"] not in ("masked", "replaced", "skipped") or not isinstance(layer["data"], dict):
                    raise wrong
                layers.append(LayerPlan(str(layer["name"]), layer["action"], str(layer["reason"]), layer["data"]))
            return Plan(str(data["method"]), tuple(layers))  # type: ignore[index]
        except (KeyError, TypeError):
            raise wrong from None


def plan_for(method: Compression, model: nn.Module, setting: Setting | None = None) -> Plan:
    """What ``method`` decides for each network that ``model`` predicts with, as one plan."""
    plans = {prefix: method.plan(network, setting) for prefix, network in networks_in(model).items()}
    name = next(iter(plans.values())).method
    layers = (replace(layer, name=prefix + layer.name) for prefix, plan in plans.items() for layer in plan.layers)
    return Plan(name, tuple(layers))


@runtime_checkable
class Compression(Protocol):
    """A compression method: a frozen dataclass that makes a plan, and how such a plan is applied.

    ``method.plan(model, setting) -> plan`` for the deployed network ``model``, in eval mode, on the device; it is left
    alone. setting: where data are needed (``setting.model`` has no meaning here); None where there are none, which a
    method that needs them refuses. The same arguments give the same plan.
    ``apply(plan, model, fit=...)``: see ``Plan.apply``.
    retrains: whether the network is fine-tuned afterwards unless the recipe says otherwise.
    """

    retrains: ClassVar[bool]

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan: ...

    @staticmethod
    def apply(plan: Plan, model: nn.Module, *, fit: bool = True) -> nn.Module: ...


@runtime_checkable
class Steers(Protocol):
    """A compression that training leads up to: multipliers, scores or copies that draw the weights to what is allowed.

    ``method.steered(model)`` is a copy that carries them as parameters (trained, where they require gradients) or
    buffers, so that they are part of every checkpoint; it is trained by ``method.steering(objective)``, a wrap (field
    ``objective``) of what the network was trained by, for ``epochs`` epochs, of which the last counts.
    ``method.released(steered)`` is the ordinary network that came of it. ``plan`` then gets the steered network, and
    the plan is applied to the released one.
    """

    epochs: int

    def steered(self, model: nn.Module) -> nn.Module: ...

    def steering(self, objective: Objective) -> Objective: ...

    def released(self, steered: nn.Module) -> nn.Module: ...


@runtime_checkable
class Recovers(Protocol):
    """A compression with an objective of its own for fine-tuning: ``method.recovery(objective, parent)``.

    objective: what the network was trained by;  parent: the network before compression, in eval mode, frozen.
    """

    def recovery(self, objective: Objective, parent: nn.Module) -> Objective: ...
