"""Cost-sensitive adversarial training: protected classes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.pgd import Pgd, maximiser
from nas.errors import InputError, nearest
from nas.objective import Attack, Batch, Metrics, Setting, State


@dataclass(frozen=True)
class CostSensitive:
    """Cost-sensitive adversarial training (CSA, CSE): errors that involve protected classes cost more than others.

    Shen, Chen, Wang and Wang, arXiv 2101.12372, and the released code. The loss of an image of class y is
    cross-entropy + cost_weight * sum_j C[j, y] p_j, with C[j, y] the cost of answering j: 0 for j = y, ``cost`` where j
    or y is protected, 1 elsewhere. With a cost of 1 this adds 1 - p_y.

    protected: classes by name or number; names need the class names of the data (``prepare``). costs: all of C instead,
    one row for each answer j. mode:
    "csa": clean and adversarial images, the latter found by maximising the same loss (inner = "cost") or as the attack
    is (inner = "attack"). One step on the mean of both; two_steps = true is the published schedule: a step on the clean
    batch, then one on what the attack finds for the weights after it.
    "cse": clean images, and the Min-Max property of the first convolutions: + sum_l min_max[l] (|W_l|_1 - |W_l|_2),
    which is 0 only where one weight of W_l alone is not 0. It promises robustness without having seen an attack: judge
    it by AutoAttack.
    "csa+cse": both.
    layers: names of the convolutions, as many as ``min_max`` has weights; none: the first ones. Inferred: several
    protected classes, pixel units of the attack (the code attacks normalised images without bounds), PGD instead of
    FGSM, and a start from random weights instead of trained ones.
    """

    attack: Attack = field(default_factory=Pgd)
    protected: tuple[int | str, ...] = (0,)
    cost: float = 10.0
    costs: tuple[tuple[float, ...], ...] = ()
    cost_weight: float = 1.0
    mode: Literal["csa", "cse", "csa+cse"] = "csa"
    inner: Literal["cost", "attack"] = "cost"
    two_steps: bool = False
    min_max: tuple[float, ...] = (1.0, 1.0)
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value, known in (
            ("mode", self.mode, ("csa", "cse", "csa+cse")),
            ("inner", self.inner, ("cost", "attack")),
        ):
            if value not in known:
                raise InputError(f"unknown {name} '{value}': {nearest(value, known)}")
        if not all(0 <= value < math.inf for value in (self.cost, self.cost_weight, *self.min_max)):
            raise InputError("cost, cost_weight and the weights of min_max must be numbers of at least 0")
        self._check_costs()
        if self.sparse and sum(self.min_max) == 0:
            raise InputError(f"the weights of min_max sum to nothing: mode '{self.mode}' needs one above 0")
        if self.layers and len(self.layers) != len(self.min_max):
            raise InputError(
                f"min_max has {len(self.min_max)} weights for {len(self.layers)} layers: give one for each"
            )
        if self.adversarial and self.inner == "cost":
            maximiser(self.attack, "the cost-sensitive loss (inner = 'cost')")

    def _check_costs(self) -> None:
        if not self.costs:
            if not self.protected:
                raise InputError("no class is protected: name at least one in protected, or give costs")
            return
        off = [cost for j, row in enumerate(self.costs) for y, cost in enumerate(row) if j != y]
        if any(len(row) != len(self.costs) for row in self.costs) or not all(0 <= cost < math.inf for cost in off):
            raise InputError("costs must be a square table of numbers of at least 0: a row for each answer")
        if any(self.costs[j][j] != 0 for j in range(len(self.costs))):
            raise InputError("costs must be 0 on the diagonal: a right answer costs nothing")
        if sum(off) == 0:
            raise InputError("the costs sum to nothing: give one above 0, or train with 'pgd_at' or 'standard'")

    @property
    def adversarial(self) -> bool:
        """Whether adversarial images are trained on."""
        return self.mode != "cse"

    @property
    def sparse(self) -> bool:
        """Whether the Min-Max property is asked for."""
        return self.mode != "csa"

    @property
    def replays(self) -> int:
        """Steps on each batch."""
        return 2 if self.two_steps and self.adversarial else 1

    def prepare(self, setting: Setting) -> CostSensitive:
        """The same with protected classes as numbers, checked against data and network."""
        classes = setting.data.classes
        if self.costs and len(self.costs) != len(classes):
            raise InputError(f"costs has {len(self.costs)} rows for the {len(classes)} classes of the data")
        numbers = () if self.costs else class_numbers(self.protected, classes)
        present = set(setting.data.y_train[setting.split.training.to(setting.data.y_train.device)].tolist())
        for number in numbers:
            if number not in present:
                raise InputError(f"no training image shows the protected class '{classes[number]}'")
        if self.sparse:
            self._convolutions(setting.model)
        return self if self.costs else dataclasses.replace(self, protected=numbers)

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The mean loss of the images of this step, and the Min-Max term."""
        halves = ["clean", "adversarial"] if self.adversarial else ["clean"]
        if self.replays == 2:
            halves = [halves[state.step % 2]]
        losses: list[Tensor] = []
        metrics: Metrics = {}
        for half in halves:
            x = batch.x if half == "clean" else self._crafted(model, batch, state)
            logits = model(x)
            costs = self._costs(logits)
            losses.append(cost_sensitive(logits, batch.y, costs, self.cost_weight).mean())
            answers = logits.detach().argmax(1)
            metrics["accuracy"] = (answers == batch.y).float().mean()
            metrics["cost"] = costs[answers, batch.y].mean()
        loss = torch.stack(losses).mean()
        if self.sparse:
            weights = self._convolutions(model)
            term = torch.stack([share * min_max(w) for share, w in zip(self.min_max, weights, strict=True)]).sum()
            metrics["min_max"] = term.detach()
            metrics["small_weights"] = torch.stack([small_weights(w) for w in weights]).mean()
            loss = loss + term
        return loss, metrics

    def _crafted(self, model: nn.Module, batch: Batch, state: State) -> Tensor:
        generator = state.attack_generator
        if self.inner == "attack":
            return self.attack(model, batch.x, batch.y, generator=generator)

        def objective(images: Tensor) -> Tensor:
            logits = model(images)
            return cost_sensitive(logits, batch.y, self._costs(logits), self.cost_weight)

        return maximiser(self.attack, "the cost-sensitive loss").maximise(
            model, objective, batch.x, generator=generator
        )

    def _costs(self, logits: Tensor) -> Tensor:
        """C [K, K], for the classes and in the type of ``logits``."""
        if self.costs:
            if len(self.costs) != logits.shape[1]:
                raise InputError(f"costs has {len(self.costs)} rows for a network of {logits.shape[1]} classes")
            return logits.new_tensor(self.costs)
        names = [name for name in self.protected if isinstance(name, str)]
        if names:
            raise InputError(f"which class is '{names[0]}'? Without the class names of the data, give its number")
        numbers = [int(number) for number in self.protected]
        return cost_matrix(numbers, self.cost, logits.shape[1]).to(logits)

    def _convolutions(self, model: nn.Module) -> list[Tensor]:
        """The weights of the convolutions whose entries should be few and large."""
        modules = model.named_modules()
        found = {name: module.weight for name, module in modules if isinstance(module, nn.Conv2d)}
        for name in self.layers:
            if name not in found:
                raise InputError(f"the network has no convolution '{name}': {nearest(name, found)}")
        if len(found) < len(self.min_max):
            raise InputError(
                f"the network has {len(found)} convolutions for the {len(self.min_max)} weights of min_max: give fewer"
            )
        return [found[name] for name in self.layers or [*found][: len(self.min_max)]]


