"""LADDER."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.fgsm import Fgsm
from nas.errors import Failure, InputError
from nas.evaluation.robustness import correct
from nas.model_file import load_weights, weights_digest
from nas.model_state import evaluating
from nas.objective import Batch, Metrics, Setting, State
from nas.randomness import derived_seed, generator
from nas.tensor_file import write_text
from nas.training.latent_boundary import Boundaries, Decoder, Latent, fit_boundaries, fit_decoder, latent
from nas.training.loop import Training, train
from nas.training.stage import Stage
from nas.training.standard import Standard


@dataclass(frozen=True)
class Ladder:
    """LADDER: fine-tunes on images decoded from latents that were moved across boundaries between classes.

    Zhou, Tsang & Yin, Machine Learning 2022, arXiv 2206.03717; algorithm and constants after the authors' code. A
    classifier is trained on clean images; a decoder learns to give images back from its latents z; for each pair
    of classes a support vector machine with attention a(z) finds the boundary among latents; each training image is
    moved, z' = z + epsilon a(z) * n, n the normal towards another class drawn at random; fine-tuning of the classifier
    then minimises ``mix`` CE(decoded z', y) + (1 - mix) CE(x, y) with the label unchanged. Nothing bounds how far the
    decoded image is from x, and the images are made once, before training: expect little against an attack that
    searches a ball of pixels, and evaluate like any other method.

    layer: of which z is the mean over positions; without a name, the input of the layer that computes the logits.
    weights: a safetensors file of the network, trained; otherwise the classifier is trained as ``classifier`` says, by
    standard training of the network as it comes. decoder_steps, decoder_batch, decoder_rate, decoder_width: training
    and filters of the decoder. least_kept: training stops where the classifier gets less than this share of its
    accuracy on decoded images. attention; svm_hinge, svm_images, svm_epochs, svm_batch, svm_rate: of the boundaries.

    epsilons: each gives an image of its own, so that an epoch is as many times as long. unit: what epsilon counts, of
    a(z) * n as it is ("normal"), scaled to length 1 ("length"), or so that 1 reaches the boundary with a(z) held fast,
    whatever the network ("distance"). adaptive: epsilon instead grows from the first of ``epsilons`` by 0.1, from 1 on
    by 1, until the classifier is wrong about the decoded image, at most ``attempts`` times.

    Left in the folder of the training: ladder.json (how good each stage is, how far and how often wrong the images are)
    and a file of each stage. Inferred: w begins at 0, decoder by steps instead of epochs, latents normalised for it.
    """

    layer: str = ""
    weights: str = ""
    classifier: Training = field(default_factory=Training)
    decoder_steps: int = 4000
    decoder_batch: int = 256
    decoder_rate: float = 1e-3
    decoder_width: int = 32
    least_kept: float = 0.9
    attention: bool = True
    svm_hinge: float = 0.01
    svm_images: int = 200
    svm_epochs: int = 10
    svm_batch: int = 1
    svm_rate: float = 0.01
    epsilons: tuple[float, ...] = (0.5,)
    unit: Literal["normal", "length", "distance"] = "normal"
    adaptive: bool = False
    attempts: int = 10
    mix: float = 0.5

    def __post_init__(self) -> None:
        counts = (self.decoder_batch, self.decoder_width, self.svm_images, self.svm_epochs, self.svm_batch)
        if min(*counts, self.decoder_steps, self.attempts) < 1:
            raise InputError("steps, epochs, batches, widths and attempts of LADDER must be at least 1")
        if not self.decoder_rate > 0 or not self.svm_rate > 0 or not self.svm_hinge >= 0:
            raise InputError("decoder_rate and svm_rate of LADDER must be above 0, svm_hinge at least 0")
        if not self.epsilons or not all(0 <= epsilon < float("inf") for epsilon in self.epsilons):
            raise InputError("epsilons of LADDER must be one or more numbers of at least 0")
        if not 0 <= self.mix <= 1 or not 0 <= self.least_kept <= 1:
            raise InputError("mix and least_kept of LADDER are shares from 0 to 1")

    def prepare(self, setting: Setting) -> FineTuning:
        """All stages up to the decoded images; what ``setting.folder`` holds of them is not made again."""
        data, rows = setting.data, setting.split.training.to(setting.data.x_train.device)
        x, y = data.x_train[rows], data.y_train[rows]
        latent(setting.model, self.layer, x)  # a wrong name is told before anything takes long
        model = self._classifier(setting)
        encode = latent(model, self.layer, x)
        z = encode(x)
        source = (weights_digest(model), data.digest, rows.tolist(), setting.seed, self.layer)
        decoder = fit_decoder(
            z,
            x,
            steps=self.decoder_steps,
            batch_size=self.decoder_batch,
            learning_rate=self.decoder_rate,
            width=self.decoder_width,
            seed=derived_seed(setting.seed, "ladder"),
            stage=self._stage(setting, "decoder", source),
        )
        report = self._reconstruction(model, decoder, z, x, y)
        if setting.folder is not None:
            write_text(json.dumps(report, indent=1) + "\n", setting.folder / "ladder.json")
        if report["decoded_accuracy"] < self.least_kept * report["accuracy"]:
            raise Failure(
                f"the classifier is right about {report['accuracy']:.1%} of the training images but only "
                f"{report['decoded_accuracy']:.1%} of those LADDER decodes from its latents: raise decoder_steps or "
                "decoder_width, name an earlier layer, or lower least_kept"
            )
        stage = self._stage(setting, "images", (*source, self))
        tree = stage.read()
        if not tree:
            boundaries = self._boundaries(setting, z, y)
            images, found = self._moved(encode, decoder, boundaries, z, x, y, setting.seed)
            tree = {"images": images, "report": {"boundary_accuracy": boundaries.accuracy.mean().item(), **found}}
            stage.write(tree)
        if setting.folder is not None:
            write_text(json.dumps(report | tree["report"], indent=1) + "\n", setting.folder / "ladder.json")
        times = len(tree["images"]) // len(x)
        pairs = torch.cat([x.repeat(times, 1, 1, 1), tree["images"].to(x.device)], 1)
        return FineTuning(pairs, y.repeat(times), dict(model.state_dict()), self.mix)

    def _stage(self, setting: Setting, name: str, source: tuple[Any, ...]) -> Stage:
        settings = [getattr(self, f"decoder_{name}") for name in ("steps", "batch", "rate", "width")]
        return Stage(setting.folder, f"ladder-{name}", (*source, *settings))

    def _classifier(self, setting: Setting) -> nn.Module:
        """A trained copy of the network, in eval mode."""
        model = copy.deepcopy(setting.model)
        if self.weights:
            load_weights(model, Path(self.weights).expanduser())
            return model.eval()
        # Standard training has no robustness to choose an epoch by: the last one is taken.
        training = replace(self.classifier, validate_every=self.classifier.epochs)
        checkpoint = None if setting.folder is None else setting.folder / "ladder-classifier.safetensors"
        train(
            model,
            setting.data,
            setting.split,
            Standard(),
            training,
            validation_attack=Fgsm(),
            seed=derived_seed(setting.seed, "ladder classifier"),
            checkpoint=checkpoint,
        )
        return model.eval()

    def _reconstruction(self, model: nn.Module, decoder: Decoder, z: Tensor, x: Tensor, y: Tensor) -> dict[str, Any]:
        decoded = decoder.images(z)
        return {
            "latent_size": z.shape[1],
            "decoded_error": _squared_error(decoded, x),
            "accuracy": _accuracy(model, x, y),
            "decoded_accuracy": _accuracy(model, decoded, y),
        }

    def _boundaries(self, setting: Setting, z: Tensor, y: Tensor) -> Boundaries:
        return fit_boundaries(
            z,
            y,
            len(setting.data.classes),
            attention=self.attention,
            hinge=self.svm_hinge,
            per_class=self.svm_images,
            epochs=self.svm_epochs,
            batch_size=self.svm_batch,
            learning_rate=self.svm_rate,
            seed=derived_seed(setting.seed, "ladder"),
        )

    def _moved(
        self, encode: Latent, decoder: Decoder, boundaries: Boundaries, z: Tensor, x: Tensor, y: Tensor, seed: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """Decoded images [n, C, H, W] uint8 for ``epsilons``, one after the other, and what became of them."""
        randomness = generator(seed, "ladder targets")
        rounds = self.epsilons[:1] if self.adaptive else self.epsilons
        images, crossed, wrong, used = [], [], [], []
        for epsilon in rounds:
            away = torch.randint(1, boundaries.classes, y.shape, generator=randomness).to(y.device)
            direction = boundaries.towards(z, y, (y + away) % boundaries.classes, self.unit)
            sizes = torch.full((len(y),), epsilon, device=z.device, dtype=z.dtype)
            decoded = decoder.images(z + sizes.unsqueeze(1) * direction)
            mistaken = ~_right(encode.model, decoded, y)
            for _ in range(self.attempts if self.adaptive else 0):
                rows = (~mistaken).nonzero().squeeze(1)
                if len(rows) == 0:
                    break
                sizes[rows] += torch.where(sizes[rows] < 0.95, 0.1, 1.0).to(sizes)
                decoded[rows] = decoder.images(z[rows] + sizes[rows].unsqueeze(1) * direction[rows])
                mistaken[rows] = ~_right(encode.model, decoded[rows], y[rows])
            shift = sizes.unsqueeze(1) * direction
            parts = zip(x.split(512), shift.split(512), strict=True)
            answers = torch.cat([encode.logits(part, moved).argmax(1) for part, moved in parts])
            images.append(decoded)
            crossed.append((answers != y).double().mean().item())
            wrong.append(mistaken.double().mean().item())
            used.append(sizes.mean().item())
        made = torch.cat(images)
        change = (made.float() - x.repeat(len(rounds), 1, 1, 1).float()).flatten(1) / 255
        return made, {
            "epsilon": used,
            "latents_misclassified": crossed,
            "images_misclassified": wrong,
            "mean_linf": change.abs().amax(1).mean().item(),
            "mean_l2": change.norm(dim=1).mean().item(),
        }


@dataclass(frozen=True, eq=False)
class FineTuning:
    """``mix`` times the loss on decoded images plus 1 - ``mix`` times that on clean ones, from trained ``weights``.

    pairs: [n, 2 C, H, W] uint8, clean and decoded channels in one image, so that augmentation moves both alike.
    """

    pairs: Tensor
    y: Tensor
    weights: Mapping[str, Tensor]
    mix: float

    def training_images(self) -> tuple[Tensor, Tensor]:
        """The pairs."""
        return self.pairs, self.y

    def initial_weights(self) -> Mapping[str, Tensor]:
        """Those of the classifier."""
        return self.weights

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """Mean loss of the batch."""
        del state
        x, x_adv = batch.x.chunk(2, 1)
        logits = model(x_adv)
        boundary, natural = F.cross_entropy(logits, batch.y), F.cross_entropy(model(x), batch.y)
        metrics = {
            "accuracy": (logits.argmax(1) == batch.y).float().mean(),
            "natural_loss": natural.detach(),
            "boundary_loss": boundary.detach(),
        }
        return self.mix * boundary + (1 - self.mix) * natural, metrics


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    parts = zip(x.split(512), y.split(512), strict=True)  # as floats, all of a data set may be too large
    with evaluating(model):
        return torch.cat([correct(model, images.float() / 255, own, 512) for images, own in parts])


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return _right(model, x, y).double().mean().item()


def _squared_error(decoded: Tensor, x: Tensor) -> float:
    return ((decoded.float() - x.float()) / 255).square().mean().item()


PLUGIN = Ladder
