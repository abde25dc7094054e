"""Plan: what a compression method decided, per layer, as pure data that can be kept, applied and applied again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import nn

from nas import plugins
from nas.errors import InputError


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
        """A compressed copy of ``model``, which is left alone. Raises ``InputError`` for a plan of another network."""
        return plugins.load("compression", self.method).apply(self, model)

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


class Compression(Protocol):
    """A compression method: a frozen dataclass that makes a plan, and how such a plan is applied."""

    def plan(self, model: nn.Module) -> Plan: ...

    apply: Callable[[Plan, nn.Module], nn.Module]
