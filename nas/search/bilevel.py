"""The bilevel search: architecture parameters and weights of a supernet take turns, stage by stage.

One step: both batches are attacked; the architecture gradient of each objective of the stage is taken and the
gradients combined; Adam moves the architecture parameters; SGD moves the weights. DSARA (arXiv 2212.14049) is
the recipe of two stages [adversarial], then [natural, adversarial] by min-norm; the released ARNAS code has the
second stage only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nas import ranks
from nas.attacks.fixed import Fixed
from nas.data.augmentation import Augmentation
from nas.data.batches import batch_count, batches
from nas.data.image_data import ImageData
from nas.data.split import Split
from nas.errors import Diverged, InputError
from nas.min_norm import min_norm_direction
from nas.model_state import frozen_statistics
from nas.objective import Attack, Batch, Objective, State
from nas.optimisation import Sgd, gradient_step, optimiser_tree, restore_optimiser
from nas.precision import check_bfloat16, in_bfloat16
from nas.randomness import generator
from nas.search import monitor
from nas.search.architecture_gradient import FirstOrder, Loss, Unrolled, WeightStep
from nas.search.perturbation_memory import PerturbationMemory, check_can_start
from nas.search.recomputation import recompute
from nas.search.relaxation import Mixture, SampledPath
from nas.shards import Shards, Step
from nas.tensor_file import read_tree, write_tree
from nas.validation import accuracies
from search_spaces.cell_space import CellSpace
from search_spaces.genotype import Genotype
from search_spaces.sampled import SampledSupernet
from search_spaces.supernet import Supernet

Record = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """Epochs up to ``until`` (exclusive) minimise ``objectives`` over the architecture, combined by ``combine``.

    adversarial_gradient_scale multiplies the gradient of "adversarial" before the combination. The min-norm step
    favours the shorter gradient, so a scale below 1 pulls *towards* robustness: for orthogonal gradients of equal
    length gamma, the weight of the natural one, is scale^2 / (1 + scale^2), i.e. 0.5, 0.2 and 0.0099 at scales 1,
    0.5 and 0.1 (the released ARNAS code uses 0.1).
    """

    until: int
    objectives: tuple[str, ...] = ("adversarial",)
    combine: Literal["sum", "min_norm"] = "sum"
    adversarial_gradient_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.until < 1:
            raise InputError(f"a search stage must end after at least one epoch, not until = {self.until}")
        if not self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise InputError("a search stage needs at least one objective, each named once")
        if self.combine == "min_norm" and len(self.objectives) != 2:
            raise InputError("combine = 'min_norm' needs exactly two objectives, e.g. ['natural', 'adversarial']")
        if not self.adversarial_gradient_scale > 0:
            raise InputError(f"adversarial_gradient_scale must be above 0, not {self.adversarial_gradient_scale}")


@dataclass(frozen=True)
class ArchitectureAdam:
    """Adam on the architecture parameters; defaults of DARTS and ARNAS."""

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise InputError("the architecture optimiser needs learning_rate above 0 and weight_decay of at least 0")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be at least 0 and below 1, not {self.betas}")


@dataclass(frozen=True)
class Search:
    """Size and schedule of a search. monitored: images of the architecture part judged after each epoch.

    The others trade exactness for speed; docs/search-speed.md says what each changes. relaxation: what an edge computes
    in a step. partial_channels: k lets 1/k of the channels through the candidates. reuse_perturbations: attacks on an
    image begin where the last one ended. architecture_every: the architecture takes a step at every n-th step of an
    epoch, beginning with the first. precision: of the supernet's passes.

    recompute_cells trades speed for memory and is exact: a backward pass computes the inner maps of a cell again.
    """

    channels: int = 16
    cells: int = 8
    batch_size: int = 64
    stages: tuple[Stage, ...] = (
        Stage(until=20),
        Stage(until=50, objectives=("natural", "adversarial"), combine="min_norm"),
    )
    weights: Sgd = field(default_factory=lambda: Sgd(0.025, final_learning_rate=0.001, weight_decay=3e-4))
    architecture: ArchitectureAdam = field(default_factory=ArchitectureAdam)
    gradient: FirstOrder | Unrolled = field(default_factory=Unrolled)
    augmentation: Augmentation = field(default_factory=Augmentation)
    monitored: int = 512
    relaxation: Mixture | SampledPath = field(default_factory=Mixture)
    partial_channels: int = 1
    reuse_perturbations: bool = False
    architecture_every: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    recompute_cells: bool = False

    def __post_init__(self) -> None:
        untils = [stage.until for stage in self.stages]
        if not untils or untils != sorted(set(untils)):
            raise InputError("search stages must end one after another: 'until' has to rise from stage to stage")
        if self.batch_size < 2 or self.monitored < 1:
            raise InputError("search batch_size must be at least 2, monitored at least 1")
        if self.partial_channels < 1 or self.channels % self.partial_channels:
            raise InputError(
                f"partial_channels = {self.partial_channels} must be at least 1 and divide channels = {self.channels}"
            )
        if self.architecture_every < 1:
            raise InputError(f"architecture_every must be at least 1, not {self.architecture_every}")
        if self.precision == "bfloat16" and getattr(self.gradient, "hessian", None) == "finite_difference":
            raise InputError(
                "precision = 'bfloat16' rounds away the small shifts of weights that gradient.hessian = "
                "'finite_difference' compares: use gradient name = 'first_order', or hessian = 'exact'"
            )

    @property
    def epochs(self) -> int:
        """Length of the search."""
        return self.stages[-1].until

    def stage_of(self, epoch: int) -> Stage:
        """The stage that ``epoch`` belongs to."""
        return next(stage for stage in self.stages if epoch < stage.until)


@dataclass(frozen=True)
class SearchResult:
    """The genotype found, the final mixing weights [edges, operations] by kind, the epochs' records and warnings."""

    genotype: Genotype
    weights: Mapping[str, Tensor]
    records: list[Record]
    warnings: list[str]


