"""One network of a run trained, compressed and judged in a folder: what runs, comparisons and studies share."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.activations.transfer import freeze_activation, load_activation
from nas.analysis.complexity import complexity, nonzero_parameters
from nas.compression.plan import Recovers, Steers, plan_for
from nas.compression.size import stored_size
from nas.data.split import Split
from nas.errors import InputError
from nas.model_file import ModelSpec, load_model, save_model, weights_digest, with_plan
from nas.objective import Objective, Setting, prediction_of
from nas.randomness import derived_seed
from nas.training.auxiliary import WithAuxiliary
from nas.training.cost_sensitive import class_table
from nas.training.loop import Training, train
from nas.training.weight_perturbation import WeightPerturbation
from runs.compress_part import PARENT, CompressPart, Step
from runs.context import Context, bench_of
from runs.directory import read_json, write_json
from runs.judging import judge
from runs.metrics import MetricsLog
from search_spaces.genotype import AnyGenotype, Genotype


def to_train(
    context: Context, genotype: AnyGenotype, name: str, channels: int = 0
) -> tuple[ModelSpec, nn.Module, Objective]:
    """The network of ``genotype`` with fresh weights, which depend on seed and ``name``, and what it is trained by."""
    part = context.recipe.train
    objective: Objective = part.objective
    auxiliary = bool(part.auxiliary_weight) and isinstance(genotype, Genotype)
    if auxiliary:
        objective = WithAuxiliary(objective, part.auxiliary_weight)
    if part.weight_perturbation:
        objective = WeightPerturbation(objective, part.weight_perturbation)
    spec = context.spec(genotype, channels)
    spec = dataclasses.replace(spec, auxiliary=auxiliary, prediction=prediction_of(part.objective))
    model = fresh(spec, derived_seed(context.seed, f"weights {name}"))
    if part.activation is not None and part.activation.transfer:
        load_activation(model, Path(part.activation.transfer))
        if part.activation.freeze:
            freeze_activation(model)
    return spec, model.to(context.device), objective


def fresh(spec: ModelSpec, seed: int) -> nn.Module:
    """The network with initial weights that depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.build()


def train_in(
    context: Context,
    model: nn.Module,
    objective: Objective,
    training: Training,
    folder: Path,
    purpose: str,
    lap: Callable[[int], None] = lambda epoch: None,
    *,
    rows: Split | None = None,
    heard: Callable[[Mapping[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Train ``model`` in ``folder``; returns its records.

    lap: hears of every epoch that ends here. heard: of every epoch's record, those before an interruption again; what
    it raises ends the training. rows: the images to train on, instead of the recipe's.
    """

    def log(record: Mapping[str, Any]) -> None:
        lap(record["epoch"])
        metrics.log(record)
        heard(record)

    def history(records: list[dict[str, Any]]) -> None:
        metrics.restore(records)
        for record in records:
            heard(record)

    with MetricsLog(folder, "train") as metrics:
        return train(
            model,
            context.data,
            rows or context.split,
            objective,
            training,
            validation_attack=context.recipe.train.validation_attack,
            seed=training_seed(context, purpose),
            extra=context.recipe.data.extra,
            shards=context.shards,
            checkpoint=folder / "checkpoint.safetensors",
            log=log,
            history=history,
            tick=context.tick,
        )


def training_seed(context: Context, purpose: str) -> int:
    """The seed of the training that is called ``purpose``."""
    return derived_seed(context.seed, f"train {purpose}")


def model_result(spec: ModelSpec, model: nn.Module, folder: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Save the trained ``model`` in ``folder``; what a task says of it."""
    save_model(spec, model, folder)
    return {
        "genotype": spec.genotype.to_data(),
        "prediction": "one network" if spec.prediction is None else str(spec.prediction),
        **size_of(spec, model),
        "training": records,
    }


def size_of(spec: ModelSpec, model: nn.Module) -> dict[str, Any]:
    """How large a network is: weights, those that are not zero, MACs of one image, bytes; the digest of its weights."""
    counted = complexity(spec)
    return {
        "parameters": counted.parameters,
        "nonzero": nonzero_parameters(model),
        "macs": counted.macs,
        "bytes": dataclasses.asdict(stored_size(model)),
        "digest": weights_digest(model),
    }


def compress_into(context: Context, part: CompressPart, source: Path, folder: Path) -> dict[str, Any]:
    """Compress the trained network in ``source`` step by step, and leave it in ``folder``, what is between inside."""
    plans: list[dict[str, str]] = []
    result: dict[str, Any] = {}
    for index, step in enumerate(part.steps):
        last = index + 1 == len(part.steps)
        target = folder if last else folder / f"{index + 1}-{step.name}"
        done = target / "step.json"
        if not done.exists():
            write_json(_compress_step(context, step, source, target), done)
        result = read_json(done)
        plans += result["plan"]
        source = target
    return {**result, "plan": plans}


def _compress_step(context: Context, step: Step, source: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    spec, network = load_model(source, context.device)
    if spec.auxiliary:
        spec, trained = dataclasses.replace(spec, auxiliary=False), network.state_dict()
        network = spec.build().to(context.device)
        network.load_state_dict({name: trained[name] for name in network.state_dict()})
    network.eval()
    method, objective = step.method, step.objective or context.recipe.train.objective
    if getattr(objective, "teacher", None) == PARENT:
        taught: Any = objective
        objective = dataclasses.replace(taught, teacher=str(source))
    parent, looked_at, led = copy.deepcopy(network).requires_grad_(False), network, []
    if isinstance(method, Steers) and method.epochs:
        if spec.prediction is not None:
            raise InputError(
                f"compression '{step.name}' is led up to by training one network, and '{source.name}' predicts with "
                f"several ({spec.prediction}): set its epochs to 0, or choose a method without"
            )
        looked_at = method.steered(network)
        (folder / "steering").mkdir(exist_ok=True)
        led = train_in(
            context, looked_at, method.steering(context.recipe.train.objective), step.steering(method.epochs),
            folder / "steering", f"steered {step.name}",
        )  # fmt: skip
        looked_at.eval()
        network = method.released(looked_at)
    seed = derived_seed(context.seed, f"compress {step.name}")
    setting = Setting(network, context.data, context.split, seed, step.epochs, step.training.batch_size, folder)
    decided = plan_for(method, looked_at, setting)
    spec, model = with_plan(spec, decided), decided.apply(network)
    records = []
    if step.epochs:
        if isinstance(method, Recovers):
            objective = method.recovery(objective, parent)
        records = train_in(context, model, objective, step.fine_tuning, folder, f"compressed {step.name}")
    result = model_result(spec, model, folder, records)
    if led:
        result["steering"] = led
    result["plan"] = [
        {"method": decided.method, "name": p.name, "action": p.action, "reason": p.reason} for p in decided.layers
    ]
    return result


def evaluate_into(
    context: Context, model: nn.Module, trials: Mapping[str, Any], folder: Path, **more: Any
) -> dict[str, Any]:
    """Judge ``model`` on the whole test set and keep the masks in ``folder``. more: of ``judging.judge``."""
    result = judge(bench_of(context), model, trials, folder, **more)
    result["per_class"] = class_table(result["per_class"], context.data.classes, context.recipe.train.objective)
    return result
