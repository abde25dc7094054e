"""HYDRA: which weights stay is learnt, under the training's own loss, by a score for each."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from nas.compression.layers import Layer, deployed_layers
from nas.compression.masks import Selection, competing, largest, masked, plan_of, share, weights_of
from nas.compression.plan import Plan
from nas.errors import InputError
from nas.objective import Objective, Setting

FROZEN = "hydra_frozen"
"""Attribute of a steered network: names of the parameters that do not train until it is released."""


class Scored(nn.Module):
    """Parametrisation of a weight: zero but for the ``count`` entries whose ``scores`` are largest in absolute value.

    scores: parameter of the shape of the weight. Gradients pass the choice straight through, as if it were |scores|.
    They start as sqrt(6 / fan-in) w / max|w|: the ranking by magnitude, at the size of freshly drawn weights.
    """

    def __init__(self, weight: Tensor, count: int) -> None:
        super().__init__()
        size = weight.detach().abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
        self.scores = nn.Parameter(math.sqrt(6 / weight[0].numel()) * weight.detach() / size)
        self.count = count

    def chosen(self) -> Tensor:
        """The mask, bool."""
        return largest(self.scores.detach().abs(), self.count)

    def forward(self, weight: Tensor) -> Tensor:
        strength = self.scores.abs()
        # The difference is exactly 0: only its gradient counts.
        return weight * ((strength - strength.detach()) + self.chosen())


@dataclass(frozen=True)
class Hydra:
    """HYDRA: a score for every weight, trained by what the network was trained by, decides which of them stay.

    Sehwag, Wang, Mittal & Jana, NeurIPS 2020, arXiv 2002.10509. Robust training chooses the weights, not their size:
    for ``epochs`` epochs all weights stand still and their scores train; a pass uses the weights of a layer whose
    scores are largest in absolute value, and the gradient reaches the scores as if those were used themselves. The
    mask of the end is then fixed and what it leaves is fine-tuned. As in the released code the parameters and
    statistics of batch normalisation go on training meanwhile, each layer keeps the same share, and scores begin in
    proportion to the weights, without which the method does not work. Unlike there, first convolution and classifier
    keep all their weights, and the loss is the run's (theirs: TRADES, beta 6).

    keep: share of the weights of each competing layer that stays, rounded up to a whole number, above 0 and at most
    1.  epochs: of training the scores (theirs: 20, at the learning rate of a first training); with 0 the mask is that
    of layer-wise magnitude.
    """

    retrains: ClassVar[bool] = True

    keep: float = 0.1
    epochs: int = 20

    def __post_init__(self) -> None:
        self._selection()
        if self.epochs < 0:
            raise InputError(f"epochs of training the scores must be at least 0 (0 = none), not {self.epochs}")

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        """The weights with the best scores of a steered network; the largest of each layer of any other."""
        # A steered network computes with as many weights as are asked for: all others are zeros already.
        return plan_of("hydra", model, self._selection()(weights_of(model)))

    @staticmethod
    def apply(plan: Plan, model: nn.Module, *, fit: bool = True) -> nn.Module:
        """A copy of ``model`` with the plan's masks as parametrisations of its weights."""
        return masked(plan, model)

    def steered(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` of which only scores and batch normalisation train."""
        copied = copy.deepcopy(model)
        norms = {id(p) for module in copied.modules() if isinstance(module, _BatchNorm) for p in module.parameters()}
        for layer in competing(copied).values():
            weight = layer.weight.detach()
            parametrize.register_parametrization(layer, "weight", Scored(weight, share(self.keep, weight.numel())))
        scores = {id(module.scores) for module in copied.modules() if isinstance(module, Scored)}
        frozen = []
        for name, parameter in copied.named_parameters():
            if parameter.requires_grad and id(parameter) not in norms | scores:
                parameter.requires_grad_(False)
                frozen.append(name)
        setattr(copied, FROZEN, tuple(frozen))
        return copied

    def steering(self, objective: Objective) -> Objective:
        """``objective`` itself: the scores are trained by nothing else."""
        return objective

    def released(self, steered: nn.Module) -> nn.Module:
        """The network without scores, all its weights as they were, trainable again."""
        network = copy.deepcopy(steered)
        for name in getattr(network, FROZEN):
            network.get_parameter(name).requires_grad_(True)
        delattr(network, FROZEN)
        for layer in deployed_layers(network).values():
            if _scored(layer) is not None:
                parts: Any = layer.parametrizations["weight"]  # type: ignore[union-attr, index]
                if len(parts) == 1:
                    # A copy shares the class of what it was copied from, which torch would take the weight from.
                    kind = type(layer)
                    layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
                    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
                else:  # masks of an earlier compression stay
                    del parts[-1]
        return network

    def _selection(self) -> Selection:
        return Selection(self.keep, "layer")


def _scored(layer: Layer) -> Scored | None:
    """The scores of a layer, which come after all masks; None where it has none."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    last = layer.parametrizations["weight"][-1]  # type: ignore[union-attr, index]
    return last if isinstance(last, Scored) else None


PLUGIN = Hydra
