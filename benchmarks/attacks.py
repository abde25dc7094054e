"""PGD-20 and an evaluation in images per second, against torchattacks, foolbox and ART.

    pip install -r benchmarks/requirements.txt
    python -m benchmarks.attacks --data cifar10.npz

``--data``: an .npz with x_train, y_train [N], images uint8 [N, 32, 32, 3]. A ResNet-18 (3x3 stem, no max-pool) and the
published cell network are trained briefly on FGSM images and kept in .cache/. Every library attacks the same images
with the same settings; runs are interleaved, and the median ratio of neighbours is reported. The others get the network
with frozen parameters, which is the faster way for them, and as it is exported, without our kernels: with them every
library is as fast on a cell network as ours is.

Equal results are checked from the clean images, for a start that the libraries do not draw themselves: in double
precision pixel by pixel, in single precision sample by sample (broken or not), where signs of gradients near zero
depend on the order of sums; how often the other libraries differ among themselves tells how much that is.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from benchmarks.retraining import plain_torch
from nas.attacks.fgsm import Fgsm
from nas.attacks.pgd import Pgd
from nas.evaluation.robustness import Trial, evaluate
from nas.threat_model import ThreatModel
from search_spaces.catalogue import published, space_of
from search_spaces.genotype import read_genotype
from search_spaces.layers import Normalise

EPSILON, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 20
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CACHE = Path(__file__).parents[1] / ".cache"

Craft = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(network, images [N, C, H, W], labels [N]) -> adversarial images."""


def residual_network() -> nn.Module:
    """ResNet-18 for 32x32 images, normalisation inside."""
    network = resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()  # type: ignore[assignment]
    return nn.Sequential(Normalise(MEAN, STD), network)


def cell_network() -> nn.Module:
    """The published robust genotype at a size that a CPU can attack."""
    genotype = read_genotype(published()["arnas"])
    sizes: dict[str, Any] = {"channels": 16, "cells": 8, "input_shape": (3, 32, 32), "classes": 10}
    return space_of(genotype).build(genotype, **sizes, mean=MEAN, std=STD)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet18": residual_network, "cells": cell_network}


