"""What the input Jacobian of a network says about its robustness, before any attack."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nas.attacks.gradient import input_jacobian, per_image
from nas.model_state import crafting
from nas.threat_model import ThreatModel


def local_radius(model: nn.Module, x: Tensor, y: Tensor, threat_model: ThreatModel) -> Tensor:
    """Distance [N] to the nearest boundary of the network linearised at ``x`` [N, C, H, W], in the threat model's norm.

    min over classes k of (f_y - f_k) / |grad(f_y - f_k)|_q, q the dual norm: the first step of DeepFool; exact for a
    linear network away from the pixel bounds. 0 for samples that are misclassified, inf without any gradient. Where it
    is small and attacks fail all the same, suspect the attacks.
    """
    with crafting(model):
        jacobian, logits = input_jacobian(model, x)
    of_label = per_image(y, jacobian).expand(-1, 1, *jacobian.shape[2:])
    normals = (jacobian - jacobian.gather(1, of_label)).flatten(0, 1)
    slopes = (normals * threat_model.geometry.steepest(normals)).flatten(1).sum(1).view_as(logits)
    gaps = logits.gather(1, y.unsqueeze(1)) - logits
    radii = torch.where(slopes > 0, gaps / slopes, torch.inf)
    others = radii.scatter(1, y.unsqueeze(1), torch.inf)
    wrong = (gaps < 0).any(1)
    return torch.where(wrong, 0, others.amin(1).clamp_min(0))


def jacobian_norm(model: nn.Module, x: Tensor, *, projections: int, generator: torch.Generator) -> Tensor:
    """Estimates [N] of the Frobenius norm of the Jacobian of the logits with respect to ``x`` [N, C, H, W].

    The root of ``squared_jacobian_norm``: exact with as many projections as classes.
    """
    with crafting(model), torch.enable_grad():
        point = x.detach().requires_grad_(True)
        return squared_jacobian_norm(model(point), point, projections=projections, generator=generator).sqrt().detach()


def squared_jacobian_norm(
    logits: Tensor, x: Tensor, *, projections: int, generator: torch.Generator, create_graph: bool = False
) -> Tensor:
    """Unbiased estimates [N] of |J|_F^2, J the Jacobian of ``logits`` [N, K] with respect to the ``x`` they come from.

    From ``projections`` random unit vectors v: |J|_F^2 = K E|v'J|^2 (Hoffman et al., arXiv 1908.02729, eq. 7); one
    backward pass each. Fewer projections than classes are orthogonal to each other, K of them give the norm
    exactly, and further ones are not needed: they are not drawn. create_graph: to differentiate the result.
    """
    n, classes = logits.shape
    count = min(projections, classes)
    normal = torch.randn(n, classes, count, generator=generator, device=x.device, dtype=logits.dtype)
    directions = torch.linalg.qr(normal).Q
    total = torch.zeros_like(logits[:, 0])
    for i in range(count):
        weighted = (logits * directions[:, :, i]).sum()
        (gradient,) = torch.autograd.grad(weighted, x, retain_graph=True, create_graph=create_graph)
        total = total + gradient.flatten(1).square().sum(1)
    return classes / count * total
