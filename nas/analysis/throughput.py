"""How fast networks really run: images per second and latency, measured in turns on the machine at hand."""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nas.errors import InputError

ENGINES = ("eager", "onnxruntime")
WARM_UP = 20
ROUNDS = 5
"""Turns; in each, every network is measured once."""
CALLS = 20
"""Timed calls of a network in a turn, unless they take longer than ``TURN``."""
TURN = 0.5
"""Seconds."""

Run = Callable[[Tensor], object]


def throughput(
    models: Mapping[str, nn.Module],
    images: Tensor,
    *,
    batches: Sequence[int] = (1, 64),
    engines: Sequence[str] = ENGINES,
    turn: float = TURN,
) -> dict[str, Any]:
    """Latency and images per second of ``models``, and how many times as fast as the first each is.

    images: [N, C, H, W] in [0, 1] on the device, repeated to fill a batch. Eager torch, and ONNX Runtime on the CPU
    where it is installed and the network has a form in ONNX. Networks take turns, so that what else the machine does
    falls on all alike; a speed is the median over the turns of the ratio within a turn. turn: seconds that a network
    has in a turn. JSON-ready.
    """
    deployed = {name: _deployed(model) for name, model in models.items()}
    result: dict[str, Any] = {"device": _device_name(images), "threads": torch.get_num_threads(), "engines": {}}
    for engine in engines:
        runs, absent = _runs(engine, deployed, images)
        measured: dict[str, Any] = {}
        for batch in batches:
            x = images[torch.arange(batch, device=images.device) % len(images)].contiguous()
            measured[str(batch)] = _measure(runs, x, turn)
        result["engines"][engine] = {"batches": measured if runs else {}, **({"absent": absent} if absent else {})}
    return result


def speed_lines(result: Mapping[str, Any]) -> list[str]:
    """In words, how fast each network but the first is beside it; a network that is not faster is said to be so."""
    lines = []
    for engine, found in result["engines"].items():
        for batch, rows in found["batches"].items():
            first, *others = rows
            for name in others:
                speed = rows[name]["speed"]
                what = f"{name}, batch {batch}, {engine}"
                if speed >= 1.05:
                    lines.append(f"{what}: {speed:.2f} times as fast as {first}.")
                else:
                    lines.append(f"{what}: no speed-up ({speed:.2f} times as fast as {first}).")
        lines += [f"{name}, {engine}: not measured, {why}." for name, why in found.get("absent", {}).items()]
    return lines


def _runs(engine: str, models: Mapping[str, nn.Module], images: Tensor) -> tuple[dict[str, Run], dict[str, str]]:
    """What carries each network out, and why some cannot be."""
    if engine == "eager":
        return dict(models), {}
    if importlib.util.find_spec("onnxruntime") is None:
        return {}, dict.fromkeys(models, "onnxruntime is not installed")
    if images.device.type != "cpu":
        return {}, dict.fromkeys(models, "ONNX Runtime is measured on the CPU only")
    import onnxruntime

    from nas.export.onnx_file import INPUT, onnx_bytes

    runs: dict[str, Run] = {}
    absent: dict[str, str] = {}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for name, model in models.items():
        try:
            content = onnx_bytes(model, (images.shape[1], images.shape[2], images.shape[3]))
        except InputError as refusal:
            absent[name] = str(refusal)
            continue
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

        def run(x: Tensor, session: Any = session) -> object:
            return session.run(None, {INPUT: x.numpy()})

        runs[name] = run
    return runs, absent


def _deployed(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose masked weights are plain ones."""
    network = copy.deepcopy(model).eval().requires_grad_(False)
    for module in [*network.modules()]:
        if parametrize.is_parametrized(module):
            parametrizations = module.parametrizations
            assert isinstance(parametrizations, nn.ModuleDict)
            for name in [*parametrizations]:
                parametrize.remove_parametrizations(module, name)
    return network


def _measure(runs: Mapping[str, Run], x: Tensor, turn: float) -> dict[str, Any]:
    times: dict[str, list[list[float]]] = {name: [] for name in runs}
    with torch.no_grad():
        for run in runs.values():
            _timed(run, x, WARM_UP, turn)
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times[name].append(_timed(run, x, CALLS, turn))
    rows = {}
    medians = {name: [statistics.median(one) for one in found] for name, found in times.items()}
    first = next(iter(medians), "")
    for name, found in times.items():
        every = torch.tensor([second for one in found for second in one], dtype=torch.float64)
        rows[name] = {
            "p50": float(every.quantile(0.5)),
            "p90": float(every.quantile(0.9)),
            "images_per_second": len(x) / float(every.quantile(0.5)),
            "calls": len(every),
            "speed": statistics.median(a / b for a, b in zip(medians[first], medians[name], strict=True)),
        }
    return rows


def _timed(run: Run, x: Tensor, calls: int, seconds: float) -> list[float]:
    """Seconds of each call, of ``calls`` or as many as fit, three at least."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < calls and (len(found) < 3 or time.perf_counter() < end):
        begin = time.perf_counter()
        run(x)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        found.append(time.perf_counter() - begin)
    return found


def _device_name(x: Tensor) -> str:
    if x.device.type == "cuda":
        return torch.cuda.get_device_name(x.device)
    return str(x.device)