def trained(name: str, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """The network, trained on FGSM images of ``x`` [N, C, H, W] or read from the cache."""
    torch.manual_seed(0)
    network = NETWORKS[name]().to(x.device)
    file = CACHE / f"benchmark-{name}-{len(x)}-{epochs}.pt"
    if file.exists():
        network.load_state_dict(torch.load(file, map_location=x.device, weights_only=True))
        return network.eval()
    optimiser = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    attack = Fgsm(ThreatModel("linf", EPSILON))
    generator = torch.Generator().manual_seed(0)
    steps = epochs * (len(x) // 64)
    network.train()
    for step in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:64].to(x.device)
        for group in optimiser.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        images = attack(network, x[rows], y[rows], generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(network(images), y[rows]).backward()
        optimiser.step()
    CACHE.mkdir(exist_ok=True)
    torch.save(network.state_dict(), file)
    return network.eval()


class TorchOnly(nn.Module):
    """A network as it is exported: on torch's own operations. The kernels of cells would serve every library."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with plain_torch():
            logits: Tensor = self.network(x)
        return logits


def with_torchattacks(random_start: bool, steps: int) -> Craft:
    import torchattacks

    def craft(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attack = torchattacks.PGD(network, EPSILON, STEP_SIZE, steps, random_start)
        return attack(x, y)

    return craft


def with_foolbox(random_start: bool, steps: int) -> Craft:
    import foolbox

    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=steps, random_start=random_start)

    def craft(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model = foolbox.PyTorchModel(network, bounds=(0, 1), device=x.device)
        return attack.run(model, x, y, epsilon=EPSILON)

    return craft


def with_art(random_start: bool, steps: int) -> Craft:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def craft(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        classifier = PyTorchClassifier(
            network,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=10,
            clip_values=(0.0, 1.0),
            device_type="gpu" if x.is_cuda else "cpu",
        )
        attack = ProjectedGradientDescentPyTorch(
            classifier,
            eps=EPSILON,
            eps_step=STEP_SIZE,
            max_iter=steps,
            num_random_init=int(random_start),
            batch_size=len(x),
            verbose=False,
        )
        return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x.device)

    return craft


def with_ours(random_start: bool, steps: int, stop_when_broken: bool = False) -> Craft:
    attack = Pgd(
        ThreatModel("linf", EPSILON), steps, STEP_SIZE, random_start=random_start, stop_when_broken=stop_when_broken
    )

    def craft(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attack(network, x, y, generator=torch.Generator(x.device).manual_seed(0))

    return craft


OTHERS = {"torchattacks": with_torchattacks, "foolbox": with_foolbox, "art": with_art}


def evaluate_with_torchattacks(network: nn.Module, x: Tensor, y: Tensor, batch: int, steps: int) -> Tensor:
    """What ``nas.evaluation`` does (FGSM and PGD on the samples that are right), written around torchattacks.

    Not through ``nas.evaluation.evaluate``: within it, any attack would meet our faster form of the network.
    """
    import torchattacks

    attacks = [torchattacks.FGSM(network, EPSILON), torchattacks.PGD(network, EPSILON, STEP_SIZE, steps, True)]
    natural = torch.cat([robust(network, *part) for part in zip(x.split(batch), y.split(batch), strict=True)])
    worst = natural.clone()
    for attack in attacks:
        for rows in natural.nonzero().squeeze(1).split(batch):
            worst[rows] &= robust(network, attack(x[rows], y[rows]), y[rows])
    return worst


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long ``run`` takes, device work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run, ``rounds`` times, one after the other; the order turns round every time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs) if number % 2 == 0 else reversed(runs):
            times[name].append(seconds(runs[name], device))
    return times


def rates(times: dict[str, list[float]], images: int, reference: str) -> dict[str, Any]:
    """Images per second (median) and, over each other run of the same round, the median ratio of ``reference``."""
    per_second = {name: images / statistics.median(values) for name, values in times.items()}
    ratios = {
        name: statistics.median(b / a for a, b in zip(times[reference], values, strict=True))
        for name, values in times.items()
        if name != reference
    }
    return {"images_per_second": per_second, "ratio": ratios, "fastest_other": min(ratios.values()), "seconds": times}


def robust(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """[N] bool."""
    with torch.no_grad():
        return network(x).argmax(1) == y


def equality(ours: nn.Module, frozen: nn.Module, x: Tensor, y: Tensor, few: int, steps: int) -> dict[str, Any]:
    """Whether all libraries find the same, from the same start (the clean images)."""
    exact: dict[str, Any] = {}
    double_ours, double_frozen = copy.deepcopy(ours).double(), copy.deepcopy(frozen).double()
    x64, y64 = x[:few].double(), y[:few]
    found = with_ours(False, steps)(double_ours, x64, y64)
    for name in ("torchattacks", "foolbox"):  # ART computes in single precision only
        other = OTHERS[name](False, steps)(double_frozen, x64, y64)
        exact[name] = {
            "largest_pixel_difference": float((found - other).abs().max()),
            "samples_with_equal_outcome": int(
                (robust(double_frozen, found, y64) == robust(double_frozen, other, y64)).sum()
            ),
        }
    results = {"ours": with_ours(False, steps)(ours, x, y)}
    results |= {name: make(False, steps)(frozen, x, y) for name, make in OTHERS.items()}
    stopped = with_ours(False, steps, stop_when_broken=True)(ours, x, y)
    masks = {name: robust(frozen, images, y) for name, images in results.items()}
    names = list(results)
    single = {
        f"{a} and {b}": {
            "samples_with_equal_outcome": int((masks[a] == masks[b]).sum()),
            "pixels_that_differ": float(((results[a] - results[b]).abs() > 1e-6).double().mean()),
        }
        for number, a in enumerate(names)
        for b in names[number + 1 :]
    }
    return {
        "double_precision": {"samples": few, **exact},
        "single_precision": {
            "samples": len(x),
            "right_before": int(robust(frozen, x, y).sum()),
            "right_after": {name: int(mask.sum()) for name, mask in masks.items()},
            **single,
        },
        "stop_when_broken": {
            "right_after": int(robust(frozen, stopped, y).sum()),
            "broken_only_without": int((robust(frozen, stopped, y) & ~masks["ours"]).sum()),
        },
    }


def measure(name: str, x: Tensor, y: Tensor, network: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one network; ``x`` [N, C, H, W] are images it has not been trained on."""
    frozen = TorchOnly(copy.deepcopy(network)).requires_grad_(False).eval()
    device = x.device
    threat_model = ThreatModel("linf", EPSILON)
    report: dict[str, Any] = {"equality": equality(network, frozen, x[:64], y[:64], options.few, options.steps)}
    print(name, json.dumps(report["equality"], indent=1), flush=True)
    for batch in options.batches:
        images, labels = x[:batch], y[:batch]
        runs: dict[str, Callable[[], Any]] = {"ours": partial(with_ours(True, options.steps), network, images, labels)}
        runs |= {other: partial(make(True, options.steps), frozen, images, labels) for other, make in OTHERS.items()}
        stops = partial(with_ours(True, options.steps, stop_when_broken=True), network, images, labels)
        if device.type == "cuda":  # kernels are chosen at the first call
            for run in runs.values():
                run()
        report[f"pgd batch {batch}"] = rates(interleaved(runs, options.rounds, device), batch, "ours")
        both: dict[str, Callable[[], Any]] = {"stop_when_broken": stops, "all steps": runs["ours"]}
        report[f"stop_when_broken batch {batch}"] = rates(
            interleaved(both, options.rounds, device), batch, "stop_when_broken"
        )

        suite: dict[str, Callable[[], Any]]
        trials = {"fgsm": Trial(Fgsm(threat_model)), "pgd": Trial(Pgd(threat_model, options.steps, STEP_SIZE))}
        some, theirs = (x[:256], y[:256]), (frozen, x[:256], y[:256], batch, options.steps)
        suite = {
            "ours": partial(evaluate, network, *some, trials, seed=0, batch_size=batch),
            "torchattacks": partial(evaluate_with_torchattacks, *theirs),
        }
        report[f"evaluation batch {batch}"] = rates(interleaved(suite, options.rounds, device), 256, "ours")
        for title in ("pgd", "stop_when_broken", "evaluation"):
            part = report[f"{title} batch {batch}"]
            print(name, title, batch, part["images_per_second"], part["ratio"], flush=True)
    return report


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| network | what | ours, images/s | fastest other | ratio |", "| --- | --- | --- | --- | --- |"]
    for name, report in results["networks"].items():
        for title, part in report.items():
            if title == "equality":
                continue
            first, *_ = part["images_per_second"]
            other = min(part["ratio"], key=part["ratio"].__getitem__)
            ours, theirs = part["images_per_second"][first], part["images_per_second"][other]
            row = [name, title, f"{ours:.1f}", f"{other} {theirs:.1f}", f"{part['ratio'][other]:.2f}"]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchattacks", "foolbox", "adversarial-robustness-toolbox")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="5 steps, batch 64: for trying out, not for the record")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attacks.json")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.batches = 5, [64]
    options.few = 4 if options.quick else 8
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning, module="art")
    device = torch.device(options.device)
    with np.load(options.data) as arrays:
        x = torch.from_numpy(arrays["x_train"][:2048]).permute(0, 3, 1, 2).contiguous().to(device).float() / 255
        y = torch.from_numpy(arrays["y_train"][:2048]).long().to(device)
    results: dict[str, Any] = {
        "settings": {
            "norm": "linf", "epsilon": EPSILON, "step_size": STEP_SIZE, "steps": options.steps,
            "rounds": options.rounds, "threads": options.threads, "device": str(device),
            "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
            "versions": versions(),
        },
        "networks": {},
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        network = trained(name, x[:1024], y[:1024], epochs=4)
        results["networks"][name] = measure(name, x[1024:], y[1024:], network, options)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
