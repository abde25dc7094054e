"""AutoAttack against its public reference: verdicts sample by sample, and images per second.

    git clone https://github.com/fra31/auto-attack DIR
    python -m benchmarks.autoattack agreement digits --reference DIR --run RUN/train/searched
    python -m benchmarks.autoattack agreement cifar --reference DIR --data cifar10.npz
    python -m benchmarks.autoattack speed digits --reference DIR --run RUN/train/searched
    python -m benchmarks.autoattack speed cells --reference DIR --data cifar10.npz --samples 16

networks: "digits", a network that a run on digits trained (``--run``: folder with model.json); "cifar", a small
convolutional network trained here on FGSM images of CIFAR-10; "cells", the published cell network of
``benchmarks.attacks``. ``--data``: an .npz with x_train, y_train [N], images uint8 [N, 32, 32, 3].

"agreement" runs the whole suite with 100 steps and 5000 queries, all with seed 0; with ``--seeds``, exact and fast with
others as well, for how much of a difference is chance. "speed" runs a few samples that PGD does not break, with fewer
steps and queries, to which costs are proportional, interleaved; medians. Seconds are those of the processor, on one
thread.

The reference attacks the same module that ours does, kernels included, unless it is named "exported": then the network
runs on torch's own operations, as any other library meets it. It is called attack by attack, each on the samples that
the earlier ones left, which is what it does itself. Its checks are switched off: that for zero gradients fails on
gradients that are not contiguous, and the others would be run again at each of these calls. Nothing else is changed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import attacks
from benchmarks.attacks import MEAN, STD, TorchOnly, trained
from nas.attacks.autoattack import AutoAttack
from nas.attacks.pgd import Pgd
from nas.data.digits import Digits
from nas.model_file import load_model
from nas.threat_model import ThreatModel
from search_spaces.layers import Normalise

EPSILON = {"digits": 0.22, "cifar": 8 / 255, "cells": 4 / 255}
TRAINING = {"cifar": (8192, 10), "cells": (1024, 4)}
"""Images and epochs."""


def small_network() -> nn.Module:
    """Four convolutions, normalisation inside."""
    layers: list[nn.Module] = [Normalise(MEAN, STD)]
    for channels, out, stride in ((3, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(256, 10))


clock = time.process_time
"""Seconds of the processor, on one thread: other work on the machine then counts little."""

attacks.NETWORKS["cifar"] = small_network


def subject(options: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, and images with labels to attack: not trained on, for digits the test images first."""
    if options.network == "digits":
        _, model = load_model(options.run, "cpu")
        data = Digits()()
        x, y = torch.cat([data.x_test, data.x_train]), torch.cat([data.y_test, data.y_train])
        return model.eval(), x.float() / 255, y
    with np.load(options.data) as arrays:
        x = torch.from_numpy(arrays["x_train"]).permute(0, 3, 1, 2).float().contiguous() / 255
        y = torch.from_numpy(arrays["y_train"]).long().flatten()
    count, epochs = TRAINING[options.network]
    return trained(options.network, x[:count], y[:count], epochs), x[count:], y[count:]


def reference(
    model: nn.Module, x: Tensor, y: Tensor, settings: AutoAttack, seed: int
) -> tuple[Tensor, dict[str, float], Tensor]:
    """Place of the attack that broke each sample (-1 none, -2 wrong from the start), seconds of each, the images."""
    import autoattack
    from autoattack import autopgd_base, checks

    autopgd_base.check_zero_gradients = lambda *_, **__: None  # type: ignore[attr-defined]
    for name in ("check_randomized", "check_range_output", "check_dynamic", "check_n_classes"):
        setattr(checks, name, lambda *_, **__: None)
    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[settings.threat_model.norm]
    epsilon = settings.threat_model.epsilon
    suite = autoattack.AutoAttack(
        model, norm=norm, eps=epsilon, seed=seed, verbose=False, version=settings.version, device="cpu"
    )
    for part in (suite.apgd, suite.apgd_targeted, suite.fab):
        part.n_iter = settings.steps
    for part in (suite.apgd, suite.apgd_targeted):
        part.n_iter_orig = settings.steps
        part.n_iter_2, part.n_iter_min = max(int(0.22 * settings.steps), 1), max(int(0.06 * settings.steps), 1)
        part.size_decr = max(int(0.03 * settings.steps), 1)
    suite.square.n_queries = settings.queries
    names, seconds = list(suite.attacks_to_run), {}
    with torch.no_grad():
        natural = torch.cat([model(part).argmax(1) for part in x.split(settings.batch_size)]) == y
    broken_by = torch.where(natural, -1, -2)
    x_adv = x.clone()
    for place, name in enumerate(names):
        rows = (broken_by == -1).nonzero().squeeze(1)
        suite.attacks_to_run = [name]
        start = clock()
        if len(rows):
            images = suite.run_standard_evaluation(x[rows], y[rows], bs=settings.batch_size)
            with torch.no_grad():
                parts = zip(images.split(settings.batch_size), y[rows].split(settings.batch_size), strict=True)
                broken = torch.cat([model(part).argmax(1) != labels for part, labels in parts])
            broken_by[rows[broken]] = place
            x_adv[rows[broken]] = images[broken]
        seconds[name] = clock() - start
    return broken_by, seconds, x_adv


