"""The table of a comparison: contenders against attacks and costs, for a page, a terminal and a Markdown file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Data = Mapping[str, Any]

ABSENT = "\N{EN DASH}"
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
MARKS = {"pass": "✓", "warn": "▲", "fail": "✗"}


@dataclass(frozen=True)
class Column:
    """What stands in it for a contender of the results.

    share: accuracy in [0, 1] that the cell shows, None where it shows something else;  attack: the column of a single
    attack;  number: set to the right.
    """

    title: str
    text: Callable[[Data, Data], str]
    share: Callable[[Data], float | None] = lambda contender: None
    attack: bool = False
    number: bool = True


def columns(results: Data) -> list[Column]:
    """The columns of a comparison, the contender's name first."""
    names = dict.fromkeys([*results["attacks"], *(n for c in results["contenders"] for n in c.get("attacks") or ())])
    certified = any("certification" in contender for contender in results["contenders"])
    return [
        Column("contender", lambda results, contender: contender["name"], number=False),
        Column("natural", lambda results, contender: spread(contender.get("natural")), _mean_of("natural")),
        Column("worst case", lambda results, contender: spread(contender.get("worst_case")), _mean_of("worst_case")),
        Column("95 % interval", lambda results, contender: interval(contender.get("interval"))),
        *(_protected(results) if results.get("protected") else []),
        Column("masking", lambda results, contender: masking(contender), number=False),
        *(Column(name, _attack_text(name), _attack_share(name), attack=True) for name in names),
        *([Column("certified (0, sigma)", lambda results, contender: certified_text(contender))] if certified else []),
        *(COMPRESSED if compressed(results) else []),
        *([ENSEMBLE] if any("prediction" in contender for contender in results["contenders"]) else []),
        Column("epochs", lambda results, contender: f"{contender['epochs']}"),
        Column("passes", lambda results, contender: f"{contender['passes']['relative']:.2f}"),
        Column("seconds", lambda results, contender: seconds(results, contender)),
        Column("memory", lambda results, contender: memory(results, contender)),
    ]


def _protected(results: Data) -> list[Column]:
    """Worst case on the classes that some contender protects."""
    names = results["protected"]
    title = f"worst case, {'class' if len(names) == 1 else 'classes'} {', '.join(names)}"
    return [Column(title, lambda results, contender: spread(contender.get("protected")), _mean_of("protected"))]


def compressed(results: Data) -> bool:
    """Whether networks of different size are compared."""
    return any(measured.get("speed") for measured in results["measured"].values())


def size(contender: Data, key: str) -> str:
    """Parameters, non-zeros or bytes, the mean over the seeds."""
    value = contender.get(key)
    mean = value.get("mean") if isinstance(value, Mapping) else value
    return ABSENT if mean is None else f"{mean:,.0f}"


def speed(results: Data, contender: Data, engine: str, batch: str) -> str:
    """How many times as fast as the network before compression."""
    row = results["measured"][contender["name"]]["speed"].get(engine, {}).get(batch)
    return ABSENT if row is None else f"{row['speed']:.2f} x"


def _speed_column(engine: str, batch: str, title: str) -> Column:
    return Column(title, lambda results, contender: speed(results, contender, engine, batch))


ENSEMBLE = Column("predicts by", lambda results, contender: contender.get("prediction", "one network"), number=False)
"""Where some contenders predict by several networks or draws."""

COMPRESSED = [
    Column("parameters", lambda results, contender: size(contender, "parameters")),
    Column("non-zero", lambda results, contender: size(contender, "nonzero")),
    Column("bytes", lambda results, contender: size(contender, "bytes")),
    Column("MACs", lambda results, contender: size(contender, "macs")),
    _speed_column("eager", "1", "speed, 1 image"),
    _speed_column("eager", "64", "64 images"),
    _speed_column("onnxruntime", "1", "ONNX Runtime, 1 image"),
    _speed_column("onnxruntime", "64", "64 images, ONNX"),
]
"""Columns where networks are compressed."""


