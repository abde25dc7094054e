"""How much faster compressed networks of full size really are, in eager torch and in ONNX Runtime.

    python -m benchmarks.compression_speed                       ResNet-18, VGG-16 and a network of cells, one thread
    python -m benchmarks.compression_speed resnet-18 --threads 2

Weights are drawn, not trained: speed depends on shapes. Of trained weights CSTAR and GDWS would share their budgets out
otherwise over the layers; GDWS here by the share of each layer's norm, since drawn layers differ in scale. Networks
take turns, each figure is the median of the ratio to the dense network.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas import plugins
from nas.activations.activation import activation_from_data
from nas.analysis.complexity import complexity
from nas.analysis.throughput import throughput
from nas.compression.plan import plan_for
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.model_file import ModelSpec, with_plan
from nas.objective import Setting
from nas.randomness import generator
from nas.tensor_file import write_text
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import StageGenotype

KEEPS = (0.5, 0.25, 0.125, 0.0625)
Step = tuple[str, Mapping[str, Any]]


def shares(name: str, **more: Any) -> dict[str, list[Step]]:
    """A method at each share that stays."""
    return {f"{name} {keep:g}": [(name, {"keep": keep, **more})] for keep in KEEPS}


VARIANTS: dict[str, dict[str, list[Step]]] = {
    "resnet-18": {
        **shares("gdws", weights="relative"), **shares("cstar", epochs=0, step=8), **shares("channel_pruning", step=8),
        "channel_pruning 0.5, step 1": [("channel_pruning", {"keep": 0.5})],
        "fold_batchnorm": [("fold_batchnorm", {})], "int8": [("int8", {})],
    },
    "vgg-16": {
        **shares("gdws", weights="relative"), **shares("cstar", epochs=0, step=8), **shares("channel_pruning", step=8),
        "channel_pruning 0.5, step 1": [("channel_pruning", {"keep": 0.5})],
        **{f"arlst {keep:g}": [("arlst", {"keep": keep, "start": "scratch", "modes": modes})]
           for keep, modes in ((0.1, 2), (0.02, 2), (0.005, 3))},
        "int8": [("int8", {})],
    },
    "cells": {
        **shares("channel_pruning"), "channel_pruning 0.5, step 8": [("channel_pruning", {"keep": 0.5, "step": 8})],
        "channel_pruning 0.5, network": [("channel_pruning", {"keep": 0.5, "scope": "network"})],
        "cstar 0.5": [("cstar", {"keep": 0.5, "epochs": 0})],
        "fold_batchnorm": [("fold_batchnorm", {})], "int8": [("int8", {})],
    },
}  # fmt: skip


def spec_of(name: str) -> ModelSpec:
    """The dense network."""
    if name == "cells":
        genotype, shape, channels = load_genotype("arnas"), (1, 8, 8), 16
    elif name == "vgg-16":
        genotype = StageGenotype("vgg", (2, 2, 3, 3, 3), (64, 128, 256, 512, 512))
        shape, channels = (3, 32, 32), 1
    else:
        genotype, shape, channels = StageGenotype("resnet", (2, 2, 2, 2), (64, 128, 256, 512)), (3, 32, 32), 1
    mean, std = (0.5,) * shape[0], (0.25,) * shape[0]
    return ModelSpec(genotype, channels, 4, shape, tuple(map(str, range(10))), mean, std)


def setting_of(spec: ModelSpec, model: nn.Module) -> Setting:
    """What int8 calibrates with: drawn images."""
    stream = generator(0, "benchmark images")
    x = torch.randint(0, 256, (128, *spec.input_shape), generator=stream, dtype=torch.uint8)
    y = torch.arange(128) % len(spec.classes)
    data = ImageData("drawn", x, y, x, y, spec.classes)
    return Setting(model, data, split(y, architecture=0.0, validation=0.2, seed=0), 0, 1, 32)


def compressed(spec: ModelSpec, model: nn.Module, steps: list[Step]) -> tuple[ModelSpec, nn.Module]:
    """The network after the steps."""
    for name, fields in steps:
        plan = plan_for(plugins.load("compression", name)(**fields), model, setting_of(spec, model))
        spec, model = with_plan(spec, plan), plan.apply(model).eval()
    return spec, model


def measure(name: str, turn: float) -> dict[str, Any]:
    """Speeds and sizes of every variant of a network, method by method: all of VGG-16 at once would fill 20 GiB."""
    spec = spec_of(name)
    torch.manual_seed(0)
    dense = spec.build().eval()
    images = torch.rand(64, *spec.input_shape, generator=generator(0, "benchmark pixels"))
    methods: dict[str, dict[str, list[Step]]] = {}
    for variant, steps in VARIANTS[name].items():
        methods.setdefault(steps[0][0], {})[variant] = steps
    specs, seconds, found = {"dense": spec}, {}, []
    for variants in methods.values():
        models = {"dense": dense}
        for variant, steps in variants.items():
            begin = time.perf_counter()
            specs[variant], models[variant] = compressed(spec, dense, steps)
            seconds[variant] = round(time.perf_counter() - begin, 2)
        found.append(throughput(models, images, turn=turn))
    if name == "cells":
        for activation in ("silu", "sparta"):
            specs[activation] = dataclasses.replace(spec, activation=activation_from_data({"name": activation}))
        models = {one: specs[one].build().eval() for one in ("dense", "silu", "sparta")}
        found.append(throughput(models, images, turn=turn))
    sizes = {variant: complexity(one) for variant, one in specs.items()}
    return {
        "sizes": {variant: {"parameters": size.parameters, "macs": size.macs} for variant, size in sizes.items()},
        "seconds to compress": seconds,
        **joined(found),
    }


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Several results of ``throughput`` as one; the dense network's own figures are those of the first."""
    first, *others = found
    for other in others:
        for engine, result in other["engines"].items():
            into = first["engines"][engine]
            for batch, rows in result["batches"].items():
                into["batches"][batch] = {**rows, **into["batches"].get(batch, {})}
            if "absent" in result:
                into["absent"] = {**into.get("absent", {}), **result["absent"]}
    return first


