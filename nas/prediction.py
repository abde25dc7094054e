"""How a network predicts, as plain values: alone, by the mean over a noise, or by the mean of several networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from nas.defences.noise import ImageNoise, LayerNoise, NoiseEnsemble
from nas.defences.particles import Particles
from nas.errors import InputError, nearest

Build = Callable[[], nn.Module]
"""Makes a network of fresh weights."""


@dataclass(frozen=True)
class MeanOverNoise:
    """The mean probabilities over ``draws`` of ``noise``: a ``NoiseEnsemble``."""

    noise: ImageNoise | LayerNoise
    draws: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.draws <= 100_000:
            raise InputError(f"a mean over noise needs from 1 to 100000 draws, not {self.draws}")

    def predictor(self, build: Build) -> nn.Module:
        """The ensemble around a network of ``build``."""
        return NoiseEnsemble(build(), self.noise, self.draws, self.seed)

    def to_data(self) -> dict[str, Any]:
        """As written to JSON."""
        return {"kind": _KINDS[type(self.noise)], **asdict(self.noise), "draws": self.draws, "seed": self.seed}

    def __str__(self) -> str:
        return f"mean of {self.draws} draws of {self.noise}"


@dataclass(frozen=True)
class MeanOfParticles:
    """The mean probabilities of ``count`` networks of one architecture, each with weights of its own: ``Particles``."""

    count: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 1000:
            raise InputError(f"an ensemble needs from 1 to 1000 particles, not {self.count}")

    def predictor(self, build: Build) -> nn.Module:
        """As many networks of ``build``, which initialises each independently."""
        return Particles([build() for _ in range(self.count)])

    def to_data(self) -> dict[str, Any]:
        """As written to JSON."""
        return {"kind": "particles", "count": self.count}

    def __str__(self) -> str:
        return f"mean of {self.count} particles"


Prediction = MeanOverNoise | MeanOfParticles
"""A prediction that takes more than one pass of one network; ``None`` stands for that one pass."""

_NOISES: dict[str, type[ImageNoise] | type[LayerNoise]] = {"image noise": ImageNoise, "layer noise": LayerNoise}
_KINDS = {noise: kind for kind, noise in _NOISES.items()}


def prediction_from_data(data: object) -> Prediction | None:
    """The prediction in parsed JSON. Raises ``InputError`` naming what is wrong."""
    if data is None:
        return None
    if not isinstance(data, dict):
        raise InputError("'prediction' must be an object or null")
    entries = dict(data)
    kind = entries.pop("kind", None)
    kinds = ("particles", *_NOISES)
    if kind not in kinds:
        raise InputError(f"unknown 'prediction' of kind {str(kind)[:40]!r}: {nearest(str(kind)[:40], kinds)}")
    numbers = {"count"} if kind == "particles" else {"draws", "seed", *(f.name for f in fields(_NOISES[kind]))}
    if entries.keys() != numbers:
        raise InputError(f"'prediction' of kind '{kind}' needs {', '.join(sorted(numbers))}, and nothing else")
    for name, value in entries.items():
        whole = name in ("count", "draws", "seed")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            wanted = "an integer" if whole else "a number"
            raise InputError(f"'prediction': {name} must be {wanted}, not {value!r}"[:200])
    if kind == "particles":
        return MeanOfParticles(entries["count"])
    draws, seed = entries.pop("draws"), entries.pop("seed")
    return MeanOverNoise(_NOISES[kind](**{name: float(value) for name, value in entries.items()}), draws, seed)


def networks_in(model: nn.Module) -> Mapping[str, nn.Module]:
    """The networks that ``model`` predicts with, by the prefix of their names in it; ``{"": model}`` of one alone."""
    if isinstance(model, NoiseEnsemble):
        return {"network.": model.network}
    if isinstance(model, Particles):
        return {f"members.{i}.": member for i, member in enumerate(model.members)}
    return {"": model}


def passes_of(model: nn.Module) -> int:
    """How often a prediction of ``model`` passes each of its networks."""
    return model.draws if isinstance(model, NoiseEnsemble) else 1


def begin(model: nn.Module, number: int = 0) -> None:
    """Let the noise of ``model`` start over, from a stream of its own for each ``number``.

    What follows then depends neither on earlier predictions nor on whether a run was resumed.
    """
    for module in model.modules():
        if isinstance(module, NoiseEnsemble):
            module.stretch, module.calls = number, 0
