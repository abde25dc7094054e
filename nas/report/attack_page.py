"""One self-contained HTML page about the robustness of one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nas.evaluation.gallery import Pair
from nas.report import curves
from nas.report.curves import Series
from nas.report.gallery import shown
from nas.report.page import CHECK_MARKS, gallery_part, template
from nas.tensor_file import write_text


def write_attack_page(
    result: Mapping[str, Any], pairs: Sequence[Pair], classes: Sequence[str], title: str, path: Path
) -> None:
    """Write the page of an evaluation's ``result`` to ``path``. Identical results give an identical file."""
    page = render(result, pairs, classes, title)
    write_text(page.encode("utf-8", "replace").decode("utf-8"), path)


def render(result: Mapping[str, Any], pairs: Sequence[Pair], classes: Sequence[str], title: str) -> str:
    """The page. What was not measured is not there."""
    by_class = [{**row, "name": classes[row["class"]]} for row in result.get("per_class") or ()]
    found = result.get("curves") or {}
    return template("attack").render(
        title=title,
        result=result,
        doubts=[check for check in result["checks"] if check["verdict"] == "fail"],
        marks=CHECK_MARKS,
        by_class=by_class,
        left_out=result.get("left_out") or {},
        transfer=result.get("transfer"),
        corruptions=result.get("corruptions"),
        pictures=[picture for picture in (_over_epsilon(found), _over_steps(found)) if picture],
        gallery=gallery_part([shown(pair, classes) for pair in pairs]),
    )


def _over_epsilon(found: Mapping[str, Any]) -> dict[str, Any] | None:
    points = found.get("epsilon")
    if not points:
        return None
    series = Series("PGD-20, margin", [p["epsilon"] for p in points], [p["accuracy"] for p in points])
    drawn = curves.curves("Accuracy over epsilon", [series], unit="share", top=1.0, axis="epsilon")
    return {"picture": Markup(drawn), "caption": "Accuracy over the size of the ball"}


def _over_steps(found: Mapping[str, Any]) -> dict[str, Any] | None:
    points = found.get("steps")
    if not points:
        return None
    series = Series("PGD, margin", [p["steps"] for p in points], [p["accuracy"] for p in points])
    drawn = curves.curves("Accuracy over steps", [series], unit="share", top=1.0, axis="steps")
    return {"picture": Markup(drawn), "caption": "Accuracy over the steps of the attack"}
