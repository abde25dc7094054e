"""What a comparison showed, in plain lines: who is more robust than the reference, by more than noise, and who is not
to be believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nas.report.doubts import MANY, guessing, listed, masking

Data = Mapping[str, Any]


def comparison_verdict(results: Data) -> list[str]:
    """Every contender against the reference, and reasons for doubt.

    "Beyond noise" means that the 95% intervals of the worst cases do not overlap and, where there are several seeds,
    that every seed of the better one is above every seed of the other: a cautious rule, which may call a small true
    difference noise but seldom the reverse.
    """
    contenders = results["contenders"]
    reference = next(c for c in contenders if c["name"] == results["reference"])
    lines = []
    if reference.get("worst_case") is None:
        lines.append(f"The reference '{reference['name']}' failed: nothing is set against it.")
    else:
        lines.append(f"Reference: {reference['name']}, worst case {_percent(reference['worst_case']['mean'])}.")
        for outcome in ("more robust than", "less robust than", "not measurably more or less robust than"):
            group = [
                contender
                for contender in contenders
                if contender is not reference
                and contender.get("worst_case") is not None
                and _outcome(contender, reference) == outcome
            ]
            if group:
                verb = "is" if len(group) == 1 else "are"
                lines.append(f"{_named(group, reference)} {verb} {outcome} {reference['name']}.")
    return lines + _doubts(results)


def _outcome(one: Data, other: Data) -> str:
    if _above(one, other):
        return "more robust than"
    return "less robust than" if _above(other, one) else "not measurably more or less robust than"


def _above(one: Data, other: Data) -> bool:
    """Whether ``one`` is more robust than ``other`` beyond noise."""
    values = [[run["worst_case"] for run in each["runs"] if "failed" not in run] for each in (one, other)]
    return bool(one["interval"][0] > other["interval"][1] and min(values[0]) > max(values[1]))


def _named(group: list[Data], reference: Data) -> str:
    """The contenders of a group with their distance from the reference; of many only the ends."""
    if len(group) <= MANY:
        return listed([_against(contender, reference) for contender in group])
    ends = sorted(group, key=lambda contender: float(contender["worst_case"]["mean"]))
    low, high = (_against(contender, reference) for contender in (ends[0], ends[-1]))
    return f"{len(group)} contenders, from {low} to {high},"


def _against(one: Data, other: Data) -> str:
    points = round(100 * (one["worst_case"]["mean"] - other["worst_case"]["mean"]), 1)
    natural = round(100 * (one["natural"]["mean"] - other["natural"]["mean"]), 1)
    return f"{one['name']} ({points:+.1f} points, natural {natural:+.1f})"


def _doubts(results: Data) -> list[str]:
    contenders = results["contenders"]
    natural = {c["name"]: c["natural"]["mean"] for c in contenders if c.get("natural") is not None}
    lines = guessing(natural, results["data"]["test"], len(results["data"]["classes"]))
    failed = {c["name"]: c["masking"] for c in contenders if (c.get("masking") or {}).get("verdict") == "fail"}
    lines += masking({name: [*found["checks"]] for name, found in failed.items()})
    reasons: dict[str, list[str]] = {}
    for contender in contenders:
        runs = [run for run in contender["runs"] if "failed" in run]
        if runs:
            told = f"failed in {len(runs)} of {len(contender['runs'])} seeds: {runs[0]['failed'].removesuffix('.')}."
            reasons.setdefault(told, []).append(contender["name"])
    lines += [f"{listed(names)} {told}" for told, names in reasons.items()]
    for contender in contenders:
        detection = contender.get("detection")
        if detection is not None:
            adaptive = detection["attacks"]["adaptive"]
            caught = adaptive["detected"]
            lines.append(
                f"{contender['name']}: of what the attack that knows the detector gets misclassified, "
                + ("nothing was left to detect." if caught is None else f"{_percent(caught)} is detected.")
            )
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
