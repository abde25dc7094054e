"""Splits are disjoint, cover everything, stratified and the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nas.data.split import split, subset
from nas.errors import InputError

UNEVEN = torch.tensor([0] * 3 + [1] * 10 + [2] * 57 + [4] * 130)[torch.randperm(200, generator=torch.manual_seed(3))]
EVEN = torch.arange(1000) % 10


@pytest.mark.parametrize("labels", [UNEVEN, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("architecture", [0, 0.01, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("validation", [0, 0.01, 0.1, 0.5, 0.99])
def test_parts_are_disjoint_cover_and_hold_every_class(labels: Tensor, architecture: float, validation: float) -> None:
    parts = split(labels, architecture=architecture, validation=validation, seed=5)
    rows = torch.cat([parts.weights, parts.architecture, parts.validation])
    assert torch.equal(rows.sort().values, torch.arange(len(labels)))
    wanted = {"weights": True, "architecture": architecture > 0, "validation": validation > 0}
    for name, present in wanted.items():
        part = getattr(parts, name)
        assert part.dtype == torch.int64 and (part.diff() > 0).all()
        assert set(labels[part].tolist()) == (set(labels.tolist()) if present else set())


@pytest.mark.parametrize(("architecture", "validation"), [(0.5, 0.1), (0.3, 0.25), (0.5, 0), (0, 0.2), (1 / 3, 1 / 7)])
def test_sizes_are_the_rounded_shares_overall_and_in_each_class(architecture: float, validation: float) -> None:
    parts = split(UNEVEN, architecture=architecture, validation=validation, seed=0)
    held_out = round(200 * validation)
    assert len(parts.validation) == held_out
    assert len(parts.architecture) == round((200 - held_out) * architecture)
    exact = UNEVEN.bincount() * validation
    assert ((UNEVEN[parts.validation].bincount(minlength=5) - exact).abs() <= 1).all()
    training = parts.training
    assert torch.equal(training, torch.cat([parts.weights, parts.architecture]).sort().values)
    exact = UNEVEN[training].bincount() * architecture
    assert ((UNEVEN[parts.architecture].bincount(minlength=5) - exact).abs() <= 1).all()


def test_the_seed_decides() -> None:
    def rows(seed: int) -> list[int]:
        torch.rand(seed + 1)  # the global state plays no part
        return split(EVEN, architecture=0.5, validation=0.1, seed=seed).weights.tolist()

    assert rows(1) == rows(1) != rows(2)
    before = torch.get_rng_state()
    rows(0)
    torch.set_rng_state(before)
    split(EVEN, architecture=0.5, validation=0.1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_validation_part_does_not_depend_on_the_architecture_share() -> None:
    few, many = (split(UNEVEN, architecture=share, validation=0.2, seed=1) for share in (0.1, 0.8))
    assert torch.equal(few.validation, many.validation)


def test_three_samples_a_class_still_reach_every_part() -> None:
    labels = torch.arange(30) % 10
    parts = split(labels, architecture=0.5, validation=0.1, seed=0)
    assert [len(part) for part in (parts.weights, parts.architecture, parts.validation)] == [10, 10, 10]


@pytest.mark.parametrize("share", [-0.1, 1, 1.5, float("nan")])
def test_impossible_shares(share: float) -> None:
    with pytest.raises(InputError, match="architecture share"):
        split(EVEN, architecture=share, validation=0.1, seed=0)
    with pytest.raises(InputError, match="validation share"):
        split(EVEN, architecture=0.5, validation=share, seed=0)


def test_too_small_a_class_is_named() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    with pytest.raises(InputError, match=r"class 1 has 2 .*3 parts"):
        split(labels, architecture=0.5, validation=0.3, seed=0)
    assert len(split(labels, architecture=0.5, validation=0, seed=0).validation) == 0
    with pytest.raises(InputError, match=r"class 1 has 1 .*2 parts"):
        split(labels[:4], architecture=0.5, validation=0, seed=0)
    assert len(split(labels[:4], architecture=0, validation=0, seed=0).weights) == 4
    with pytest.raises(InputError, match="no samples"):
        split(labels[:0], architecture=0, validation=0, seed=0)


@pytest.mark.parametrize("size", [0, 1, 3, 4, 50, 199, 200])
def test_subset_is_a_stratified_choice(size: int) -> None:
    rows = subset(UNEVEN, size, torch.Generator().manual_seed(0))
    assert len(rows) == size and (rows.diff() > 0).all()
    counts = UNEVEN[rows].bincount(minlength=5)
    assert ((counts - UNEVEN.bincount() * size / 200).abs() <= 1).all() or size == 4
    if size >= 4:
        assert set(UNEVEN[rows].tolist()) == {0, 1, 2, 4}


def test_every_sample_can_land_in_every_part() -> None:
    labels = torch.arange(12) % 2
    seen: dict[str, set[int]] = {name: set() for name in ("weights", "architecture", "validation")}
    for seed in range(60):
        parts = split(labels, architecture=0.5, validation=0.3, seed=seed)
        for name, rows in seen.items():
            rows.update(getattr(parts, name).tolist())
    assert all(rows == set(range(12)) for rows in seen.values())
