"""Adversarial training of a searched network against the plain loop, interleaved in one process.

    python -m benchmarks.retraining                 # CPU
    python -m benchmarks.retraining --device cuda

The plain loop is what is usually written: the network as ordinary torch modules (our kernels and foldings switched
off), channels first, each PGD step a full backward pass through trainable parameters. Both train copies of one
network on the same batches with the same starts; reported are seconds a step, median, and their ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.objective import Batch, State
from nas.optimisation import Sgd, weight_step
from nas.threat_model import ThreatModel
from nas.training.pgd_at import PgdAt
from search_spaces.catalogue import load_genotype
from search_spaces.dsara import SPACE

# channels, cells, image size, image channels, batch, attack steps, epsilon
CONFIGURATIONS: dict[str, tuple[int, int, int, int, int, int, float]] = {
    "digits": (10, 4, 8, 1, 64, 3, 0.1),
    "cifar10-mini": (10, 4, 16, 3, 64, 2, 8 / 255),
    "cifar10, 16 filters, 8 cells": (16, 8, 32, 3, 32, 7, 8 / 255),
}


@contextmanager
def plain_torch() -> Iterator[None]:
    """Within it, cells run on torch's own operations."""
    before = os.environ.get("DSARA_NATIVE")
    os.environ["DSARA_NATIVE"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DSARA_NATIVE"]
        else:
            os.environ["DSARA_NATIVE"] = before


def plain_step(
    model: nn.Module, x: Tensor, y: Tensor, attack: Pgd, start: Tensor, optimiser: torch.optim.Optimizer
) -> None:
    """A step of the usual loop: PGD in eval mode by full backward passes, then the weights."""
    model.eval()
    x_adv = start
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_()
        optimiser.zero_grad()
        F.cross_entropy(model(x_adv), y).backward()
        assert x_adv.grad is not None
        x_adv = attack.threat_model.project(x_adv.detach() + attack.step * x_adv.grad.sign(), x)
    model.train()
    optimiser.zero_grad()
    F.cross_entropy(model(x_adv.detach()), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimiser.step()


def measure(name: str, device: str, repeats: int) -> dict[str, Any]:
    """Median seconds of both steps."""
    channels, cells, size, image_channels, batch_size, steps, epsilon = CONFIGURATIONS[name]
    torch.manual_seed(0)
    moments: dict[str, Any] = {"mean": (0.5,) * image_channels, "std": (0.25,) * image_channels}
    ours = SPACE.build(
        load_genotype("arnas"), channels=channels, cells=cells, input_shape=(image_channels, size, size), classes=10,
        **moments,
    ).to(device)  # fmt: skip
    theirs = copy.deepcopy(ours)
    attack = Pgd(ThreatModel(epsilon=epsilon), steps=steps)
    settings = Sgd(0.1)
    our_optimiser = settings.optimiser(list(ours.parameters()))
    their_optimiser = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, weight_decay=settings.weight_decay)
    objective, generator = PgdAt(attack), torch.Generator(device).manual_seed(0)
    x = F.interpolate(torch.rand(batch_size, image_channels, 4, 4), size=(size, size), mode="bilinear").to(device)
    y = torch.randint(10, (batch_size,), device=device)
    batch = Batch(x, y, torch.arange(batch_size, device=device))
    state = State(0, 0, 0.0, generator, generator)

    def mine() -> None:
        ours.train()
        loss, _ = objective(ours, batch, state)
        weight_step(loss, list(ours.parameters()), our_optimiser, 0.1, 5.0)

    def usual() -> None:
        with plain_torch():
            start = attack.threat_model.random_start(x, generator)
            plain_step(theirs, x, y, attack, start, their_optimiser)

    times: dict[str, list[float]] = {"ours": [], "plain loop": []}
    for repeat in range(repeats + 1):
        for label, step in (("ours", mine), ("plain loop", usual)):
            if device == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                times[label].append(time.perf_counter() - begin)
    medians = {label: statistics.median(values) for label, values in times.items()}
    return {"seconds": medians, "ratio": medians["plain loop"] / medians["ours"], "repeats": repeats}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"threads": arguments.threads, "torch": torch.__version__}
    for name in CONFIGURATIONS:
        results[name] = measure(name, arguments.device, arguments.repeats)
        seconds = results[name]["seconds"]
        print(
            f"{name}: plain loop {seconds['plain loop']:.3f} s, ours {seconds['ours']:.3f} s a step: "
            f"{results[name]['ratio']:.2f}x"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"retraining-{arguments.device}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
