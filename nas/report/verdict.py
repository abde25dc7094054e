"""What a run showed, in about three plain lines: was the search worth it, and what did compression cost?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nas.evaluation.interval import wilson
from nas.report.doubts import collapsed, guessing, masking

Model = Mapping[str, Any]

EQUAL_SIZE = 0.1
"""Networks whose parameters differ by at most this share count as equally large."""


@dataclass(frozen=True)
class Score:
    """An accuracy and its 95% interval; without an interval nothing can be said about noise."""

    value: float
    interval: tuple[float, float] | None


def verdict(results: Mapping[str, Any]) -> list[str]:
    """The searched network against random cells, against the plain baseline, and against its compressed self.

    "Within noise" means that the 95% intervals overlap: a cautious rule, which may call a small true difference
    noise but seldom the reverse. Then come warnings where the numbers themselves are in doubt.
    """
    models: Sequence[Model] = results.get("models") or ()
    searched = _first(models, "searched")
    if searched is None:
        return ["No searched network was evaluated: nothing can be said about the search."]
    lines = [
        _against_random(searched, [model for model in models if model.get("role") == "random"]),
        _against(searched, _first(models, "plain"), "the plain baseline"),
        *(_against(searched, model, str(model.get("name"))) for model in models if model.get("role") == "published"),
        *(_compression(searched, model) for model in models if model.get("role") == "compressed"),
    ]
    return lines + _doubts(results)


def score(model: Model, which: str) -> Score | None:
    """The "natural" or "worst_case" accuracy of a model, None if it was not measured."""
    value = model.get(which)
    if value is None:
        return None
    given = model.get("interval") if which == "worst_case" else None
    if given is not None:
        return Score(value, (given[0], given[1]))
    n = model.get("n")
    return Score(value, wilson(round(value * n), n) if n else None)


def _against_random(searched: Model, randoms: Sequence[Model]) -> str:
    if not randoms:
        return "No random cells were evaluated: whether the search beats chance is not known."
    size = _sizes(searched, randoms)
    cells = f"{len(randoms)} random cells" if len(randoms) > 1 else "1 random cell"
    mine, theirs = score(searched, "worst_case"), _scores(randoms, "worst_case")
    if mine is None or not theirs:
        return f"Against {cells}{size}: the worst case was not measured on both sides."
    mean = _mean(theirs)
    line = f"{_outcome(mine, mean)} {cells}{size}: {_worst_case(mine)} against {_group(theirs)}, "
    line += f"{_difference(mine, mean)}."
    mine, theirs = score(searched, "natural"), _scores(randoms, "natural")
    return line + _natural(mine, _mean(theirs) if theirs else None)


def _against(searched: Model, other: Model | None, name: str) -> str:
    """Against one other network, called ``name``."""
    if other is None:
        return f"No {name.removeprefix('the ')} was evaluated."
    size = _sizes(searched, [other])
    mine, theirs = score(searched, "worst_case"), score(other, "worst_case")
    if mine is None or theirs is None:
        return f"Against {name}{size}: the worst case was not measured on both sides."
    natural = _natural(score(searched, "natural"), score(other, "natural"))
    return (
        f"{_outcome(mine, theirs)} {name}{size}: {_worst_case(mine)} against {_percent(theirs.value)}, "
        f"{_difference(mine, theirs)}.{natural}"
    )


def _compression(searched: Model, compressed: Model) -> str:
    line = f"Compression ('{compressed.get('name', 'compressed')}')"
    kept, dense = compressed.get("nonzero"), searched.get("nonzero", searched.get("parameters"))
    if kept is not None and dense:
        line += f" keeps {kept:,} of {dense:,} parameters ({_percent(kept / dense)})"
    mine, theirs = score(compressed, "worst_case"), score(searched, "worst_case")
    if mine is None or theirs is None:
        return f"{line}: the worst case was not measured on both sides."
    natural = _natural(score(compressed, "natural"), score(searched, "natural"))
    return f"{line}: {_worst_case(mine)} against {_percent(theirs.value)} before, {_difference(mine, theirs)}.{natural}"


def _natural(mine: Score | None, theirs: Score | None) -> str:
    """Natural accuracies where they differ by more than noise, or where noise cannot be judged."""
    if mine is None or theirs is None or _within_noise(mine, theirs):
        return ""
    return f" Natural accuracy {_percent(mine.value)} against {_percent(theirs.value)}, {_difference(mine, theirs)}."


def _doubts(results: Mapping[str, Any]) -> list[str]:
    """Reasons not to trust the numbers or the comparison."""
    models: Sequence[Model] = results.get("models") or ()
    natural = {str(model.get("name", "?")): model["natural"] for model in models if model.get("natural") is not None}
    counts = sorted({model["n"] for model in models if model.get("n")})
    classes = (results.get("data") or {}).get("classes")
    lines = collapsed((results.get("search") or {}).get("epochs") or ())
    lines += guessing(natural, counts[0], len(classes)) if counts and classes else []
    failed = {
        str(model.get("name", "?")): [
            str(check.get("name")) for check in model.get("checks") or () if check.get("verdict") == "fail"
        ]
        for model in models
    }
    lines += masking({name: checks for name, checks in failed.items() if checks})
    measured = [model for model in models if model.get("worst_case") is not None]
    if len(counts) > 1:
        lines.append(f"The models were measured on different numbers of images ({', '.join(map(str, counts))}).")
    if len({frozenset(model.get("attacks") or ()) for model in measured}) > 1:
        lines.append("The models were not measured with the same attacks: their worst cases are not comparable.")
    return lines


def _outcome(mine: Score, theirs: Score) -> str:
    if _within_noise(mine, theirs) is False:
        return f"The searched network is {'more' if mine.value > theirs.value else 'less'} robust than"
    return "The searched network is not measurably more or less robust than"


def _within_noise(mine: Score, theirs: Score) -> bool | None:
    """Whether the 95% intervals overlap; None where one is missing."""
    if mine.interval is None or theirs.interval is None:
        return None
    return mine.interval[0] <= theirs.interval[1] and theirs.interval[0] <= mine.interval[1]


def _difference(mine: Score, theirs: Score) -> str:
    points = round(100 * (mine.value - theirs.value), 1)
    size = f"{abs(points):.1f} points {'higher' if points > 0 else 'lower'}" if points else "no difference"
    noise = _within_noise(mine, theirs)
    if noise is None:
        return f"{size} (without intervals: noise cannot be judged)"
    return f"{size} ({'within noise' if noise else 'beyond the 95% intervals'})"


def _scores(models: Iterable[Model], which: str) -> list[Score]:
    return [one for model in models if (one := score(model, which)) is not None]


def _mean(scores: Sequence[Score]) -> Score:
    """The typical model of a group: mean accuracy with the mean ends of the intervals.

    The group shares its test images, so pooling them would make the interval narrower than it is.
    """
    intervals = [one.interval for one in scores if one.interval is not None]
    ends = None
    if len(intervals) == len(scores):
        ends = (sum(low for low, _ in intervals) / len(scores), sum(high for _, high in intervals) / len(scores))
    return Score(sum(one.value for one in scores) / len(scores), ends)


def _group(scores: Sequence[Score]) -> str:
    values = [one.value for one in scores]
    if len(values) == 1:
        return _percent(values[0])
    mean = _percent(sum(values) / len(values))
    return f"a mean of {mean} (lowest {_percent(min(values))}, highest {_percent(max(values))})"


def _worst_case(one: Score) -> str:
    if one.interval is None:
        return f"worst case {_percent(one.value)}"
    low, high = one.interval
    return f"worst case {_percent(one.value)} [{100 * low:.1f}, {100 * high:.1f}]"


def _sizes(searched: Model, others: Sequence[Model]) -> str:
    """ " of equal size", or by how much the sizes differ: a larger network may be better for that alone."""
    mine = searched.get("parameters")
    ratios = sorted(other["parameters"] / mine for other in others if other.get("parameters")) if mine else []
    if not ratios:
        return ""
    if max(abs(ratio - 1) for ratio in ratios) <= EQUAL_SIZE:
        return " of equal size"
    span = f"{ratios[0]:.2f}" if ratios[0] == ratios[-1] else f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    return f" ({span} times its parameters)"


def _first(models: Iterable[Model], role: str) -> Model | None:
    return next((model for model in models if model.get("role") == role), None)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
