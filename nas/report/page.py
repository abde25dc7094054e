"""One self-contained HTML page that tells what a run found, how sure that is, and how to repeat it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from nas.analysis.drawing import NAMESPACE, TIMES, draw_cell, operation_label
from nas.analysis.throughput import speed_lines
from nas.report import curves
from nas.report.curves import Interval, Series
from nas.report.heat_map import heat_map, span_of
from nas.report.verdict import verdict
from nas.tensor_file import write_text
from search_spaces.genotype import AnyGenotype, Genotype, GenotypeError, genotype_from_data
from search_spaces.graph import edge_count, supernet_edges

LARGEST_DRAWING = 200
"""Operations beyond which a cell is described only: the picture would be unreadable."""

ABSENT = "\N{EN DASH}"

CHECK_MARKS = {"pass": "✓", "warn": "▲", "fail": "✗"}

ROLE_LINES = {
    "searched": (0, 0, 2.4),
    "compressed": (2, 2, 1.6),
    "random": (4, 0, 1.0),
    "published": (3, 3, 1.6),
    "plain": (1, 1, 1.6),
}
"""Colour, dash and width of a model's training curves."""

Data = Mapping[str, Any]


def write_report(results: Data, path: Path) -> None:
    """Write the page of ``results`` to ``path``. Identical results give an identical file."""
    # Names from a user's files may hold lone surrogates, which no encoding can write.
    write_text(render(results).encode("utf-8", "replace").decode("utf-8"), path)


def render(results: Data) -> str:
    """The page of ``results``. Absent parts are shown as not run."""
    models: Sequence[Data] = results.get("models") or ()
    analysis: Data = results.get("analysis") or {}
    genotype, problem = _genotype(results.get("genotype"))
    return template("page").render(
        results=results,
        threat=_threat(results.get("threat_model")),
        verdict=results.get("verdict") or verdict(results),
        summary=_summary(models),
        checks=_checks(models),
        genotype=genotype,
        genotype_problem=problem,
        cells=_drawings(genotype, ""),
        others=_other_drawings(models, genotype),
        topology=[_topology_row(row) for row in analysis.get("topology") or ()],
        complexity=analysis.get("complexity"),
        compression=_compression(models, results.get("throughput")),
        gallery=gallery_part(_embedded(results.get("gallery") or {})),
        genotype_text=genotype_text(results.get("genotype")),
        search=_search(results.get("search") or {}),
        training=_training(models),
        overfitting=_overfitting(models),
        attacks=_attacks(models),
    )


@cache
def template(name: str) -> Template:
    """The template ``name`` of a page, with the filters and the style that all pages share."""
    loader = PackageLoader("nas", "report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=percent, count=count, quantity=quantity, duration=duration, small=lambda value: f"{value:.2g}"
    )
    folder = resources.files("nas.report")
    environment.globals["style"] = Markup(folder.joinpath("style.css.jinja").read_text("utf-8"))
    return environment.get_template(f"{name}.html.jinja")


def gallery_part(pairs: Sequence[Data]) -> Markup:
    """The part of a page with the images ``pairs`` of ``nas.report.gallery``; nothing where there are none."""
    return Markup(template("gallery").render(pairs=pairs)) if pairs else Markup("")


def _embedded(gallery: Data) -> list[Data]:
    """The pairs whose images are all inside the page: a page never asks the network for one."""
    images = ("clean", "change", "adversarial")
    return [
        pair
        for pair in gallery.get("pairs") or ()
        if all(str(pair.get(image)).startswith("data:image/png;base64,") for image in images)
    ]


