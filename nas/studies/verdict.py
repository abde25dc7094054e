"""What a study showed, in about three plain lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nas.studies.claims import Claim
from nas.studies.ranking import Ranking

Data = Mapping[str, Any]


def study_verdict(configurations: Sequence[Data], claims: Sequence[Claim], rankings: Sequence[Ranking]) -> list[str]:
    """The best configuration, the claims, and what ranks robustness.

    configurations: as in results.json, the highest lower bound first.
    """
    if not configurations:
        return ["No trial is finished: nothing can be said yet."]
    lines = [_best(configurations)]
    if claims:
        lines.append(_claims(claims))
    telling = [one for one in rankings if one.interval[0] > 0 or one.interval[1] < 0]
    if telling:
        best = telling[0]
        low, high = best.interval
        lines.append(
            f"What goes with robustness most: {best.name} (Kendall's tau {best.tau:+.2f}, 95% interval {low:+.2f} to "
            f"{high:+.2f}, {best.n} configurations)."
        )
    elif rankings:
        lines.append(f"Nothing measured goes with robustness beyond chance over {rankings[0].n} configurations.")
    return lines


def _best(configurations: Sequence[Data]) -> str:
    best, others = configurations[0], configurations[1:]
    low, high = best["interval"]
    shape = f"depths {'-'.join(map(str, best['depths']))}, widths {'-'.join(map(str, best['widths']))}"
    line = (
        f"Best of {len(configurations)}: {shape} ({best['parameters']:,} parameters), worst case "
        f"{100 * best['robust']:.1f}% [{100 * low:.1f}, {100 * high:.1f}], natural {100 * best['natural']:.1f}%."
    )
    equal = [one for one in others if one["interval"][1] >= low]
    if equal:
        least = min(equal, key=lambda one: int(one["parameters"]))
        line += f" {len(equal)} others overlap with it"
        line += (
            f"; the smallest has {least['parameters']:,} parameters and {100 * least['robust']:.1f}%."
            if least["parameters"] < best["parameters"]
            else ", none smaller."
        )
    return line


def _claims(claims: Sequence[Claim]) -> str:
    parts = []
    for verdict in ("supported", "contradicted"):
        own = [one.statement.rstrip(".") for one in claims if one.verdict == verdict]
        if own:
            parts.append(f"{verdict}: {'; '.join(own)}")
    rest = sum(one.verdict == "not supported by this data" for one in claims)
    untested = sum(one.verdict == "cannot be tested" for one in claims)
    parts += [f"{rest} not supported by this data"] * (rest > 0) + [f"{untested} cannot be tested"] * (untested > 0)
    return f"Of {len(claims)} published claims, {'. '.join(parts)}."
