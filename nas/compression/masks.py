"""Masks on single weights: which layers may carry them, which weights stay, the plan of it and the masked network."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nas.compression.layers import Layer, deployed_layers, kept_dense
from nas.compression.packing import pack, unpack
from nas.compression.plan import LayerPlan, Plan
from nas.errors import InputError

Scope = Literal["global", "layer"]
Score = Literal["magnitude", "lamp", "normalised"]


class Mask(nn.Module):
    """Parametrisation of a weight by a fixed 0/1 mask; masked weights get no gradient.

    Momentum and weight decay move what is masked, but nothing of it is ever computed with.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def kept_by_masks(layer: nn.Module) -> Tensor | None:
    """Which weights of ``layer`` all its masks leave, bool; None where it has none."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    parts: nn.ModuleDict = layer.parametrizations  # type: ignore[assignment]
    return left_by(parts["weight"])  # type: ignore[arg-type]


def left_by(parametrisations: Iterable[nn.Module]) -> Tensor | None:
    """Which entries of a tensor all masks among its parametrisations leave, bool; None where there is no mask.

    Several rounds of pruning are several masks.
    """
    masks = [mask for part in parametrisations if isinstance(mask := getattr(part, "mask", None), Tensor)]
    return torch.stack([mask != 0 for mask in masks]).all(0) if masks else None


@dataclass(frozen=True)
class Selection:
    """Which weights of a network stay: those of highest score, of equals the first, as many as ``keep`` says.

    keep: share of the weights that stays, above 0 and at most 1.  scope: "global" ranks all layers together, of which
    round(keep N) weights stay; "layer" keeps the same share of each, rounded up.  score: "magnitude": |w|;
    "normalised": |w| over the norm of the layer's weights; "lamp": w^2 over the sum of the squares of all weights of
    the layer that are no smaller (Lee et al., ICLR 2021, arXiv 2010.07611). The last two do not depend on the scale of
    a layer, which batch normalisation leaves open; within a layer all three rank alike.  floor: least share that stays
    of each layer; 0: none, so that a layer may lose all.
    """

    keep: float
    scope: Scope = "global"
    score: Score = "magnitude"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError(f"keep must be above 0 and at most 1, not {self.keep}")
        if self.scope not in ("global", "layer"):
            raise InputError(f"scope must be 'global' or 'layer', not '{self.scope}'")
        if self.score not in SCORES:
            raise InputError(f"score must be {' or '.join(map(repr, SCORES))}, not '{self.score}'")
        if not 0 <= self.floor <= self.keep:
            raise InputError(
                f"floor, the least share of each layer, must be from 0 (off) to keep = {self.keep}, not {self.floor}"
            )

    def __call__(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks, bool, of the shapes of ``weights``. Raises ``InputError`` where they are no finite numbers."""
        scores = {name: SCORES[self.score](_exact(name, weight)) for name, weight in weights.items()}
        if self.scope == "layer":
            return {name: largest(score, share(self.keep, score.numel())) for name, score in scores.items()}
        total = sum(score.numel() for score in scores.values())
        count = max(1, round(self.keep * total))
        least = {name: share(self.floor, score.numel()) if self.floor else 0 for name, score in scores.items()}
        if sum(least.values()) > count:
            raise InputError(
                f"floor = {self.floor} keeps {sum(least.values())} weights, more than the {count} of {total} that "
                f"keep = {self.keep} allows: lower it (0 = off)"
            )
        ranked = torch.cat(
            [score.masked_fill(largest(score, least[name]), math.inf).flatten() for name, score in scores.items()]
        )
        parts = largest(ranked, count).split([score.numel() for score in scores.values()])
        return {name: part.view(score.shape) for part, (name, score) in zip(parts, scores.items(), strict=True)}


def share(keep: float, count: int) -> int:
    """``keep`` of ``count``, rounded up, at least 1; what is whole but for rounding counts as whole."""
    return max(1, math.ceil(round(keep * count, 6)))


