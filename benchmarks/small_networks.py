"""Plain convolutional networks trained in minutes on a CPU, for benchmarks that need something to attack."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from nas.attacks.pgd import Pgd
from nas.data.arrays import Arrays
from nas.data.augmentation import Augmentation
from nas.data.digits import Digits
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.model_file import ModelSpec, load_model, save_model
from nas.objective import Objective
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from search_spaces.genotype import StageGenotype

CACHE = Path(__file__).parents[1] / ".cache"
SEED = 0


@dataclass(frozen=True)
class Task:
    """A data set, the budget of the attacker, and a small network that is trained on the first images."""

    name: str
    threat_model: ThreatModel
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    epochs: int
    train_images: int | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)

    def data(self, folder: Path) -> ImageData:
        """The images of ``name``.npz in ``folder``; the digits are built in."""
        if self.name == "digits":
            return Digits()()
        return Arrays(str(folder / f"{self.name}.npz"), train_limit=self.train_images)()

    def network(self, data: ImageData, *, adversarial: bool = False) -> nn.Module:
        """The network in eval mode, trained as ``Standard`` or ``PgdAt`` trains it, or read from the cache."""
        folder = CACHE / f"{self.name}-{'adversarial' if adversarial else 'standard'}"
        if (folder / "model.json").exists():
            return load_model(folder)[1]
        genotype = StageGenotype("plain", self.depths, self.widths)
        spec = ModelSpec(genotype, 0, 0, data.input_shape, data.classes, data.mean, data.std)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            model = spec.build()
        attack = Pgd(self.threat_model, steps=7)
        objective: Objective = PgdAt(attack) if adversarial else Standard()
        optimiser = Sgd(learning_rate=0.05, schedule="one_cycle", weight_decay=5e-4)
        training = Training(self.epochs, 64, optimiser, self.augmentation, validate_every=self.epochs)
        parts = split(data.y_train, architecture=0.5, validation=0.05, seed=SEED)
        train(model, data, parts, objective, training, validation_attack=attack, seed=SEED, log=print)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(spec, model, folder)
        return model.eval()


TASKS = {
    "digits": Task("digits", ThreatModel("linf", 0.1), (1, 1), (32, 64), 30),
    "mnist": Task("mnist", ThreatModel("linf", 0.3), (1, 1, 1), (16, 32, 64), 20, 8000),
    "cifar10": Task(
        "cifar10", ThreatModel("linf", 8 / 255), (1, 1, 1, 1), (32, 64, 128, 128), 8, 20000, Augmentation(2, True)
    ),
}
