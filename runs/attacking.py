"""``nas attack``: a network of a run, or one from outside, judged by an attack, the recipe's trials or a suite."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.data.split import subset
from nas.defences.noise import NoiseEnsemble
from nas.errors import InputError
from nas.evaluation.expectation import Expectation
from nas.evaluation.gallery import gallery
from nas.evaluation.robustness import Trial
from nas.evaluation.suites import suite
from nas.model_file import load_model
from nas.randomness import generator
from nas.report.attack_page import write_attack_page
from nas.threat_model import ThreatModel
from runs.context import bench_of, device_of, model_folder
from runs.directory import default_path, make_folder, write_json
from runs.finished import label_of, network_folder, networks_of, opened
from runs.judging import Bench, Tick, judge
from runs.outside import data_from, is_outside, network_from, source_from
from runs.progress import Observer
from runs.recipe import attack_from, override_key


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line; None is what was not."""

    target: str
    attack: str
    suite: str | None
    model: str
    settings: tuple[str, ...]
    restarts: int | None
    epsilon: float | None
    norm: str | None
    samples: int | None
    data: str | None
    weights: Path | None
    draws: int
    seed: int | None
    out: Path | None

    def __post_init__(self) -> None:
        if self.suite is not None and (self.attack != "recipe" or self.settings or self.restarts is not None):
            raise InputError("--suite brings its own attacks: leave out --attack, --set and --restarts")
        if self.attack == "recipe" and (self.settings or self.restarts is not None):
            raise InputError("--set and --restarts need --attack: the recipe's trials are as the recipe says")
        if is_outside(self.target):
            if self.data is None:
                raise InputError("a network from outside needs --data: a data set (nas list data), a file or name:path")
            if self.attack == "recipe" and self.suite is None:
                raise InputError("a network from outside has no recipe: give --suite or --attack")
        elif self.data is not None or self.weights is not None:
            raise InputError("--data and --weights are for networks from outside: a run has its own")

    @property
    def starts(self) -> int:
        """How often the attack begins."""
        return 1 if self.restarts is None else self.restarts

    def trials(self, threat_model: ThreatModel) -> tuple[Mapping[str, Trial], Mapping[str, str]]:
        """The trials of a suite or an attack, and what the threat model leaves out."""
        if self.suite is not None:
            chosen = suite(self.suite, threat_model)
            return chosen.trials, chosen.left_out
        table: dict[str, Any] = {"name": self.attack}
        for item in self.settings:
            override_key(table, item)
        return {self.attack: Trial(attack_from(table, "attack", threat_model), self.starts)}, {}


def carry_out_attack(request: Request, observer: Observer) -> tuple[dict[str, Any], Path]:
    """Judge the network; returns the result and the folder with result.json and report.html."""
    begin = time.monotonic()
    observer.started("attack")
    judge_it = _outside if is_outside(request.target) else _of_a_run
    result, folder = judge_it(request, partial(observer.progressed, "attack"))
    observer.finished("attack", time.monotonic() - begin)
    return result, folder


def _of_a_run(request: Request, tick: Tick) -> tuple[dict[str, Any], Path]:
    """A network of a run."""
    path = Path(request.target)
    changed = {"epsilon": request.epsilon, "norm": request.norm}
    overrides = [f"threat_model.{key}={value!r}" for key, value in changed.items() if value is not None]
    with opened(path, overrides, tick) as context:
        recipe = context.recipe
        trials: Mapping[str, Trial] = recipe.evaluate.trials
        left_out: Mapping[str, str] = {}
        if request.suite is not None or request.attack != "recipe":
            trials, left_out = request.trials(recipe.threat_model)
        place = network_folder(model_folder(context.run, request.model), path, request.model)
        _, network = load_model(place, context.device)
        if request.draws > 1:
            if not isinstance(network, NoiseEnsemble):
                raise InputError(f"--draws is for networks that answer at random: '{request.model}' does not")
            network.draws = request.draws
        others = {}
        if request.suite == "full":
            for other in networks_of(path):
                if other != request.model and (model_folder(context.run, other) / "model.json").is_file():
                    others[other] = load_model(model_folder(context.run, other), context.device)[1]
        name = f"suite-{request.suite}" if request.suite is not None else request.attack
        chosen = {"samples": request.samples, "seed": request.seed}
        amount = [f"{key}={value}" for key, value in chosen.items() if value is not None]
        amount += [f"draws={request.draws}"] if request.draws > 1 else []
        starts = request.starts if request.suite is None and request.attack != "recipe" else None
        label = label_of(name, [*request.settings, *overrides, *amount], starts, request.model)
        folder = request.out or context.run.folder(f"attack-{label}")
        bench = bench_of(context)
        if request.seed is not None:
            bench = dataclasses.replace(bench, seed=request.seed)
        bench = _sampled(bench, request)
        title = f"{recipe.general.name}: {request.model}"
        return _judged(request, bench, network, trials, left_out, others, context.data.classes, folder, title)


def _outside(request: Request, tick: Tick) -> tuple[dict[str, Any], Path]:
    """A network that no run made."""
    assert request.data is not None
    threat_model = ThreatModel(
        request.norm or ThreatModel.norm, ThreatModel.epsilon if request.epsilon is None else request.epsilon
    )
    trials, left_out = request.trials(threat_model)
    device = device_of("auto")
    network = network_from(request.target, request.weights, device)
    if request.draws > 1:
        network = Expectation(network, request.draws).eval()
    data = data_from(source_from(request.data)).to(device)
    bench = Bench(data.x_test.float() / 255, data.y_test, threat_model, request.seed or 0, tick=tick)
    title = Path(request.target).name
    folder = request.out or default_path("attack-" + "".join(c if c.isalnum() else "_" for c in title))
    return _judged(request, _sampled(bench, request), network, trials, left_out, {}, data.classes, folder, title)


def _sampled(bench: Bench, request: Request) -> Bench:
    """With as many samples as asked for."""
    if request.samples is None or request.samples >= len(bench.y):
        return bench
    rows = subset(bench.y.cpu(), request.samples, generator(bench.seed, "attack samples")).to(bench.y.device)
    return dataclasses.replace(bench, x=bench.x[rows], y=bench.y[rows])


def _judged(
    request: Request,
    bench: Bench,
    network: nn.Module,
    trials: Mapping[str, Trial],
    left_out: Mapping[str, str],
    others: Mapping[str, nn.Module],
    classes: tuple[str, ...],
    folder: Path,
    title: str,
) -> tuple[dict[str, Any], Path]:
    make_folder(folder)
    beyond = {"curves": request.suite in ("standard", "full"), "corruptions": request.suite == "full"}
    with torch.random.fork_rng(devices=[]):
        # A random network from outside may draw from the global stream.
        torch.manual_seed(bench.seed)
        judged = judge(bench, network, trials, folder, **beyond, surrogates=others)
        pairs = gallery(network, bench.x, bench.y, bench.threat_model, seed=bench.seed)
    threat = {"norm": bench.threat_model.norm, "epsilon": bench.threat_model.epsilon}
    name = request.model if not is_outside(request.target) else title
    result = {"name": name, "role": name, "threat_model": threat, **judged, "left_out": dict(left_out)}
    if request.suite is not None:
        result["suite"] = request.suite
    write_json(result, folder / "result.json")
    write_attack_page(result, pairs, classes, title, folder / "report.html")
    return result, folder
