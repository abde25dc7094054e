"""A search step of ``nas.search`` against the textbook step, interleaved in one process.

    python -m benchmarks.search_step a b c          # CPU: about 3, 20 and 2 minutes
    python -m benchmarks.search_step d --device cuda

Both start from the same weights and take steps on the same batches. Reported: median seconds and their ratio, passes
of the network, peak memory of each (each alone in a fresh process), arithmetic against a matrix product measured on
the same machine, and how far attack directions and architecture gradients are from the textbook's in float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.textbook import TextbookSearch, textbook_of
from nas.attacks.gradient import input_gradient
from nas.attacks.pgd import Pgd
from nas.model_state import crafting, frozen_statistics
from nas.objective import Batch, State
from nas.optimisation import Sgd
from nas.search import bilevel
from nas.search.architecture_gradient import Unrolled, WeightStep
from nas.threat_model import ThreatModel
from nas.training.pgd_at import PgdAt
from nas.training.standard import PLUGIN as Standard
from search_spaces.dsara import SPACE
from search_spaces.native import library
from search_spaces.supernet import Supernet


@dataclass(frozen=True)
class Configuration:
    """Size of a search step."""

    channels: int
    cells: int
    batch: int
    size: int
    image_channels: int
    epsilon: float
    attack_steps: int
    repeats: int


CONFIGURATIONS = {
    "a": Configuration(8, 5, 16, 32, 3, 8 / 255, 7, 5),
    "b": Configuration(16, 8, 32, 32, 3, 8 / 255, 7, 2),
    "c": Configuration(8, 4, 64, 8, 1, 0.1, 3, 7),
    "d32": Configuration(24, 8, 32, 32, 3, 8 / 255, 7, 5),
    "d256": Configuration(24, 8, 256, 32, 3, 8 / 255, 7, 5),
}
CLASSES = 10
LEARNING_RATE = 0.1


class Ours:
    """Our step: the pieces of ``nas.search.bilevel`` on given batches."""

    def __init__(self, configuration: Configuration, supernet: Supernet) -> None:
        self.supernet = supernet
        self.attack = Pgd(
            ThreatModel(epsilon=configuration.epsilon), steps=configuration.attack_steps, statistics="batch"
        )
        self.settings = bilevel.Search(
            channels=configuration.channels,
            cells=configuration.cells,
            batch_size=configuration.batch,
            gradient=Unrolled(),
            weights=Sgd(LEARNING_RATE, final_learning_rate=0.001, weight_decay=3e-4),
            architecture=bilevel.ArchitectureAdam(0.02),
            stages=(bilevel.Stage(1, ("natural", "adversarial"), "min_norm", 0.1),),
        )
        self.objectives = {"natural": Standard(), "adversarial": PgdAt(self.attack)}
        self.optimiser, self.adam = bilevel.optimisers(supernet, self.settings)

    def step(self, batch: Batch, held_out: Batch, generator: torch.Generator) -> None:
        """One step."""
        self.supernet.train()
        state = State(0, 0, 0.0, generator, generator)
        bilevel.take_step(
            self.supernet, self.settings, self.settings.stages[0], self.objectives["adversarial"], self.objectives,
            batch, held_out, {0: state}, self.optimiser, self.adam,
        )  # fmt: skip


def supernet_of(configuration: Configuration, device: str) -> Supernet:
    """A supernet with fixed initial weights."""
    torch.manual_seed(0)
    moments: dict[str, Any] = {
        "mean": (0.5,) * configuration.image_channels,
        "std": (0.25,) * configuration.image_channels,
    }
    return SPACE.supernet(
        channels=configuration.channels,
        cells=configuration.cells,
        input_shape=(configuration.image_channels, configuration.size, configuration.size),
        classes=CLASSES,
        **moments,
    ).to(device)


def batches_of(configuration: Configuration, device: str, data: Path | None, seed: int = 1) -> tuple[Batch, Batch]:
    """Two batches: of ``data`` (an .npz with x_train and y_train) or smooth random images."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(2):
        n, c, s = configuration.batch, configuration.image_channels, configuration.size
        if data is not None:
            with np.load(data) as arrays:
                rows = torch.randperm(len(arrays["x_train"]), generator=generator)[:n].numpy()
                x = torch.from_numpy(arrays["x_train"][rows]).float() / 255
                y = torch.from_numpy(arrays["y_train"][rows].astype("int64").ravel())
                if x.dim() == 3:
                    x = x[..., None]
                if x.shape[1] != c:
                    x = x.permute(0, 3, 1, 2).contiguous()
        else:
            coarse = torch.rand(n, c, 4, 4, generator=generator)
            x = torch.nn.functional.interpolate(coarse, size=(s, s), mode="bilinear")
            x = (x + 0.1 * torch.rand(n, c, s, s, generator=generator)).clamp(0, 1)
            y = torch.randint(CLASSES, (n,), generator=generator)
        found.append(Batch(x.to(device), y.to(device), torch.arange(n, device=device)))
    return found[0], found[1]


