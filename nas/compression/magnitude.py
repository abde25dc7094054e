"""Global magnitude pruning: the smallest weights of the whole network are masked."""

from __future__ import annotations

import base64
import copy
import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nas.compression.layers import deployed_layers, kept_dense
from nas.compression.plan import LayerPlan, Plan
from nas.errors import InputError
from nas.objective import Setting


class Mask(nn.Module):
    """Parametrisation of a weight by a fixed 0/1 mask; masked weights get no gradient."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@dataclass(frozen=True)
class MagnitudePruning:
    """Global magnitude pruning: keep the share ``keep`` of weights that are largest in absolute value.

    The weights of all convolutions and linear layers but the first convolution and the classifier compete
    together (Han et al., 2015, arXiv 1506.02626, with one threshold for the network). Batch normalisation
    and biases stay. keep: share of the competing weights that stays, above 0 and at most 1.
    """

    retrains: ClassVar[bool] = True

    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError(f"keep must be above 0 and at most 1, not {self.keep}")

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        """Which weights of ``model`` stay."""
        layers = deployed_layers(model)
        skipped = kept_dense(layers)
        competing = {name: layer for name, layer in layers.items() if name not in skipped}
        if not competing:
            raise InputError("this network has no layer that magnitude pruning may touch")
        magnitudes = {
            name: layer.weight.detach().abs() * (_mask_of(layer) if parametrize.is_parametrized(layer) else 1)
            for name, layer in competing.items()
        }
        everything = torch.cat([value.flatten() for value in magnitudes.values()])
        keep = max(1, round(self.keep * everything.numel()))
        # A stable order decides between equal magnitudes, so that exactly ``keep`` weights stay.
        order = torch.argsort(everything, descending=True, stable=True)
        kept = torch.zeros(everything.numel(), dtype=torch.bool, device=everything.device)
        kept[order[:keep]] = True
        plans, position = [], 0
        for name in layers:
            if name in skipped:
                plans.append(LayerPlan(name, "skipped", skipped[name], {}))
                continue
            shape = magnitudes[name].shape
            mask = kept[position : position + shape.numel()].view(shape)
            position += shape.numel()
            reason = f"{int(mask.sum())} of {mask.numel()} weights kept"
            plans.append(LayerPlan(name, "masked", reason, {"shape": list(shape), "mask": _pack(mask)}))
        return Plan("magnitude", tuple(plans))

    @staticmethod
    def apply(plan: Plan, model: nn.Module, *, fit: bool = True) -> nn.Module:
        """A copy of ``model`` with the plan's masks as parametrisations of its weights."""
        compressed = copy.deepcopy(model)
        layers = deployed_layers(compressed)
        for layer_plan in plan.layers:
            layer = layers.get(layer_plan.name)
            if layer is None:
                raise InputError(f"the plan is for another network: there is no layer '{layer_plan.name}'")
            if layer_plan.action != "masked":
                continue
            shape = list(layer.weight.shape)
            if layer_plan.data.get("shape") != shape:
                raise InputError(
                    f"the plan is for another network: '{layer_plan.name}' has shape {shape}, its mask another one"
                )
            mask = _unpack(layer_plan, layer.weight.shape).to(layer.weight.device)
            parametrize.register_parametrization(layer, "weight", Mask(mask.to(layer.weight.dtype)))
        return compressed


def _mask_of(layer: nn.Module) -> Tensor:
    """Product of the masks a layer already carries."""
    product = torch.ones(())
    for parametrisation in layer.parametrizations["weight"]:  # type: ignore[union-attr, index]
        if isinstance(parametrisation, Mask):
            product = product * parametrisation.mask
    return product


def _pack(mask: Tensor) -> str:
    bits = np.packbits(mask.flatten().cpu().numpy())
    return base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode()


def _unpack(layer: LayerPlan, shape: torch.Size) -> Tensor:
    try:
        count = shape.numel()
        # The size is known from the network: a bomb cannot unfold beyond it. A stream of another length is damaged.
        stream = zlib.decompressobj()
        unfolded = stream.decompress(base64.b64decode(layer.data["mask"], validate=True), count // 8 + 2)
        if not stream.eof or len(unfolded) != (count + 7) // 8:
            raise ValueError("not the length of the mask")
        bits = np.unpackbits(np.frombuffer(unfolded, np.uint8), count=count)
        return torch.from_numpy(bits.astype(bool)).view(shape)
    except (KeyError, TypeError, ValueError, RuntimeError, zlib.error):
        raise InputError(f"the plan's mask of layer '{layer.name}' is damaged") from None


PLUGIN = MagnitudePruning