def ours(
    model: nn.Module, x: Tensor, y: Tensor, settings: AutoAttack, seed: int = 0
) -> tuple[Tensor, dict[str, float], Tensor]:
    """The same from here."""
    with mock.patch.object(time, "perf_counter", clock):
        verdicts = settings.run(model, x, y, seed=seed)
    broken_by = torch.where(verdicts.natural, verdicts.broken_by, -2)
    return broken_by, dict(zip(verdicts.attacks, verdicts.seconds.tolist(), strict=True)), verdicts.x_adv


def agreement(options: argparse.Namespace) -> dict[str, Any]:
    """Verdicts of all sides on the same samples."""
    model, x, y = subject(options)
    x, y = x[: options.samples], y[: options.samples]
    exact = settings(options, "exact")
    runs: dict[str, Callable[[], tuple[Tensor, dict[str, float], Tensor]]] = {
        "fast": lambda: ours(model, x, y, settings(options, "fast")),
        "exact": lambda: ours(model, x, y, exact),
        "reference": lambda: reference(model, x, y, exact, 0),
    }
    for seed in range(1, options.seeds):
        runs[f"exact, seed {seed}"] = partial(ours, model, x, y, exact, seed)
        runs[f"fast, seed {seed}"] = partial(ours, model, x, y, settings(options, "fast"), seed)
    found, report = {}, {}
    for name, run in runs.items():
        broken_by, seconds, x_adv = run()
        found[name] = broken_by
        names = list(seconds)
        report[name] = {
            "robust": int((broken_by == -1).sum()),
            "standing_after": {
                "natural": int((broken_by > -2).sum()),
                **{attack: int(((broken_by == -1) | (broken_by > i)).sum()) for i, attack in enumerate(names)},
            },
            "seconds": seconds,
            "total_seconds": sum(seconds.values()),
            "largest_perturbation": float(exact.threat_model.distance(x_adv, x).max()),
        }
        print(options.network, name, json.dumps(report[name]), flush=True)
    pairs = {}
    for name in found:
        if name != "reference":
            same = (found[name] == -1) == (found["reference"] == -1)
            pairs[name] = {
                "samples_with_the_same_verdict": int(same.sum()),
                "share": float(same.double().mean()),
                "broken_by_the_same_attack": int((found[name] == found["reference"]).sum()),
            }
            print(name, "and the reference:", pairs[name], flush=True)
    return {"samples": len(x), "runs": report, "agreement_with_reference": pairs}


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each side for the same standing samples, interleaved."""
    model, x, y = subject(options)
    exported = TorchOnly(copy.deepcopy(model)).eval()
    pgd = Pgd(settings(options, "fast").threat_model, 20, loss="margin", stop_when_broken=True)
    x, y = x[: 8 * options.samples], y[: 8 * options.samples]
    images = pgd(model, x, y, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        standing = torch.cat([model(part).argmax(1) for part in images.split(256)]) == y
    rows = standing.nonzero().squeeze(1)[: options.samples]
    x, y = x[rows], y[rows]
    exact = settings(options, "exact")
    runs: dict[str, Callable[[], tuple[Tensor, dict[str, float], Tensor]]] = {
        "fast": lambda: ours(model, x, y, settings(options, "fast")),
        "exact": lambda: ours(model, x, y, exact),
        "reference": lambda: reference(model, x, y, exact, 0),
        "reference, exported": lambda: reference(exported, x, y, exact, 0),
    }
    rounds: list[dict[str, dict[str, float]]] = []
    standing_after = {}
    for number in range(options.rounds):
        times = {}
        for name in list(runs) if number % 2 == 0 else reversed(runs):
            broken_by, seconds, _ = runs[name]()
            times[name] = {**seconds, "total": sum(seconds.values())}
            standing_after[name] = int((broken_by == -1).sum())
            print(options.network, number, name, times[name], flush=True)
        rounds.append(times)
    parts = list(rounds[0]["fast"])
    rate = {
        name: {part: len(x) / statistics.median(times[name][part] for times in rounds) for part in parts}
        for name in runs
    }
    ratio = {
        name: {part: statistics.median(times[name][part] / times["fast"][part] for times in rounds) for part in parts}
        for name in runs
        if name != "fast"
    }
    return {
        "samples": len(x),
        "steps": options.steps,
        "queries": options.queries,
        "robust": standing_after,
        "images_per_second": rate,
        "fast_is_faster_by": ratio,
        "rounds": rounds,
    }


def settings(options: argparse.Namespace, mode: Literal["exact", "fast"]) -> AutoAttack:
    """What both sides are set to."""
    attack = AutoAttack(ThreatModel(options.norm, options.epsilon), "standard", mode, batch_size=options.batch)
    return replace(attack, steps=options.steps, queries=options.queries)


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = []
    for title, report in results.items():
        lines += [f"## {title}", ""]
        if "runs" in report:
            names = list(next(iter(report["runs"].values()))["standing_after"])
            head = ["", *names, "seconds", "same verdict as the reference"]
            lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
            for name, run in report["runs"].items():
                pair = report["agreement_with_reference"].get(name)
                same = f"{pair['samples_with_the_same_verdict']} of {report['samples']}" if pair else ""
                counts = [str(count) for count in run["standing_after"].values()]
                cells = [name, *counts, f"{run['total_seconds']:.0f}", same]
                lines.append(f"| {' | '.join(cells)} |")
        else:
            parts = list(report["images_per_second"]["fast"])
            lines += [f"| images per second | {' | '.join(parts)} |", "| --- " * (len(parts) + 1) + "|"]
            for name, rates in report["images_per_second"].items():
                lines.append(f"| {name} | {' | '.join(f'{rates[part]:.3g}' for part in parts)} |")
            for name, ratios in report["fast_is_faster_by"].items():
                lines.append(f"| {name} / fast, time | {' | '.join(f'{ratios[part]:.2f}' for part in parts)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["agreement", "speed"])
    parser.add_argument("network", choices=list(EPSILON))
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of github fra31/auto-attack")
    parser.add_argument("--run", type=Path, help="folder with model.json, for digits")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as .npz, for cifar and cells")
    parser.add_argument("--norm", default="linf")
    parser.add_argument("--epsilon", type=float, default=0.0, help="0: that of the network")
    parser.add_argument("--samples", type=int, default=0, help="0: 540 for agreement, 64 for speed")
    parser.add_argument("--steps", type=int, default=0, help="0: 100 for agreement, 20 for speed")
    parser.add_argument("--queries", type=int, default=0, help="0: 5000 for agreement, 1000 for speed")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds exact and fast are run with")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "autoattack.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (options.reference / "autoattack").is_dir():
        parser.error(f"{options.reference} is no checkout of auto-attack")
    sys.path.insert(0, str(options.reference))
    whole = options.what == "agreement"
    options.epsilon = options.epsilon or EPSILON[options.network]
    options.samples = options.samples or (540 if whole else 64)
    options.steps, options.queries = (
        options.steps or (100 if whole else 20),
        options.queries or (5000 if whole else 1000),
    )
    report = agreement(options) if whole else speed(options)
    report["setting"] = f"{report['samples']} samples, {settings(options, 'exact')}"
    report["machine"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
    }
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    results[f"{options.what} on {options.network}: {report['setting']}"] = report
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
