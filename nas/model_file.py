"""model.json and model.safetensors: every network this program makes, rebuilt from plain data."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from nas.activations.activation import Activation, activation_from_data, activation_to_data, place
from nas.compression.plan import Plan
from nas.errors import InputError, check_schema
from nas.prediction import Prediction, prediction_from_data
from nas.tensor_file import read_tensors, write_bytes, write_text
from search_spaces.catalogue import space_of
from search_spaces.genotype import AnyGenotype, Genotype, GenotypeError, genotype_from_data

SCHEMA = 1


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to build a network but its weights.

    input_shape: (C, H, W);  classes: names;  mean, std: per channel, in pixels of [0, 1];
    plans: compressions in the order they were applied. channels and cells have no meaning where the genotype
    itself holds the size (space "plain"), cells has none where its layout has depths. prediction: how it predicts, None
    for one pass of one network. activation: what stands in the place of the activations of its space, None for these.
    """

    genotype: AnyGenotype
    channels: int
    cells: int
    input_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    auxiliary: bool = False
    plans: tuple[Plan, ...] = ()
    prediction: Prediction | None = None
    activation: Activation | None = None

    def build(self) -> nn.Module:
        """What predicts, with fresh weights, compressed as planned: the network, or an ensemble around or of such."""
        model = self._network() if self.prediction is None else self.prediction.predictor(self._network)
        for plan in self.plans:
            model = plan.apply(model, fit=False)
        return model

    def _network(self) -> nn.Module:
        network = space_of(self.genotype).build(
            self.genotype,
            channels=self.channels,
            cells=self.cells,
            input_shape=self.input_shape,
            classes=len(self.classes),
            mean=self.mean,
            std=self.std,
            auxiliary=self.auxiliary,
        )
        if self.activation is not None:
            place(network, self.activation, self.input_shape, self._groups())
        return network

    def _groups(self) -> dict[str, str]:
        """Where places of the activation belong together by more than the size of their maps: kinds of cells."""
        if not isinstance(self.genotype, Genotype):
            return {}
        placed = self.genotype.layout.place(self.cells, self.channels)
        cells = {f"cells.{index}.": place.kind for index, place in enumerate(placed)}
        return {**cells, "stem.": "stem", "auxiliary.": "auxiliary"}

    def to_data(self) -> dict[str, Any]:
        """Plain lists and dictionaries, as written to JSON."""
        return {
            "schema": SCHEMA,
            "genotype": self.genotype.to_data(),
            "channels": self.channels,
            "cells": self.cells,
            "input_shape": list(self.input_shape),
            "classes": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "auxiliary": self.auxiliary,
            "plans": [plan.to_data() for plan in self.plans],
            "prediction": None if self.prediction is None else self.prediction.to_data(),
            "activation": activation_to_data(self.activation),
        }

    @staticmethod
    def from_data(data: object) -> ModelSpec:
        """The specification in parsed JSON. Raises ``InputError`` naming what is wrong."""
        if not isinstance(data, dict):
            raise InputError(f"model.json must be an object of schema version {SCHEMA}")
        check_schema(data.get("schema"), SCHEMA, "model.json")
        try:
            shape = data["input_shape"]
            spec = ModelSpec(
                genotype=genotype_from_data(data["genotype"]),
                channels=_integer(data["channels"], 4096),
                cells=_integer(data["cells"], 1024),
                input_shape=(_integer(shape[0], 1024), _integer(shape[1], 8192), _integer(shape[2], 8192)),
                classes=tuple(str(name) for name in data["classes"]),
                mean=tuple(float(value) for value in data["mean"]),
                std=tuple(float(value) for value in data["std"]),
                auxiliary=bool(data["auxiliary"]),
                plans=tuple(Plan.from_data(plan) for plan in data["plans"]),
                # Absent from files older than the field.
                prediction=prediction_from_data(data.get("prediction")),
                activation=activation_from_data(data.get("activation")),
            )
        except GenotypeError as error:
            raise InputError(f"genotype: {error}") from None
        except InputError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InputError(f"missing or wrong entry ({type(error).__name__}: {error})") from None
        if min(spec.input_shape) < 1:
            raise InputError("'input_shape' must be channels, height and width of at least 1")
        if len(spec.mean) != spec.input_shape[0] or len(spec.std) != spec.input_shape[0]:
            raise InputError("'mean' and 'std' need one number per input channel")
        if not all(math.isfinite(value) for value in (*spec.mean, *spec.std)) or min(spec.std) <= 0:
            raise InputError("'mean' and 'std' must be finite, 'std' above 0")
        if len(spec.classes) < 2:
            raise InputError("'classes' needs at least two names")
        return spec


def save_model(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    """Write model.json and model.safetensors, weights first, so that model.json never stands without them."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(save(state), folder / "model.safetensors")
    write_text(json.dumps(spec.to_data(), indent=1) + "\n", folder / "model.json")


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[ModelSpec, nn.Module]:
    """The network of a folder with model.json and model.safetensors, in eval mode.

    Raises ``InputError`` for anything that cannot be read or does not fit together.
    """
    path = folder / "model.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from None
    try:
        spec = ModelSpec.from_data(data)
        _check_size(spec)
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced
            model = spec.build()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    load_weights(model, folder / "model.safetensors")
    return spec, model.to(device).eval()


LARGEST = 2_000_000_000
"""Weights of the largest network that is built from a file: 8 GB, a hundred times a wide residual network."""


def _check_size(spec: ModelSpec) -> None:
    """Raise ``InputError`` for a description that would fill the memory; what it takes is counted without taking it."""
    from nas.analysis.complexity import parameters_of

    if (count := parameters_of(replace(spec, plans=()))) > LARGEST:
        raise InputError(f"it describes a network of {count:,} weights; up to {LARGEST:,} are built")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of a safetensors file into ``model``; names and shapes must all fit."""
    tensors = read_tensors(path)
    expected = model.state_dict()
    missing, surplus = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or surplus:
        example = sorted(missing or surplus)[0]
        raise InputError(
            f"{path} holds the weights of another network: {len(missing)} tensors missing, {len(surplus)} unknown "
            f"(for example '{example}')"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{path}: '{name}' has shape {tuple(tensor.shape)}, the network needs {tuple(expected[name].shape)}"
            )
        if (tensor.is_floating_point(), tensor.is_complex()) != (expected[name].is_floating_point(), False):
            raise InputError(f"{path}: '{name}' holds {tensor.dtype}, the network needs {expected[name].dtype}")
    model.load_state_dict(tensors)


def weights_digest(model: nn.Module) -> str:
    """Twelve hexadecimal digits that name the weights of a model."""
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def with_plan(spec: ModelSpec, plan: Plan) -> ModelSpec:
    """The specification after one more compression."""
    return replace(spec, plans=(*spec.plans, plan))


def _integer(value: object, largest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
        raise ValueError(f"expected an integer from 0 to {largest}, not {value!r}"[:200])
    return value
