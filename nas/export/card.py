"""A model card: what a network is, how it was made, how accurate and robust it was found, and what is not known."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.export.package import ExportedFile
from nas.model_file import ModelSpec
from nas.tensor_file import write_text
from search_spaces.genotype import Genotype

CARD = "MODEL_CARD.md"


@dataclass(frozen=True)
class About:
    """What a card says beyond the network itself.

    name: of the run and the network in it.  size: parameters, nonzero, macs, bytes, digest.  data: name, train, test,
    digest.  recipe: settings by dotted key.  seconds: of each task.  evaluations: results of attacks on these weights,
    each with threat_model, attacks, attack_settings, checks, interval, n, seed.  doubts: reasons not to believe them.
    commands: that made it.
    """

    name: str
    size: Mapping[str, Any]
    data: Mapping[str, Any]
    recipe: Mapping[str, Any]
    seconds: Mapping[str, float]
    evaluations: Sequence[Mapping[str, Any]]
    doubts: Sequence[str]
    commands: Sequence[str]
    environment: Mapping[str, Any]


def write_card(spec: ModelSpec, about: About, files: Sequence[ExportedFile], folder: Path) -> Path:
    """Write the card to ``folder``."""
    # Names from a user's files may hold lone surrogates, which no encoding can write.
    write_text(model_card(spec, about, files).encode("utf-8", "replace").decode("utf-8"), folder / CARD)
    return folder / CARD


def model_card(spec: ModelSpec, about: About, files: Sequence[ExportedFile]) -> str:
    """The card as Markdown, with the front matter that model hubs read."""
    parts = [
        _front_matter(about),
        f"# {plain(about.name)}",
        *_network(spec, about),
        *_use(files),
        *_accuracy(about),
        *_limits(about),
        *_making(about),
    ]
    return "\n\n".join(parts) + "\n"


def plain(text: object) -> str:
    """``text`` as one line of Markdown that says just that, whatever is in it."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&!])", r"\\\1", " ".join(str(text).split()))


def _front_matter(about: About) -> str:
    """YAML; its values are JSON, which YAML contains."""
    entries: dict[str, Any] = {
        "library_name": "pytorch",
        "license": "unknown",
        "tags": ["image-classification", "adversarial-robustness", "neural-architecture-search"],
        "datasets": [_line(about.data.get("name", "unknown"))],
    }
    if about.evaluations:
        dataset = _line(about.data.get("name", "unknown"))
        metrics = []
        for found in about.evaluations:
            metrics.append({"type": "accuracy", "name": "accuracy", "value": round(found["natural"], 4)})
            name = f"accuracy in the worst case, {_threat(found)}"
            metrics.append({"type": "accuracy", "name": name, "value": round(found["worst_case"], 4)})
        task = {"type": "image-classification"}
        results = [{"task": task, "dataset": {"name": dataset, "type": dataset}, "metrics": metrics}]
        entries["model-index"] = [{"name": _line(about.name), "results": results}]
    # Not as \u escapes: YAML takes the two halves of a character beyond 16 bits for two characters.
    lines = (f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items())
    return "\n".join(["---", *lines, "---"])


def _line(text: object) -> str:
    """``text`` without what a line of YAML cannot hold."""
    return "".join(c if c.isprintable() else "?" for c in str(text))[:200]


def _network(spec: ModelSpec, about: About) -> list[str]:
    size, shape = about.size, " x ".join(map(str, spec.input_shape))
    genotype = spec.genotype
    lines = [
        f"* Architecture: space {plain(genotype.space)}, genotype `{genotype.digest}`, {_built(spec)}.",
        f"* Input: pixels [N, {shape}] in [0, 1]; normalisation is inside (mean {_numbers(spec.mean)}, deviation "
        f"{_numbers(spec.std)}). Output: logits of {len(spec.classes)} "
        f"classes: {', '.join(plain(name) for name in spec.classes[:20])}{', ...' if len(spec.classes) > 20 else ''}.",
        f"* Size: {size['parameters']:,} parameters, {size['nonzero']:,} of them not zero, {size['macs'] / 1e6:.2f} "
        f"million multiply-accumulates for an image, {size['bytes']['dense']:,} bytes as stored.",
        f"* Weights: digest `{size['digest']}`.",
    ]
    if spec.plans:
        lines.append(f"* Compressed by {', then '.join(plain(plan.method) for plan in spec.plans)}.")
    if spec.prediction is not None:
        lines.append(f"* Predicts by the {plain(spec.prediction)}.")
    return ["\n".join(lines)]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _built(spec: ModelSpec) -> str:
    if isinstance(spec.genotype, Genotype):
        depths = spec.genotype.layout.depths
        return f"{sum(depths) if depths else spec.cells} cells, {spec.channels} base channels"
    depth, width = ("-".join(map(str, numbers)) for numbers in (spec.genotype.depths, spec.genotype.widths))
    return f"depths {depth}, widths {width}"


USES = {
    "py": "`network.py` with `network.safetensors`: `import network; model = network.load('network.safetensors')`; "
    "needs torch only.",
    "onnx": "`network.onnx`: ONNX Runtime, input `pixels`, any number of images.",
    "pt2": "`network.pt2`: `torch.export.load('network.pt2').module()`.",
    "safetensors": "`model.json` with `model.safetensors`: `nas.model_file.load_model(folder)`.",
    "json": "`genotype.json`: the architecture, for `nas train --genotype`.",
    "robustbench": "`robustbench_model.py`: `load_model(device)` for RobustBench's `benchmark`.",
    "timm": "`timm_model.py`: registers the network with timm where that is installed.",
}


