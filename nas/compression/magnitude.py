"""Magnitude pruning: the smallest weights of the network, or of each layer, are masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from nas.compression.masks import Scope, Score, Selection, masked, plan_of, weights_of
from nas.compression.plan import Plan
from nas.objective import Setting


@dataclass(frozen=True)
class MagnitudePruning:
    """Magnitude pruning: keep the share ``keep`` of weights that are largest in absolute value.

    The weights of all convolutions and linear layers but the first convolution and the classifier compete
    together (Han et al., 2015, arXiv 1506.02626, with one threshold for the network). Batch normalisation
    and biases stay.

    keep: share of the competing weights that stays, above 0 and at most 1.  scope: "global": one ranking;
    "layer": each layer keeps this share.  score: what is ranked: "magnitude", or "normalised" or "lamp", which do not
    depend on the scale of a layer; only of consequence across layers.  floor: least share that stays of each layer,
    0 (off) to keep: where layers differ much in scale, a ranking without it can empty a whole one, and the network is
    dead.  See ``masks.Selection``. Gradual pruning is several steps of this method, each with its
    fine-tuning: what is masked before stays so, and ``keep`` always counts all weights.
    """

    retrains: ClassVar[bool] = True

    keep: float = 0.5
    scope: Scope = "global"
    score: Score = "magnitude"
    floor: float = 0.005

    def __post_init__(self) -> None:
        self._selection()

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        """Which weights of ``model`` stay."""
        return plan_of("magnitude", model, self._selection()(weights_of(model)))

    @staticmethod
    def apply(plan: Plan, model: nn.Module, *, fit: bool = True) -> nn.Module:
        """A copy of ``model`` with the plan's masks as parametrisations of its weights."""
        return masked(plan, model)

    def _selection(self) -> Selection:
        return Selection(self.keep, self.scope, self.score, self.floor)


PLUGIN = MagnitudePruning
