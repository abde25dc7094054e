"""Whether exported files give the logits of the network they were made from, each reloaded in a fresh process."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nas.errors import Failure, InputError
from nas.export import reload
from nas.export.graph_files import edges_of, svg
from nas.export.loaders import entry_name
from nas.export.package import FORMATS, ExportedFile, check_formats, export_model
from nas.export.reload import titles_of
from nas.model_file import ModelSpec
from nas.prediction import begin
from nas.tensor_file import write_bytes

TOLERANCE = 1e-5
"""Largest difference that counts as equal, for logits up to 10: exported code may sum in another order.

Above 10 the resolution of float32 grows with the logits, and so does the difference allowed.
"""

ROUNDING = 0.05
"""The same for an int8 engine, as a share of the largest logit: sums in another order may round to another level."""

GRADIENT = 1e-2
"""Largest difference of gradients that counts as equal, as a share of their norm.

An activation that rounding moves over its kink turns single entries: in a network of 20 cells with drawn weights, one
part in a thousand.
"""

MOVED = 0.01
"""Largest share of pixels that an attack by a file's own gradients may move elsewhere than one by the model's."""

TIE = 0.1
"""Pixels whose gradient is smaller than this share of the root mean square of their image's are not among them.

Such a sign is a matter of rounding where gradients may differ by ``GRADIENT``.
"""

LEAST_VARIANCE = 0.1
"""Of the batch statistics of a network without training: layers that magnify more let differences of rounding grow."""

TIMEOUT = 600
"""Seconds after which the process that reloads the exports is given up."""


class ExportMismatch(Failure):
    """An exported file that does not give what the model gives.

    difference: largest absolute difference of the logits; None where the file could not be read or run.
    """

    def __init__(self, file: str, message: str, difference: float | None = None) -> None:
        super().__init__(f"{file} {message}")
        self.file = file
        self.difference = difference


Attacks = Callable[[nn.Module, Tensor], Tensor]
"""Makes adversarial images of a network from images [N, C, H, W]."""


def check_exports(
    folder: Path, spec: ModelSpec, model: nn.Module, inputs: Tensor, attack: Attacks
) -> list[ExportedFile]:
    """Every exported file in ``folder``, with the largest differences of its logits from those of ``model``.

    inputs: pixels [N, C, H, W]; attack: makes adversarial images of them, on which files are compared as well: a
    network that agrees on clean images only would be more or less robust than the one exported. Where a format has
    gradients they are compared on the adversarial images, and adversarial images are made again from those of the clean
    ones: what cannot be attacked would look robust. One child process reloads all formats on the CPU; it is isolated
    from this project until the source file has been run. Raises ``ExportMismatch`` where logits differ by more than
    ``TOLERANCE``, gradients by more than ``GRADIENT`` or images made again in more than ``MOVED``, or where classes,
    genotype or specification are others than those of ``spec``, and ``InputError`` where there is nothing to check.
    """
    formats = [
        name
        for name, entry in FORMATS.items()
        if (name in reload.ALONE or name in reload.WITH_PACKAGE) and (folder / entry.files[0]).exists()
    ]
    if not formats:
        raise InputError(f"{folder} holds no exported files that can be checked")
    inputs = inputs.detach().cpu().contiguous()
    again = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    adversarial = attack(again, inputs).detach().contiguous()
    begin(again)  # as a model that was just loaded does
    images = {"clean": inputs, "adversarial": adversarial}
    expected = reload.answers(again, images)
    report, found = _reloaded(folder, images, formats)
    checked = []
    for name in formats:
        files = FORMATS[name].files
        if "error" in report[name]:
            raise ExportMismatch(files[0], f"cannot be used: {report[name]['error']}")
        if report[name]["plain"] != _plain(spec)[name]:
            raise ExportMismatch(files[0], "describes another network than the one exported")
        rounds = name == "onnx" and any(plan.method == "int8" for plan in spec.plans)
        on_clean, on_adversarial = (
            _difference(f"{files[0]}{where}", found[name][part], expected[part], rounds=rounds) if found[name] else None
            for part, where in (("clean", ""), ("adversarial", ", on adversarial images,"))
        )
        gradient = moved = None
        if name in reload.DIFFERENTIABLE and "gradient" in expected:
            gradient = _gradient_difference(files[0], found[name].get("gradient"), expected["gradient"])
            moved = _moved(files[0], found[name].get("remade"), expected)
        checked += [ExportedFile(file, name, on_clean, on_adversarial, gradient, moved) for file in files]
    return checked


def export_architecture(spec: ModelSpec, folder: Path, formats: Sequence[str], attack: Attacks) -> list[ExportedFile]:
    """Write what ``formats`` say of the network of ``spec`` by itself, without weights, to ``folder``.

    The files are made, reloaded and compared with weights that were drawn, which then are left out.
    """
    check_formats(formats, trained=False)
    with tempfile.TemporaryDirectory() as scratch:
        model, inputs = drawn(spec)
        export_model(spec, model, Path(scratch), formats)
        checked = check_exports(Path(scratch), spec, model, inputs, attack)
        weights = {file for entry in FORMATS.values() for file in entry.weights}
        kept = [file for file in checked if file.file not in weights]
        folder.mkdir(parents=True, exist_ok=True)
        for file in kept:
            write_bytes(Path(scratch, file.file).read_bytes(), folder / file.file)
    return kept


def drawn(spec: ModelSpec) -> tuple[nn.Module, Tensor]:
    """The network of ``spec`` in eval mode with weights that were drawn, always the same, and two images [2, C, H, W].

    Its batch statistics are those of drawn images, but for ``LEAST_VARIANCE``. With the initial ones a deep network
    shrinks its images until all that is left is the bias of the classifier, and any two networks of that bias would be
    equal.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = spec.build().train()
        norms = {module: module.momentum for module in model.modules() if isinstance(module, _BatchNorm)}
        for norm in norms:
            norm.momentum = 1.0
        model(torch.rand(8, *spec.input_shape))
        for norm, momentum in norms.items():
            norm.momentum = momentum
            if norm.running_var is not None:
                norm.running_var.clamp_(min=LEAST_VARIANCE)
        return model.eval(), torch.rand(2, *spec.input_shape)