def textbook_search(configuration: Configuration, supernet: Supernet, attack: Pgd) -> TextbookSearch:
    """The yardstick with the weights of ``supernet``."""
    return TextbookSearch(
        textbook_of(supernet, SPACE),
        lambda: textbook_of(supernet, SPACE),
        attack.threat_model,
        configuration.attack_steps,
        attack.step,
        LEARNING_RATE,
    )


def seconds(function: Any, device: str) -> float:
    """Wall time of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(configuration: Configuration, device: str, data: Path | None, repeats: int) -> dict[str, Any]:
    """Interleaved times of both steps."""
    supernet = supernet_of(configuration, device)
    batch, held_out = batches_of(configuration, device, data)
    generator = torch.Generator(device).manual_seed(2)
    ours = Ours(configuration, supernet)
    textbook = textbook_search(configuration, supernet, ours.attack)

    def theirs() -> None:
        starts = tuple(ours.attack.threat_model.random_start(b.x, generator) for b in (batch, held_out))
        textbook.step(batch.x, batch.y, held_out.x, held_out.y, starts)  # type: ignore[arg-type]

    def mine() -> None:
        ours.step(batch, held_out, generator)

    times: dict[str, list[float]] = {"ours": [], "textbook": []}
    mine()  # compiles, and allocates what is kept
    if configuration.batch * configuration.channels < 512:
        theirs()
    textbook.passes = 0
    for _ in range(repeats):
        times["ours"].append(seconds(mine, device))
        times["textbook"].append(seconds(theirs, device))
    passes = textbook.passes // repeats
    counter = FlopCounterMode(display=False)
    with counter:
        textbook.loss(textbook.model, batch.x, batch.y).backward()
    flops = counter.get_total_flops() * passes
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "seconds": medians,
        "all_seconds": times,
        "ratio": medians["textbook"] / medians["ours"],
        "passes": {"textbook": passes, "ours": passes - 1},
        "gflop_per_step": flops / 1e9,
        "gflop_per_second": {name: flops / 1e9 / value for name, value in medians.items()},
    }


def agreement(configuration: Configuration, device: str, data: Path | None) -> dict[str, float]:
    """How close to the textbook's float64 result: input gradients (attack directions) and architecture gradients.

    Medians over three draws: rounding in float32 is blown up by the finite differences, by chance more or less.
    """
    draws = [_agreement(configuration, device, data, seed) for seed in range(1, 4)]
    return {label: statistics.median(draw[label] for draw in draws) for label in draws[0]}


def _agreement(configuration: Configuration, device: str, data: Path | None, seed: int) -> dict[str, float]:
    batch, held_out = batches_of(configuration, device, data, seed)
    batch = Batch(batch.x[:8], batch.y[:8], batch.indices[:8])
    held_out = Batch(held_out.x[:8], held_out.y[:8], held_out.indices[:8])
    reference: tuple[Tensor, Tensor] | None = None
    found: dict[str, float] = {}
    for name, precision in (("textbook", torch.float64), ("ours", torch.float64), ("textbook", torch.float32),
                            ("ours", torch.float32)):  # fmt: skip
        supernet = supernet_of(configuration, device).to(precision).train()
        x, held_out_x = batch.x.to(precision), held_out.x.to(precision)
        settings = Ours(configuration, supernet)
        if name == "ours":
            with crafting(supernet, batch_statistics=True):
                direction, _, _ = input_gradient(supernet, x, batch.y, "cross_entropy", None)
            with frozen_statistics(supernet):
                step = WeightStep(LEARNING_RATE, 0.9, 3e-4, [None] * len(supernet.weight_parameters()))
                (gradient,) = settings.settings.gradient(
                    supernet,
                    lambda: torch.nn.functional.cross_entropy(supernet(x), batch.y),  # noqa: B023
                    [lambda: torch.nn.functional.cross_entropy(supernet(held_out_x), held_out.y)],  # noqa: B023
                    step,
                )
        else:
            textbook = textbook_search(configuration, supernet, settings.attack)
            point = x.clone().requires_grad_()
            (direction,) = torch.autograd.grad(textbook.loss(textbook.model, point, batch.y) * len(x), point)
            gradient, _ = textbook.architecture_gradient(x, batch.y, held_out_x, held_out.y)
        if reference is None:
            reference = (direction, gradient)
            continue
        for what, value, expected in (("attack", direction, reference[0]), ("architecture", gradient, reference[1])):
            value = value.double().flatten()
            expected = expected.flatten()
            label = f"{name} {'float64' if precision == torch.float64 else 'float32'} {what}"
            found[f"{label} relative error"] = float((value - expected).norm() / expected.norm())
            found[f"{label} cosine"] = float(torch.dot(value, expected) / (value.norm() * expected.norm()))
    return found


def peak(which: str, name: str, device: str, threads: int) -> float:
    """Peak memory in GiB of one step, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (which, name, device, threads))


