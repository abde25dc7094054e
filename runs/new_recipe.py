"""A commented recipe for data of one's own, as large as fits the time there is for it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from dataclasses import dataclass
from typing import Any

import torch

from nas import plugins
from nas.analysis.complexity import parameters_of
from nas.data.image_data import ImageData
from nas.model_file import ModelSpec
from runs.directory import usable_cores
from runs.estimate import Estimate, estimate
from runs.recipe import build
from search_spaces.genotype import StageGenotype


@dataclass(frozen=True)
class Effort:
    """How large supernet and network are, and how long they are trained."""

    channels: int
    cells: int
    search_epochs: int
    gradient: str
    attack_steps: int
    parameters: int
    trained_cells: int
    epochs: int
    stem: int
    random: int


EFFORTS = (
    Effort(6, 4, 4, "first_order", 2, 30_000, 4, 10, 16, 1),
    Effort(8, 4, 10, "unrolled", 3, 100_000, 6, 20, 16, 2),
    Effort(12, 6, 20, "unrolled", 5, 300_000, 8, 30, 32, 3),
    Effort(16, 8, 30, "unrolled", 7, 1_000_000, 12, 60, 64, 3),
    Effort(24, 8, 50, "unrolled", 7, 4_000_000, 20, 120, 64, 3),
)
"""From a first look to what papers do."""


FEWEST_TRAIN, FEWEST_TEST = 1000, 200
"""Images below which a recipe is not limited, however little time there is."""


@dataclass(frozen=True)
class NewRecipe:
    """The text of a recipe, and how long it will take here."""

    text: str
    time: Estimate


def new_recipe(name: str, source: dict[str, Any], data: ImageData, minutes: float) -> NewRecipe:
    """The recipe of the largest effort that takes at most ``minutes`` here; where none does, of fewer images.

    source: the keys of its [data] table that name the images.
    """
    seconds = 60 * minutes
    fits: NewRecipe | None = None
    for effort in EFFORTS:
        made = _made(recipe_text(name, source, data, effort), data)
        if made.time.seconds > seconds:
            if fits is None and "train_limit" in {
                f.name for f in dataclasses.fields(plugins.load("data", source["name"]))
            }:
                return _of_fewer_images(name, source, data, made.time, seconds)
            return fits or made
        fits = made
    assert fits is not None
    return fits


def _made(text: str, data: ImageData) -> NewRecipe:
    return NewRecipe(text, estimate(build(tomllib.loads(text)), data))


def _of_fewer_images(name: str, source: dict[str, Any], data: ImageData, whole: Estimate, seconds: float) -> NewRecipe:
    """The smallest effort on as many of the images as fit; whole: what it takes on all of them."""
    judging, learning = whole.evaluation / whole.workers, whole.search + whole.training / whole.workers
    # A third of the time is for the test images: with fewer than some hundred, differences drown in noise.
    test = min(len(data.y_test), max(FEWEST_TEST, int(len(data.y_test) * seconds / 3 / judging)))
    left = max(0.0, seconds - judging * test / len(data.y_test))
    train = min(len(data.y_train), max(FEWEST_TRAIN, int(len(data.y_train) * left / learning)))
    few = data.limited(train, test, 0)
    text = recipe_text(name, {**source, "train_limit": train, "test_limit": test}, few, EFFORTS[0])
    return _made(text, few)


def recipe_text(name: str, source: dict[str, Any], data: ImageData, effort: Effort) -> str:
    """A recipe as TOML, with what each part is for."""
    image_channels, height, width = data.input_shape
    side, colour = min(height, width), image_channels >= 3
    cores = usable_cores()
    gpu = torch.cuda.is_available()
    depths, widths = (2, 3), _plain_widths(data, effort.parameters)
    images = f"{len(data.y_train):,} + {len(data.y_test):,} images of {height}x{width} pixels, {image_channels}"
    text = TEMPLATE.format(
        name=json.dumps(name, ensure_ascii=False),
        images=f"{images} channel{'s' if image_channels > 1 else ''}, {len(data.classes)} classes",
        # Each class has to be in every part; small sets need a larger share to choose checkpoints by.
        validation=0.15 if len(data.y_train) < 5000 else 0.1 if len(data.y_train) < 20_000 else 0.05,
        epsilon=round(8 / 255, 6) if colour else 0.1,
        radius="8/255, usual for colour photographs" if colour else "strong for photographs, usual for drawings",
        workers=1 if gpu else min(2, cores),
        threads=cores,
        crop=side // 8 if side >= 16 else 0,
        flip=json.dumps(colour),
        batch_size=min(64, 2 ** int(math.log2(max(4, len(data.y_train) // 8)))),
        first=max(1, effort.search_epochs * 2 // 5),
        train_batch=128 if gpu else 64,
        plain_depths=list(depths),
        plain_widths=list(widths),
        monitored=min(512, max(32, len(data.y_train) // 8)),
        **dataclasses.asdict(effort),
    )
    aligned = re.sub(r"^([^#\s].*?) +# ", lambda found: f"{found[1]:<34} # ", text, flags=re.MULTILINE)
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in source.items()]
    if "train_limit" in source:
        lines.insert(-2, "# For the time there is, not all images are used: with more time, remove the limits.")
    return aligned.replace(SOURCE, "\n".join(lines), 1)


def _plain_widths(data: ImageData, parameters: int) -> tuple[int, int]:
    """Widths of a plain network of two stages with about so many parameters."""

    def size(width: int) -> int:
        genotype = StageGenotype("plain", (2, 3), (width, 2 * width))
        return parameters_of(ModelSpec(genotype, 1, 1, data.input_shape, data.classes, data.mean, data.std))

    width = round(math.sqrt(parameters / 155))  # about 155 w^2 weights
    nearest = min(range(max(2, width - 8), width + 9), key=lambda candidate: abs(size(candidate) - parameters))
    return nearest, 2 * nearest


SOURCE = "@source@"

TEMPLATE = """\
# {images}.
# Every key that is left out has its default; any can be overridden: nas run THIS.toml --set search.channels=8
name = {name}
seed = 0
device = "auto"              # cuda where there is one
workers = {workers}                  # networks trained and attacked at the same time
threads = {threads}                  # CPU threads, shared among the workers; results depend on them in their last bits