def _plain(spec: ModelSpec) -> dict[str, Any]:
    """By format, the plain values that a reloaded export must report."""
    plain = {
        "py": spec.classes,
        "onnx": spec.classes,
        "pt2": spec.classes,
        "robustbench": None,
        "timm": entry_name(spec),
        **dict.fromkeys(("graphml", "dot"), edges_of(spec.genotype)),
        "svg": titles_of(svg(spec.genotype)),
        "json": spec.genotype.to_data(),
        "safetensors": spec.to_data(),
    }
    # The report went through JSON too, which turns tuples into lists.
    return json.loads(json.dumps(plain))


def _difference(file: str, logits: Tensor, expected: Tensor, *, rounds: bool = False) -> float:
    if logits.shape != expected.shape:
        raise ExportMismatch(file, f"gives logits of shape {tuple(logits.shape)}, not {tuple(expected.shape)}")
    difference = float((logits - expected).abs().max())
    largest = float(expected.abs().max())
    allowed = ROUNDING * largest if rounds else TOLERANCE * max(1.0, largest / 10)
    # "not <=" also catches a difference that is not a number.
    if not difference <= allowed:
        message = f"gives logits that differ from the model's by {difference:.3g}, more than {allowed:.3g}"
        raise ExportMismatch(file, message, difference)
    return difference


def _gradient_difference(file: str, gradient: Tensor | None, expected: Tensor) -> float:
    if gradient is None:
        raise ExportMismatch(file, "has no gradients, but the model has: it would look robust to attacks by gradients")
    difference = float((gradient - expected).norm() / expected.norm().clamp(min=1e-30))
    if not difference <= GRADIENT:
        message = (
            f"has gradients that differ from the model's by {difference:.3g} of their size, more than {GRADIENT:g}: "
            "attacks on it would not be attacks on the model"
        )
        raise ExportMismatch(file, message, difference)
    return difference


def _moved(file: str, remade: Tensor | None, expected: dict[str, Tensor]) -> float:
    """The share of pixels that adversarial images made by the file and by the model move to different values."""
    gradient = expected["gradient_clean"].flatten(1).abs()
    counts = gradient > TIE * gradient.square().mean(1, keepdim=True).sqrt()
    if remade is None:
        raise ExportMismatch(file, "has no gradients on clean images, where attacks start: it would look robust")
    elsewhere = (remade - expected["remade"]).flatten(1).abs() > reload.RADIUS / 2
    moved = float((elsewhere & counts).sum() / counts.sum().clamp(min=1))
    if not moved <= MOVED:
        message = (
            f"gives other adversarial images than the model: {moved:.1%} of the pixels differ, more than {MOVED:.0%}"
        )
        raise ExportMismatch(file, message)
    return moved


Found = dict[str, dict[str, Tensor]]


def _reloaded(folder: Path, images: dict[str, Tensor], formats: list[str]) -> tuple[dict[str, Any], Found]:
    """What reload.py reports of the exports in ``folder``, and their answers to ``images``, by format."""
    packages = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as scratch:
        save_file(images, Path(scratch, "images.safetensors"))
        # -I: neither the working directory nor PYTHONPATH can lend the source file a module.
        command = [sys.executable, "-I", "-B", reload.__file__, str(folder), scratch, str(packages), *formats]
        try:
            subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        except subprocess.TimeoutExpired:
            raise ExportMismatch(str(folder), f"was not reloaded within {TIMEOUT} seconds") from None
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or [f"exit status {error.returncode}"])[-1]
            raise ExportMismatch(str(folder), f"could not be reloaded: {reason}") from None
        report = json.loads(Path(scratch, "report.json").read_text(encoding="utf-8"))
        found: Found = {name: {} for name in formats}
        for key, tensor in load_file(Path(scratch, "answers.safetensors")).items():
            name, _, part = key.partition(".")
            found[name][part] = tensor
        return report, found
