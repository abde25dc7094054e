"""Feature squeezing: how many adversarial images it finds, and how many when the attack knows it.

    python -m benchmarks.feature_squeezing --data FOLDER

FOLDER holds mnist.npz and cifar10.npz (x_train, y_train, x_test, y_test); the networks are small
(``small_networks``). The squeezers are those the paper found best on either data set. The threshold is set on one
half of the test images to a false-positive rate of 5 %; the other half gives the false positives that are reported,
the ROC curve and, of its correctly classified images, those that are attacked. The naive attacks know the network
only. Attacks for the nearest misclassified image are judged at whatever distance they find it, as in the paper.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.small_networks import TASKS
from nas import plugins
from nas.attacks.fgsm import Fgsm
from nas.attacks.losses import right
from nas.attacks.pgd import Pgd
from nas.detection.evasion import Evasion
from nas.detection.feature_squeezing import Detector, FeatureSqueezing, detection, threshold_at
from nas.detection.squeezers import BitDepth, MedianFilter, NonLocalMeans, Squeezer
from nas.evaluation.interval import wilson
from nas.objective import Attack
from nas.randomness import generator
from nas.threat_model import ThreatModel

SQUEEZERS: dict[str, tuple[Squeezer, ...]] = {
    "mnist": (BitDepth(1), MedianFilter(2, 2)),
    "cifar10": (BitDepth(5), MedianFilter(2, 2), NonLocalMeans(13, 3, 2.0)),
}
NEAREST: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepFool, nearest in l2": ("deepfool", {}),
    "Carlini-Wagner, nearest in l2": ("carlini_wagner", {"searches": 5, "steps": 100}),
    "Carlini-Wagner, confidence 10": (
        "carlini_wagner",
        {"searches": 6, "steps": 200, "confidence": 10.0, "weight": 10.0},
    ),
}
"""Attacks for the nearest image, measured where they are installed, with what makes them affordable."""


def naive(threat_model: ThreatModel) -> dict[str, Attack]:
    """Attacks that know nothing of the detector."""
    return {
        "FGSM": Fgsm(threat_model),
        "PGD, stops when misclassified": Pgd(
            threat_model, steps=40, step_size=threat_model.epsilon / 20, stop_when_broken=True
        ),
        "PGD, cross-entropy": Pgd(threat_model, steps=40),
        "PGD, margin": Pgd(threat_model, steps=40, loss="margin"),
    }


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One network, its joint and single detectors, every attack on the same images."""
    task = TASKS[name]
    data = task.data(folder)
    model = task.network(data)
    x, y = data.x_test[: 2 * options.calibration].float() / 255, data.y_test[: 2 * options.calibration]
    with torch.no_grad():
        rows = right(model(x), y).nonzero().squeeze(1)
    rows = rows[rows >= options.calibration][: options.images]
    calibration, clean, attacked, labels = x[: options.calibration], x[options.calibration :], x[rows], y[rows]
    joint, *single = [
        calibrated(model, squeezers, calibration, options.rate)
        for squeezers in (SQUEEZERS[name], *((squeezer,) for squeezer in SQUEEZERS[name]))
    ]
    false_positives = int(joint.flags(model, clean).sum())
    chosen = f"--images {options.images} --calibration {options.calibration} --rate {options.rate}"
    report: dict[str, Any] = {
        "options": f"--cases {name} {chosen} --steps {options.steps} --restarts {options.restarts}",
        "threat_model": str(task.threat_model),
        "natural_accuracy": float(right(model(clean).detach(), y[options.calibration :]).double().mean()),
        "images": len(rows),
        "calibration_images": len(calibration),
        "detector": str(joint),
        "thresholds": {str(detector.squeezing): detector.threshold for detector in (joint, *single)},
        "false_positive_rate": false_positives / len(clean),
        "false_positive_interval": list(wilson(false_positives, len(clean))),
        "attacks": {},
    }

    def record(title: str, craft: Any, knows: bool, settings: str) -> None:
        start = time.process_time()
        images: Tensor = craft(model, attacked, labels, generator=generator(0, f"benchmark {title}"))
        seconds = time.process_time() - start
        row: dict[str, Any] = {"settings": settings, "adaptive": knows, "cpu_seconds": seconds}
        row["joint"] = detection(joint, model, clean, images, labels).to_data()
        if not knows:
            row["single"] = {
                str(detector.squeezing): detection(detector, model, clean, images, labels).to_data()["detected"]
                for detector in single
            }
        report["attacks"][title] = row
        print(name, title, row["joint"], f"{seconds:.0f} s", flush=True)

    for title, attack in naive(task.threat_model).items():
        record(title, attack, False, str(attack))
    for title, (plugin, settings) in NEAREST.items():
        if plugin in plugins.available("attacks"):
            nearest = plugins.load("attacks", plugin)(ThreatModel("l2", 1.0), **settings)
            record(title, nearest.nearest, False, str(nearest))
    for restarts in (1, options.restarts):
        evasion = Evasion(joint, task.threat_model, steps=options.steps, restarts=restarts)
        record(f"adaptive, {restarts} start{'s' if restarts > 1 else ''}", evasion, True, str(evasion))
    return report


def calibrated(model: nn.Module, squeezers: tuple[Squeezer, ...], images: Tensor, rate: float) -> Detector:
    """A detector with its threshold at this false-positive rate on ``images``."""
    squeezing = FeatureSqueezing(squeezers)
    return Detector(squeezing, threshold_at(squeezing.scores(model, images), rate))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "Made by `python -m benchmarks.feature_squeezing`; the numbers are those of the small networks measured.",
        "",
    ]
    for name, report in results.items():
        low, high = report["false_positive_interval"]
        lines += [
            f"## {name}, {report['threat_model']}",
            "",
            f"Natural accuracy {report['natural_accuracy']:.1%}; {report['images']} correctly classified images "
            f"attacked; {report['detector']}, set on {report['calibration_images']} other images; false positives "
            f"{report['false_positive_rate']:.1%} ({low:.1%} to {high:.1%}). `{report['options']}`",
            "",
            "| attack | successful | detected (95 %) | successful, undetected | ROC AUC | failed ones flagged |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for title, row in report["attacks"].items():
            joint = row["joint"]
            detected = (
                ""
                if joint["detected"] is None
                else "{:.1%} ({:.1%} to {:.1%})".format(joint["detected"], *joint["interval"])
            )
            auc = "" if joint["auc"] is None else f"{joint['auc']:.3f}"
            failed = "" if joint["failed_flagged"] is None else f"{joint['failed_flagged']:.1%}"
            bold = "**" if row["adaptive"] else ""
            lines.append(
                f"| {bold}{title}{bold} | {joint['successful']} of {joint['n']} | {detected} | "
                f"{bold}{joint['undetected_success']:.1%}{bold} | {auc} | {failed} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=list(SQUEEZERS), choices=list(SQUEEZERS))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--calibration", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "feature_squeezing.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Cases that are not measured now stay.
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.cases:
        results[name] = measure(name, options.data, options)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
