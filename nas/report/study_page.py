"""One self-contained HTML page of a width/depth study: what to build, what the data say of claims, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nas.report.comparison_table import MARKS
from nas.report.doubts import guessing, masking
from nas.report.page import template
from nas.report.study_pictures import PICTURES, Studied, inline
from nas.studies.observation import Observation
from nas.tensor_file import write_text

Data = Mapping[str, Any]

SHOWN = 20
"""Configurations of the first table; the rest are in a second one, folded."""

CAPTIONS = {
    "heat-maps": "Mean worst-case accuracy by blocks and width of each stage, over all else; lines: equal mean numbers "
    "of parameters",
    "pareto": "Every configuration, mean over its seeds with their deviation; circled and joined: those that none "
    "surpasses",
    "fits": "Parabolas through the configurations with 95 % bands; shapes at equal numbers of parameters. A bar below: "
    "where the best lies, if it is certain to lie inside the data",
    "stage-capacity": "Where the most robust, all, and the least robust configurations have their capacity; lines: "
    "deviation",
}
VERDICTS = {
    "supported": "pass",
    "contradicted": "fail",
    "not supported by this data": "warn",
}
"""How the verdict on a claim is marked; what cannot be tested has no mark."""


def write_study(results: Data, observations: Sequence[Observation], path: Path) -> None:
    """Write the page of a study's ``results`` to ``path``. Identical results give an identical file."""
    write_text(render(results, observations).encode("utf-8", "replace").decode("utf-8"), path)


def render(results: Data, observations: Sequence[Observation]) -> str:
    """The page. What was not measured is not there."""
    studied = Studied(observations)
    pictures = [
        {"name": name, "caption": CAPTIONS[name], "picture": Markup(picture)}
        for name, draw in PICTURES.items()
        if observations and (picture := inline(draw, studied))
    ]
    return template("study").render(
        results=results,
        ranked=results["configurations"],
        shown=SHOWN,
        pictures=pictures,
        marks=MARKS,
        verdicts=VERDICTS,
        doubts=doubts(results),
        measures=sorted({name for one in observations for name in one.measures}),
    )


def doubts(results: Data) -> list[str]:
    """Reasons not to believe what stands in the study, in lines."""
    entries = results["observations"]
    natural: dict[str, list[float]] = {}
    failed: dict[str, dict[str, None]] = {}
    for entry in entries:
        one = entry["observation"]
        natural.setdefault(one["configuration"], []).append(one["natural"])
        for check in entry["checks"]:
            if check["verdict"] == "fail":
                failed.setdefault(one["configuration"], {})[check["name"]] = None
    n = entries[0]["observation"]["n"] if entries else 0
    lines = guessing({name: min(values) for name, values in natural.items()}, n, len(results["data"]["classes"]))
    lines += masking({name: [*checks] for name, checks in failed.items()})
    trials = results["trials"]
    for state, told in (
        ("failed", "diverged or could not be built and are missing"),
        ("running", "are not finished and are missing"),
        ("pruned", "were stopped early as hopeless and are missing"),
    ):
        if trials.get(state):
            lines.append(f"{trials[state]} of {sum(trials.values())} trials {told}.")
    return lines
