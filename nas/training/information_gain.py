"""Bayesian adversarial training by particles, with information gain."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.defences.particles import Particles, mean_prediction
from nas.errors import InputError
from nas.model_state import frozen_statistics
from nas.objective import Attack, Batch, Metrics, State
from nas.prediction import MeanOfParticles


@dataclass(frozen=True)
class InformationGain:
    """IG-BNN: Bayesian adversarial training of particles by Stein descent, with equal information gain under attack.

    Doan, Abbasnejad, Shi & Ranasinghe, "Bayesian Learning with Information Gain Provably Bounds Risk for a Robust
    Adversarial Defense", ICML 2022, arXiv 2212.02003. ``particles`` networks with weights of their own stand for the
    posterior of the weights; they predict, and are attacked at evaluation, by the mean of their probabilities. The loss
    is the mean of their cross-entropies on adversarial images, plus ``weight`` times the mean of how much the
    information gain of an image and of its adversarial image differ (``information_gain``). Their gradients are mixed,
    and the particles kept apart, as ``stein_directions`` says.

    attacked: what the images are found on, a "particle" drawn for each batch or the "ensemble".  emphasis: weight of a
    further cross-entropy of that particle (1 in the paper's formula, 0 in its released code).  repulsion: gamma, which
    pushes particles apart.  mixing: share of the steps whose gradients are mixed (0.4 in the released code); the others
    train each particle on its own, so that ``weight`` and ``mixing`` of 0 are independent adversarial training.

    The model must be ``nas.defences.particles.Particles``, which training by a recipe builds; any other network, such
    as the supernet of a search, is a single particle, and with one the method is PGD adversarial training. Time and
    memory are those of ``particles`` networks and of another pass over the clean images; the attack costs one
    network's ("particle") or all networks' ("ensemble"). Inferred: the kernel's weights are normalised to sum 1, which
    leaves the fixed points where they are and the step that of one network, whatever the number of particles; the
    initial weights are independent. Clipping in the training loop acts on all particles together.
    """

    attack: Attack = field(default_factory=Pgd)
    particles: int = 10
    weight: float = 5.0
    emphasis: float = 0.0
    attacked: Literal["particle", "ensemble"] = "particle"
    repulsion: float = 1.0
    mixing: float = 1.0

    def __post_init__(self) -> None:
        _ = self.prediction  # it checks the number of particles
        for name, value in (("weight", self.weight), ("emphasis", self.emphasis), ("repulsion", self.repulsion)):
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} must be a number of at least 0, not {value}")
        if not 0 <= self.mixing <= 1:
            raise InputError(f"mixing is a share of the steps from 0 to 1, not {self.mixing}")
        if self.attacked not in ("particle", "ensemble"):
            raise InputError(f"attacked must be 'particle' or 'ensemble', not '{self.attacked}'")

    @property
    def prediction(self) -> MeanOfParticles:
        """The mean of the particles."""
        return MeanOfParticles(self.particles)

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        """The loss, gradients of which are still to be mixed. Metrics are those of the adversarial images."""
        members = _members(model)
        drawn = int(torch.randint(len(members), (), generator=state.method_generator, device=batch.x.device))
        target = members[drawn] if self.attacked == "particle" else model
        x_adv = self.attack(target, batch.x, batch.y, generator=state.attack_generator)
        logits = torch.stack([member(x_adv) for member in members])
        losses = torch.stack([F.cross_entropy(own, batch.y) for own in logits])
        loss = losses.mean() + self.emphasis * losses[drawn]
        adversarial = logits.log_softmax(2)
        answers = adversarial.detach().argmax(2)
        metrics = {
            "accuracy": (mean_prediction(adversarial.detach()).argmax(1) == batch.y).float().mean(),
            "disagreement": _disagreement(answers),
            "information_gain": information_gain(adversarial.detach()).mean(),
        }
        # One particle has nothing to gain.
        if self.weight and len(members) > 1:
            # Running statistics are those of the adversarial images, as without this term.
            with frozen_statistics(model):
                clean = torch.stack([member(batch.x) for member in members]).log_softmax(2)
            difference = information_gain(clean) - information_gain(adversarial)
            penalty = _smooth_absolute(difference).mean()
            loss = loss + self.weight * penalty
            metrics["gain_difference"] = penalty.detach()
        return loss, metrics

    def gradients(
        self, model: nn.Module, batch: Batch, state: State, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor | None], Metrics]:
        """The Stein directions of the particles, for the mean loss times their number."""
        loss, metrics = self(model, batch, state)
        members = _members(model)
        # The mean over particles made each gradient that of one particle over their number.
        found: list[Any] = [*torch.autograd.grad(len(members) * loss, [*parameters], allow_unused=True)]
        if len(members) == 1 or not self._mixes(state, batch.x.device):
            return loss.detach(), found, metrics
        place = {id(parameter): i for i, parameter in enumerate(parameters)}
        rows = [[place[id(p)] for p in member.parameters() if id(p) in place] for member in members]
        used = [column for column in zip(*rows, strict=True) if all(found[i] is not None for i in column)]
        rows = [list(row) for row in zip(*used, strict=True)]
        with torch.no_grad():
            weights = torch.stack([torch.cat([parameters[i].flatten() for i in row]) for row in rows])
            slopes = torch.stack([torch.cat([found[i].flatten() for i in row]) for row in rows])
            kernel, directions = stein_directions(weights, slopes, repulsion=self.repulsion)
            for row, direction in zip(rows, directions, strict=True):
                parts = direction.split([parameters[i].numel() for i in row])
                for i, part in zip(row, parts, strict=True):
                    found[i] = part.view_as(parameters[i])
        n = len(members)
        metrics["kernel"] = (kernel.sum() - n) / (n * (n - 1))
        return loss.detach(), found, metrics

    def _mixes(self, state: State, device: torch.device) -> bool:
        """Whether the gradients of this step are mixed."""
        if self.mixing in (0, 1):
            return bool(self.mixing)
        return float(torch.rand((), generator=state.method_generator, device=device)) < self.mixing


def stein_directions(
    weights: Tensor, slopes: Tensor, *, repulsion: float = 1.0, bandwidth: float | None = None
) -> tuple[Tensor, Tensor]:
    """Kernel matrix [n, n] of n particles and the directions [n, D] to descend along.

    weights: [n, D];  slopes: [n, D], gradients there of what is minimised (minus the log posterior). Stein variational
    gradient descent (Liu & Wang, NeurIPS 2016, arXiv 1608.04471, algorithm 1) with the kernel k = exp(-d^2 / 2 h^2) of
    arXiv 2212.02003; h is ``bandwidth`` or the median distance of two particles. Particle i descends along the
    sum over j of k_ji slope_j + repulsion k_ji (weights_j - weights_i) / (h^2 n), divided by the sum over j of k_ji
    rather than by n: for h to 0 that is its own slope, for h to infinity the mean of all. Particles in one place have
    the mean slope and no repulsion.
    """
    n = len(weights)
    # No distances by way of scalar products, no means of weights: what little sets particles apart would be lost.
    apart = weights - weights[0]
    squares = torch.cdist(apart, apart, compute_mode="donot_use_mm_for_euclid_dist").square()
    pairs = squares[torch.triu_indices(n, n, 1, device=weights.device).unbind()]
    square = pairs.sqrt().quantile(0.5).square() if bandwidth is None else weights.new_tensor(bandwidth).square()
    square = square.clamp_min(torch.finfo(weights.dtype).tiny)
    kernel = (-squares / (2 * square)).exp()
    shares = kernel / kernel.sum(1, keepdim=True)
    away = (shares @ apart - apart) / square
    return kernel, shares @ slopes + repulsion / n * away


def information_gain(log_probabilities: Tensor) -> Tensor:
    """What the label of each image would tell about which particle is right: [n, N, K] to [N], in nats.

    The entropy of the mean prediction less the mean entropy of the predictions of n particles, that is the mutual
    information of label and particle: at least 0, at most log n and log K, and 0 where all particles agree.
    """
    together = mean_prediction(log_probabilities)
    return _entropy(together) - _entropy(log_probabilities).mean(0)


def _entropy(log_probabilities: Tensor) -> Tensor:
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def _smooth_absolute(values: Tensor) -> Tensor:
    """Absolute values whose slope at 0 is 0, to within 1e-6."""
    return (values.square() + 1e-12).sqrt() - 1e-6


def _disagreement(answers: Tensor) -> Tensor:
    """Share of images [n, N] to which two different particles give different classes; 0 of one particle."""
    pairs = [(one != other).float().mean() for one, other in itertools.combinations(answers, 2)]
    return torch.stack(pairs).mean() if pairs else torch.zeros((), device=answers.device)


def _members(model: nn.Module) -> list[nn.Module]:
    return [*model.members] if isinstance(model, Particles) else [model]


PLUGIN = InformationGain