def class_table(rows: Sequence[Mapping[str, Any]], classes: Sequence[str], objective: object) -> list[dict[str, Any]]:
    """Accuracies by class, as ``nas.evaluation.robustness`` gives them, with names and which ``objective`` protects."""
    while not isinstance(objective, CostSensitive) and hasattr(objective, "objective"):
        objective = objective.objective
    protected = class_numbers(objective.protected, classes) if isinstance(objective, CostSensitive) else ()
    return [{**row, "name": classes[row["class"]], "protected": row["class"] in protected} for row in rows]


def class_numbers(protected: Sequence[int | str], classes: Sequence[str]) -> tuple[int, ...]:
    """Numbers of the classes named, each once and in order. Raises ``InputError`` for one that does not exist."""
    numbers = set()
    for name in protected:
        if isinstance(name, int):
            if not 0 <= name < len(classes):
                raise InputError(f"there is no class {name}: classes are numbered 0..{len(classes) - 1}")
            numbers.add(name)
        elif name in classes:
            numbers.add([*classes].index(name))
        else:
            raise InputError(f"unknown class '{name}': {nearest(name, classes)}")
    return tuple(sorted(numbers))


def cost_matrix(protected: list[int], cost: float, classes: int) -> Tensor:
    """C [K, K]: entry (j, y) is what answering j costs where y is right."""
    for number in protected:
        if not 0 <= number < classes:
            raise InputError(f"there is no class {number}: classes are numbered 0..{classes - 1}")
    costs = torch.ones(classes, classes)
    costs[protected, :] = cost
    costs[:, protected] = cost
    return costs.fill_diagonal_(0)


def cost_sensitive(logits: Tensor, y: Tensor, costs: Tensor, weight: float) -> Tensor:
    """Cross-entropy + ``weight`` times the expected cost of the answer: [N]. costs [K, K]: of answer j, truth y."""
    losses = F.cross_entropy(logits, y, reduction="none")
    return losses + weight * (costs.T[y] * logits.softmax(1)).sum(1)


def min_max(weight: Tensor) -> Tensor:
    """|W|_1 - |W|_2: 0 where at most one weight is not 0, and growing with every other; its gradient at 0 is 0."""
    flat = weight.flatten()
    return flat.abs().sum() - torch.linalg.vector_norm(flat)


def small_weights(weight: Tensor) -> Tensor:
    """The share of weights below a hundredth of the largest."""
    sizes = weight.detach().abs()
    return (sizes < 1e-2 * sizes.amax()).float().mean()


PLUGIN = CostSensitive