def _peak(which: str, name: str, device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    # The length of the attack changes nothing: a pass needs the memory, not their number.
    configuration = dataclasses.replace(CONFIGURATIONS[name], attack_steps=1)
    supernet = supernet_of(configuration, device)
    batch, held_out = batches_of(configuration, device, None)
    generator = torch.Generator(device).manual_seed(2)
    ours = Ours(configuration, supernet)
    # The high-water mark of this process from here on (that of getrusage may be its parent's).
    Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    if which == "ours":
        ours.step(batch, held_out, generator)
    else:
        textbook = textbook_search(configuration, supernet, ours.attack)
        textbook.step(batch.x, batch.y, held_out.x, held_out.y, (batch.x, held_out.x))
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return _high_water() - before


def _high_water() -> float:
    """GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def matrix_product(device: str) -> float:
    """GFLOP per second of a large float32 matrix product."""
    n = 2048 if device == "cpu" else 8192
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    times = [seconds(lambda: a @ b, device) for _ in range(8)]
    return 2 * n**3 / statistics.median(times[2:]) / 1e9


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configurations", nargs="+", choices=[*CONFIGURATIONS, "d"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=0, help="0: as many as the configuration says")
    parser.add_argument("--data", type=Path, help=".npz of images instead of smooth random ones (32x32 only)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = [n for name in arguments.configurations for n in (("d32", "d256") if name == "d" else (name,))]
    path = arguments.out / f"search_step-{arguments.device}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        configuration = CONFIGURATIONS[name]
        data = arguments.data if configuration.size == 32 else None
        product = matrix_product(arguments.device)
        result = measure(configuration, arguments.device, data, arguments.repeats or configuration.repeats)
        result["matrix_product_gflop_per_second"] = product
        result["agreement"] = agreement(configuration, arguments.device, data)
        result["peak_gib"] = {
            which: peak(which, name, arguments.device, arguments.threads) for which in ("ours", "textbook")
        }
        result["configuration"] = vars(configuration)
        result["machine"] = {
            "processor": platform.machine() if arguments.device == "cpu" else torch.cuda.get_device_name(),
            "threads": arguments.threads,
            "torch": torch.__version__,
            "native": library.library() is not None,
        }
        results[name] = result
        arguments.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(
            f"({name}) textbook {result['seconds']['textbook']:.2f} s, ours {result['seconds']['ours']:.3f} s: "
            f"{result['ratio']:.1f}x; {result['gflop_per_second']['ours']:.1f} GFLOP/s of {product:.0f}; peak GiB "
            f"{result['peak_gib']['textbook']:.2f} -> {result['peak_gib']['ours']:.2f}"
        )
        for label, value in result["agreement"].items():
            print(f"    {label}: {value:.3e}" if "error" in label else f"    {label}: {value:.8f}")


if __name__ == "__main__":
    main()
