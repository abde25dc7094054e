"""What a task works with: a run, its recipe, its data; where its networks lie."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas import ranks
from nas.analysis.complexity import with_parameters
from nas.analysis.throughput import throughput
from nas.data.image_data import ImageData
from nas.data.split import Split, split
from nas.errors import InputError
from nas.model_file import ModelSpec
from nas.shards import Shards
from nas.training.cost_sensitive import protected_by
from runs.directory import RunDirectory
from runs.judging import Bench, Tick
from runs.recipe import General, Recipe
from search_spaces.genotype import AnyGenotype, GenotypeError, genotype_from_data


def use_machine(general: General, beside: int = 1) -> None:
    """Let this process compute as a recipe asks, as one of ``beside`` that share its threads."""
    torch.set_num_threads(max(1, general.threads // beside))
    if general.deterministic:
        # Of cuBLAS, which reads it when a GPU is first used: its sums otherwise depend on what else runs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


@dataclass(frozen=True)
class Context:
    """What a task works with: the run, its recipe, and where to report progress."""

    run: RunDirectory
    recipe: Recipe
    tick: Tick

    @property
    def device(self) -> torch.device:
        """The device of the recipe."""
        return device_of(self.recipe.general.device)

    @property
    def shards(self) -> Shards:
        """Into what batches are cut, and which parts are this process's."""
        return Shards(self.recipe.general.shards)

    @property
    def seed(self) -> int:
        """The seed of the recipe."""
        return self.recipe.general.seed

    @cached_property
    def data(self) -> ImageData:
        """The data set, on the device."""
        data: ImageData = self.recipe.data.source()
        protected_by(self.recipe.train.objective, data.classes)  # an unknown class is told before a search, not after
        return data.to(self.device)

    @cached_property
    def split(self) -> Split:
        """Weights, architecture and validation part of the training images."""
        part = self.recipe.data
        return split(
            self.data.y_train.cpu(), architecture=part.architecture, validation=part.validation, seed=self.seed
        )

    def throughput(self, models: Mapping[str, nn.Module], **more: Any) -> dict[str, Any]:
        """How fast networks are on test images, against the first of them. more: of ``throughput``."""
        return throughput(models, self.data.x_test[:64].float() / 255, **more)

    def spec(self, genotype: AnyGenotype, channels: int = 0) -> ModelSpec:
        """The network of ``genotype`` for the recipe's data, at the recipe's size unless ``channels`` are given."""
        data, part = self.data, self.recipe.train
        known = channels or part.channels
        activation = None if part.activation is None else part.activation.activation
        spec = ModelSpec(
            genotype, known or 1, part.cells, data.input_shape, data.classes, data.mean, data.std, activation=activation
        )  # fmt: skip
        return spec if known else with_parameters(spec, part.parameters)


def device_of(name: str) -> torch.device:
    """The device a recipe names; "auto" is cuda where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device = 'cuda', but this machine has no usable GPU: use --set device=cpu")
    return torch.device(name, ranks.local_rank()) if name == "cuda" and ranks.world() > 1 else torch.device(name)


def model_folder(run: RunDirectory, model: str) -> Path:
    """Where a trained network of a run lies."""
    return run.path / ("compress" if model == "compressed" else f"train/{model}")


def found_genotype(run: RunDirectory) -> AnyGenotype:
    """The genotype the run searched for or was given."""
    place = run.path / ("run.json" if run.command == "compare" else "search/result.json")
    try:
        return genotype_from_data(run.genotype if run.command == "compare" else run.needed("search")["genotype"])
    except (KeyError, TypeError, GenotypeError) as error:
        raise InputError(f"{place} is damaged: {error}") from None


def bench_of(context: Context) -> Bench:
    """The test set of a run, and how its networks are judged."""
    data, recipe = context.data, context.recipe
    return Bench(
        data.x_test.float() / 255,
        data.y_test,
        recipe.threat_model,
        context.seed,
        recipe.evaluate.batch_size,
        context.tick,
        context.shards,
    )