def search(
    space: CellSpace,
    data: ImageData,
    split: Split,
    settings: Search,
    *,
    weight_objective: Objective,
    objectives: Mapping[str, Objective],
    attack: Attack,
    seed: int,
    shards: Shards | None = None,
    checkpoint: Path | None = None,
    log: Callable[[Record], None] = lambda record: None,
    history: Callable[[list[Record]], None] = lambda records: None,
    tick: Callable[[float], None] = lambda progress: None,
) -> SearchResult:
    """Search ``space`` on the weights and architecture parts of ``split``.

    weight_objective is what the weights minimise, ``objectives`` what a stage may name; ``attack`` judges the supernet
    after each epoch. shards: parts that batches are cut into, for a data-parallel run. Resumes from ``checkpoint`` to
    the same result. Raises ``Diverged`` for a loss or a gradient that is not finite; the checkpoint then holds the last
    good epoch.
    """
    if len(split.weights) == 0 or len(split.architecture) == 0:
        raise InputError("no images for the architecture or none for the weights: set data.architecture above 0")
    shards = shards or Shards()
    shards.check(settings.batch_size, "search.batch_size")
    device = data.x_train.device
    for stage in settings.stages:
        for name in stage.objectives:
            if name not in objectives:
                raise InputError(f"unknown search objective '{name}'; known: {', '.join(objectives)}")
    memory = None
    if settings.reuse_perturbations:
        for objective in (weight_objective, *objectives.values()):
            if hasattr(objective, "attack"):
                check_can_start(objective.attack)
        memory = PerturbationMemory(data.x_train)
    if settings.precision == "bfloat16":
        check_bfloat16(device)
    supernet = _supernet(space, data, settings, seed)
    optimiser, adam = optimisers(supernet, settings)
    records: list[Record] = []
    if checkpoint is not None and checkpoint.exists():
        tree = read_tree(checkpoint, device)
        supernet.load_state_dict(tree["supernet"])
        restore_optimiser(optimiser, tree["weights"])
        restore_optimiser(adam, tree["architecture"])
        records = tree["records"]
        if memory is not None:
            memory.deltas = tree["perturbations"]
    history(records)

    steps = batch_count(min(len(split.weights), len(split.architecture)), settings.batch_size, True)
    architecture_steps = -(-steps // settings.architecture_every)
    for epoch in range(len(records), settings.epochs):
        stage = settings.stage_of(epoch)
        attacks = shards.generators(seed, "search attack", epoch, device=device)
        methods = shards.generators(seed, "search method", epoch, device=device)
        path_generator = generator(seed, "search path", epoch)
        sums: dict[str, float] = {}
        supernet.train()
        for step, (batch, held_out) in enumerate(_paired(data, split, settings, seed, epoch, steps)):
            progress = (epoch + step / steps) / settings.epochs
            states = {
                number: State(epoch, epoch * steps + step, progress, attacks[number], methods[number])
                for number in shards.own
            }
            if isinstance(supernet, SampledSupernet) and isinstance(settings.relaxation, SampledPath):
                supernet.draw(path_generator, settings.relaxation.temperature(progress))
            architecture_values, weight_values = take_step(
                supernet, settings, stage, weight_objective, objectives, batch,
                held_out if step % settings.architecture_every == 0 else None, states, optimiser, adam, memory, shards,
            )  # fmt: skip
            _check_finite(architecture_values | weight_values, f"step {step + 1} of {steps} of epoch {epoch}", settings)
            _add_means(sums, architecture_values, architecture_steps)
            _add_means(sums, weight_values, steps)
            tick((epoch + (step + 1) / steps) / settings.epochs)
        if isinstance(supernet, SampledSupernet):
            supernet.settle()
        if memory is not None:
            memory.share()
        ranks.check_same([*supernet.parameters(), *supernet.buffers()], "architecture parameters and weights")
        record = _epoch_record(space, supernet, data, split, settings, attack, seed, epoch, stage, sums, shards)
        records.append(record)
        log(record)
        if checkpoint is not None:
            tree = {
                "supernet": dict(supernet.state_dict()),
                "weights": optimiser_tree(optimiser),
                "architecture": optimiser_tree(adam),
                "records": records,
            }
            if memory is not None:
                tree["perturbations"] = memory.deltas
            write_tree(tree, checkpoint)
    mixing = {kind: table.detach().cpu() for kind, table in supernet.mixing_weights().items()}
    warnings = [warning for record in records for warning in record["warnings"]]
    return SearchResult(space.discretise(mixing), mixing, records, warnings)


def optimisers(supernet: Supernet, settings: Search) -> tuple[torch.optim.SGD, torch.optim.Adam]:
    """The optimisers of the weights and of the architecture parameters."""
    adam = torch.optim.Adam(
        supernet.architecture_parameters(),
        lr=settings.architecture.learning_rate,
        betas=settings.architecture.betas,
        weight_decay=settings.architecture.weight_decay,
    )
    return settings.weights.optimiser(supernet.weight_parameters()), adam


def take_step(
    supernet: Supernet,
    settings: Search,
    stage: Stage,
    weight_objective: Objective,
    objectives: Mapping[str, Objective],
    batch: Batch,
    held_out: Batch | None,
    states: Mapping[int, State],
    optimiser: torch.optim.SGD,
    adam: torch.optim.Adam,
    memory: PerturbationMemory | None = None,
    shards: Shards | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """One step of the search: the architecture on ``held_out`` (None: it rests), then the weights on ``batch``.

    states: of each of this process's shards. The supernet is in train mode. Returns what the architecture's and the
    weights' part are logged with.
    """
    shards = shards or Shards()
    rate = settings.weights.rate(next(iter(states.values())).progress)
    own = {
        number: _Part(
            part, states[number], _with_fixed_attack(weight_objective, supernet, part, states[number], memory)
        )
        for number, part in shards.parts(batch).items()
    }
    values: dict[str, float] = {}
    if held_out is not None:
        values = _architecture_step(
            supernet, settings, stage, objectives, own, held_out, rate, optimiser, adam, memory, shards
        )
    weights = supernet.weight_parameters()

    def of_shard(number: int) -> Step:
        loss, metrics = own[number].objective(supernet, own[number].batch, own[number].state)
        return loss.detach(), [*torch.autograd.grad(loss, weights, allow_unused=True)], metrics

    loss, gradients, metrics = shards.step(supernet, of_shard)
    norm = gradient_step(gradients, weights, optimiser, rate, settings.weights.clip)
    return values, {
        "weight_loss": float(loss),
        "weight_accuracy": float(metrics["accuracy"]),
        "weight_gradient_norm": float(norm),
    }


class _Part(NamedTuple):
    """A shard of a batch of the weights, and their objective with its attack carried out."""

    batch: Batch
    state: State
    objective: Objective


def _supernet(space: CellSpace, data: ImageData, settings: Search, seed: int) -> Supernet:
    """A fresh supernet whose initial weights depend on the seed only."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            supernet = space.supernet(
                channels=settings.channels,
                cells=settings.cells,
                input_shape=data.input_shape,
                classes=len(data.classes),
                mean=data.mean,
                std=data.std,
                partial_channels=settings.partial_channels,
                sampled=isinstance(settings.relaxation, SampledPath),
            )
    except ValueError as error:
        raise InputError(f"search: {error}") from None
    if settings.precision == "bfloat16":
        supernet.forward = in_bfloat16(supernet.forward)  # type: ignore[method-assign, assignment]
    if settings.recompute_cells:
        for cell in supernet.cells:
            recompute(cell)
    return supernet.to(data.x_train.device)


def _paired(
    data: ImageData, split: Split, settings: Search, seed: int, epoch: int, steps: int
) -> Iterator[tuple[Batch, Batch]]:
    """Batches of the weights part beside batches of the architecture part, ``steps`` of them."""
    device = data.x_train.device
    streams = []
    for name, indices in (("weights", split.weights), ("architecture", split.architecture)):
        streams.append(
            batches(
                data.x_train,
                data.y_train,
                indices.to(device),
                batch_size=settings.batch_size,
                shuffle=generator(seed, f"search order {name}", epoch),
                augmentation=settings.augmentation,
                augmentation_generator=generator(seed, f"search augmentation {name}", epoch, device=device),
                drop_last=True,
                trace=settings.reuse_perturbations,
            )
        )
    # Parts may differ in size by rounding; the longer one's last batch is left out in this epoch.
    for _, pair in zip(range(steps), zip(*streams, strict=False), strict=False):
        yield pair


def _check_finite(values: Mapping[str, float], where: str, settings: Search) -> None:
    wrong = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        raise Diverged(
            f"the search is not finite any more at {where} ({', '.join(wrong)}): lower search.weights.learning_rate "
            f"(now {settings.weights.learning_rate}) or search.architecture.learning_rate (now "
            f"{settings.architecture.learning_rate})"
        )


def _add_means(sums: dict[str, float], values: Mapping[str, float], count: int) -> None:
    """Add to the epoch's means the values of one of ``count`` steps."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value / count


def _with_fixed_attack(
    objective: Objective, supernet: Supernet, batch: Batch, state: State, memory: PerturbationMemory | None
) -> Objective:
    """``objective`` with its attack carried out once, at the present weights and architecture.

    The unrolled gradient evaluates the same loss at several weights; the adversarial images stay those of the
    present ones, as in the released ARNAS code.
    """
    attack = getattr(objective, "attack", None)
    if attack is None:
        return objective
    if memory is None:
        x_adv = attack(supernet, batch.x, batch.y, generator=state.attack_generator)
    else:
        x_adv = memory.attack(attack, supernet, batch, state.attack_generator)
    return dataclasses.replace(objective, attack=Fixed(x_adv))  # type: ignore[type-var]


def _architecture_step(
    supernet: Supernet,
    settings: Search,
    stage: Stage,
    objectives: Mapping[str, Objective],
    own: Mapping[int, _Part],
    held_out: Batch,
    rate: float,
    optimiser: torch.optim.SGD,
    adam: torch.optim.Adam,
    memory: PerturbationMemory | None,
    shards: Shards,
) -> dict[str, float]:
    """One Adam step on the architecture parameters; returns the losses of the stage's objectives and gamma."""
    losses: dict[tuple[int, str], Tensor] = {}
    unseen = shards.parts(held_out)
    now = 0  # the shard that losses are of

    def mean(work: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        def of_shard(number: int) -> Sequence[Tensor]:
            nonlocal now
            now = number
            return work()

        return shards.mean(of_shard)

    def loss_of(name: str, fixed: Mapping[int, Objective]) -> Loss:
        def evaluate() -> Tensor:
            loss, _ = fixed[now](supernet, unseen[now], own[now].state)
            losses[now, name] = loss.detach()
            return loss

        return evaluate

    def weight_loss() -> Tensor:
        return own[now].objective(supernet, own[now].batch, own[now].state)[0]

    with frozen_statistics(supernet):
        closures = [
            loss_of(
                name,
                {
                    number: _with_fixed_attack(objectives[name], supernet, part, own[number].state, memory)
                    for number, part in unseen.items()
                },
            )
            for name in stage.objectives
        ]
        weight_step_taken = WeightStep(
            rate,
            settings.weights.momentum,
            settings.weights.weight_decay,
            [optimiser.state[weight].get("momentum_buffer") for weight in supernet.weight_parameters()],
        )
        gradients = settings.gradient(supernet, weight_loss, closures, weight_step_taken, mean)
    scaled = [
        gradient * (stage.adversarial_gradient_scale if name == "adversarial" else 1.0)
        for name, gradient in zip(stage.objectives, gradients, strict=True)
    ]
    reached = shards.mean(lambda number: [losses[number, name] for name in stage.objectives])
    values = {f"{name}_loss": float(loss) for name, loss in zip(stage.objectives, reached, strict=True)}
    if stage.combine == "min_norm":
        direction, gamma = min_norm_direction(scaled[0], scaled[1])
        values["gamma"] = gamma
    else:
        direction = torch.stack(scaled).sum(0)
    values["architecture_gradient_norm"] = float(direction.norm())
    architecture = supernet.architecture_parameters()
    for parameter, part in zip(
        architecture, direction.split([parameter.numel() for parameter in architecture]), strict=True
    ):
        parameter.grad = part.view_as(parameter).clone()
    adam.step()
    adam.zero_grad(set_to_none=True)
    return values


def _epoch_record(
    space: CellSpace,
    supernet: Supernet,
    data: ImageData,
    split: Split,
    settings: Search,
    attack: Attack,
    seed: int,
    epoch: int,
    stage: Stage,
    values: dict[str, float],
    shards: Shards,
) -> Record:
    """What is logged of an epoch: mean losses, accuracies on the architecture part, and the state of alpha."""
    device = data.x_train.device
    # The part is in a fixed order; a permutation drawn once per seed makes the judged images representative.
    order = torch.randperm(len(split.architecture), generator=generator(seed, "monitored"))[: settings.monitored]
    judged = split.architecture[order].to(device)

    def stream(number: int) -> torch.Generator:
        return shards.generator(number, seed, "monitor attack", epoch, device=device)

    natural, robust = accuracies(supernet, data, judged, attack, stream, settings.batch_size, shards)
    mixing = {kind: table.detach() for kind, table in supernet.mixing_weights().items()}
    genotype = space.discretise(mixing)
    return {
        "epoch": epoch,
        "stage": "+".join(stage.objectives),
        **values,
        "natural_accuracy": natural,
        "robust_accuracy": robust,
        "alpha_entropy": monitor.alpha_entropies(mixing),
        "mixing_weights": {kind: monitor.by_operation(space.operations, table) for kind, table in mixing.items()},
        "parameter_free_edges": {kind: list(pair) for kind, pair in monitor.parameter_free_edges(genotype).items()},
        "genotype": genotype.to_data(),
        "warnings": monitor.collapse_warnings(genotype, epoch),
    }
