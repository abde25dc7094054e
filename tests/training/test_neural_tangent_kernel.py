"""The tangent kernel against closed forms, Monte Carlo and wide networks; regression with it."""

import math
from itertools import pairwise

import pytest
import torch
from torch.func import jacrev, vmap

from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.threat_model import ThreatModel
from nas.training.neural_tangent_kernel import Regression, ReluKernel, centred


def _vectors(n, d=6, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _covariances(x, v, b):
    s = v / x.shape[1] * (x @ x.T) + b
    return s, s.diagonal()


def test_depth_zero_is_the_linear_kernel():
    x, other = _vectors(3), _vectors(4, seed=1)
    torch.testing.assert_close(ReluKernel(0, 1.5, 0.2)(x, other), 1.5 / 6 * x @ other.T + 0.2, rtol=1e-13, atol=0)


def test_known_angles():
    """One layer, no biases, in units of v^2 |x||x'|/D: parallel vectors 1, opposite 0, orthogonal 1/(2 pi)."""
    kernel, x = ReluKernel(1, 2.0, 0.0), torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    for other, wanted in (([6.0, 0.0], 2 * 2 * 18 / 2), ([-6.0, 0.0], 0.0), ([0.0, 6.0], 2 / math.pi * 18 / 2)):
        found = kernel(x, torch.tensor([other], dtype=torch.float64))
        assert found.item() == pytest.approx(wanted, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_gram_matrix_is_symmetric_positive_and_exact_on_its_diagonal(depth):
    kernel, x = ReluKernel(depth), _vectors(12)
    gram = kernel.gram(x)
    torch.testing.assert_close(gram, gram.T, rtol=1e-13, atol=1e-13)
    assert torch.linalg.eigvalsh(gram)[0] > (-1e-12 if depth == 0 else 1e-4)
    torch.testing.assert_close(gram, kernel(x, x.clone()), rtol=1e-6, atol=0)
    # v = 2 keeps the variance but for the biases: T = sum over layers of the variance of each.
    variance = 2 / 6 * x.square().sum(1) + 0.01
    wanted = sum(variance + 0.01 * layer for layer in range(depth + 1))
    torch.testing.assert_close(gram.diagonal(), wanted, rtol=1e-13, atol=0)


def test_one_layer_against_monte_carlo():
    """E over Gaussian weights of both terms of the kernel, 400,000 hidden units."""
    kernel, x = ReluKernel(1, 1.7, 0.3), _vectors(4)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(400_000, 6, generator=generator, dtype=torch.float64) * math.sqrt(1.7 / 6)
    biases = torch.randn(400_000, generator=generator, dtype=torch.float64) * math.sqrt(0.3)
    hidden = x @ weights.T + biases
    active = (hidden > 0).double()
    last = 1.7 * hidden.relu() @ hidden.relu().T / 400_000 + 0.3
    first = 1.7 * (active @ active.T / 400_000) * _covariances(x, 1.7, 0.3)[0]
    torch.testing.assert_close(kernel.gram(x), last + first, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("depth", [1, 2])
def test_wide_networks_have_this_kernel(depth):
    """Inner products of parameter gradients of finite networks, by automatic differentiation, averaged over draws."""
    width, v, b, x = 1024, 2.0, 0.1, _vectors(3)
    total = torch.zeros(3, 3, dtype=torch.float64)
    for draw in range(8):
        generator = torch.Generator().manual_seed(draw)
        sizes = [6, *[width] * depth, 1]
        parameters = {}
        for layer, (incoming, outgoing) in enumerate(pairwise(sizes)):
            parameters[f"w{layer}"] = torch.randn(outgoing, incoming, generator=generator, dtype=torch.float64)
            parameters[f"b{layer}"] = torch.randn(outgoing, generator=generator, dtype=torch.float64)

        def network(parameters, image):
            for layer in range(depth + 1):
                weight, bias = parameters[f"w{layer}"], parameters[f"b{layer}"]
                image = math.sqrt(v / weight.shape[1]) * (weight @ image) + math.sqrt(b) * bias
                image = image.relu() if layer < depth else image
            return image[0]

        gradients = vmap(jacrev(network), (None, 0))(parameters, x)
        total += sum(g.flatten(1) @ g.flatten(1).T for g in gradients.values()) / 8
    torch.testing.assert_close(ReluKernel(depth, v, b).gram(x), total, rtol=0.03, atol=0.03)


REGRESSION = Regression(ReluKernel(2), (0.4,), (0.3,))


def _images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def test_the_regression_interpolates():
    x, y = _images(12)
    targets = centred(y, 3)
    torch.testing.assert_close(REGRESSION(x, x, targets), targets, rtol=0, atol=1e-4)
    loose = Regression(REGRESSION.kernel, (0.4,), (0.3,), ridge=10.0)
    assert (loose(x, x, targets) - targets).abs().max() > 0.3
    assert targets.sum(1).abs().max() < 1e-15 and targets.max() == pytest.approx(2 / 3)


def test_a_single_image_gives_the_ratio_of_kernels():
    x, _ = _images(5)
    one, targets = x[:1], torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    vectors = REGRESSION.vectors(x)
    ratio = REGRESSION.kernel(vectors, vectors[:1]) / REGRESSION.kernel.diagonal(vectors[:1])
    torch.testing.assert_close(REGRESSION(x, one, targets), ratio @ targets, rtol=2e-6, atol=0)


def test_pixels_are_normalised_within():
    x, y = _images(6)
    by_hand = (x - 0.4) / 0.3
    bare = Regression(REGRESSION.kernel, (0.0,), (1.0,))
    targets = centred(y, 3)
    torch.testing.assert_close(REGRESSION(x, x[:4], targets[:4]), bare(by_hand, by_hand[:4], targets[:4]))


def test_gradients_by_finite_differences():
    """With respect to the support (through kernel, solution and diagonal) and to the images, float64."""
    x, y = _images(4)
    support = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x[:, :, :2, :2].contiguous()
    targets = centred(y[:3], 3)
    ridged = Regression(ReluKernel(2), (0.4,), (0.3,), ridge=1e-2)
    assert torch.autograd.gradcheck(
        lambda images, support: ridged(images, support, targets),
        (x.requires_grad_(True), support.requires_grad_(True)),
        eps=1e-6,
        atol=1e-6,
        rtol=1e-5,
    )


def test_the_fitted_classifier_is_the_regression():
    x, y = _images(12)
    fitted = REGRESSION.fitted(x[:9], centred(y[:9], 3), 0.1)
    wanted = REGRESSION(x, x[:9], centred(y[:9], 3)) / 0.1
    torch.testing.assert_close(fitted(x), wanted, rtol=1e-12, atol=1e-12)
    assert fitted(x.float()).dtype == torch.float32 and not list(fitted.parameters())


def test_the_attack_reaches_the_worst_case_of_a_linear_kernel():
    """A linear kernel is a linear classifier: of two classes, epsilon ||w||_1 is what the margin can lose."""
    x = 0.4 + 0.2 * _images(10)[0]
    y = torch.arange(10) % 2
    linear = Regression(ReluKernel(0), (0.4,), (0.3,), ridge=1e-2)
    fitted = linear.fitted(x, centred(y, 2), 0.1)
    point = x.clone().requires_grad_(True)
    logits = fitted(point)
    margin = logits[torch.arange(10), y] - logits[torch.arange(10), 1 - y]
    (gradient,) = torch.autograd.grad(margin.sum(), point)
    x_adv = Pgd(ThreatModel("linf", 0.1), steps=5)(fitted, x, y, generator=torch.Generator().manual_seed(0))
    logits = fitted(x_adv)
    attacked = logits[torch.arange(10), y] - logits[torch.arange(10), 1 - y]
    torch.testing.assert_close(attacked, margin.detach() - 0.1 * gradient.flatten(1).abs().sum(1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("settings", [{"depth": -1}, {"weight_variance": 0.0}, {"bias_variance": -1.0}])
def test_impossible_kernels_are_refused(settings):
    with pytest.raises(InputError):
        ReluKernel(**settings)
