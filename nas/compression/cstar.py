"""CSTAR: low-rank convolutions and linear layers, with ranks chosen for the whole network and trained towards."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nas.compression.layers import Layer, deployed_layers, exchanged, kept_dense
from nas.compression.penalised import Penalised, apart, carriers, without
from nas.compression.plan import LayerPlan, Plan
from nas.compression.tucker import Ranks, allocate, factorised, full_ranks, low_rank, parameters_of, spectra
from nas.errors import InputError
from nas.objective import Metrics, Objective, Setting

TARGET, DUAL, RANKS, EPOCH = "cstar_target", "cstar_dual", "cstar_ranks", "cstar_epoch"
"""Buffers of a steered network: Z, U and the ranks (0 where a layer stays as it is) in each layer; in the network, the
epoch that Z and U are of."""

FROZEN_AFTER = 0.5
"""Share of the steering after which ranks stand, so that the multipliers can settle."""
TIGHT_AFTER, TIGHTER = 0.85, 5.0
"""Share of the steering after which rho is larger, and by how much."""


@dataclass(frozen=True)
class Cstar:
    """CSTAR: Tucker-2 convolutions and low-rank linear layers of globally chosen ranks, led up to by robust training.

    After Phan, Yin, Sui, Yuan & Zonouz, AAAI 2023, arXiv 2212.01957: adversarial training under the constraint that the
    unfoldings of every kernel have low rank, within one budget for the network, by the alternating direction method of
    multipliers. A *reconstruction*: its text could not be read. That projection is onto Tucker-2 tensors and that
    ranks are determined for the whole network is known of it; inferred are how (greedily by the energies kept,
    ``tucker.allocate``), when ranks are frozen, and every default. No published number is promised.

    Steering trains the weights W of a copy by what the network was trained by, plus rho/2 sum |W - Z + U|^2; at each
    new epoch Z becomes the projection of W + U on the budget and U grows by W - Z. Ranks are chosen anew until half of
    the epochs have passed; over the last 15 % rho is 5 times as large (and U, which is scaled by it, a fifth). The last
    Z is what is factorised. With epochs = 0 the weights are projected as they are.

    keep: share that stays of the numbers in the weights of the layers that compete, above 0 and at most 1: all but the
    first convolution, the classifier, grouped convolutions and those whose factors cannot be smaller. epochs: of
    steering. rho: pull towards low rank; what counts is rho times learning rate times steps. min_rank: least rank;
    step: ranks are multiples of it where they are cut (8 suits the hardware of large networks).
    """

    retrains: ClassVar[bool] = True

    keep: float = 0.5
    epochs: int = 10
    rho: float = 0.5
    min_rank: int = 1
    step: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError(f"keep must be above 0 and at most 1, not {self.keep}")
        if self.epochs < 0:
            raise InputError(f"epochs of steering must be at least 0 (0 = none), not {self.epochs}")
        if not 0 <= self.rho < float("inf"):
            raise InputError(f"rho must be a number of at least 0, not {self.rho}")
        if self.min_rank < 1 or self.step < 1:
            raise InputError(f"min_rank and step must be at least 1, not {self.min_rank} and {self.step}")

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        """The ranks that a steered network was led to; those that its weights ask for, of any other."""
        layers = deployed_layers(model)
        reasons = self._left_alone(model, layers)
        competing = {name: layer for name, layer in layers.items() if name not in reasons}
        steered = {name: layer for name, layer in competing.items() if hasattr(layer, RANKS)}
        if steered:
            ranks = {name: _ranks_of(layer) for name, layer in steered.items()}
        else:
            ranks = self._allocated({name: layer.weight for name, layer in competing.items()})
        plans = []
        for name, layer in layers.items():
            if name in reasons:
                plans.append(LayerPlan(name, "skipped", reasons[name], {}))
                continue
            found, size = ranks[name], layer.weight.numel()
            if found is None:
                reason = f"stays dense: factors of the ranks it would have are no smaller than its {size} weights"
                plans.append(LayerPlan(name, "skipped", reason, {}))
                continue
            shape = list(layer.weight.shape)
            of = " and ".join(f"{rank} of {full}" for rank, full in zip(found, full_ranks(shape), strict=True))
            reason = f"rank {of}: {parameters_of(shape, found)} numbers for {size}"
            plans.append(LayerPlan(name, "replaced", reason, {"shape": shape, "ranks": list(found)}))
        return Plan("cstar", tuple(plans))

    @staticmethod
    def apply(plan: Plan, model: nn.Module, *, fit: bool = True) -> nn.Module:
        """A copy of ``model`` with the plan's layers factorised: each two linear layers, or two or three convolutions.

        Batch normalisation keeps its statistics, which are those of the dense network: fine-tuning finds new ones.
        """
        compressed = copy.deepcopy(model)
        layers = deployed_layers(compressed)
        for layer_plan in plan.layers:
            name = layer_plan.name
            layer = layers.pop(name, None)
            if layer is None:
                raise InputError(f"the plan is for another network: there is no layer '{name}'")
            if layer_plan.action != "replaced":
                continue
            exchanged(compressed, name, factorised(layer, _checked_ranks(layer_plan, layer), fit=fit))
        return compressed

    def steered(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` that carries Z, U and the ranks of every competing layer as buffers; U = 0 at first."""
        copied = copy.deepcopy(model)
        for layer in self._competing(copied).values():
            for name in (TARGET, DUAL):
                layer.register_buffer(name, torch.zeros_like(layer.weight.detach()))
            ranks = torch.zeros(len(full_ranks(layer.weight.shape)), dtype=torch.int64, device=layer.weight.device)
            layer.register_buffer(RANKS, ranks)
        copied.register_buffer(EPOCH, torch.zeros((), dtype=torch.int64, device=next(copied.parameters()).device))
        self._project(copied, choose=True)
        return copied

    def steering(self, objective: Objective) -> Penalised:
        """``objective`` with the pull towards low rank."""
        return Penalised(objective, self)

    def released(self, steered: nn.Module) -> nn.Module:
        """An ordinary network with the weights Z of a last projection, at the ranks that ``plan`` finds."""
        network = copy.deepcopy(steered)
        self._project(network, choose=False)
        for layer in carriers(network, TARGET).values():
            if _ranks_of(layer) is not None:
                if parametrize.is_parametrized(layer, "weight"):
                    # A mask would undo the low rank; the factors take its place.
                    parametrize.remove_parametrizations(layer, "weight")
                with torch.no_grad():
                    layer.weight.copy_(layer.get_buffer(TARGET))
        return without(network, (TARGET, DUAL, RANKS), EPOCH)

    def rho_at(self, epoch: int) -> float:
        """The penalty's weight in an epoch of the steering."""
        return self.rho * (TIGHTER if self._tight(epoch) else 1.0)

    def begin_epoch(self, steered: nn.Module, epoch: int) -> None:
        """Projection and multipliers after the epochs before ``epoch``, unless that was done."""
        known = steered.get_buffer(EPOCH)
        if int(known) == epoch:
            return
        self._project(steered, choose=epoch < FROZEN_AFTER * self.epochs)
        with torch.no_grad():
            for layer in carriers(steered, TARGET).values():
                dual = layer.get_buffer(DUAL)
                dual += layer.weight - layer.get_buffer(TARGET)
                if self._tight(epoch) and not self._tight(int(known)):
                    dual /= TIGHTER  # U is the multiplier over rho
        known.fill_(epoch)

    def penalty(self, model: nn.Module) -> tuple[Tensor, Metrics]:
        """rho/2 sum |W - Z + U|^2;  low_rank_gap: |W - Z| / |W|: unless it ends near 0, low rank was not reached."""
        pulled, gap = apart(model, TARGET, DUAL)
        return self.rho_at(int(model.get_buffer(EPOCH))) / 2 * pulled, {"low_rank_gap": gap}

    def _tight(self, epoch: int) -> bool:
        return epoch >= TIGHT_AFTER * self.epochs

    @torch.no_grad()
    def _project(self, steered: nn.Module, *, choose: bool) -> None:
        """Z := the projection of W + U; choose: on ranks that are chosen for it, too."""
        layers = carriers(steered, TARGET)
        wanted = {name: layer.weight + layer.get_buffer(DUAL) for name, layer in layers.items()}
        ranks = self._allocated(wanted) if choose else {name: _ranks_of(layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            found = ranks[name]
            layer.get_buffer(TARGET).copy_(wanted[name] if found is None else low_rank(wanted[name], found))
            kept = layer.get_buffer(RANKS)
            kept.copy_(torch.tensor(found) if found is not None else torch.zeros_like(kept))

    def _competing(self, model: nn.Module) -> dict[str, Layer]:
        layers = deployed_layers(model)
        reasons = self._left_alone(model, layers)
        return {name: layer for name, layer in layers.items() if name not in reasons}

    def _left_alone(self, model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, str]:
        """Layers that do not compete, with the reason."""
        reasons = kept_dense(layers)
        users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
        for name, layer in layers.items():
            reason = _unfit(model, name, layer, users) or self._too_small(layer)
            if name not in reasons and reason:
                reasons[name] = reason
        if len(reasons) == len(layers) and self.keep < 1:
            raise InputError(
                f"this network has no layer whose factors of rank {self.min_rank} would be smaller than its weights: "
                "lower min_rank, or leave cstar out"
            )
        return reasons

    def _least(self, shape: Sequence[int]) -> Ranks:
        return tuple(min(self.min_rank, full) for full in full_ranks(shape))

    def _too_small(self, layer: Layer) -> str | None:
        shape = layer.weight.shape
        if parameters_of(shape, self._least(shape)) < shape.numel():
            return None
        return f"no factors of rank {self.min_rank} or more are smaller than its {shape.numel()} weights"

    def _allocated(self, weights: Mapping[str, Tensor]) -> dict[str, Ranks | None]:
        """Ranks of the competing ``weights`` within the budget."""
        shapes = [weight.shape for weight in weights.values()]
        dense = sum(shape.numel() for shape in shapes)
        if self.keep == 1:
            return dict.fromkeys(weights)
        least = sum(parameters_of(shape, self._least(shape)) for shape in shapes)
        budget = int(self.keep * dense)
        if budget < least:
            raise InputError(
                f"keep = {self.keep} is below what ranks of {self.min_rank} leave of this network: keep at least "
                f"{-(-least * 10000 // dense) / 10000}" + (", or lower min_rank" if self.min_rank > 1 else "")
            )
        squares = [spectra(weight) for weight in weights.values()]
        found = allocate(shapes, squares, budget, step=self.step, floor=self.min_rank)
        return dict(zip(weights, found, strict=True))


def _ranks_of(layer: Layer) -> Ranks | None:
    """The ranks that a steered layer carries, None of one that stays as it is."""
    found = tuple(int(rank) for rank in layer.get_buffer(RANKS))
    return found if any(found) else None


def _unfit(model: nn.Module, name: str, layer: Layer, users: Mapping[int, int]) -> str | None:
    """Why ``layer`` cannot be replaced by factors. users: how many modules hold a parameter, by id."""
    if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
        return "depthwise convolution: each filter sees one channel, which leaves no rank to cut"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "grouped convolution"
    kind = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    if type(layer).forward is not kind.forward:
        return f"{type(layer).__name__} has a forward pass of its own"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"{type(parent).__name__} reads its weight without calling it"
    if any(users[id(parameter)] > 1 for parameter in layer.parameters()):
        return "shares its weight with another layer"
    return None


def _checked_ranks(plan: LayerPlan, layer: Layer) -> Ranks:
    """The ranks in the plan's data. Raises ``InputError`` where they are not possible for ``layer``."""
    shape, ranks = list(layer.weight.shape), plan.data.get("ranks")
    if plan.data.get("shape") != shape:
        raise InputError(f"the plan is for another network: '{plan.name}' has shape {shape}, its factors another one")
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        raise InputError(f"the plan is for another network: '{plan.name}' is a grouped convolution")
    full = full_ranks(shape)
    if (
        not isinstance(ranks, list)
        or len(ranks) != len(full)
        or not all(type(rank) is int and 1 <= rank <= most for rank, most in zip(ranks, full, strict=True))
    ):
        raise InputError(f"the plan's ranks of layer '{plan.name}' are not possible: at most {list(full)}")
    return tuple(ranks)


PLUGIN = Cstar
