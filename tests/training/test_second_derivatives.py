"""Methods that differentiate twice, on every kind of network: native cells, a ResNet-18, a vision transformer."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.vision_transformer import VisionTransformer

from nas.attacks.krylov import Krylov
from nas.attacks.pgd import Pgd
from nas.objective import Batch, State
from nas.threat_model import ThreatModel
from nas.training.jsigr import JSigr
from nas.training.krylov_at import KrylovAt
from search_spaces.dsara import SPACE
from search_spaces.layers import Normalise

THREAT = ThreatModel("linf", 0.05)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _cells():
    sizes = {"channels": 4, "cells": 5, "input_shape": (3, 32, 32), "classes": 10, "mean": MEAN, "std": STD}
    return SPACE.build(SPACE.random(_generator(4)), **sizes)


def _residual():
    return nn.Sequential(Normalise(MEAN, STD), resnet18(num_classes=10))


def _transformer():
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    model = VisionTransformer(**sizes, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.3)  # it begins with zeros, and no input gradient
    return nn.Sequential(Normalise(MEAN, STD), model)


@pytest.fixture(params=[_cells, _residual, _transformer])
def model(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return request.param().train()


def _batch(dtype):
    x = torch.rand(8, 3, 32, 32, generator=_generator(1), dtype=dtype)
    return Batch(x, torch.arange(8) % 10, torch.arange(8))


def _state():
    return State(0, 0, 0.0, _generator(2), _generator(3))


def test_j_sigr_has_the_gradient_of_its_loss(model):
    """Finite differences along the weights, in float64; the penalties outweigh the cross-entropy.

    The steps are tiny, for at the kinks of ReLU gradients jump, and the loss with them.
    """
    model, batch = model.double(), _batch(torch.float64)
    # A mask that does not hang on the weights.
    method = JSigr(jacobian_weight=1.0, saliency_weight=100.0, keep=0.3, selection="random")
    loss, _ = method(model, batch, _state())
    weights = list(model.parameters())
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    direction = [p.detach().abs() * torch.randn(p.shape, generator=_generator(5), dtype=p.dtype) for p in weights]
    pairs = [(g, d) for g, d in zip(gradients, direction, strict=True) if g is not None]
    slope = sum(float((g * d).sum()) for g, d in pairs)

    def moved(step):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter, change in zip(other.parameters(), direction, strict=True):
                parameter += step * change
        return method(other, batch, _state())[0].item()

    assert slope == pytest.approx((moved(1e-9) - moved(-1e-9)) / 2e-9, rel=1e-3)


@pytest.mark.parametrize(
    "method", [JSigr(Pgd(THREAT, steps=1), adversarial=True), KrylovAt(Krylov(THREAT, 2, dimensions=2))]
)
def test_in_single_precision_they_run_and_leave_the_network_as_found(method, model):
    batch = _batch(torch.float32)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss, metrics = method(model, batch, _state())
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in gradients if g is not None) and bool(loss.isfinite())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(model.parameters(), before, strict=True))
    assert 0 <= float(metrics["accuracy"]) <= 1
