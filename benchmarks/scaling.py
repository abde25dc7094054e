"""How time and memory of a search step grow, and the largest supernet that fits a given memory.

    python -m benchmarks.scaling            table, JSON and picture in benchmarks/results (CPU, about an hour)
    python -m benchmarks.scaling --quick    two points of every axis

One property is changed at a time; every point is measured in a process of its own. Seconds are CPU seconds of one
thread, so that other work on the machine disturbs them little. Memory is what a step adds to the process; it is also
measured with cells recomputed (``search.recompute_cells``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.search_step import CONFIGURATIONS, Configuration, Ours, batches_of, supernet_of
from nas.search.recomputation import recompute
from nas.tensor_file import write_text

BASE = CONFIGURATIONS["a"]
AXES = {
    "channels": (4, 8, 16, 32),
    "cells": (4, 5, 8, 12, 20),
    "batch": (8, 16, 32, 64),
    "size": (16, 32, 64),
    "attack_steps": (1, 3, 7, 14),
}
"""What is changed of configuration (a): values of each property, the others as they are."""

LARGEST = dataclasses.replace(BASE, cells=8, batch=64, attack_steps=1)
"""Which supernets are asked for the largest that fits: all but the channels (steps of an attack need no memory)."""

LARGEST_CHANNELS = (8, 16, 24, 48)
BUDGETS = (8.0, 80.0)


def main() -> None:
    """Measure what is not in the results yet; write them, the table and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two points of every axis, no largest supernet")
    parser.add_argument(
        "--verify", nargs="*", choices=("kept", "recomputed"), default=[], help="try the largest that should fit 8 GiB"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scaling.json")
    arguments = parser.parse_args()
    points: dict[str, dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for axis, values in AXES.items():
        for value in values[:2] if arguments.quick else values:
            configuration = dataclasses.replace(BASE, **{axis: value})
            measure(points, arguments.out, configuration, timed=True)
    if not arguments.quick:
        for channels in LARGEST_CHANNELS:
            measure(points, arguments.out, dataclasses.replace(LARGEST, channels=channels), timed=False)
    found = {how: largest(points, how, BUDGETS[0]) for how in arguments.verify}
    for how, channels in found.items():
        measure(points, arguments.out, dataclasses.replace(LARGEST, channels=channels), timed=False, only=how)
    text = table(points)
    write_text(text, arguments.out.with_suffix(".md"))
    picture(points, arguments.out.with_suffix(".svg"))
    print(text)


def key_of(configuration: Configuration) -> str:
    """What a point is called in the results."""
    c = configuration
    return f"C={c.channels} cells={c.cells} batch={c.batch} size={c.size} attack={c.attack_steps}"


def measure(
    points: dict[str, dict[str, Any]], out: Path, configuration: Configuration, *, timed: bool, only: str = ""
) -> None:
    """Add a point to ``points``, unless it is there."""
    point = points.setdefault(key_of(configuration), {"configuration": dataclasses.asdict(configuration)})
    jobs = [("kept", False), ("recomputed", True)]
    context = multiprocessing.get_context("spawn")
    for how, recomputes in jobs:
        if f"gib_{how}" in point or (only and how != only):
            continue
        with context.Pool(1) as pool:
            gib, seconds = pool.apply(_step, (configuration, recomputes, timed))
        point[f"gib_{how}"] = gib
        if timed:
            point[f"seconds_{how}"] = seconds
        write_text(json.dumps(points, indent=1) + "\n", out)
        print(f"{key_of(configuration)}, {how}: {gib:.3f} GiB, {seconds:.2f} s", flush=True)


def _step(configuration: Configuration, recomputes: bool, timed: bool) -> tuple[float, float]:
    """Memory a step adds (GiB) and its CPU seconds: the lesser of two steps where it is ``timed``."""
    torch.set_num_threads(1)
    supernet = supernet_of(configuration, "cpu")
    if recomputes:
        for cell in supernet.cells:
            recompute(cell)
    batch, held_out = batches_of(configuration, "cpu", None)
    generator = torch.Generator().manual_seed(2)
    ours = Ours(configuration, supernet)
    # What torch loads for recomputation, once a process, is no memory of the step.
    warm = torch.nn.Identity()
    recompute(warm)
    warm(torch.ones(1, requires_grad=True)).sum().backward()
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    seconds = []
    for _ in range(2 if timed else 1):
        start = time.process_time()
        ours.step(batch, held_out, generator)
        seconds.append(time.process_time() - start)
    return _high_water() - before, min(seconds)


def _high_water() -> float:
    """GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def law(points: dict[str, dict[str, Any]], how: str) -> np.ndarray[Any, Any]:
    """Memory as a quadratic in the channels: maps grow with the channels, weights and their copies with the square.

    No term can be negative.
    """
    chosen = [points[key_of(dataclasses.replace(LARGEST, channels=c))] for c in LARGEST_CHANNELS]
    columns = np.array([[1, c, c * c] for c in LARGEST_CHANNELS], float)
    values = np.array([point[f"gib_{how}"] for point in chosen])
    solution: np.ndarray[Any, Any] = nnls(columns / values[:, None], np.ones(len(values)))[0]
    return solution


def largest(points: dict[str, dict[str, Any]], how: str, budget: float) -> int:
    """Most channels (a multiple of 4) that fit ``budget`` GiB, by the law."""
    a, b, c = law(points, how)
    a -= budget
    root = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * c) if abs(c) > 1e-12 else -a / b
    return int(root) // 4 * 4


def table(points: dict[str, dict[str, Any]]) -> str:
    """Markdown: one table an axis, then the largest supernets."""
    lines = [
        "CPU seconds of one thread for a search step (unrolled, min-norm stage), memory it adds to the process, and",
        "both with cells recomputed. Everything but the first column is that of C = 8, 5 cells, batch 16, 32x32",
        "pixels, attacks of 7 steps. Command: `python -m benchmarks.scaling`.",
        "",
    ]  # fmt: skip
    for axis, values in AXES.items():
        lines += [f"| {axis.replace('_', ' ')} | s | GiB | s, recomputed | GiB, recomputed |", "|---|---|---|---|---|"]
        for value in values:
            p = points.get(key_of(dataclasses.replace(BASE, **{axis: value})))
            if p is not None:
                lines.append(
                    f"| {value} | {p['seconds_kept']:.2f} | {p['gib_kept']:.3f} | {p['seconds_recomputed']:.2f} | "
                    f"{p['gib_recomputed']:.3f} |"
                )
        lines.append("")
    if all(key_of(dataclasses.replace(LARGEST, channels=c)) in points for c in LARGEST_CHANNELS):
        lines += ["Most channels of a supernet of 8 cells at batch 64, 32x32 pixels:", ""]
        lines += ["| memory | cells | channels | |", "|---|---|---|---|"]
        for budget in BUDGETS:
            for how in ("kept", "recomputed"):
                channels = largest(points, how, budget)
                tried = points.get(key_of(dataclasses.replace(LARGEST, channels=channels)), {}).get(f"gib_{how}")
                source = "extrapolated" if tried is None else f"measured: {tried:.2f} GiB"
                lines.append(f"| {budget:g} GiB | {how} | {channels} | {source} |")
        known = ", ".join(map(str, LARGEST_CHANNELS))
        lines += [
            "",
            f"Channels follow from a quadratic law through C = {known}; on a CPU, above the 0.6 GiB of an",
            "idle process. GPUs, where torch keeps more than the kernels do, need more (see `--memory-budget`).",
        ]
        lines.append("")
    return "\n".join(lines)


def picture(points: dict[str, dict[str, Any]], path: Path) -> None:
    """Seconds and memory over each axis, on logarithmic scales."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, len(AXES), figsize=(15, 6), sharey="row", layout="constrained")
    for column, (axis, values) in enumerate(AXES.items()):
        known = [v for v in values if key_of(dataclasses.replace(BASE, **{axis: v})) in points]
        found = [points[key_of(dataclasses.replace(BASE, **{axis: v}))] for v in known]
        for row, quantity in enumerate(("seconds", "gib")):
            panel = panels[row][column]
            for how, marker in (("kept", "o"), ("recomputed", "s")):
                panel.plot(known, [p[f"{quantity}_{how}"] for p in found], marker=marker, label=f"cells {how}")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(known, [str(v) for v in known])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        panels[1][column].set_xlabel(axis.replace("_", " "))
    panels[0][0].set_ylabel("CPU seconds a step")
    panels[1][0].set_ylabel("GiB")
    panels[0][0].legend()
    figure.suptitle("A search step (C = 8, 5 cells, batch 16, 32x32 pixels, attacks of 7 steps) as it grows")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