[data]
@source@
validation = {validation} # of the training images, to choose checkpoints by; test images wait

[threat_model]
norm = "linf"                # or "l2", "l1"
epsilon = {epsilon}          # pixels are in [0, 1]; {radius}

[space]
name = "dsara"               # accurate cells near the input, robust cells near the output
stem = {stem}                    # the stem halves images until their shorter side is at most this: smaller is faster

[search]
channels = {channels}                 # of the supernet, in the first section
cells = {cells}
batch_size = {batch_size}
monitored = {monitored}

[search.augmentation]
crop = {crop}                     # pixels by which images are shifted at random
flip = {flip}                 # mirror images; not for letters and digits

[search.gradient]
name = "{gradient}"       # "unrolled" is better founded, "first_order" takes about half the time

[search.attack]
name = "pgd"
steps = {attack_steps}

[search.weights]
learning_rate = 0.1
final_learning_rate = 0.001
weight_decay = 3e-4

[search.architecture]
learning_rate = 0.02         # short searches need more than the 3e-4 of 50 epochs

[[search.stages]]            # first: the architecture against the adversarial loss alone
until = {first}
objectives = ["adversarial"]

[[search.stages]]            # then: natural and adversarial loss together
until = {search_epochs}
objectives = ["natural", "adversarial"]
combine = "min_norm"
adversarial_gradient_scale = 0.1   # min-norm follows the shorter gradient: this gives robustness the say

[train]
parameters = {parameters}           # of the found network; or channels = ...
cells = {trained_cells}
epochs = {epochs}
batch_size = {train_batch}

[train.method]
name = "pgd_at"              # nas list methods

[train.augmentation]
crop = {crop}
flip = {flip}

[train.attack]
name = "pgd"
steps = {attack_steps}

[train.optimiser]
learning_rate = 0.1
weight_decay = 5e-4

[compress]
name = "magnitude"           # nas list compressors
keep = 0.5

[baselines]                  # trained and attacked like the found network: what the search has to beat
random = {random}                   # random cells of equal size
tolerance = 0.1
plain_depths = {plain_depths}
plain_widths = {plain_widths}

[[evaluate.trials]]
name = "pgd-20"
attack = {{ name = "pgd", steps = 20 }}

[[evaluate.trials]]
name = "pgd-50 x 3, margin"
attack = {{ name = "pgd", steps = 50, loss = "margin", stop_when_broken = true }}
restarts = 3

# AutoAttack on the finished run: nas attack RUN --suite standard
"""
