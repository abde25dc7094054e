"""The only loop that trains the weights of a discovered network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas import ranks
from nas.activations.annealing import anneal
from nas.activations.transfer import activation_parameters
from nas.data.augmentation import Augmentation
from nas.data.batches import batch_count, batches
from nas.data.image_data import ImageData
from nas.data.split import Split
from nas.defences.noise import NoiseEnsemble
from nas.errors import Diverged, InputError
from nas.objective import (
    Attack,
    Batch,
    Metrics,
    Objective,
    Remembers,
    Replays,
    Setting,
    StartsFrom,
    State,
    TrainsOn,
    gradients_of,
    kept_by,
    prepared,
)
from nas.optimisation import Sgd, gradient_step, optimiser_tree, restore_optimiser
from nas.precision import Precision, passes_in
from nas.prediction import begin
from nas.randomness import generator
from nas.shards import Shards
from nas.tensor_file import read_tree, write_tree
from nas.training.extra_images import ExtraImages
from nas.training.overfitting import collapse_warning, robust_overfitting
from nas.training.weight_average import EpochAverage, MovingAverage
from nas.validation import accuracies

Record = dict[str, Any]
LOOK_EVERY = 50
"""Steps after which losses are looked at: a device that works ahead is not waited for at every one."""


@dataclass(frozen=True)
class Training:
    """How long and with what a network is trained.

    ema: decay of the exponential moving average of the weights that is validated and kept; 0 for none. ema_warmup:
    share of the training over which it is a copy of the weights; then it decays quicker at first. 0: decays alike.
    swa: share of the training after which the mean of the weights at the ends of epochs (stochastic weight averaging)
    is validated and kept; 0 for none. It wants a schedule that still moves there, "steps" or "constant".
    validate_every: epochs between validations; the last epochs' validation always takes place.
    precision: "bfloat16" carries out the passes of training steps by autocast, for devices that gain by it; weights,
    losses and validation stay float32.
    """

    epochs: int = 30
    batch_size: int = 128
    optimiser: Sgd = field(default_factory=Sgd)
    augmentation: Augmentation = field(default_factory=Augmentation)
    ema: float = 0.0
    ema_warmup: float = 0.0
    swa: float = 0.0
    validate_every: int = 1
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.validate_every < 1:
            raise InputError("epochs and validate_every must be at least 1, batch_size at least 2")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is a decay of at least 0 and below 1, not {self.ema}")
        for name, share in (("ema_warmup", self.ema_warmup), ("swa", self.swa)):
            if not 0 <= share < 1:
                raise InputError(f"{name} is a share of the training of at least 0 and below 1, not {share}")
        if self.ema_warmup and not self.ema:
            raise InputError("ema_warmup is that of a moving average: set ema, for example to 0.995, or leave it out")
        if self.ema and self.swa:
            raise InputError("ema and swa are two averages, and one network is kept: set one of them to 0")

    def average(self, model: nn.Module, steps: int) -> MovingAverage | EpochAverage | None:
        """The average of the weights that is kept instead of them, if one is; steps: of an epoch."""
        if self.ema:
            return MovingAverage(model, self.ema, round(self.ema_warmup * self.epochs * steps))
        return EpochAverage(model, self.swa) if self.swa else None


@dataclass(frozen=True)
class Validation:
    """Natural and robust accuracy on held-out images."""

    natural: float
    robust: float


def train(
    model: nn.Module,
    data: ImageData,
    split: Split,
    objective: Objective,
    training: Training,
    *,
    validation_attack: Attack,
    seed: int,
    extra: ExtraImages | None = None,
    shards: Shards | None = None,
    checkpoint: Path | None = None,
    log: Callable[[Record], None] = lambda record: None,
    history: Callable[[list[Record]], None] = lambda records: None,
    tick: Callable[[float], None] = lambda progress: None,
) -> list[Record]:
    """Train ``model`` in place on ``split.training``; it ends with the weights of the best validated epoch.

    Best means highest robust accuracy on ``split.validation``, then highest natural accuracy, then latest; epochs in
    which an activation still hardens (``nas.activations.annealing``) do not count. The
    state is written to ``checkpoint`` after every epoch; a later call with the same arguments goes on from there
    to the same result. extra: images that make up a share of every batch. shards: parts that batches are cut
    into, for a data-parallel run. ``log`` gets each epoch's record, ``history``
    once all records so far, ``tick`` the progress. A validated record says by how much robust accuracy is below the
    best so far (``robust_overfitting``), and warns of catastrophic overfitting. What ``objective`` asks for beyond a
    loss (see ``nas.objective``) is heeded; it is prepared here, in the folder of ``checkpoint``. Raises ``Diverged``
    when a loss or a gradient is not finite; the checkpoint then holds the last good epoch, and ``model`` the weights of
    the best one.
    """
    if len(split.validation) == 0:
        raise InputError("no validation images to choose a checkpoint by: set data.validation above 0")
    shards = shards or Shards()
    shards.check(training.batch_size, "train.batch_size")
    device = data.x_train.device
    folder = None if checkpoint is None else checkpoint.parent
    objective = prepared(objective, Setting(model, data, split, seed, training.epochs, training.batch_size, folder))
    memory, start = kept_by(objective, Remembers), kept_by(objective, StartsFrom)
    if shards.count > 1:
        _check_shards(model, memory)
    if start is not None:
        weights = start.initial_weights()
        if weights.keys() != model.state_dict().keys():
            raise InputError(
                f"{type(start).__name__} begins with weights of a network of its own, which this one, steered or "
                "compressed, cannot take: set compress.fine_tune.method, and epochs of the compression to 0"
            )
        model.load_state_dict(weights)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = training.optimiser.optimiser(parameters, activation_parameters(model))
    x, y, indices = data.x_train, data.y_train, split.training.to(device)
    own, again = kept_by(objective, TrainsOn), kept_by(objective, Replays)
    if own is not None:
        x, y = own.training_images()
        indices = torch.arange(len(y), device=device)
    if own is not None and extra is not None:
        raise InputError(f"{type(own).__name__} brings images of its own, which extra ones cannot join: leave one out")
    rows_of: Callable[[int], Tensor] | None = None
    if extra is not None:
        more_x, more_y = extra(data, split)
        more = torch.arange(len(y), len(y) + len(more_y), device=device)
        x, y = torch.cat([x, more_x]), torch.cat([y, more_y])
        rows_of = partial(extra.rows, indices, more, training.batch_size, seed)
        rows_of(0)  # what does not fit is told before the first step
    replays = 1 if again is None else again.replays
    steps = replays * batch_count(len(indices), training.batch_size, True)
    average = training.average(model, steps)
    records: list[Record] = []
    best_state, best_key = _copy(model), (-1.0, -1.0)
    if checkpoint is not None and checkpoint.exists():
        tree = read_tree(checkpoint, device)
        model.load_state_dict(tree["model"])
        restore_optimiser(optimiser, tree["optimiser"])
        if average is not None:
            average.restore(tree["average"])
        if memory is not None:
            memory.restore(tree["objective"])
        records, best_state, best_key = tree["records"], tree["best"], tuple(tree["best_key"])
    history(records)

    for epoch in range(len(records), training.epochs):
        attacks = shards.generators(seed, "attack", epoch, device=device)
        methods = shards.generators(seed, "method", epoch, device=device)
        sums: dict[str, Tensor] = {}
        unseen: list[Tensor] = []  # losses and gradient norms of the steps since they were last looked at
        anneal(model, epoch, training.epochs)
        model.train()
        epoch_batches = batches(
            x,
            y,
            indices if rows_of is None else rows_of(epoch),
            batch_size=training.batch_size,
            shuffle=generator(seed, "order", epoch) if rows_of is None else None,
            augmentation=training.augmentation,
            augmentation_generator=generator(seed, "augmentation", epoch, device=device),
            drop_last=True,
        )
        for step, batch in enumerate(batch for batch in epoch_batches for _ in range(replays)):
            progress = (epoch + step / steps) / training.epochs
            states = {
                number: State(epoch, epoch * steps + step, progress, attacks[number], methods[number])
                for number in shards.own
            }
            with passes_in(training.precision, model, device):
                of_shard = partial(_of_shard, objective, model, parameters, shards.parts(batch), states)
                loss, gradients, metrics = shards.step(model, of_shard)
            rate, clip = training.optimiser.rate(progress), training.optimiser.clip
            norm = gradient_step(gradients, parameters, optimiser, rate, clip)
            if average is not None:
                average.after_step(model)
            for name, value in {"loss": loss, "gradient_norm": norm, **metrics}.items():
                sums[name] = sums.get(name, 0) + value
            unseen.append(torch.stack([loss, norm]))
            if len(unseen) == LOOK_EVERY or step + 1 == steps:
                if (wrong := _not_finite(torch.stack(unseen))) is not None:
                    model.load_state_dict(best_state)
                    place, what = wrong
                    raise Diverged(
                        f"{what} at step {step + 2 - len(unseen) + place} of {steps} of epoch {epoch}: lower the "
                        f"learning rate (now {training.optimiser.learning_rate}) or the gradient clip (now "
                        f"{training.optimiser.clip}); {_kept(records, checkpoint)}"
                    )
                unseen.clear()
            tick((epoch + (step + 1) / steps) / training.epochs)
        record: Record = {"epoch": epoch, **{name: float(value) / steps for name, value in sums.items()}}
        if average is not None:
            own_images = batches(
                data.x_train, data.y_train, split.training, batch_size=training.batch_size, drop_last=True
            )
            average.after_epoch(model, epoch / training.epochs, (batch.x for batch in own_images))
        if (epoch + 1) % training.validate_every == 0 or epoch + 1 == training.epochs:
            judged = model if average is None or average.network is None else average.network
            # An activation that has not hardened yet is not the one that was asked for.
            finished = anneal(judged, epoch, training.epochs)
            validation = validate(judged, data, split.validation, validation_attack, seed, training.batch_size, shards)
            record |= {"validation_natural": validation.natural, "validation_robust": validation.robust}
            record["robust_overfitting"] = robust_overfitting(records, validation.robust)
            if warning := collapse_warning([*records, record]):
                record["warnings"] = [warning]
            key = (validation.robust, validation.natural)
            if finished and key >= best_key:
                best_state, best_key = _copy(judged), key
        ranks.check_same([*model.parameters(), *model.buffers()], "weights")
        records.append(record)
        log(record)
        if checkpoint is not None:
            tree = {
                "model": dict(model.state_dict()),
                "optimiser": optimiser_tree(optimiser),
                "best": best_state,
                "best_key": list(best_key),
                "records": records,
            }
            if average is not None:
                tree["average"] = average.tree()
            if memory is not None:
                tree["objective"] = dict(memory.tree())
            write_tree(tree, checkpoint)
    model.load_state_dict(best_state)
    return records


def validate(
    model: nn.Module,
    data: ImageData,
    indices: Tensor,
    attack: Attack,
    seed: int,
    batch_size: int,
    shards: Shards | None = None,
) -> Validation:
    """Natural accuracy and accuracy under ``attack`` on the training images ``indices``, in eval mode."""
    shards = shards or Shards()
    device = data.x_train.device

    def stream(number: int) -> torch.Generator:
        return shards.generator(number, seed, "validation", device=device)

    begin(model)
    return Validation(*accuracies(model, data, indices.to(device), attack, stream, max(batch_size, 256), shards))


def _of_shard(
    objective: Objective,
    model: nn.Module,
    parameters: list[nn.Parameter],
    parts: Mapping[int, Batch],
    states: Mapping[int, State],
    number: int,
) -> tuple[Tensor, list[Tensor | None], Metrics]:
    return gradients_of(objective, model, parts[number], states[number], parameters)


def _check_shards(model: nn.Module, memory: Remembers | None) -> None:
    """Raise ``InputError`` for what cannot be trained on one shard of a batch after another."""
    if memory is not None:
        raise InputError(
            f"{type(memory).__name__} carries a state from batch to batch, which shards of them have not: set "
            "shards = 1"
        )
    if any(isinstance(module, NoiseEnsemble) for module in model.modules()):
        raise InputError("a network that answers at random draws from one stream, shards from several: set shards = 1")


def _not_finite(steps: Tensor) -> tuple[int, str] | None:
    """The first of ``steps`` [steps, 2] of (loss, gradient's norm) with one that is no finite number, and which."""
    bad = steps.isfinite().logical_not().nonzero()
    if len(bad) == 0:
        return None
    place, column = bad[0].tolist()
    what = ("the training loss is", "the norm of the gradient is")[column]
    return place, f"{what} {steps[place, column].item()}"


def _kept(records: list[Record], checkpoint: Path | None) -> str:
    if checkpoint is None or not records:
        return "no epoch before it was kept"
    return f"{checkpoint} holds epoch {records[-1]['epoch']}, the last good one"


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
