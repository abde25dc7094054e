"""Accuracy under attack: worst case per sample over attacks and restarts, with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.attacks.losses import right
from nas.errors import InputError
from nas.evaluation.expectation import suited
from nas.evaluation.interval import wilson
from nas.model_state import constant, evaluating
from nas.objective import Attack
from nas.prediction import begin
from nas.shards import Shards
from nas.tensor_file import read_tree, write_tree


@dataclass(frozen=True)
class Trial:
    """An attack and how often it starts anew. A sample counts as robust only if it survives every start."""

    attack: Attack
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.restarts < 1:
            raise InputError(f"restarts must be at least 1, not {self.restarts}")

    def __str__(self) -> str:
        return f"{self.attack}" + (f", {self.restarts} restarts" if self.restarts > 1 else "")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Natural accuracy and accuracy under each attack, as masks of samples that stay right.

    natural, worst_case: [N] bool;  attacks: name -> [N] bool;  settings: name -> what was run;  labels: [N] int64,
    where accuracies by class are wanted.
    """

    natural: Tensor
    attacks: Mapping[str, Tensor]
    settings: Mapping[str, str] = field(default_factory=dict)
    labels: Tensor | None = None

    @property
    def worst_case(self) -> Tensor:
        """Samples that are right and stay right under every attack."""
        worst = self.natural
        for survived in self.attacks.values():
            worst = worst & survived
        return worst

    def to_data(self) -> dict[str, Any]:
        """Accuracies, the 95 % interval of the worst case, and how each was made."""
        n = len(self.natural)
        return {
            "n": n,
            "natural": float(self.natural.double().mean()),
            "attacks": {name: float(mask.double().mean()) for name, mask in self.attacks.items()},
            "worst_case": float(self.worst_case.double().mean()),
            "interval": list(wilson(int(self.worst_case.sum()), n)),
            "attack_settings": dict(self.settings),
            "per_class": self._per_class(),
        }

    def _per_class(self) -> list[dict[str, Any]]:
        """Accuracies of the classes that are there."""
        classes = [] if self.labels is None else self.labels.unique().tolist()
        rows = []
        for label in classes:
            own = self.labels == label
            n = int(own.sum())
            robust = int(self.worst_case[own].sum())
            natural = int(self.natural[own].sum())
            interval = list(wilson(robust, n))
            rows.append(
                {"class": label, "n": n, "natural": natural / n, "worst_case": robust / n, "interval": interval}
            )
        return rows


def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    trials: Mapping[str, Trial],
    *,
    seed: int,
    batch_size: int = 512,
    shards: Shards | None = None,
    progress_file: Path | None = None,
    tick: Callable[[float], None] = lambda progress: None,
) -> Evaluation:
    """Evaluate ``model`` in eval mode on images ``x`` [N, C, H, W] in [0, 1] with labels ``y`` [N].

    Within a trial each restart attacks the samples that survived the earlier ones. After every restart the masks are
    written to ``progress_file``, from which a later call goes on to the same result. A model that answers at random is
    judged by single predictions of it, each a mean over its draws, and attacked as ``expectation.suited`` says.
    shards: parts that the samples are cut into, for a data-parallel run.
    """
    check_images(x, y)
    shards = shards or Shards()
    trials = {name: replace(trial, attack=suited(trial.attack, model)) for name, trial in trials.items()}
    natural: Tensor | None = None
    masks: dict[str, Tensor] = {}
    done = 0
    if progress_file is not None and progress_file.exists():
        tree = read_tree(progress_file, x.device)
        natural, masks, done = tree["natural"], tree["masks"], tree["done"]
    # One derivation for all batches; gradients of the weights are nobody's business here.
    with evaluating(model), constant(model):
        check_model(model, x, y)
        begin(model)
        if natural is None:
            natural = correct(model, x, y, batch_size)
        total = sum(trial.restarts for trial in trials.values())
        unit = 0
        for name, trial in trials.items():
            survivors = masks.get(name, natural)
            for restart in range(trial.restarts):
                unit += 1
                if unit <= done:
                    continue
                numbered = {
                    number: unit if shards.count == 1 else unit * shards.count + number for number in shards.own
                }
                streams = shards.generators(seed, f"evaluate {name}", restart, device=x.device)
                of_shard = partial(_attacked, model, x, y, survivors, trial.attack, batch_size, numbered, streams)
                survivors = shards.withstood(len(y), of_shard, x.device)
                masks[name] = survivors
                if progress_file is not None:
                    write_tree({"natural": natural, "masks": masks, "done": unit}, progress_file)
                tick(unit / total)
    attacks = {name: masks[name] for name in trials}
    return Evaluation(natural, attacks, {name: str(trial) for name, trial in trials.items()}, y)


def check_images(x: Tensor, y: Tensor) -> None:
    """Raise ``InputError`` for images and labels that cannot be evaluated."""
    if len(x) != len(y) or len(x) == 0:
        raise InputError(
            f"{len(x)} images and {len(y)} labels: an evaluation needs the same number of both, at least 1"
        )
    if x.dim() != 4:
        raise InputError(f"images must be [N, C, H, W], not of shape {tuple(x.shape)}")
    if not x.is_floating_point() or not (float(x.min()) >= 0 and float(x.max()) <= 1):  # NaN is neither
        raise InputError("images must be floating point with pixels in [0, 1]; normalisation belongs inside the model")
    if y.dtype != torch.int64 or y.dim() != 1:
        raise InputError(f"labels must be int64 of shape [N], not {y.dtype} of shape {tuple(y.shape)}")


def check_model(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Raise ``InputError`` for a model whose answers cannot be judged. Tried on a few images of the batch."""
    with torch.no_grad():
        logits = model(x[:4])
    if not isinstance(logits, Tensor):
        raise InputError(
            f"the model returns a {type(logits).__name__}, not logits [N, classes]: wrap it in a module that returns "
            "them"
        )
    if logits.dim() != 2 or len(logits) != len(x[:4]) or logits.shape[1] < 2 or not logits.is_floating_point():
        raise InputError(
            f"the model returns {logits.dtype} of shape {tuple(logits.shape)} for {len(x[:4])} images: "
            "logits [N, classes] are needed, of at least 2 classes"
        )
    if not bool(logits.isfinite().all()):
        raise InputError("the model returns NaN or infinite logits for clean images: it is damaged, or diverged")
    lowest, highest = int(y.min()), int(y.max())
    if lowest < 0 or highest >= logits.shape[1]:
        raise InputError(
            f"labels {lowest}..{highest}, but the model has {logits.shape[1]} classes 0..{logits.shape[1] - 1}"
        )


def correct(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Which samples [N] the model, as it stands, gets right."""
    with torch.no_grad():
        pairs = zip(x.split(batch_size), y.split(batch_size), strict=True)
        return torch.cat([right(model(images), labels) for images, labels in pairs])


def _attacked(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    survivors: Tensor,
    attack: Attack,
    batch_size: int,
    numbered: Mapping[int, int],
    streams: Mapping[int, torch.Generator],
    shard: int,
    part: slice,
) -> Tensor:
    """``survivors[part]`` without the samples that one start of the attack breaks."""
    begin(model, numbered[shard])
    x, y, survivors = x[part], y[part], survivors[part].clone()
    for rows in survivors.nonzero().squeeze(1).split(batch_size):
        x_adv = attack(model, x[rows], y[rows], generator=streams[shard])
        with torch.no_grad():
            survivors[rows] = right(model(x_adv), y[rows])
    return survivors
