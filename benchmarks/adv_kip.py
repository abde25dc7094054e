"""adv-KIP against its own weakness: a random subset, KIP and adv-KIP under attacks of growing strength.

    python -m benchmarks.adv_kip --task digits [--data FOLDER] [--seeds 0 1 2]

For each set of images, kernel regression on it and a small network (``small_networks``) trained on it as usual, each
under PGD of 1 and 20 steps, PGD-100 with 3 restarts on the margin, Square and AutoAttack, at the epsilon the set was
made for and at half of it; and the same network trained by PGD adversarial training on the random subset. What PGD-20
leaves and AutoAttack takes is robustness that was not there. FOLDER holds the other data sets' .npz files.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.small_networks import TASKS
from nas.attacks.autoattack import AutoAttack
from nas.attacks.pgd import Pgd
from nas.attacks.square import Square
from nas.data.image_data import ImageData
from nas.data.split import Split, split
from nas.evaluation.robustness import Trial, evaluate
from nas.model_file import ModelSpec
from nas.objective import Batch, Metrics, Objective, Setting, State
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training.adv_kip import CAVEAT, AdvKip, Distilled
from nas.training.loop import Training, train
from nas.training.neural_tangent_kernel import Regression, centred
from nas.training.pgd_at import PgdAt
from search_spaces.genotype import StageGenotype


@dataclass(frozen=True, eq=False)
class AdversariallyOn:
    """PGD adversarial training on a few images."""

    few: Distilled
    method: PgdAt

    def training_images(self) -> tuple[Tensor, Tensor]:
        return self.few.training_images()

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        return self.method(model, batch, state)


def attacks(threat_model: ThreatModel, queries: int) -> dict[str, Trial]:
    """What each model is put under."""
    return {
        "PGD-1": Trial(Pgd(threat_model, steps=1)),
        "PGD-20": Trial(Pgd(threat_model, steps=20)),
        "PGD-100 x3, margin": Trial(Pgd(threat_model, steps=100, loss="margin", stop_when_broken=True), 3),
        "Square": Trial(Square(threat_model, queries=queries)),
        "AutoAttack": Trial(AutoAttack(threat_model, queries=queries)),
    }


def measure(task_name: str, data: ImageData, seed: int, images: int, options: argparse.Namespace) -> dict[str, Any]:
    """Rows of the table: model -> epsilon -> attack -> accuracy."""
    task = TASKS[task_name]
    parts = split(data.y_train, architecture=0.5, validation=0.1, seed=seed)
    method = AdvKip(Pgd(task.threat_model, steps=10), images=images, steps=options.steps)
    none = replace(task.threat_model, epsilon=0.0)
    methods = {
        "random subset": replace(method, steps=0),
        "KIP": replace(method, attack=Pgd(none, steps=1)),
        "adv-KIP": method,
    }
    regression = Regression(method.kernel, data.mean, data.std, method.ridge)
    models: dict[str, nn.Module] = {}
    seconds: dict[str, float] = {}
    for name, variant in methods.items():
        began = time.perf_counter()
        few = variant.prepare(Setting(nn.Identity(), data, parts, seed, 1, 64))
        seconds[name] = time.perf_counter() - began
        targets = centred(few.y, len(data.classes))
        models[f"{name}, kernel"] = regression.fitted(few.x.double() / 255, targets, method.temperature)
        models[f"{name}, network"] = trained(task_name, data, parts, few, seed, options)
        if name == "random subset":
            by_attack = AdversariallyOn(few, PgdAt(Pgd(task.threat_model, steps=7)))
            models["random subset, network by PGD-AT"] = trained(task_name, data, parts, by_attack, seed, options)
    x, y = data.x_test[: options.test].float() / 255, data.y_test[: options.test]
    rows: dict[str, Any] = {}
    for name, model in models.items():
        rows[name] = {}
        for epsilon in (task.threat_model.epsilon / 2, task.threat_model.epsilon):
            trials = attacks(replace(task.threat_model, epsilon=epsilon), options.queries)
            found = evaluate(model, x, y, trials, seed=seed).to_data()
            rows[name][f"{epsilon:.4g}"] = {"natural": found["natural"], **found["attacks"]}
        print(seed, name, rows[name], flush=True)
    return {"rows": rows, "seconds": seconds}


def trained(
    task_name: str, data: ImageData, parts: Split, objective: Objective, seed: int, options: argparse.Namespace
) -> nn.Module:
    """The small network, trained; the last epoch counts, as no real image is to choose one."""
    task = TASKS[task_name]
    spec = ModelSpec(
        StageGenotype("plain", task.depths, task.widths), 0, 0, data.input_shape, data.classes, data.mean, data.std
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = spec.build()
    optimiser = Sgd(learning_rate=0.05, schedule="one_cycle", weight_decay=5e-4)
    training = Training(options.epochs, 50, optimiser, validate_every=options.epochs)
    train(model, data, parts, objective, training, validation_attack=Pgd(task.threat_model, steps=1), seed=seed)
    return model.eval()


def table(report: dict[str, Any]) -> str:
    """Markdown: mean and deviation over the seeds, in per cent."""
    first = report["seeds"][0]["rows"]
    columns = list(next(iter(next(iter(first.values())).values())))
    lines = [
        f"Made by `{report['command']}`: {report['images']} images of {report['task']}, {report['test']} test images, "
        f"{report['epochs']} epochs, {report['queries']} queries of Square, here and in AutoAttack; "
        f"{len(report['seeds'])} seed(s), per cent, mean +- standard deviation. {CAVEAT}",
        "",
        "| images, model | epsilon | " + " | ".join(columns) + " |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for name, of_epsilon in first.items():
        for epsilon in of_epsilon:
            cells = []
            for column in columns:
                values = [100 * seed["rows"][name][epsilon][column] for seed in report["seeds"]]
                cells.append(f"{mean(values):.1f}" + (f" +- {stdev(values):.1f}" if len(values) > 1 else ""))
            lines.append(f"| {name} | {epsilon} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits", choices=list(TASKS))
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = TASKS[options.task].data(options.data)
    report: dict[str, Any] = {
        "command": f"python -m benchmarks.adv_kip --task {options.task} --steps {options.steps} "
        f"--epochs {options.epochs} --seeds {' '.join(map(str, options.seeds))}",
        "task": options.task,
        "images": options.images,
        "test": min(options.test, len(data.y_test)),
        "epochs": options.epochs,
        "queries": options.queries,
        "seeds": [],
    }
    for seed in options.seeds:
        report["seeds"].append({"seed": seed, **measure(options.task, data, seed, options.images, options)})
        (options.out / f"adv_kip-{options.task}.json").write_text(json.dumps(report, indent=1) + "\n")
        (options.out / f"adv_kip-{options.task}.md").write_text(table(report))


if __name__ == "__main__":
    main()
