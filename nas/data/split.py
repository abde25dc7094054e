"""Stratified, seeded parts of a labelled set: which samples train weights, which the architecture, which validate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nas.errors import InputError
from nas.randomness import generator


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of the training set, each in exactly one part and each part in ascending order: [n] int64, on the CPU."""

    weights: Tensor
    architecture: Tensor
    validation: Tensor

    @property
    def training(self) -> Tensor:
        """Rows of both training parts in ascending order: what a found network is trained on."""
        return torch.cat([self.weights, self.architecture]).sort().values


def split(labels: Tensor, *, architecture: float, validation: float, seed: int) -> Split:
    """Divide the samples with ``labels`` ([N] int64) into the three parts of a ``Split``, class by class.

    ``validation`` is the share of all samples, ``architecture`` the share of what then remains; both in [0, 1),
    and 0 leaves that part empty. Part sizes are the rounded shares, spread over the classes by largest remainder.
    Every class is in every part asked for: where a share is so small (or large) that this would fail, the part takes
    one sample more (or less) of that class. With the same seed, the validation part does not depend on
    ``architecture`` as long as both parts are asked for.

    Raises InputError for impossible shares and for a class with fewer samples than parts.
    """
    for name, share in (("architecture", architecture), ("validation", validation)):
        if not 0 <= share < 1:
            raise InputError(f"the {name} share of a split is {share}; it must be at least 0 and below 1")
    labels = labels.cpu()
    if len(labels) == 0:
        raise InputError("there are no samples to split; give at least one of each class")
    counts = labels.bincount().tolist()
    parts = 1 + (architecture > 0) + (validation > 0)
    for label, count in enumerate(counts):
        if 0 < count < parts:
            raise InputError(
                f"class {label} has {count} training sample(s), too few for a split into {parts} parts that each hold "
                "every class; add samples of it, or set the architecture or validation share to 0"
            )

    held_out = _shares(counts, validation, leave=parts - 1)
    remaining = [count - taken for count, taken in zip(counts, held_out, strict=True)]
    second = _shares(remaining, architecture, leave=1)

    rank = _rank_in_class(labels, generator(seed, "split"))
    until_validation = torch.tensor(held_out)[labels]
    until_architecture = until_validation + torch.tensor(second)[labels]
    return Split(
        weights=_rows(rank >= until_architecture),
        architecture=_rows((rank >= until_validation) & (rank < until_architecture)),
        validation=_rows(rank < until_validation),
    )


def subset(labels: Tensor, size: int, stream: torch.Generator) -> Tensor:
    """Rows of a random, stratified choice of ``size`` of the samples: [size] int64, ascending, on the CPU.

    Keeps the shares of the classes of ``labels`` ([N] int64) up to rounding; every class is in it if ``size`` allows.
    0 <= size <= N; ``stream`` is a CPU generator.
    """
    labels = labels.cpu()
    counts = labels.bincount().tolist()
    least = 1 if size >= sum(count > 0 for count in counts) else 0
    taken = _apportion(size, counts, [min(least, count) for count in counts], counts)
    return _rows(_rank_in_class(labels, stream) < torch.tensor(taken)[labels])


def _shares(counts: Sequence[int], share: float, leave: int) -> list[int]:
    """How many samples of each class make up ``share`` of all: at least 1, and at least ``leave`` stay behind."""
    if share == 0:
        return [0] * len(counts)
    least = [min(1, count) for count in counts]
    most = [max(0, count - leave) for count in counts]
    return _apportion(round(share * sum(counts)), counts, least, most)


def _apportion(total: int, counts: Sequence[int], least: Sequence[int], most: Sequence[int]) -> list[int]:
    """Spread ``total`` over the classes in proportion to ``counts`` by largest remainder, within the bounds."""
    samples = sum(counts)
    total = min(max(total, sum(least)), sum(most))
    taken = [
        min(max(count * total // samples, low), high) for count, low, high in zip(counts, least, most, strict=True)
    ]

    def owed(label: int) -> int:  # distance to the exact share, times ``samples`` to stay in whole numbers
        return counts[label] * total - taken[label] * samples

    missing = total - sum(taken)
    for _ in range(missing):
        taken[max((label for label in range(len(counts)) if taken[label] < most[label]), key=owed)] += 1
    for _ in range(-missing):
        taken[min((label for label in range(len(counts)) if taken[label] > least[label]), key=owed)] -= 1
    return taken


def _rank_in_class(labels: Tensor, stream: torch.Generator) -> Tensor:
    """For each sample its place in a random order of its own class, from 0: [N] int64."""
    shuffled = torch.randperm(len(labels), generator=stream)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - starts[labels[by_class]]
    return rank


def _rows(chosen: Tensor) -> Tensor:
    return chosen.nonzero().squeeze(1)