def main() -> None:
    """Measure, print a table, keep the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(VARIANTS)}; all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turn", type=float, default=1.0, help="seconds that a network has in a turn")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compression_speed.json")
    given = parser.parse_args()
    if unknown := set(given.networks) - set(VARIANTS):
        parser.error(f"unknown network {', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
    torch.set_num_threads(given.threads)
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    found["machine"] = {"platform": platform.platform(), "cores": os.cpu_count(), "torch": torch.__version__}
    for name in given.networks or VARIANTS:
        found[name] = measure(name, given.turn)
        write_text(json.dumps(found, indent=1) + "\n", given.out)
        write_text(table(found), given.out.with_suffix(".md"))
    print(table(found))


def table(found: Mapping[str, Any]) -> str:
    """Speeds beside the dense network, a row a variant."""
    lines = []
    for name in [name for name in VARIANTS if name in found]:
        result, engines = found[name], found[name]["engines"]
        columns = [(engine, batch) for engine in engines for batch in engines[engine]["batches"]]
        measured = [f"{engine}, batch {batch}" for engine, batch in columns]
        head = ["network", "parameters", "MACs", "seconds to compress", *measured]
        lines += ["", f"## {name}, {result['threads']} thread", "", f"| {' | '.join(head)} |"]
        lines.append("| --- |" + " ---: |" * (len(head) - 1))
        for variant, size in result["sizes"].items():
            took = result["seconds to compress"].get(variant)
            cells = [variant, f"{size['parameters']:,}", f"{size['macs']:,}", "" if took is None else f"{took:.1f}"]
            for engine, batch in columns:
                row = engines[engine]["batches"][batch].get(variant)
                first = variant == "dense" and row is not None
                cells.append(
                    "none" if row is None else f"{1e3 * row['p50']:.3g} ms" if first else f"{row['speed']:.2f} x"
                )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(["# Speed of compressed networks beside the dense one (its latency in ms)", *lines]) + "\n"


if __name__ == "__main__":
    main()