def largest(values: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest of ``values``, any shape; of equals the first. In linear time, unlike a sort."""
    flat = values.flatten()
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    above, equal = flat > threshold, flat == threshold
    return (above | (equal & (equal.cumsum(0) <= count - above.sum()))).view(values.shape)


def lamp(weight: Tensor) -> Tensor:
    """LAMP scores of ``weight``, of its shape, float64. The largest weight of a layer has 1, the highest there is."""
    squares, order = weight.flatten().double().square().sort(descending=True, stable=True)
    scores = torch.empty_like(squares)
    scores[order] = squares / squares.cumsum(0).clamp_min(torch.finfo(squares.dtype).tiny)
    return scores.view(weight.shape)


def normalised(weight: Tensor) -> Tensor:
    """|w| over the Frobenius norm of ``weight``, float64."""
    size = weight.double().norm()
    return weight.double().abs() / size.clamp_min(torch.finfo(size.dtype).tiny)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": torch.abs, "lamp": lamp, "normalised": normalised}


def left_dense(model: nn.Module) -> dict[str, str]:
    """Layers of ``model`` that get no mask, with the reason: by custom, or as their weight is not theirs alone."""
    layers = deployed_layers(model)
    reasons = kept_dense(layers)
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, layer in layers.items():
        if name not in reasons and any(users[id(p)] > 1 for key, p in layer.named_parameters() if "bias" not in key):
            reasons[name] = "shares its weight with another layer"
    return reasons


def competing(model: nn.Module) -> dict[str, Layer]:
    """Layers of ``model`` whose weights may be masked. Raises ``InputError`` where there are none."""
    dense = left_dense(model)
    found = {name: layer for name, layer in deployed_layers(model).items() if name not in dense}
    if not found:
        raise InputError("this network has no layer but first convolution and classifier whose weights could be masked")
    return found


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What the competing layers of ``model`` compute with, masked weights being zeros; detached."""
    return {name: layer.weight.detach() for name, layer in competing(model).items()}


def plan_of(method: str, model: nn.Module, masks: Mapping[str, Tensor]) -> Plan:
    """The plan of ``method`` with ``masks`` of all competing layers of ``model``."""
    reasons, plans = left_dense(model), []
    for name in deployed_layers(model):
        if name in reasons:
            plans.append(LayerPlan(name, "skipped", reasons[name], {}))
            continue
        mask = masks[name]
        reason = f"{int(mask.sum())} of {mask.numel()} weights kept"
        plans.append(LayerPlan(name, "masked", reason, {"shape": list(mask.shape), "mask": pack(mask)}))
    return Plan(method, tuple(plans))


def masked(plan: Plan, model: nn.Module) -> nn.Module:
    """A copy of ``model`` with the plan's masks as parametrisations of its weights."""
    compressed = copy.deepcopy(model)
    layers = deployed_layers(compressed)
    for layer_plan in plan.layers:
        layer = layers.get(layer_plan.name)
        if layer is None:
            raise InputError(f"the plan is for another network: there is no layer '{layer_plan.name}'")
        if layer_plan.action != "masked":
            continue
        weight = layer.weight
        if layer_plan.data.get("shape") != list(weight.shape):
            raise InputError(
                f"the plan is for another network: '{layer_plan.name}' has shape {list(weight.shape)}, its mask "
                "another one"
            )
        mask = unpack(layer_plan.data.get("mask"), weight.shape, layer_plan.name)
        mask = mask.to(weight.device, weight.dtype)
        parametrize.register_parametrization(layer, "weight", Mask(mask))
    return compressed


def _exact(name: str, weight: Tensor) -> Tensor:
    """``weight`` in a type in which ranks are taken."""
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if not bool(weight.isfinite().all()):
        raise InputError(f"weights of layer '{name}' are no finite numbers: there is nothing to rank")
    return weight