def genotype_text(genotype: Any) -> str:
    """A genotype as JSON with a line for each kind of cell."""
    if not isinstance(genotype, dict):
        return ""
    lines = []
    for key, value in genotype.items():
        if isinstance(value, dict) and key == "cells":
            inner = ",\n".join(f"  {json.dumps(kind)}: {json.dumps(cell)}" for kind, cell in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def percent(share: float | None) -> str:
    """0.9 as "90.0%"."""
    return ABSENT if share is None else f"{100 * share:.1f}%"


def count(value: int | None) -> str:
    """Thousands apart: "4,520,394"."""
    return ABSENT if value is None else f"{value:,}"


def quantity(value: float | None) -> str:
    """Three digits and a unit: 1240151040 as "1.24 G"."""
    if value is None:
        return ABSENT
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        # 999,999 is "1 M": the unit is chosen after rounding to three digits.
        if float(f"{value:.3g}") >= size:
            return f"{value / size:#.3g}".rstrip(".") + f"\N{NO-BREAK SPACE}{unit}"
    return f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds as "12.3 s", "4 min 05 s" or "2 h 07 min"."""
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _threat(model: Data | None) -> str | None:
    if not model:
        return None
    epsilon = model.get("epsilon")
    size = "unknown size" if epsilon is None else f"size {epsilon:.4g}"
    return f"{model.get('norm', 'unknown norm')}, {size} (pixels in 0 to 1)"


def _summary(models: Sequence[Data]) -> dict[str, Any]:
    """The table of models: the attacks in order of appearance, the number of images if it is one, and the picture."""
    counts = {model.get("n") for model in models}
    rows = [
        Interval(
            name=str(model.get("name", "?")),
            worst_case=model.get("worst_case"),
            interval=(model["interval"][0], model["interval"][1]) if model.get("interval") else None,
            natural=model.get("natural"),
            emphasised=model.get("role") == "searched",
        )
        for model in models
    ]
    return {
        "models": models,
        "attacks": list(dict.fromkeys(name for model in models for name in model.get("attacks") or ())),
        "n": counts.pop() if len(counts) == 1 else None,
        "picture": Markup(curves.intervals("Worst-case and natural accuracy", rows)),
    }


def _checks(models: Sequence[Data]) -> dict[str, Any]:
    """The masking checks as a table, checks by models, and what the checks that did not pass found."""
    checked = [model for model in models if model.get("checks")]
    names = dict.fromkeys(str(check.get("name")) for model in checked for check in model["checks"])
    # Found by place: two models may have the same name.
    found = {
        (place, str(check.get("name"))): _graded(check)
        for place, model in enumerate(checked)
        for check in model["checks"]
    }
    columns = [{"place": place, "name": str(model.get("name", "?"))} for place, model in enumerate(checked)]
    notable = [
        {"model": columns[place]["name"], "name": name, **check}
        for (place, name), check in found.items()
        if check["word"] != "pass"
    ]
    return {"names": list(names), "models": columns, "found": found, "notable": notable}


def _graded(check: Data) -> dict[str, str]:
    """A check with its verdict as word and sign. A verdict this page does not know is no pass."""
    word = check.get("verdict")
    word = word if word in CHECK_MARKS else "warn"
    return {"word": word, "mark": CHECK_MARKS[word], "detail": str(check.get("detail", ""))}


def _genotype(data: object) -> tuple[AnyGenotype | None, str | None]:
    """The genotype, or why there is none to show."""
    if data is None:
        return None, None
    try:
        return genotype_from_data(data), None
    except GenotypeError as error:
        return None, str(error)


def _drawings(genotype: AnyGenotype | None, prefix: str) -> list[dict[str, Any]]:
    """The picture of each kind of cell, and the sections where it stands."""
    if not isinstance(genotype, Genotype):
        return []
    drawings = []
    layout = genotype.layout
    for kind, cell in genotype.cells:
        sections = [str(number) for number, section in enumerate(layout.sections, start=1) if section == kind]
        places = [f"in section{'s' if len(sections) > 1 else ''} {', '.join(sections)}"] if sections else []
        if kind == layout.reduction and len(layout.sections) > 1:
            places.append("at the start of each later section")
        picture = None
        if edge_count(cell) <= LARGEST_DRAWING:
            # Inside a page the namespace is understood, and the page names no address at all.
            picture = Markup(draw_cell(cell, f"{prefix}{kind} cell").replace(f' xmlns="{NAMESPACE}"', "", 1))
        drawings.append({"kind": kind, "places": " and ".join(places), "picture": picture})
    return drawings


def _other_drawings(models: Sequence[Data], shown: AnyGenotype | None) -> list[dict[str, Any]]:
    """The cells of the models that are not the searched architecture."""
    others = []
    for model in models:
        genotype, _ = _genotype(model.get("genotype"))
        if genotype is not None and genotype != shown:
            name = str(model.get("name", "?"))
            others.append({"name": name, "genotype": genotype, "cells": _drawings(genotype, f"{name}: ")})
    return others


def _topology_row(row: Data) -> dict[str, Any]:
    operations = (row.get("operations") or {}).items()
    return {
        **row,
        "operations": ", ".join(f"{number} {TIMES} {operation_label(str(name))}" for name, number in operations),
    }


def _search(search: Data) -> dict[str, Any]:
    """The pictures of a search with its stages and warnings."""
    epochs: Sequence[Data] = search.get("epochs") or ()
    stages: list[dict[str, Any]] = []
    for row in epochs:
        if not stages or stages[-1]["name"] != row.get("stage"):
            stages.append({"name": row.get("stage"), "first": row.get("epoch")})
        stages[-1]["last"] = row.get("epoch")
    boundaries = [stage["first"] - 0.5 for stage in stages[1:]]
    lines: dict[str, tuple[Literal["share", "number"], float | None, list[Series]]] = {
        "Accuracy on the architecture part": (
            "share",
            1.0,
            [_line(epochs, "robust", "robust_accuracy", 0, 0), _line(epochs, "natural", "natural_accuracy", 1, 1)],
        ),
        "Losses": (
            "number",
            None,
            [
                _line(epochs, "adversarial", "adversarial_loss", 0, 0),
                _line(epochs, "natural", "natural_loss", 1, 1),
                _line(epochs, "weights", "weight_loss", 4, 3),
            ],
        ),
        "Gamma, the weight of the natural loss": ("number", None, [_line(epochs, "gamma", "gamma", 0, 0)]),
        "Entropy of the mixing weights, by kind of cell": ("number", 1.05, _by_kind(epochs, "alpha_entropy", float)),
        "Edges on which a parameter-free operation leads": (
            "share",
            1.0,
            _by_kind(epochs, "parameter_free_edges", lambda pair: pair[0] / max(pair[1], 1)),
        ),
    }
    pictures = [
        {"caption": caption, "picture": Markup(picture)}
        for caption, (unit, top, series) in lines.items()
        if (picture := curves.curves(caption, series, unit=unit, boundaries=boundaries, top=top))
    ]
    return {
        "epochs": epochs,
        "stages": stages,
        "pictures": pictures,
        "mixing": _mixing(epochs, [stage["first"] for stage in stages[1:]]),
        "warnings": search.get("warnings") or (),
    }


def _mixing(epochs: Sequence[Data], firsts: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Heat maps of the mixing weights of each kind of cell: over the epochs, and by edge at the end."""
    rows = [row for row in epochs if row.get("mixing_weights")]
    if not rows:
        return {"epochs": [], "edges": []}
    last = rows[-1]["mixing_weights"]
    names = [str(row["epoch"]) for row in rows]
    places = [place for place, row in enumerate(rows) if row["epoch"] in firsts]
    over = {
        kind: {name: [_mean(row["mixing_weights"][kind][name]) for row in rows] for name in operations}
        for kind, operations in last.items()
    }
    pictures: dict[str, list[dict[str, Any]]] = {"epochs": [], "edges": []}
    for kind, operations in last.items():
        picture = heat_map(
            f"Mixing weights of the {kind} cell over the epochs", over[kind], names, span_of([*over.values()]),
            axis="epoch", boundaries=places,
        )  # fmt: skip
        pictures["epochs"].append({"caption": f"{kind} cell, mean over its edges", "picture": Markup(picture)})
        edges = [f"{source}→{target}" for source, target in supernet_edges(len(next(iter(operations.values()))))]
        picture = heat_map(
            f"Mixing weights of the {kind} cell at the end", operations, edges, span_of([*last.values()]), axis="edge"
        )
        pictures["edges"].append({"caption": f"{kind} cell, edges at the end", "picture": Markup(picture)})
    return pictures


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _line(rows: Sequence[Data], name: str, key: str, colour: int, dash: int, width: float = 1.8) -> Series:
    return Series(name, [row["epoch"] for row in rows], [row.get(key) for row in rows], colour, dash, width)


def _by_kind(epochs: Sequence[Data], key: str, value: Callable[[Any], float]) -> list[Series]:
    """One line for each kind of cell that ``key`` of any epoch names."""
    kinds = dict.fromkeys(kind for row in epochs for kind in row.get(key) or ())
    return [
        Series(
            str(kind),
            [row["epoch"] for row in epochs],
            [None if (found := (row.get(key) or {}).get(kind)) is None else value(found) for row in epochs],
            colour=index,
            dash=index,
            width=1.8,
        )
        for index, kind in enumerate(kinds)
    ]


def _training(models: Sequence[Data]) -> list[dict[str, Any]]:
    """Pictures over the epochs of retraining. The random cells share one look: they are one group."""
    randoms = sum(model.get("role") == "random" and bool(model.get("training")) for model in models)
    pictures = []
    for caption, key, top in (
        ("Robust accuracy on the validation part", "validation_robust", 1.0),
        ("Natural accuracy on the validation part", "validation_natural", 1.0),
        ("Training loss", "loss", None),
    ):
        series = []
        # The searched network last, so that its line lies on top.
        for model in sorted(models, key=lambda model: model.get("role") == "searched"):
            role = str(model.get("role"))
            name = f"random cells ({randoms})" if role == "random" and randoms > 1 else str(model.get("name", "?"))
            series.append(_line(model.get("training") or (), name, key, *ROLE_LINES.get(role, (5, 3, 1.6))))
        if picture := curves.curves(caption, series, unit="number" if top is None else "share", top=top):
            pictures.append({"caption": caption, "picture": Markup(picture)})
    return pictures


def _overfitting(models: Sequence[Data]) -> dict[str, Any]:
    """How far the last epoch of each training is below its best, which is kept, and what the trainings warned of."""
    gaps, warnings = [], []
    for model in models:
        records, name = model.get("training") or (), str(model.get("name", "?"))
        if records and "robust_overfitting" in records[-1]:
            gaps.append({"model": name, "gap": records[-1]["robust_overfitting"]})
        warnings += [f"{name}: {warning}" for record in records for warning in record.get("warnings") or ()]
    return {"gaps": gaps, "warnings": warnings}


def _compression(models: Sequence[Data], speed: Data | None) -> dict[str, Any] | None:
    """The searched network beside what compression made of it, line by line, and how fast they are in words."""
    found = {model.get("role"): model for model in reversed(models)}
    if not {"searched", "compressed"} <= found.keys():
        return None
    pair = (found["searched"], found["compressed"])
    lines: list[tuple[str, list[str], str]] = []

    def add(name: str, values: Sequence[float | None], show: Callable[[Any], str], change: str = "share") -> None:
        if None in values:
            return
        before, after = (float(value or 0) for value in values)
        told = change
        if change == "share":
            told = percent(after / before) if before else ABSENT
        elif change == "points":
            told = f"{100 * (after - before):+.1f} points".replace("-", "\N{MINUS SIGN}")
        lines.append((name, [show(value) for value in values], told))

    add("Parameters", [model.get("parameters") for model in pair], count)
    add("Non-zero parameters", [model.get("nonzero") for model in pair], count)
    for key, name in (("dense", "Bytes stored"), ("sparse", "Bytes stored, zeros left out")):
        add(name, [(model.get("bytes") or {}).get(key) for model in pair], count)
    add("MACs for one image", [model.get("macs") for model in pair], quantity)
    add("Natural accuracy", [model.get("natural") for model in pair], percent, "points")
    add("Worst case", [model.get("worst_case") for model in pair], percent, "points")
    for engine, timed in ((speed or {}).get("engines") or {}).items():
        for batch, row in timed["batches"].items():
            if {"searched", "compressed"} <= row.keys():
                rates = [row[name]["images_per_second"] for name in ("searched", "compressed")]
                # Not the ratio of the medians: the networks took turns, and what is meant is the ratio within a turn.
                speed_up = f"{row['compressed']['speed']:.2f} times as fast"
                add(f"Images per second, {engine}, batch {batch}", rates, quantity, speed_up)
    measured = (
        f"Speed measured on {speed['device']}, threads: {speed['threads']}; the networks took turns." if speed else ""
    )
    return {"lines": lines, "speed": speed_lines(speed) if speed else [], "measured": measured}


def _attacks(models: Sequence[Data]) -> list[dict[str, str]]:
    """Each attack with its settings, and the models it was run on with them."""
    users: dict[tuple[str, str], list[str]] = {}
    for model in models:
        for attack, settings in (model.get("attack_settings") or {}).items():
            users.setdefault((str(attack), str(settings)), []).append(str(model.get("name", "?")))
    return [
        {"attack": attack, "settings": settings, "models": _all_or(names, len(models))}
        for (attack, settings), names in users.items()
    ]


def _all_or(names: Iterable[str], total: int) -> str:
    listed = list(names)
    return "all models" if len(listed) == total else ", ".join(listed)
