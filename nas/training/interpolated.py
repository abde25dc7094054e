"""Interpolated adversarial training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.objective import Attack, Batch, Metrics, Setting, State
from nas.training.mixture import AUTO, INPUT, drawn, joined, mixable, mixed_pass


@dataclass(frozen=True)
class Interpolated:
    """Interpolated adversarial training: mixup of clean and, separately, of adversarial images and their labels.

    Lamb, Verma, Kannala and Bengio, AISec 2019, arXiv 1906.06784: (1 - adversarial_share) M(x) + adversarial_share
    M(x~) with M the cross-entropy of images mixed in pairs with Beta(alpha, alpha) weights against their mixed labels;
    x~ is crafted for the images as they are. Each half draws its own weight and pairs.

    layers: where to mix, one drawn for each half in every step: "input" (mixup, alpha 1), names of modules (manifold
    mixup, Verma et al., ICML 2019, arXiv 1806.05236, with alpha 2), or "auto": the input and the last block of every
    stage but the last. A layer must cut the network: all of a prediction goes through it.
    per_sample: a weight for each image instead of one for the batch. joint: both halves in one pass, which mixes the
    statistics of their batch normalisation and lets them share a layer. Both after re-implementations, as are the
    defaults: the body of the paper could not be read.
    """

    attack: Attack = field(default_factory=Pgd)
    alpha: float = 1.0
    adversarial_share: float = 0.5
    layers: tuple[str, ...] = (INPUT,)
    per_sample: bool = False
    joint: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise InputError(f"alpha must be a number of at least 0 (0: nothing is mixed), not {self.alpha}")
        if not 0 <= self.adversarial_share <= 1:
            raise InputError(f"adversarial_share must be at least 0 and at most 1, not {self.adversarial_share}")
        if not self.layers:
            raise InputError(f"no layers to mix at: give ['{INPUT}'], names of modules, or ['{AUTO}']")

    def prepare(self, setting: Setting) -> Interpolated:
        """The same with its layers found and tried on ``setting.model``."""
        x = setting.data.x_train[setting.split.training[:4].to(setting.data.x_train.device)]
        return dataclasses.replace(self, layers=self._found(setting.model, x.float() / 255))

    def _found(self, model: nn.Module, x: Tensor) -> tuple[str, ...]:
        return self.layers if self.layers == (INPUT,) else mixable(model, self.layers, x)

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The mean loss of both halves, weighed by their share."""
        layers = self._found(model, batch.x) if AUTO in self.layers else self.layers
        # Both are drawn whatever the share, so that a half does not depend on whether there is another.
        draws = [
            drawn(self.alpha, batch.y, len(layers), state.method_generator, per_sample=self.per_sample)
            for _ in range(2)
        ]
        halves = []
        if self.adversarial_share < 1:
            halves.append(("clean_loss", 1 - self.adversarial_share, batch.x, *draws[0]))
        if self.adversarial_share > 0:
            x_adv = self.attack(model, batch.x, batch.y, generator=state.attack_generator)
            halves.append(("adversarial_loss", self.adversarial_share, x_adv, *draws[1]))
        if self.joint and len(halves) == 2:
            (_, _, x, first, place), (_, _, x_adv, second, _) = halves
            both = mixed_pass(model, torch.cat([x, x_adv]), joined(first, second), layers[place])
            answers = [*both.chunk(2)]
        else:
            answers = [mixed_pass(model, images, mixture, layers[place]) for _, _, images, mixture, place in halves]
        losses = [mixture.cross_entropy(z, batch.y) for z, (_, _, _, mixture, _) in zip(answers, halves, strict=True)]
        loss = torch.stack([share * value for value, (_, share, *_) in zip(losses, halves, strict=True)]).sum()
        metrics = {name: value.detach() for value, (name, *_) in zip(losses, halves, strict=True)}
        mixture = halves[-1][3]
        return loss, {"accuracy": mixture.accuracy(answers[-1], batch.y), **metrics}


PLUGIN = Interpolated
