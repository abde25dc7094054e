"""AI-GAN against targeted PGD and Carlini-Wagner: how often they hit, and how long an image takes.

    python -m benchmarks.ai_gan --data FOLDER

FOLDER holds mnist.npz and cifar10.npz (x_train, y_train, x_test, y_test). The networks are small and trained in
minutes (``small_networks``; kept in .cache/), the numbers are theirs and no others'. Each image that is classified
correctly is sent to every other class. "broken" is what an evaluation asks: misclassified in whatever way; there PGD
and Carlini-Wagner run untargeted, AI-GAN tries its targets. Milliseconds an image are those of one target (PGD,
AI-GAN) or of the untargeted attack (Carlini-Wagner) at the given batch; the time of AI-GAN's training stands beside
them, in seconds of CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.small_networks import CACHE, TASKS
from nas import plugins
from nas.attacks.ai_gan import AiGan, FittedAiGan, load
from nas.attacks.losses import right
from nas.attacks.pgd import Pgd
from nas.attacks.targeted import Targeted, TargetedPgd, success_matrix
from nas.data.image_data import ImageData
from nas.evaluation.interval import wilson
from nas.objective import Attack
from nas.randomness import generator
from nas.threat_model import ThreatModel

CASES = {
    "digits": ("digits", False, AiGan(ThreatModel("linf", 0.1), epochs=40, batch_size=32)),
    "digits, adversarially trained": ("digits", True, AiGan(ThreatModel("linf", 0.1), epochs=40, batch_size=32)),
    "mnist": ("mnist", False, AiGan(ThreatModel("linf", 0.3), epochs=10)),
    "cifar10": ("cifar10", False, AiGan(ThreatModel("linf", 8 / 255), epochs=8)),
}
"""Name -> task, whether the network is adversarially trained, and the attack to train."""


def trained(name: str, attack: AiGan, model: nn.Module, data: ImageData, images: int) -> tuple[FittedAiGan, float]:
    """The trained attack and the seconds of CPU its training took, or both from the cache."""
    file = CACHE / f"ai_gan-{name.replace(', ', '-').replace(' ', '-')}-{images}-{attack.epochs}.safetensors"
    seconds = file.with_suffix(".seconds")
    if not file.exists():
        start = time.process_time()
        x, y = data.x_train[:images].float() / 255, data.y_train[:images]
        fitted = attack.fit(model, x, y, generator=generator(0, "ai_gan"), log=lambda record: print(record, flush=True))
        fitted.save(file)
        seconds.write_text(f"{time.process_time() - start:.0f}")
    return load(file), float(seconds.read_text())


def timed(craft: Callable[[], Tensor], rounds: int) -> tuple[Tensor, float]:
    """The images, and the median seconds of CPU over ``rounds`` calls: the machine may be busy with other work."""
    seconds, x_adv = [], torch.empty(0)
    for _ in range(rounds):
        start = time.process_time()
        x_adv = craft()
        seconds.append(time.process_time() - start)
    return x_adv, statistics.median(seconds)


def targeted_row(name: str, attack: Targeted, model: nn.Module, x: Tensor, y: Tensor, rounds: int) -> dict[str, Any]:
    """How often ``attack`` hits each class from each other, and its time for one target."""
    randomness = generator(0, f"benchmark {name}")
    target = (y + 1) % 10
    _, seconds = timed(lambda: attack.towards(model, x, target, generator=randomness), rounds)
    matrix = success_matrix(attack, model, x, y, 10, generator=randomness)
    pairs = 9 * len(x)
    rate = float((matrix.nan_to_num(0.0).sum(1) * y.bincount(minlength=10)).sum()) / pairs
    return {
        "settings": str(attack),
        "targeted_success": rate,
        "interval": list(wilson(round(rate * pairs), pairs)),
        "hardest_pair": float(matrix[~matrix.isnan()].min()),
        "milliseconds": 1000 * seconds / len(x),
        "matrix": [[None if value != value else round(value, 4) for value in row] for row in matrix.tolist()],
    }


def broken(attack: Attack, model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The share that ``attack`` makes misclassified, and seconds of CPU."""
    x_adv, seconds = timed(lambda: attack(model, x, y, generator=generator(0, "benchmark broken")), 1)
    with torch.no_grad():
        return float((~right(model(x_adv), y)).double().mean()), seconds


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One network under all attacks."""
    task_name, adversarial, attack = CASES[name]
    task = TASKS[task_name]
    data = task.data(folder)
    model = task.network(data, adversarial=adversarial)
    x, y = data.x_test.float() / 255, data.y_test
    with torch.no_grad():
        hits = torch.cat(
            [right(model(images), labels) for images, labels in zip(x.split(500), y.split(500), strict=True)]
        )
    rows = hits.nonzero().squeeze(1)[: options.images]
    x, y = x[rows], y[rows]
    fitted, seconds = trained(name, attack, model, data, options.train_images)
    pgd = TargetedPgd(task.threat_model, steps=40)
    attacks: dict[str, Any] = {
        "ai_gan": targeted_row("ai_gan", fitted, model, x, y, 5),
        "targeted pgd": targeted_row("pgd", pgd, model, x, y, 1),
    }
    attacks["ai_gan"] |= {"broken": broken(fitted, model, x, y)[0], "training_seconds": seconds}
    untargeted = Pgd(task.threat_model, steps=40, keep="best", loss="margin")
    attacks["targeted pgd"] |= {"broken": broken(untargeted, model, x, y)[0], "settings_broken": str(untargeted)}
    if "carlini_wagner" in plugins.available("attacks"):
        carlini = plugins.load("attacks", "carlini_wagner")(task.threat_model)
        share, seconds = broken(carlini, model, x, y)
        attacks["carlini_wagner"] = {
            "settings": str(carlini), "broken": share, "milliseconds": 1000 * seconds / len(x),
        }  # fmt: skip
    return {
        "network": f"plain, widths {task.widths}, {'adversarially' if adversarial else 'standard'} trained",
        "natural_accuracy": float(hits.double().mean()),
        "threat_model": str(task.threat_model),
        "images": len(x),
        "generator": {"train_images": options.train_images, **fitted.settings},
        "attacks": attacks,
    }


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"Made by `python -m benchmarks.ai_gan`, {results['settings']['threads']} thread; every number belongs to the "
        "small network of its row. Success of a GAN is no measure of robustness.",
        "",
        "| network | natural | threat model | attack | targeted success | hardest pair | broken | ms an image "
        "| fit, s of CPU |",
        "|---|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, case in results["cases"].items():
        for attack, row in case["attacks"].items():
            low, high = row.get("interval", (None, None))
            hit = f"{row['targeted_success']:.1%} ({low:.1%} to {high:.1%})" if low is not None else ""
            hardest = f"{row['hardest_pair']:.0%}" if "hardest_pair" in row else ""
            seconds = f"{row['training_seconds']:.0f}" if "training_seconds" in row else ""
            cells = [name, f"{case['natural_accuracy']:.1%}", case["threat_model"], attack, hit, hardest]
            cells += [f"{row['broken']:.1%}", f"{row['milliseconds']:.2f}", seconds]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--train-images", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ai_gan.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    CACHE.mkdir(exist_ok=True)
    results: dict[str, Any] = {"cases": {}}
    if options.out.exists():  # cases that are not measured now stay
        results = json.loads(options.out.read_text())
    results["settings"] = {"threads": options.threads, "machine": platform.processor(), "torch": torch.__version__}
    for name in options.cases:
        results["cases"][name] = measure(name, options.data, options)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(results))
        print(table(results), flush=True)


if __name__ == "__main__":
    main()
