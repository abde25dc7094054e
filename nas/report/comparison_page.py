"""One self-contained HTML page of a comparison: who is more robust, at what cost, and who is to be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nas.report import curves
from nas.report.comparison_table import MARKS, PLUS_MINUS, Column, columns, legend
from nas.report.curves import Interval, Series
from nas.report.page import template
from nas.tensor_file import write_text

Data = Mapping[str, Any]


def write_comparison(results: Data, path: Path) -> None:
    """Write the page of a comparison's ``results`` to ``path``. Identical results give an identical file."""
    write_text(render(results).encode("utf-8", "replace").decode("utf-8"), path)


def render(results: Data) -> str:
    """The page. What was not measured is not there."""
    contenders: Sequence[Data] = results["contenders"]
    shown = columns(results)
    rows = [
        {
            "name": contender["name"],
            "reference": contender["name"] == results["reference"],
            "cells": [_cell(column, results, contender) for column in shown[1:]],
        }
        for contender in contenders
    ]
    return template("comparison").render(
        results=results,
        titles=[{"text": column.title, "number": column.number} for column in shown],
        rows=rows,
        legend=legend(results),
        picture=Markup(curves.intervals("Worst-case and natural accuracy", _intervals(results))),
        compressed=_compressed(contenders),
        certified=_certified(contenders),
        detectors=[contender for contender in contenders if contender.get("detection")],
        checks=_checks(contenders),
        marks=MARKS,
        training=_training(contenders),
        methods={contender["name"]: _in_words(contender["method"]) for contender in contenders},
    )


def _cell(column: Column, results: Data, contender: Data) -> dict[str, Any]:
    """A cell; the deviation apart, which stands below the mean."""
    text, sign, deviation = column.text(results, contender).partition(f" {PLUS_MINUS} ")
    return {
        "text": text,
        "deviation": f"{PLUS_MINUS} {deviation}" if sign else "",
        "share": column.share(contender),
        "number": column.number,
        "verdict": next((word for word, mark in MARKS.items() if text.startswith(mark)), ""),
    }


def _intervals(results: Data) -> list[Interval]:
    return [
        Interval(
            contender["name"],
            contender["worst_case"]["mean"],
            (contender["interval"][0], contender["interval"][1]),
            contender["natural"]["mean"],
            emphasised=contender["name"] == results["reference"],
        )
        for contender in results["contenders"]
        if contender.get("worst_case") is not None
    ]


def _compressed(contenders: Sequence[Data]) -> dict[str, Any] | None:
    """Robust accuracy against how many times smaller networks are stored, a line for each way of compression."""
    dense = {c["name"]: c["bytes"]["mean"] for c in contenders if c.get("bytes")}
    lines: dict[str, list[tuple[float, float]]] = {}
    for one in contenders:
        if one.get("compress") and one.get("bytes") and one["network"] in dense:
            factor = dense[one["network"]] / one["bytes"]["mean"]
            lines.setdefault(", ".join(one["compress"]), []).append((factor, one["worst_case"]["mean"]))
    if not lines:
        return None
    series = []
    for index, (name, points) in enumerate(lines.items()):
        factors, values = zip(*sorted(points), strict=True)
        series.append(Series(name, factors, values, index, index // 6))
    picture = curves.curves(
        "Worst-case accuracy by compression", series, unit="share", axis="times smaller in bytes", doublings=True
    )
    return {"picture": Markup(picture), "count": sum("compress" in one for one in contenders)}


def _certified(contenders: Sequence[Data]) -> dict[str, Any] | None:
    """The curves of certified accuracy, as a picture and as what made them."""
    own = [contender for contender in contenders if contender.get("certification")]
    if not own:
        return None
    series = [
        Series(c["name"], c["certification"]["radii"], c["certification"]["certified_accuracy"], index, index)
        for index, c in enumerate(own)
    ]
    picture = curves.curves("Certified accuracy", series, unit="share", top=1.0, axis="l_2 radius")
    return {"picture": Markup(picture), "contenders": own}


def _checks(contenders: Sequence[Data]) -> dict[str, Any]:
    """Every check of every contender: the worst verdict over the seeds, and what each seed's check found."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for contender in contenders:
        for run in contender["runs"]:
            for check in run.get("checks") or ():
                cell = table.setdefault(check["name"], {}).setdefault(
                    contender["name"], {"verdict": "pass", "details": []}
                )
                if list(MARKS).index(check["verdict"]) > list(MARKS).index(cell["verdict"]):
                    cell["verdict"] = check["verdict"]
                if check["verdict"] != "pass":
                    cell["details"].append(f"seed {run['seed']}: {check['detail']}")
    return {"names": [contender["name"] for contender in contenders], "table": table}


def _training(contenders: Sequence[Data]) -> list[dict[str, Any]]:
    """Robust and natural accuracy on the validation part over training, the first seed of each contender."""
    pictures = []
    own = [
        contender
        for contender in contenders
        if contender["network"] == contender["name"] and contender["runs"][0].get("training")
    ]
    for caption, key in (
        ("Robust accuracy on the validation part", "validation_robust"),
        ("Natural accuracy on the validation part", "validation_natural"),
    ):
        series = []
        for index, contender in enumerate(own):
            records = contender["runs"][0]["training"]
            # Against the share of the training: equal passes are different epochs.
            shares = [(record["epoch"] + 1) / len(records) for record in records]
            values = [record.get(key) for record in records]
            series.append(Series(contender["name"], shares, values, index, index // 6))
        # Where only the last epoch was validated there is no way to see.
        if all(len(one.points) < 2 for one in series):
            continue
        if picture := curves.curves(caption, series, unit="share", top=1.0, axis="share of the training"):
            pictures.append({"caption": caption, "picture": Markup(picture)})
    return pictures


def _in_words(method: Data) -> str:
    """A training method with its settings on one line."""
    settings = ", ".join(f"{key} {_value(value)}" for key, value in method.items() if key not in ("class",))
    return f"{method['class']}" + (f" ({settings})" if settings else "")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        # The threat model is that of the whole comparison.
        parts = [f"{key} {_value(item)}" for key, item in value.items() if key not in ("class", "threat_model")]
        return f"{value.get('class', '')} [{', '.join(parts)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