def _use(files: Sequence[ExportedFile]) -> list[str]:
    formats = {file.format: file for file in files}
    lines = [f"* {USES[name]}" for name in formats if name in USES]
    if not lines:
        return []
    rows = [
        f"| {name} | {_difference(file.difference)} | {_difference(file.adversarial)} | {_difference(file.gradient)} |"
        for name, file in formats.items()
        if file.difference is not None
    ]
    if not rows:
        return ["## Use", "\n".join(lines)]
    compared = (
        "Each format was loaded again in a fresh process and compared with the network. Largest differences of logits, "
        "on images as they are and on adversarial ones, and difference of the gradients that attacks follow, as a "
        "share of these:"
    )
    table = ["| format | clean | adversarial | gradients |", "|---|---:|---:|---:|", *rows]
    return ["## Use", "\n".join(lines), compared, "\n".join(table)]


def _difference(value: float | None) -> str:
    return "none" if value is None else f"{value:.0e}" if value else "0"


def _threat(found: Mapping[str, Any]) -> str:
    model = found["threat_model"]
    return f"{model['norm']} {model['epsilon']:.4g}"


def _accuracy(about: About) -> list[str]:
    parts = ["## Accuracy"]
    if not about.evaluations:
        return [*parts, "It was not evaluated: nothing is known of its accuracy, natural or robust."]
    for found in about.evaluations:
        low, high = found["interval"]
        rows = [
            "| | accuracy | settings |",
            "|---|---:|---|",
            f"| natural | {found['natural']:.1%} | |",
            *(
                f"| {plain(name)} | {accuracy:.1%} | {plain(found['attack_settings'].get(name, ''))} |"
                for name, accuracy in found["attacks"].items()
            ),
            f"| **worst case** | **{found['worst_case']:.1%}** | 95 % interval {low:.1%} to {high:.1%} |",
        ]
        parts += [
            f"On {found['n']:,} test images, pixels changed by at most {_threat(found)}, seed {found['seed']}. Worst "
            "case: right under every attack of the table, for each image.",
            "\n".join(rows),
            _checks(found["checks"]),
        ]
    return parts


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    doubtful = [check for check in checks if check["verdict"] != "pass"]
    passed = ", ".join(plain(check["name"]) for check in checks if check["verdict"] == "pass")
    said = f"Checks for gradient masking that passed: {passed or 'none'}."
    if not doubtful:
        return f"All {len(checks)} checks for gradient masking passed: {passed}." if checks else "No checks were made."
    lines = [f"* {check['verdict']}: {plain(check['name'])}: {plain(check['detail'])}" for check in doubtful]
    return "\n".join([f"Of {len(checks)} checks for gradient masking, these did not pass:", "", *lines, "", said])


def _limits(about: About) -> list[str]:
    lines = [
        f"* Trained on {about.data.get('train', 0):,} images of {plain(about.data.get('name', 'unknown'))}; nothing is "
        "known of images of another kind.",
        *(f"* {plain(doubt)}" for doubt in about.doubts),
    ]
    if about.evaluations:
        lines.append("* Robust means: against the attacks above, within the threat model above. No bound is certified.")
        smallest = min(found["n"] for found in about.evaluations)
        if smallest < 1000:
            lines.append(f"* {smallest} test images: differences of a few points to another network are noise.")
        if not any("autoattack" in name.lower() for found in about.evaluations for name in found["attacks"]):
            lines.append("* AutoAttack was not run on it: `nas attack RUN --suite standard` does.")
    lines += [
        "* Licence: the program that wrote these files is under Apache-2.0. That of the weights and of the images is "
        "unknown: it is up to whoever trained the network.",
    ]
    return ["## Limits", "\n".join(lines)]


def _making(about: About) -> list[str]:
    shown = {
        key: value for key, value in about.recipe.items() if not key.startswith(("evaluate.", "compare.", "study."))
    }
    settings = "\n".join(f"{key} = {json.dumps(value)}" for key, value in shown.items())
    seconds = ", ".join(f"{plain(task)} {value:,.0f} s" for task, value in about.seconds.items())
    environment = ", ".join(f"{plain(key)} {plain(value)}" for key, value in about.environment.items())
    return [
        "## How it was made",
        "\n".join(["```console", *(_fenced(" ".join(command.split())) for command in about.commands), "```"]),
        f"Seed {about.recipe.get('seed', 'unknown')}. Time: {seconds or 'not recorded'}. On: {environment}.",
        f"Data: {plain(about.data.get('name', 'unknown'))}, {about.data.get('train', 0):,} training and "
        f"{about.data.get('test', 0):,} test images, digest `{_line(about.data.get('digest', 'unknown'))}`.",
        "All settings of the run, as `--set` takes them:",
        "\n".join(["```toml", _fenced(settings), "```"]),
    ]


def _fenced(text: str) -> str:
    """``text`` within a fence: nothing in it may end that."""
    return text.replace("```", "'''")