def markdown(results: Data) -> str:
    """The table as Markdown, with a line above that says what it is of, and what its columns are below."""
    shown = columns(results)
    threat, data = results["threat_model"], results["data"]
    count = len(results["seeds"])
    lines = [
        f"{results['name']}: {data['name']}, {threat['norm']} {threat['epsilon']:g}, {data['test']} test images, "
        f"{count} seed{'s' if count > 1 else ''}" + (f" (mean {PLUS_MINUS} deviation)." if count > 1 else "."),
        "",
        _row([column.title for column in shown]),
        _row(["---:" if column.number else "---" for column in shown]),
        *(_row([column.text(results, contender) for column in shown]) for contender in results["contenders"]),
        "",
        *(f"* {line}" for line in results["verdict"]),
        "",
        *(line for line in legend(results)),
    ]
    return "\n".join(lines) + "\n"


def legend(results: Data) -> list[str]:
    """What the columns mean, one paragraph."""
    lines = [
        "Worst case: right under every attack of the row, per image. Its 95 % interval (Wilson) is over the choice of "
        "test images. Masking: checks that found signs of it. Passes: of the network through images in training, "
        "forwards and backwards, as a multiple of the first contender's. Seconds: of one training. Memory: what a step "
        "takes at its peak beyond network and images."
    ]
    if compressed(results):
        lines[0] += (
            " Bytes: as stored, a masked weight as one bit. Speed: how many times as fast as the network before "
            "compression, measured in turns on one machine; below 1 it is slower. Epochs and passes: with those of the "
            "network before."
        )
    if any("detection" in contender for contender in results["contenders"]):
        lines[0] += (
            " Behind a detector an attacked image also counts as withstood where it is refused, and a clean one only "
            "where it is not; the attack 'adaptive' knows the detector."
        )
    if any("certification" in contender for contender in results["contenders"]):
        lines[0] += " Certified: accuracy of the smoothed network, and its share certified within l_2 radius sigma."
    return lines


def spread(value: Data | None) -> str:
    """Mean and deviation of a share in per cent."""
    if value is None:
        return ABSENT
    deviation = value.get("deviation")
    return f"{100 * value['mean']:.1f}" + ("" if deviation is None else f" {PLUS_MINUS} {100 * deviation:.1f}")


def interval(ends: tuple[float, float] | None) -> str:
    """Two shares in per cent."""
    return ABSENT if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def masking(contender: Data) -> str:
    """The verdict of the checks; the lines below the table say which failed."""
    if contender.get("masking") is None:
        failed = next((run["failed"] for run in contender["runs"] if "failed" in run), None)
        return ABSENT if failed is None else "failed, see below"
    verdict = contender["masking"]["verdict"]
    return f"{MARKS[verdict]} {verdict}"


def certified_text(contender: Data) -> str:
    """Certified accuracy at radius 0 and at sigma."""
    found = contender.get("certification")
    if found is None:
        return ABSENT
    at_sigma = certified_at(found, found["sigma"])
    return f"{100 * found['certified_accuracy'][0]:.1f}, {100 * at_sigma:.1f}"


def certified_at(found: Data, radius: float) -> float:
    """Certified accuracy at the first radius of the curve that is not smaller than ``radius``: never too much."""
    pairs = zip(found["radii"], found["certified_accuracy"], strict=True)
    return next((float(share) for at, share in pairs if at >= radius), 0.0)


def seconds(results: Data, contender: Data) -> str:
    """Mean seconds of a training."""
    if contender["network"] != contender["name"]:
        return ABSENT
    known = [value for value in results["measured"][contender["name"]]["seconds"] if value is not None]
    return f"{statistics.fmean(known):.1f}" if known else ABSENT


def memory(results: Data, contender: Data) -> str:
    """Peak memory of a step."""
    size = results["measured"][contender["name"]]["memory"]
    return ABSENT if size is None or contender["network"] != contender["name"] else f"{size / 2**20:.1f} MiB"


def _attack_text(name: str) -> Callable[[Data, Data], str]:
    return lambda results, contender: spread((contender.get("attacks") or {}).get(name))


def _attack_share(name: str) -> Callable[[Data], float | None]:
    return lambda contender: ((contender.get("attacks") or {}).get(name) or {}).get("mean")


def _mean_of(key: str) -> Callable[[Data], float | None]:
    return lambda contender: (contender.get(key) or {}).get("mean")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
