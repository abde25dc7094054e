"""Adversarial training by the information bottleneck (after InfoAT)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.gradient import maximiser
from nas.attacks.losses import right
from nas.attacks.pgd import Pgd
from nas.errors import InputError, nearest
from nas.model_state import crafting
from nas.objective import Attack, Batch, Metrics, State

AUTO = "auto"


@dataclass(frozen=True)
class InfoAt:
    """InfoAT-style training (reconstruction): finds images of high information about the input, and compresses them.

    After Xu, Zhang, Li and Zhang, IEEE TNNLS, arXiv 2206.12292, of which only the abstract could be read and no code
    exists: images whose input has much mutual information with its latent representation T are the ones attacks break;
    training finds them and uses them. Everything below is inferred, and no published number is promised.

    mode "bottleneck": x~ maximises cross-entropy + gamma i(x~); the weights minimise cross-entropy + beta i(x~). Mode
    "reweight": the images of the attack as they are, each loss weighed by N softmax(i(x) / temperature), constant.
    i estimates what an image adds to I(X; T):
    "infonce": log of p(t | x) over its mean over the batch, for t = h(x) + noise n with features h of length 1; a lower
    bound, at most log N. Wants batches of 64 or more.
    "vib": KL of N(h(x), noise^2) to N(0, 1), the rate of a variational bottleneck; an upper bound. The network is
    trained with the noise in its features and attacked, predicts and is exported without.
    "label": KL of p(. | x) to its mean over the batch; T is the predicted label. Between 0 and log K in mean.
    Noise is drawn once a step, so that the attack climbs one function.

    layer: the module whose output is T, or "auto": what enters the linear layer that gives the logits. beta rises from
    0 over the first ``warmup`` share of the training. gamma = beta = 0 is PGD adversarial training (but for the noise
    of "vib"), as is a temperature without end.
    """

    attack: Attack = field(default_factory=Pgd)
    information: Literal["infonce", "vib", "label"] = "infonce"
    mode: Literal["bottleneck", "reweight"] = "bottleneck"
    gamma: float = 1.0
    beta: float = 0.1
    noise: float = 0.3
    temperature: float = 1.0
    warmup: float = 0.1
    layer: str = AUTO

    def __post_init__(self) -> None:
        for name, value, known in (
            ("information", self.information, ("infonce", "vib", "label")),
            ("mode", self.mode, ("bottleneck", "reweight")),
        ):
            if value not in known:
                raise InputError(f"unknown {name} '{value}': {nearest(value, known)}")
        if not 0 <= self.gamma < math.inf or not 0 <= self.beta < math.inf:
            raise InputError(f"gamma and beta must be at least 0, not {self.gamma} and {self.beta}")
        if not self.noise > 0 or not self.temperature > 0:
            raise InputError(f"noise and temperature must be above 0, not {self.noise} and {self.temperature}")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup is a share of the training between 0 and 1, not {self.warmup}")
        if self._climbs:
            maximiser(self.attack, "cross-entropy with information (gamma above 0)")

    @property
    def _climbs(self) -> bool:
        return self.mode == "bottleneck" and self.gamma > 0

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The loss on adversarial images, with the information of clean and adversarial ones among the metrics."""
        x, y = batch.x, batch.y
        with _watched(model, x, self.layer) as watch:
            with crafting(model), torch.no_grad():
                clean = watch.answers(x)
            noise = self._drawn(clean.features, state.method_generator)
            information = self._information(clean, noise, clean)
            x_adv = self._crafted(watch, batch, noise, clean, state)
            answers = watch.answers(x_adv, self.noise * noise if self.information == "vib" else None)
        losses = F.cross_entropy(answers.logits, y, reduction="none")
        kept = self._information(answers, noise, answers)
        if self.mode == "reweight":
            weights = len(y) * (information / self.temperature).softmax(0)
            loss = (weights.to(losses.dtype) * losses).mean()
        else:
            share = min(state.progress / self.warmup, 1.0) if self.warmup else 1.0
            loss = losses.mean() + self.beta * share * kept.mean()
        flipped = ~right(answers.logits.detach(), y)
        were_right = right(clean.logits, y)
        return loss, {
            "accuracy": (~flipped).float().mean(),
            "information": information.mean(),
            "adversarial_information": kept.detach().mean(),
            "information_auroc": auroc(information[were_right], flipped[were_right]),
        }

    def _crafted(self, watch: Watch, batch: Batch, noise: Tensor, clean: Answers, state: State) -> Tensor:
        if not self._climbs:
            return self.attack(watch.model, batch.x, batch.y, generator=state.attack_generator)

        def objective(images: Tensor) -> Tensor:
            answers = watch.answers(images)
            losses = F.cross_entropy(answers.logits, batch.y, reduction="none")
            return losses + self.gamma * self._information(answers, noise, clean)

        attack = maximiser(self.attack, "information")
        return attack.maximise(watch.model, objective, batch.x, generator=state.attack_generator)

    def _drawn(self, features: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(features.shape, generator=generator, device=generator.device, dtype=features.dtype)
        return noise.to(features.device)

    def _information(self, answers: Answers, noise: Tensor, reference: Answers) -> Tensor:
        """i [N] of the images that gave ``answers``, against those of ``reference``."""
        if self.information == "vib":
            return gaussian_rate(answers.features, self.noise)
        if self.information == "label":
            return label_information(answers.logits, reference.logits)
        unit, others = F.normalize(answers.features, dim=1), F.normalize(reference.features, dim=1)
        return noisy_information(unit, others, noise, self.noise)


def noisy_information(features: Tensor, reference: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Contributions [N] to I(X; T) of T = features + scale * noise: log p(t | x) over the mean of p(t | reference).

    features, reference, noise: [N, D]; the own entry of the reference is replaced by the features. The InfoNCE bound
    (van den Oord et al., arXiv 1807.03748) with the known Gaussian channel as its critic: each at most log N.
    """
    squares = features.square().sum(1, keepdim=True) + reference.square().sum(1) - 2 * features @ reference.T
    along = (noise * features).sum(1, keepdim=True) - noise @ reference.T
    # log p(t_k | h_j) - log p(t_k | h_k) = -(|h_k - h_j|^2 / 2 + scale n_k (h_k - h_j)) / scale^2: 0 for j = k.
    logits = (-squares / (2 * scale**2) - along / scale).fill_diagonal_(0)
    return math.log(len(features)) - logits.logsumexp(1)


def gaussian_rate(mean: Tensor, scale: float) -> Tensor:
    """KL [N] of N(mean, scale^2) to N(0, 1), summed over the features [N, D].

    Alemi et al., ICLR 2017, arXiv 1612.00410: its mean bounds I(X; T) from above.
    """
    return 0.5 * (mean.square() + scale**2 - math.log(scale**2) - 1).sum(1)


def label_information(logits: Tensor, reference: Tensor) -> Tensor:
    """KL [N] of the predicted distribution to the mean of those of ``reference``; logits [N, K]."""
    log_p = logits.log_softmax(1)
    log_mean = reference.log_softmax(1).logsumexp(0) - math.log(len(reference))
    return (log_p.exp() * (log_p - log_mean)).sum(1)


def auroc(score: Tensor, positive: Tensor) -> Tensor:
    """The chance that a positive sample scores above a negative one; one half where either kind is missing."""
    high, low = score[positive], score[~positive]
    if not len(high) or not len(low):
        return score.new_tensor(0.5)
    above = high.unsqueeze(1) - low
    return ((above > 0).to(score.dtype) + 0.5 * (above == 0).to(score.dtype)).mean()


class Answers(NamedTuple):
    """Logits [N, K] and what the latent representation was: features [N, D]."""

    logits: Tensor
    features: Tensor


class Watch:
    """Sees the latent representation, the input or the output of a module, in every pass of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._added: Tensor | None = None
        self._features: Tensor | None = None
        self._passes = 0

    def answers(self, x: Tensor, added: Tensor | None = None) -> Answers:
        """What the model answers to ``x``; ``added`` [N, D] is added to the latent representation on its way on."""
        self._added, self._features, self._passes = added, None, 0
        logits = self.model(x)
        if self._features is None or self._passes > 1:
            raise InputError(f"the layer of InfoAT is passed {self._passes} times in a pass, not once: name another")
        return Answers(logits, self._features)

    def see(self, value: Tensor) -> Tensor:
        """The representation as it goes on."""
        self._features, self._passes = value.flatten(1), self._passes + 1
        return value if self._added is None else value + self._added.view_as(value)


@contextmanager
def _watched(model: nn.Module, x: Tensor, layer: str) -> Iterator[Watch]:
    """Entered before ``crafting``, which computes layers together unless somebody watches them."""
    modules, watch = dict(model.named_modules()), Watch(model)
    if layer == AUTO:
        classifier = _last_linear(model, x)
        handle = classifier.register_forward_pre_hook(lambda module, given: (watch.see(given[0]), *given[1:]))
    elif layer and layer in modules:
        handle = modules[layer].register_forward_hook(lambda module, given, output: watch.see(output))
    else:
        raise InputError(f"the network has no layer '{layer}': {nearest(layer, [AUTO, *filter(None, modules)])}")
    try:
        yield watch
    finally:
        handle.remove()


def _last_linear(model: nn.Module, x: Tensor) -> nn.Linear:
    """The layer that the logits come out of, as seen with one image."""
    passed: list[tuple[nn.Module, Tensor]] = []
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [
        module.register_forward_hook(lambda module, given, output: passed.append((module, output))) for module in linear
    ]
    try:
        # Without autocast, after which logits are cast: another tensor than the layer's.
        with crafting(model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            logits = model(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    for module, output in passed:
        if output is logits and isinstance(module, nn.Linear):
            return module
    raise InputError(
        "the logits do not come out of a linear layer: name the module whose output is the latent representation as "
        f"layer, one of {', '.join(name for name, _ in model.named_children())}"
    )


PLUGIN = InfoAt
