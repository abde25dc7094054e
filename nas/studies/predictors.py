"""What can be told of a network's robustness without an evaluation: by a few gradients, trained or not.

Whether any of it predicts robustness in a space is a question for a study, not an assumption.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops.misc import SqueezeExcitation

from nas.analysis.jacobian import jacobian_norm
from nas.attacks.gradient import input_gradient
from nas.attacks.losses import kl
from nas.attacks.pgd import Pgd
from nas.defences.noise import NoiseEnsemble
from nas.model_file import ModelSpec
from nas.model_state import crafting
from nas.prediction import begin, networks_in
from nas.randomness import derived_seed, generator
from nas.threat_model import ThreatModel
from search_spaces.layers import Normalise


def measures(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    seed: int,
    images: int = 128,
    steps: int = 10,
) -> dict[str, float]:
    """Measures of a trained network on the first ``images`` of ``x`` [N, C, H, W], labels ``y`` [N], by name.

    Each is a mean over the images; x' is found by PGD with ``steps`` steps up the cross-entropy, in eval mode.

    lipschitz: |f(x) - f(x')|_1 / ||x - x'||, f the logits and || || the threat model's norm: the empirical local
    Lipschitz constant (Yang et al., 2020, arXiv 2003.02460; Huang et al., 2021, arXiv 2110.03825), at an adversarial
    example, not at the maximum of the quotient. lipschitz_kl: the same with KL(p(x) || p(x')) above.
    stability: share of images whose prediction the attack does not change, be it right or wrong.
    fosc: epsilon |g|_* - <x' - x, g>, g the gradient of the cross-entropy at x' and | |_* the dual norm: 0 where no x'
    of the ball has a higher loss to first order (Wang et al., 2019, arXiv 2112.08304). As published it does not know
    of pixel bounds: where these hold x' back it stays above 0.
    jacobian: Frobenius norm of the Jacobian of the logits (by ten projections where there are more classes).
    curvature: see ``curvature``, over the distance of a perturbation of size epsilon.

    An ensemble has no logits but logarithms of probabilities: with these for f its lipschitz and jacobian compare with
    those of other ensembles only. Noise is drawn alike for x and x'. A measure that is not a finite number is left
    out, as are quotients by a distance when epsilon is 0. The model is left as it was.
    """
    x, y = x[:images], y[:images]
    attack = Pgd(threat_model, steps=steps)
    found: dict[str, Tensor] = {}
    with _same_noise(model), crafting(model):
        begin(model)
        x_adv = attack(model, x, y, generator=generator(seed, "measures", device=x.device))
        clean_gradient, clean = _gradient(model, x, y)
        gradient, attacked = _gradient(model, x_adv, y)
        distance = threat_model.distance(x_adv, x)
        found["lipschitz"] = (clean - attacked).abs().sum(1) / distance
        found["lipschitz_kl"] = kl(attacked, y, clean) / distance
        found["stability"] = (clean.argmax(1) == attacked.argmax(1)).to(clean.dtype)
        found["fosc"] = fosc(gradient, x_adv, x, threat_model)
        projections = generator(seed, "measures: projections", device=x.device)
        found["jacobian"] = jacobian_norm(model, x, projections=10, generator=projections)
        found["curvature"] = _curvature(model, x, y, threat_model, clean_gradient, threat_model.epsilon)
    return _finite({name: values.double().mean() for name, values in found.items()})


def fosc(gradient: Tensor, x_adv: Tensor, x: Tensor, threat_model: ThreatModel) -> Tensor:
    """First-order stationary condition [N] of ``x_adv``, where the loss has this gradient: see ``measures``."""
    along = ((x_adv - x) * gradient).flatten(1).sum(1)
    return threat_model.epsilon * threat_model.geometry.dual(gradient) - along


def curvature(model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel, *, reach: float) -> Tensor:
    """Curvature [N] of the cross-entropy in the input, |g(x + h z) - g(x)| / h: the Euclidean norm of H z for small h.

    z is the threat model's steepest direction at ``x`` (the sign of the gradient for linf) at Euclidean length 1, and
    h the length of a perturbation of size ``reach`` along it; the regulariser CURE penalises its square
    (Moosavi-Dezfooli et al., 2019, arXiv 1811.09716). Networks of ReLUs are flat between their kinks: a reach about
    epsilon sees these. 0 where there is no gradient. x + h z is not clipped.
    """
    with _same_noise(model), crafting(model):
        gradient, _ = _gradient(model, x, y)
        return _curvature(model, x, y, threat_model, gradient, reach)


def _curvature(
    model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel, gradient: Tensor, reach: float
) -> Tensor:
    """The same, of a model that is being crafted on and whose gradient at ``x`` is known."""
    change = reach * threat_model.geometry.steepest(gradient)
    length = change.flatten(1).norm(dim=1)
    farther, _ = _gradient(model, x + change, y)
    bend = (farther - gradient).flatten(1).norm(dim=1)
    flat = gradient.flatten(1).abs().amax(1) == 0
    return torch.where(flat, 0.0, bend / length)


def at_birth(
    network: ModelSpec | nn.Module,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    *,
    seed: int,
    images: int = 64,
    kernel_images: int = 16,
) -> dict[str, float]:
    """Zero-cost scores of an untrained network on the first ``images`` of ``x`` [N, C, H, W], labels ``y``, by name.

    network: itself, left as it was, or its specification, built with weights drawn from ``seed`` and without what
    compresses it later. Of an ensemble the first network counts, without noise: all are of one architecture. Batch
    normalisation uses the batch, since its running statistics do not know the data yet; dropout is off.
    Weights are parameters of two or more axes: kernels and matrices.

    birth_synflow: logarithm of ``synflow``.
    birth_snip: sum over weights of |w dL/dw|, L the cross-entropy (Lee et al., 2019, arXiv 1810.02340; as a score of
    networks Abdelfattah et al., 2021, arXiv 2101.08134). birth_grad_norm: sum over kernels and matrices of |dL/dW|_2
    (Abdelfattah et al.).
    birth_naswot: log |det K|, K [N, N] how many ReLUs two images agree on (Mellor et al., 2021, arXiv 2006.04647).
    birth_jacov: -sum log(v + k) + 1 / (v + k), k = 1e-5, over the eigenvalues v of the correlations between images'
    gradients of the summed logits (first version of the same paper, arXiv 2006.04647v1); of at most half as
    many images as pixels times channels, as more have eigenvalues of 0, which would drown the others.
    birth_ntk: logarithm of the least eigenvalue of the neural tangent kernel of the first ``kernel_images``, of the
    summed logits (as in TE-NAS, Chen et al., 2021, arXiv 2102.11535, which takes the condition number). Here the
    statistics of the batch are held fixed: left to follow the weights, the last normalisation keeps the sum over the
    batch as it is whatever is below it, and the least eigenvalue belongs to the classifier alone.
    birth_ntk_adv: the same at adversarial examples of these images (PGD, 10 steps): the robust kernel of Wu et al.,
    2024, arXiv 2403.13134, whose bounds have the least eigenvalue; how they compute a score was not read, so that this
    is a reconstruction. Of the other scores no published form at adversarial examples is known here: they are clean.

    A score that is not a finite number is left out, as is birth_naswot of a network without ReLUs (those of gates do
    not count) and birth_synflow of one whose layers normalise each image, which would undo the flow.
    """
    x, y = x[:images], y[:images]
    built = _built(network, seed).to(x.device) if isinstance(network, ModelSpec) else copy.deepcopy(network)
    born = next(iter(networks_in(built).values())).requires_grad_(True)
    _use_batch_statistics(born)
    weights = [parameter for parameter in born.parameters() if parameter.dim() > 1]

    with torch.enable_grad():
        loss = F.cross_entropy(born(x), y)
    pairs = [(w, g) for w, g in zip(weights, _gradients(loss, weights), strict=True) if g is not None]
    found = {
        "birth_snip": sum(((w * g).abs().sum() for w, g in pairs), torch.zeros(())),
        "birth_grad_norm": sum((g.norm() for _, g in pairs), torch.zeros(())),
        "birth_jacov": _jacov(born, x[: max(2, x[0].numel() // 2)]),
    }
    if (agreement := _agreement(born, x)) is not None:
        found["birth_naswot"] = torch.linalg.slogdet(agreement).logabsdet
    _hold_statistics(born, x)
    few, their = x[:kernel_images], y[:kernel_images]
    attack = Pgd(threat_model, steps=10)
    attacked = attack(born, few, their, generator=generator(seed, "at birth", device=x.device))
    for name, points in (("birth_ntk", few), ("birth_ntk_adv", attacked)):
        found[name] = torch.linalg.eigvalsh(tangent_kernel(born, points))[0].log()
    if not any(isinstance(module, _PER_IMAGE) for module in born.modules()):
        found["birth_synflow"] = synflow(born, x.shape[1:]).log()
    return _finite(found)


_PER_IMAGE = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def synflow(network: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Synaptic flow: sum over weights of w dR/dw at |w|, R the sum of the outputs for an image of ones.

    Tanaka et al., 2020, arXiv 2006.05467. All parameters are taken by their size, so that nothing cancels: of a
    network of ReLUs without biases it is the sum over all paths, skips included, of the product of the weights on it
    times how many they are. Batch normalisation passes its input on, as Abdelfattah et al. (2021, arXiv 2101.08134)
    leave it out, and pixels are not normalised: either would bring signs back. In double precision, as
    it grows exponentially with depth. shape: (C, H, W).
    """
    network = copy.deepcopy(network).double().eval().requires_grad_(True)
    weights = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    device = weights[0].device if weights else None
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                _pass_on(module, device)
            elif isinstance(module, Normalise):
                module.mean.zero_()
                module.std.fill_(1)
    with torch.enable_grad():
        flow = network(torch.ones(1, *shape, dtype=torch.float64, device=device)).sum()
    pairs = zip(weights, _gradients(flow, weights), strict=True)
    return sum(((w * g).sum() for w, g in pairs if g is not None), torch.zeros(())).detach()


def tangent_kernel(network: nn.Module, x: Tensor) -> Tensor:
    """Neural tangent kernel [N, N] of the summed logits: inner products of images' gradients in all parameters."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with torch.enable_grad():
        outputs = network(x).sum(1).unbind()
    rows = []
    for index, output in enumerate(outputs):
        gradients = _gradients(output, parameters, retain_graph=index < len(outputs) - 1)
        rows.append(torch.cat([g.flatten() for g in gradients if g is not None]).double())
    stacked = torch.stack(rows)
    return stacked @ stacked.T


def _jacov(network: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(network(point).sum(), point)
    correlations = torch.corrcoef(gradient.flatten(1).double())
    if not bool(correlations.isfinite().all()):
        return correlations.new_tensor(math.nan)
    shifted = torch.linalg.eigvalsh(correlations) + 1e-5
    return -(shifted.log() + 1 / shifted).sum()


def _agreement(network: nn.Module, x: Tensor) -> Tensor | None:
    """How many ReLUs each two images [N, N] agree on, whether they are on or off; None without any."""
    gates = {
        id(module) for gate in network.modules() if isinstance(gate, SqueezeExcitation) for module in gate.modules()
    }
    total = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    seen = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total, seen
        on = (output.detach().flatten(1) > 0).float()
        total = total + (on @ on.T + (1 - on) @ (1 - on).T).double()
        seen += 1

    relus = [m for m in network.modules() if isinstance(m, nn.ReLU) and id(m) not in gates]
    hooks = [module.register_forward_hook(count) for module in relus]
    try:
        with torch.no_grad():
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return total if seen else None


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of each image's cross-entropy and the logits, under the same noise at every call."""
    begin(model)
    gradient, _, logits = input_gradient(model, x, y, "cross_entropy", None)
    return gradient, logits


def _gradients(
    value: Tensor, parameters: list[nn.Parameter], *, retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """By each parameter; None for those that have no part in ``value``, such as an auxiliary head's."""
    return torch.autograd.grad(value, parameters, retain_graph=retain_graph, allow_unused=True)


@contextmanager
def _same_noise(model: nn.Module) -> Iterator[None]:
    """Within it the noise of ``model`` may be let start over; afterwards it goes on from where it was."""
    places = [(m, m.stretch, m.calls) for m in model.modules() if isinstance(m, NoiseEnsemble)]
    try:
        yield
    finally:
        for ensemble, stretch, calls in places:
            ensemble.stretch, ensemble.calls = stretch, calls


def _built(spec: ModelSpec, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed, "at birth"))
        return dataclasses.replace(spec, plans=()).build()


def _use_batch_statistics(network: nn.Module) -> None:
    network.eval()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.train()


def _hold_statistics(network: nn.Module, x: Tensor) -> None:
    """Make the running statistics those of the batch ``x``, and use them."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
    with torch.no_grad():
        network(x)
    for norm in norms:
        norm.eval()


def _pass_on(norm: _BatchNorm, device: torch.device | None) -> None:
    """Let ``norm`` pass its input on."""
    # The least eps: 1 + eps is 1, and some versions of torch refuse 0.
    norm.track_running_stats, norm.eps = True, sys.float_info.min
    norm.running_mean = torch.zeros(norm.num_features, device=device, dtype=torch.float64)
    norm.running_var = torch.ones(norm.num_features, device=device, dtype=torch.float64)
    if norm.affine:
        norm.weight.fill_(1)
        norm.bias.zero_()


def _finite(found: Mapping[str, Tensor]) -> dict[str, float]:
    values = {name: float(value.detach()) for name, value in found.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}
