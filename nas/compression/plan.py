"""Plan: what a compression method decided, per layer, as pure data that can be kept, applied and applied again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from torch import nn

from nas import plugins
from nas.errors import InputError
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

    def apply(self, model: nn.Module) -> nn.Module:
        """A compressed copy of ``model``, which is left alone. Raises ``InputError`` for a plan of another network.

        Of an ensemble, each network is compressed by the layers of the plan that are named after it.
        """
        method = plugins.load("compression", self.method)
        networks = networks_in(model)
        parts = {prefix: [layer for layer in self.layers if layer.name.startswith(prefix)] for prefix in networks}
        if sum(map(len, parts.values())) != len(self.layers):
            raise InputError(f"the plan is for another network: this one consists of {', '.join(networks)}")
        if "" in networks:
            alone: nn.Module = method.apply(self, model)
            return alone
        compressed = copy.deepcopy(model)
        for prefix, layers in parts.items():
            own = Plan(self.method, tuple(replace(layer, name=layer.name.removeprefix(prefix)) for layer in layers))
            compressed.set_submodule(prefix.removesuffix("."), method.apply(own, networks[prefix]))
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
        try:
            assert isinstance(data, dict)
            layers = []
            for layer in data["layers"]:
                assert layer["action"] in ("masked", "replaced", "skipped") and isinstance(layer["data"], dict)
                layers.append(LayerPlan(str(layer["name"]), layer["action"], str(layer["reason"]), layer["data"]))
            return Plan(str(data["method"]), tuple(layers))
        except (AssertionError, KeyError, TypeError):
            raise InputError(
                "a compression plan must have 'method' and 'layers' with name, action, reason and data"
            ) from None


def plan_for(method: Compression, model: nn.Module) -> Plan:
    """What ``method`` decides for each network that ``model`` predicts with, as one plan."""
    plans = {prefix: method.plan(network) for prefix, network in networks_in(model).items()}
    name = next(iter(plans.values())).method
    layers = (replace(layer, name=prefix + layer.name) for prefix, plan in plans.items() for layer in plan.layers)
    return Plan(name, tuple(layers))


class Compression(Protocol):
    """A compression method: a frozen dataclass that makes a plan, and how such a plan is applied."""

    def plan(self, model: nn.Module) -> Plan: ...

    apply: Callable[[Plan, nn.Module], nn.Module]
