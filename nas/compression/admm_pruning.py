"""ADMM pruning: robust training under the constraint that most weights are zero, by multipliers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nas.compression.masks import Scope, Selection, competing, masked, plan_of, weights_of
from nas.compression.penalised import Penalised, apart, carriers, without
from nas.compression.plan import Plan
from nas.errors import InputError
from nas.objective import Metrics, Objective, Setting

TARGET, DUAL, EPOCH = "admm_target", "admm_dual", "admm_epoch"
"""Buffers of a steered network: Z and U in each layer; in the network, the epoch that Z and U are of."""


@dataclass(frozen=True)
class AdmmPruning:
    """R-ADMM pruning: adversarial training drawn to sparse weights by the alternating direction method of multipliers.

    Ye et al., ICCV 2019, arXiv 1903.12561, irregular pattern. Robust training of weights W under W in S, S the tensors
    with a share ``keep`` of non-zeros, becomes

        min over W of  loss + sum rho/2 |W - Z + U|^2,    Z := projection of W + U on S,    U := U + W - Z,

    the last two every ``interval`` epochs; the projection keeps the largest entries and is the nearest point of S.
    rho grows by ``growth`` each time, and U, which is the multiplier over rho, shrinks as much (the released code
    leaves U as it is). What is smallest in W at the end is masked, and the rest fine-tuned.

    keep: share of the competing weights that stays, above 0 and at most 1.  scope: "global": of all together;
    "layer": of each alike (there, the share of each layer is set by hand).  floor: least share that stays of each
    layer, part of S; 0: none.  epochs: of this training, before
    fine-tuning; with 0 the mask is that of magnitude.  rho: pull at first; what counts is rho x learning rate x steps.
    The paper's 0.001 (learning rate 0.01, 200 epochs of 390 steps, interval 20) is far too weak for short training.
    """

    retrains: ClassVar[bool] = True

    keep: float = 0.1
    scope: Scope = "global"
    epochs: int = 10
    interval: int = 1
    rho: float = 0.3
    growth: float = 1.3
    floor: float = 0.005

    def __post_init__(self) -> None:
        self._selection()
        if self.epochs < 0 or self.interval < 1:
            raise InputError(
                f"epochs must be at least 0 (0 = none) and interval at least 1, not {self.epochs} and {self.interval}"
            )
        if not 0 <= self.rho < math.inf:
            raise InputError(f"rho must be a number of at least 0, not {self.rho}")
        if not 1 <= self.growth < math.inf:
            raise InputError(f"growth of rho must be a number of at least 1, not {self.growth}")

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        """Which weights of ``model``, steered or not, stay: the largest."""
        return plan_of("admm_pruning", model, self._selection()(weights_of(model)))

    @staticmethod
    def apply(plan: Plan, model: nn.Module, *, fit: bool = True) -> nn.Module:
        """A copy of ``model`` with the plan's masks as parametrisations of its weights."""
        return masked(plan, model)

    def steered(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` that carries Z, the projected weights, and U = 0 of each competing layer."""
        copied = copy.deepcopy(model)
        weights = weights_of(copied)
        targets = self._projected(weights)
        for name, layer in competing(copied).items():
            layer.register_buffer(TARGET, targets[name])
            layer.register_buffer(DUAL, torch.zeros_like(weights[name]))
        copied.register_buffer(EPOCH, torch.zeros((), dtype=torch.int64, device=next(iter(weights.values())).device))
        return copied

    def steering(self, objective: Objective) -> Penalised:
        """``objective`` with the pull towards Z."""
        return Penalised(objective, self)

    def released(self, steered: nn.Module) -> nn.Module:
        """The network without Z and U."""
        return without(steered, (TARGET, DUAL), EPOCH)

    def begin_epoch(self, model: nn.Module, epoch: int) -> None:
        """Z and U after the epochs before ``epoch``, where they are due."""
        known = model.get_buffer(EPOCH)
        if int(known) != epoch and epoch % self.interval == 0:
            with torch.no_grad():
                layers = carriers(model, TARGET)
                weights = {name: layer.weight.detach() for name, layer in layers.items()}
                targets = self._projected({n: w + layers[n].get_buffer(DUAL) for n, w in weights.items()})
                for name, layer in layers.items():
                    layer.get_buffer(TARGET).copy_(targets[name])
                    dual = layer.get_buffer(DUAL)
                    dual.copy_((dual + weights[name] - targets[name]) / self.growth)
        known.fill_(epoch)

    def penalty(self, model: nn.Module) -> tuple[Tensor, Metrics]:
        """rho/2 sum |W - Z + U|^2;  sparsity_gap: |W - Z| / |W| over all layers, 0 where W is as sparse as asked."""
        pulled, gap = apart(model, TARGET, DUAL)
        rho = self.rho * self.growth ** (int(model.get_buffer(EPOCH)) // self.interval)
        return rho / 2 * pulled, {"sparsity_gap": gap}

    def _projected(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The nearest tensors that are as sparse as asked."""
        masks = self._selection()(weights)
        return {name: weight * masks[name] for name, weight in weights.items()}

    def _selection(self) -> Selection:
        return Selection(self.keep, self.scope, floor=self.floor)


PLUGIN = AdmmPruning
