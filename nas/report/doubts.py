"""Reasons not to believe accuracies, in plain lines, the same for a run and a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nas.evaluation.interval import wilson
from nas.search.monitor import REMEDY, collapsing


def guessing(natural: Mapping[str, float], n: int, classes: int) -> list[str]:
    """A line on networks that are right on natural images no more often than guessing is.

    natural: accuracy by name on ``n`` test images. Such a network, trained with too large a learning rate or too much
    perturbation for its data, often answers with one class whatever it sees, which no attack can change.
    """
    poor = [name for name, share in natural.items() if n and wilson(round(share * n), n)[0] <= 1 / classes]
    if not poor:
        return []
    return [
        f"No better than guessing among {classes} classes: {listed(poor)}. Nothing follows from "
        f"{'it' if len(poor) == 1 else 'them'}: lower the learning rate or epsilon, train longer, or take more images."
    ]


def masking(failed: Mapping[str, Sequence[str]]) -> list[str]:
    """A line on networks whose masking checks failed; failed: their names, for each of these networks."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, checks in failed.items():
        groups.setdefault(tuple(checks), []).append(name)
    if not groups:
        return []
    told = "; ".join(f"{listed(names)} ({', '.join(checks)})" for checks, names in groups.items())
    return [f"Masking checks failed, robust accuracy may be overstated: {told}."]


def collapsed(epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line on a search whose last epoch, of ``epochs``, left cells of skip connections and pools."""
    found = collapsing(epochs[-1].get("parameter_free_edges") or {}) if epochs else []
    if not found:
        return []
    return [f"The search may have collapsed: {listed(found)} are skips or pools. To avoid it, {REMEDY}."]


MANY = 6
"""More names than these are not listed one by one."""


def listed(items: Sequence[str]) -> str:
    """ "a, b and c"; of many, the first and how many others there are."""
    if len(items) > MANY:
        return f"{', '.join(items[: MANY // 2])} and {len(items) - MANY // 2} others"
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
