"""One self-contained HTML page about the robustness of one network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from torch import Tensor

from nas.evaluation.gallery import Pair
from nas.report import curves
from nas.report.curves import Series
from nas.report.page import CHECK_MARKS, template
from nas.tensor_file import write_text

ENLARGED = 96
"""Pixels that an image of the gallery is at least wide."""


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
        gallery=[_shown(pair, classes) for pair in pairs],
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


def _shown(pair: Pair, classes: Sequence[str]) -> dict[str, Any]:
    """Images of a pair as data URIs: the image, the difference enlarged to the full range, the adversarial image."""
    difference = pair.adversarial - pair.clean
    scale = float(difference.abs().max())
    change = 0.5 + 0.5 * difference / scale if scale > 0 else 0.5 + difference
    return {
        "clean": _data_uri(pair.clean),
        "change": _data_uri(change),
        "adversarial": _data_uri(pair.adversarial),
        "label": classes[pair.label],
        "seen": classes[pair.seen_adversarial],
        "broken": pair.seen_adversarial != pair.label,
        "scale": scale,
    }


def _data_uri(image: Tensor) -> str:
    """[C, H, W] in [0, 1] as a PNG; of other than 1 or 3 channels, the first."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte()
    picture = (
        Image.fromarray(pixels.permute(1, 2, 0).numpy()) if len(pixels) == 3 else Image.fromarray(pixels[0].numpy())
    )
    enlargement = max(1, -(-ENLARGED // picture.width))
    size = (picture.width * enlargement, picture.height * enlargement)
    stream = io.BytesIO()
    picture.resize(size, Image.Resampling.NEAREST).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
