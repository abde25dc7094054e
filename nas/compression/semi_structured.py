"""2:4 sparsity: of every four consecutive inputs two weights stay."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nas.compression.layers import deployed_layers, kept_dense
from nas.compression.masks import Mask
from nas.compression.packing import pack, unpack
from nas.compression.plan import LayerPlan, Plan
from nas.errors import InputError
from nas.objective import Setting


@dataclass(frozen=True)
class SemiStructuredPruning:
    """2:4 sparsity: of every 4 consecutive inputs of a row the 2 weights of largest absolute value stay.

    The pattern that matrix units of NVIDIA GPUs multiply at up to twice the speed, from Ampere (compute capability 8.0)
    on (Mishra et al., 2021, arXiv 2104.08378). Anywhere else, CPUs included, the zeros are multiplied like other
    numbers and nothing gets faster. Rows are those of the matrix that multiplies: of a linear layer its inputs, of a
    convolution its input channels at each place of the kernel. Layers whose inputs (per group) are no multiple of 4
    stay dense, as do the first convolution and the classifier.

    keep: share of the weights in the layers concerned that stays: 0.5, or 1.0 for none taken away.
    """

    retrains: ClassVar[bool] = True

    keep: float = 0.5

    def __post_init__(self) -> None:
        if self.keep not in (0.5, 1.0):
            raise InputError(f"2:4 sparsity keeps half of the weights (keep = 0.5) or all (1.0), not {self.keep}")

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        """Which weights of ``model`` stay."""
        layers = deployed_layers(model)
        skipped = kept_dense(layers)
        for name, layer in layers.items():
            if layer.weight.shape[1] % 4:
                skipped.setdefault(name, f"{layer.weight.shape[1]} inputs are no multiple of 4")
        if len(skipped) == len(layers):
            raise InputError("this network has no layer of a multiple of 4 inputs that 2:4 sparsity may touch")
        plans = []
        for name, layer in layers.items():
            if name in skipped:
                plans.append(LayerPlan(name, "skipped", skipped[name], {}))
                continue
            # What the network uses: weights that are masked already do not compete.
            mask = (
                largest_two(layer.weight.detach()) if self.keep < 1 else torch.ones_like(layer.weight, dtype=torch.bool)
            )
            reason = "2 of every 4 weights kept; faster only on GPUs from Ampere on"
            data = {"shape": list(mask.shape), "mask": pack(mask)}
            plans.append(LayerPlan(name, "masked", reason if self.keep < 1 else "all weights kept", data))
        return Plan("semi_structured", tuple(plans))

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
            shape = layer.weight.shape
            if layer_plan.data.get("shape") != list(shape):
                raise InputError(f"the plan is for another network: '{layer_plan.name}' has shape {list(shape)}")
            mask = unpack(layer_plan.data.get("mask"), shape, layer_plan.name)
            mask = mask.to(layer.weight.device, layer.weight.dtype)
            parametrize.register_parametrization(layer, "weight", Mask(mask))
        return compressed


def largest_two(weight: Tensor) -> Tensor:
    """Mask of the 2 largest of every 4 consecutive along axis 1 of ``weight`` [O, I, ...]; of equals the first."""
    rows = weight.abs().movedim(1, -1)
    quads = rows.unflatten(-1, (-1, 4))
    order = quads.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(quads, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return mask.flatten(-2).movedim(-1, 1)


PLUGIN = SemiStructuredPruning
