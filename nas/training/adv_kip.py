"""adv-KIP: a few images made so that a network trained on them as usual is robust."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.data.image_data import ImageData
from nas.data.split import subset
from nas.errors import Diverged, InputError
from nas.objective import Attack, Batch, Metrics, Setting, State
from nas.optimisation import optimiser_tree, restore_optimiser, weight_step
from nas.randomness import generator
from nas.tensor_file import write_bytes, write_text
from nas.training.loop import validate
from nas.training.neural_tangent_kernel import KernelClassifier, Regression, ReluKernel, centred
from nas.training.stage import Stage

CAVEAT = (
    "Accuracy under PGD of networks trained on distilled images is known to shrink or vanish under stronger attacks: "
    "attack the network, not the kernel, with AutoAttack."
)
"""Belongs to every result of this method; its authors say so of theirs."""


@dataclass(frozen=True)
class AdvKip:
    """adv-KIP: trains as usual on a few images distilled so that kernel regression on them withstands the attack.

    After Tsilivis, Su & Kempe, ICML 2022 workshop, arXiv 2207.11727, of which abstract and first page were read; the
    algorithm it extends is KIP (Nguyen, Chen & Lee, ICLR 2021, arXiv 2011.00050). A reconstruction, which promises no
    published number: min over images X_s of 1/2 mean (k(x~, X_s) (k(X_s, X_s) + ridge)^-1 Y_s - y)^2, k the tangent
    kernel of an infinitely wide network, x~ what ``attack`` makes of training images against that regression, its
    gradient not followed. Every step takes ``target_images`` of the training images, stratified. Inferred: the
    constants, the inner loss (that of ``attack``, on predictions over ``temperature``), and that pixels stay in
    [0, 1]. With an attack of epsilon 0 it is KIP; with ``steps`` 0 it is training on a random subset.

    images: how many are distilled, the same number of each class, from as many training images; learning_rate: of
    Adam, in pixels of [0, 1]; validate_every: steps between validations of the regression, of which the best under
    the attack is kept. An epoch of training shows the distilled images as often as it takes to fill an epoch of
    the data set. loss: of the network, cross-entropy or mean squared error to centred one-hot targets.

    Left in the folder of the training: adv_kip.npz (also a data set of its own, see ``nas.data.arrays``; ``distilled``
    are the pixels before rounding), adv_kip.png, adv_kip.json (accuracies of the regression) and adv_kip.safetensors.
    """

    attack: Attack = field(default_factory=Pgd)
    images: int = 100
    steps: int = 300
    learning_rate: float = 0.01
    target_images: int = 1000
    kernel: ReluKernel = field(default_factory=ReluKernel)
    ridge: float = 1e-6
    temperature: float = 0.1
    validate_every: int = 50
    loss: Literal["cross_entropy", "mean_squared_error"] = "cross_entropy"

    def __post_init__(self) -> None:
        if self.images < 2 or self.steps < 0 or self.target_images < 1 or self.validate_every < 1:
            raise InputError(
                "adv-KIP needs at least 2 images, 0 steps, 1 of target_images and validate_every of at least 1"
            )
        if not self.learning_rate > 0 or not self.ridge > 0 or not self.temperature > 0:
            raise InputError("learning_rate, ridge and temperature of adv-KIP must be above 0")

    def prepare(self, setting: Setting) -> Distilled:
        """The distilled images as an objective that brings its own training images."""
        data = setting.data
        regression = Regression(self.kernel, data.mean, data.std, self.ridge)
        support, labels, record = self._distil(setting, regression)
        rounded = support.mul(255).round().to(torch.uint8)
        fitted = self._fitted(regression, rounded.double() / 255, labels, len(data.classes))
        record["rounded"] = self._validated(fitted, setting)
        if setting.folder is not None:
            write_npz(rounded, support, labels, data, setting.folder / "adv_kip.npz")
            write_bytes(sheet(rounded, labels), setting.folder / "adv_kip.png")
            about = {"kernel_regression": record, "attack": str(self.attack), "images": len(labels), "note": CAVEAT}
            write_text(json.dumps(about, indent=1) + "\n", setting.folder / "adv_kip.json")
        times = max(1, len(setting.split.training) // len(labels))
        return Distilled(rounded, labels, times, self.loss)

    def _distil(self, setting: Setting, regression: Regression) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The images [n, C, H, W] float64 with the best validated regression, labels, and the validations."""
        data, rows = setting.data, setting.split.training.to(setting.data.x_train.device)
        x, y, classes = data.x_train[rows], data.y_train[rows], len(data.classes)
        chosen = self._start(y, classes, setting.seed)
        labels, targets = y[chosen], centred(y[chosen], classes)
        support = nn.Parameter(x[chosen].double() / 255)
        optimiser = torch.optim.Adam([support], lr=self.learning_rate)
        stage = Stage(setting.folder, "adv_kip", (self, setting.seed, data.digest, rows.tolist()))
        best, done = support.detach().clone(), 0
        record: dict[str, Any] = {"validations": []}
        best_key = (-1.0, -1.0)
        if tree := stage.read():
            support.data.copy_(tree["support"].to(support))
            restore_optimiser(optimiser, tree["optimiser"])
            best, record, done = tree["best"].to(support), tree["record"], tree["done"]
            best_key = tuple(tree["best_key"])
        for step in range(done, self.steps + 1):
            if step % self.validate_every == 0 or step == self.steps:
                validated = self._validated(self._fitted(regression, support.detach(), labels, classes), setting)
                key = (validated["robust"], validated["natural"])
                if key > best_key:
                    best, best_key = support.detach().clone(), key
                record["validations"].append({"step": step, **validated})
            if step < self.steps:
                images, wanted = self._targets(x, y, setting.seed, step)
                loss = self.loss_of(regression, support, targets, images, wanted, generator(
                    setting.seed, "adv_kip attack", step, device=x.device
                ))  # fmt: skip
                if not bool(loss.isfinite()):
                    raise Diverged(f"the loss of adv-KIP is {loss.item()} in step {step}: lower learning_rate")
                weight_step(loss, [support], optimiser, self.learning_rate, 0.0)
                support.data.clamp_(0, 1)
            if step % self.validate_every == 0 or step == self.steps:
                tree = {"support": support, "optimiser": optimiser_tree(optimiser), "best": best, "record": record}
                stage.write({**tree, "best_key": list(best_key), "done": step + 1})
        return best, labels, record

    def loss_of(
        self,
        regression: Regression,
        support: Tensor,
        targets: Tensor,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Half the mean squared error on attacked images ``x`` [N, C, H, W] in [0, 1]: a scalar.

        Differentiable in ``support`` [n, C, H, W] and ``targets`` [n, K]; the attack is on the regression as it is.
        """
        try:
            fitted = regression.fitted(support, targets, self.temperature)
            x_adv = self.attack(fitted, x, y, generator=generator)
            predictions = regression(x_adv, support, targets)
        except torch.linalg.LinAlgError:
            raise _degenerate() from None
        return 0.5 * (predictions - centred(y, targets.shape[1])).square().mean()

    def _start(self, y: Tensor, classes: int, seed: int) -> Tensor:
        """Rows of as many training images of each class, drawn at random."""
        each = self.images // classes
        counts = y.bincount(minlength=classes)
        if each < 1 or int(counts.min()) < each:
            raise InputError(
                f"adv-KIP cannot take {self.images} images, the same number of each of {classes} classes: images must "
                f"be between {classes} and {classes * int(counts.min())}"
            )
        order = torch.randperm(len(y), generator=generator(seed, "adv_kip start")).to(y.device)
        return torch.cat([order[y[order] == label][:each] for label in range(classes)])

    def _targets(self, x: Tensor, y: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor]:
        size = min(self.target_images, len(y))
        rows = subset(y, size, generator(seed, "adv_kip targets", step)).to(y.device)
        return x[rows].double() / 255, y[rows]

    def _fitted(self, regression: Regression, support: Tensor, labels: Tensor, classes: int) -> KernelClassifier:
        try:
            return regression.fitted(support, centred(labels, classes), self.temperature)
        except torch.linalg.LinAlgError:
            raise _degenerate() from None

    def _validated(self, fitted: KernelClassifier, setting: Setting) -> dict[str, float]:
        found = validate(fitted, setting.data, setting.split.validation, self.attack, setting.seed, 1024)
        return asdict(found)


def _degenerate() -> Diverged:
    return Diverged("the kernel of the distilled images has no inverse: raise ridge, or lower learning_rate")


@dataclass(frozen=True, eq=False)
class Distilled:
    """Standard training on images ``x`` [n, C, H, W] uint8 with labels ``y`` [n], each shown ``times`` an epoch."""

    x: Tensor
    y: Tensor
    times: int
    loss: Literal["cross_entropy", "mean_squared_error"] = "cross_entropy"

    def training_images(self) -> tuple[Tensor, Tensor]:
        """The images, repeated."""
        return self.x.repeat(self.times, 1, 1, 1), self.y.repeat(self.times)

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean loss of the batch."""
        del state
        logits = model(batch.x)
        if self.loss == "cross_entropy":
            loss = F.cross_entropy(logits, batch.y)
        else:
            loss = 0.5 * (logits - centred(batch.y, logits.shape[1]).to(logits)).square().mean()
        return loss, {"accuracy": (logits.argmax(1) == batch.y).float().mean()}


def write_npz(rounded: Tensor, exact: Tensor, labels: Tensor, data: ImageData, path: Path) -> None:
    """Distilled images with the test images of ``data``: a data set for ``nas.data.arrays``; "distilled" is exact."""
    arrays = {
        "x_train": rounded,
        "y_train": labels,
        "x_test": data.x_test,
        "y_test": data.y_test,
        "distilled": exact.float(),
    }
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})
    write_bytes(content.getvalue(), path)


def sheet(x: Tensor, y: Tensor, side: int = 32) -> bytes:
    """A PNG of images ``x`` [n, C, H, W] uint8, a row (or more) for each class, enlarged to about ``side`` pixels.

    Images of other than 3 channels show the first in grey.
    """
    height, width = x.shape[2:]
    times, most = max(1, side // max(height, width)), 20
    rows = []
    for label in y.unique().tolist():
        for images in x[y == label].cpu().split(most):
            row = np.full((height + 1, min(most, int(y.bincount().max())) * (width + 1), 3), 255, np.uint8)
            for place, image in enumerate(images):
                pixels = (image if len(image) == 3 else image[:1].expand(3, -1, -1)).permute(1, 2, 0).numpy()
                row[:height, place * (width + 1) : place * (width + 1) + width] = pixels
            rows.append(row)
    picture = Image.fromarray(np.concatenate(rows))
    content = io.BytesIO()
    picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST).save(content, "PNG")
    return content.getvalue()


PLUGIN = AdvKip
