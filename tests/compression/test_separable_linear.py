"""Separable layers against the dense product, the nearest Kronecker sums against brute force."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from nas.compression import separable_linear
from nas.compression.separable_linear import (
    SeparableLinear,
    SeparablePointwise,
    Separation,
    groupings,
    nearest_kronecker,
    ordered_factorisations,
    separations,
)

STRUCTURES = [
    Separation((3, 4), (2, 5)),
    Separation((3, 4), (5, 2), 3),
    Separation((2, 3, 4), (3, 2, 2)),
    Separation((4, 3, 2), (1, 2, 5), 2),
    Separation((2, 3, 2, 2), (2, 1, 3, 2)),
    Separation((12,), (7,)),
]


def _layer(separation, dtype=torch.float64, bias=True, seed=0):
    layer = SeparableLinear(separation, bias=bias, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    if bias:
        with torch.no_grad():
            layer.bias.copy_(torch.randn(layer.out_features, generator=torch.Generator().manual_seed(seed + 1)))
    return layer


def _dense(layer):
    """The matrix by numpy's own Kronecker product."""
    total = 0
    for factors in layer.factors():
        product = np.ones((1, 1))
        for factor in factors:
            product = np.kron(product, factor.weight.detach().double().numpy())
        total = total + product
    return torch.from_numpy(total)


def _random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("separation", STRUCTURES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_layer_is_the_dense_product(separation, dtype, tolerance):
    layer = _layer(separation, dtype)
    weight = _dense(layer)
    assert weight.shape == (layer.out_features, layer.in_features)
    n = layer.in_features
    for x in (
        _random(n), _random(5, n), _random(2, 3, n), _random(1, n), _random(0, n),
        _random(n, 6).T, _random(4, 2 * n)[:, ::2], _random(1, n).expand(3, n),
    ):  # fmt: skip
        expected = x @ weight.T + layer.bias.detach()
        found = layer(x.to(dtype)).double()
        assert found.shape == expected.shape
        assert float((found - expected).detach().abs().max() if len(found) else 0) <= tolerance * max(
            1, float(weight.norm())
        )
    torch.testing.assert_close(layer.weight.double(), weight, rtol=tolerance, atol=tolerance)


def test_flattening_is_row_major():
    """On a map [C, H, W] the factors act on channels, rows and columns."""
    layer = _layer(Separation((2, 3, 4), (5, 2, 3)))
    (factors,) = layer.factors()
    channels, rows, columns = (factor.weight for factor in factors)
    x = _random(6, 2, 3, 4)
    expected = torch.einsum("nchw,ac,bh,dw->nabd", x, channels, rows, columns).flatten(1) + layer.bias
    torch.testing.assert_close(layer(x.flatten(1)), expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_dense_layer():
    layer = _layer(Separation((3, 4), (2, 5), 2))
    x = _random(3, 12).requires_grad_(True)
    parameters = dict(layer.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *(p.detach().clone().requires_grad_(True) for p in parameters.values())))
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    y = x @ _dense(layer).T + layer.bias
    (expected,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(gradient, expected)


def test_one_factor_is_a_linear_layer():
    linear = nn.Linear(12, 7)
    layer = SeparableLinear(Separation((12,), (7,)))
    layer.set_factors([[linear.weight]])
    layer.bias = linear.bias
    x = _random(4, 12, dtype=torch.float32)
    torch.testing.assert_close(layer(x), linear(x))
    whole = SeparableLinear(Separation((12, 1), (7, 1)))  # one factor is the whole matrix
    whole.set_factors([[linear.weight, torch.ones(1, 1)]])
    whole.bias = linear.bias
    torch.testing.assert_close(whole(x), linear(x))


def test_counts_of_the_paper_s_layers():
    vgg = Separation((512, 7, 7), (64, 8, 8))
    assert vgg.weights == 32_880 and 25_088 * 4096 == 102_760_448
    mlp = Separation((28, 28), (32, 32))
    assert mlp.weights == 1_792 and 784 * 1024 // mlp.weights == 448
    for separation in (vgg, mlp, Separation((28, 28), (32, 32), 3)):
        layer = SeparableLinear(separation, bias=False)
        assert sum(parameter.numel() for parameter in layer.parameters()) == separation.weights
    assert (vgg.rank, mlp.rank, Separation((512, 7, 7), (512, 4, 2)).rank) == (3136, 784, 4096)


@pytest.mark.parametrize("separation", STRUCTURES, ids=str)
def test_the_order_takes_the_fewest_multiplications(separation):
    def cost(order):
        sizes, total = [*separation.in_modes], 0
        for k in order:
            total += math.prod(sizes) * separation.out_modes[k]
            sizes[k] = separation.out_modes[k]
        return separation.terms * total

    least = min(map(cost, itertools.permutations(range(len(separation.in_modes)))))
    assert cost(separation.order) == least == separation.multiply_adds
    counted = []
    layer = _layer(separation)
    for factors in layer.factors():
        for factor in factors:
            factor.register_forward_hook(lambda module, x, y: counted.append(x[0].numel() * module.out_features))
    layer(_random(1, layer.in_features))
    assert sum(counted) == least


def test_norms_of_the_layer():
    layer = _layer(Separation((3, 4), (2, 5)))
    assert float(layer.lipschitz_bound().detach()) == pytest.approx(float(torch.linalg.matrix_norm(_dense(layer), 2)))
    several = _layer(Separation((3, 4), (2, 5), 3))
    assert float(several.lipschitz_bound().detach()) >= float(torch.linalg.matrix_norm(_dense(several), 2))
    with torch.no_grad():
        for factors in layer.factors():
            for i, factor in enumerate(factors):
                factor.weight[0, : i + 1] = 0
    nonzeros = [int((factor.weight != 0).sum()) for factors in layer.factors() for factor in factors]
    assert int((_dense(layer) != 0).sum()) == math.prod(nonzeros)


def test_fresh_factors_give_the_variance_of_kaiming():
    for separation in (Separation((8, 16), (16, 8)), Separation((4, 8, 4), (8, 4, 4), 4)):
        layers = [SeparableLinear(separation, generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
        outputs = torch.stack([layer(_random(128, seed=1, dtype=torch.float32)) for layer in layers])
        power = float(_random(128, seed=1, dtype=torch.float32).square().mean())
        assert float(outputs.detach().square().mean()) == pytest.approx(2 * power, rel=0.1)
        assert not bool(layers[0].bias.any())


def test_making_a_layer_draws_nothing_from_the_global_stream():
    state = torch.get_rng_state()
    first, second = (SeparableLinear(Separation((3, 4), (2, 5))) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize(("m", "n"), [((2, 3), (4, 3)), ((5, 2), (2, 2)), ((2, 2), (6, 5))])
def test_two_factors_the_error_is_the_tail_of_singular_values(m, n):
    weight = _random(math.prod(m), math.prod(n))
    rearranged = weight.view(*m, *n).permute(0, 2, 1, 3).reshape(m[0] * n[0], m[1] * n[1])
    values = torch.linalg.svdvals(rearranged)
    for terms in range(1, len(values) + 1):
        separation = Separation(n, m, terms)
        factors, norms = nearest_kronecker(weight, separation)
        layer = _layer(separation, bias=False)
        layer.set_factors(factors)
        error = float((weight - _dense(layer)).square().sum())
        assert error == pytest.approx(float(values[terms:].square().sum()), abs=1e-10)
        torch.testing.assert_close(norms, values[:terms])
    assert terms == separation.sufficient_terms and error < 1e-20, "all terms reproduce the matrix"


def test_no_other_pair_of_factors_is_nearer():
    """Alternating least squares from many starts finds nothing better than the one term."""
    weight = _random(6, 12)
    _, norms = nearest_kronecker(weight, Separation((4, 3), (2, 3)))
    least = float(weight.square().sum() - norms.square().sum())
    blocks = weight.view(2, 3, 4, 3)
    for seed in range(20):
        b = _random(3, 3, seed=seed)
        for _ in range(200):
            a = torch.einsum("ikjl,kl->ij", blocks, b) / b.square().sum()
            b = torch.einsum("ikjl,ij->kl", blocks, a) / a.square().sum()
        assert float((weight - torch.kron(a, b)).square().sum()) >= least - 1e-9


@pytest.mark.parametrize(("m", "n"), [((2, 3, 2), (3, 2, 2)), ((4, 2, 3), (2, 3, 1)), ((2, 2, 2, 2), (2, 1, 2, 2))])
def test_more_factors_terms_are_orthogonal_and_their_norms_give_the_error(m, n):
    weight = _random(math.prod(m), math.prod(n))
    total, last = float(weight.square().sum()), math.inf
    most = Separation(n, m).sufficient_terms
    for terms in (1, 2, 3, 5, most):
        factors, norms = nearest_kronecker(weight, Separation(n, m, terms))
        layer = _layer(Separation(n, m, terms), bias=False)
        layer.set_factors(factors)
        error = float((weight - _dense(layer)).square().sum())
        assert error == pytest.approx(total - float(norms.square().sum()), abs=1e-9)
        assert error < last
        last = error
        assert torch.equal(norms, norms.sort(descending=True).values)
    assert error < 1e-18


def test_the_largest_of_all_orthogonal_terms_are_taken():
    """Stopping early leaves none out: the leading component may fall apart into small ones."""
    weight, separation = _random(12, 12), Separation((3, 2, 2), (3, 2, 2))
    _, everything = nearest_kronecker(weight, Separation((3, 2, 2), (3, 2, 2), separation.sufficient_terms))
    for terms in (1, 2, 4, 7):
        _, norms = nearest_kronecker(weight, Separation((3, 2, 2), (3, 2, 2), terms))
        torch.testing.assert_close(norms, everything[:terms])
    left = torch.linalg.qr(_random(36, 3)).Q
    spread = torch.eye(4, 9, dtype=torch.float64).T.flatten() / 2  # norm 1, of four equal parts
    single = torch.zeros(36, dtype=torch.float64)
    single[35] = 1
    left[:, 0], left[:, 1] = spread, single
    tensor = (left[:, :2] * torch.tensor([1.0, 0.9], dtype=torch.float64)) @ torch.eye(2, 3, dtype=torch.float64)
    found = separable_linear._orthogonal_terms(tensor.view(9, 4, 3), 1)
    assert float(found[0][0]) == pytest.approx(0.9), "not 0.5, the best of the leading component"


def test_kronecker_products_are_found_again():
    a, b, c = _random(3, 2), _random(2, 4, seed=1), _random(2, 2, seed=2)
    weight = torch.kron(torch.kron(a, b), c)
    for separation in (Separation((2, 4, 2), (3, 2, 2)), Separation((8, 2), (6, 2)), Separation((2, 8), (3, 4))):
        factors, _ = nearest_kronecker(weight, separation)
        layer = _layer(separation, bias=False)
        layer.set_factors(factors)
        torch.testing.assert_close(_dense(layer), weight)
        norms = [float(factor.norm()) for factor in factors[0]]
        assert max(norms) == pytest.approx(min(norms)), "no factor carries the scale alone"


@pytest.mark.parametrize("small_gram", [0, 256])
def test_large_matrices_are_split_nearly_as_well(small_gram, monkeypatch):
    """By Gram matrix or subspace iteration, on a flat spectrum (the hard case) and a falling one."""
    m, n = (12, 10), (11, 9)
    flat = _random(120, 99, dtype=torch.float32)
    falling = sum(0.7**i * torch.kron(_random(12, 11, seed=i), _random(10, 9, seed=50 + i)) for i in range(30)).float()
    for weight, closeness in ((flat, 0.97), (falling, 0.99999)):
        for terms in (1, 4):
            monkeypatch.undo()
            _, exact = nearest_kronecker(weight, Separation(n, m, terms))
            monkeypatch.setattr(separable_linear, "EXACT_SVD", 0)
            monkeypatch.setattr(separable_linear, "SMALL_GRAM", small_gram)
            for side in (weight, weight.T):
                separation = Separation(n, m, terms) if side is weight else Separation(m, n, terms)
                factors, norms = nearest_kronecker(side, separation)
                captured, best = float(norms.square().sum()), float(exact.square().sum())
                assert closeness * best <= captured <= best * (1 + 1e-5)
                layer = _layer(separation, bias=False)
                layer.set_factors(factors)
                error = float((side - _dense(layer)).square().sum())
                assert error == pytest.approx(float(weight.square().sum()) - captured, rel=1e-3)


def test_a_matrix_of_zeros_has_factors():
    factors, norms = nearest_kronecker(torch.zeros(6, 8), Separation((4, 2), (3, 2), 2))
    assert not bool(norms.any())
    assert all(bool(factor.isfinite().all()) for term in factors for factor in term)


def test_factorisations_are_complete():
    for number, length in ((12, 2), (30, 3), (7, 2), (1, 3), (16, 4)):
        expected = {own for own in itertools.product(range(1, number + 1), repeat=length) if math.prod(own) == number}
        found = ordered_factorisations(number, length)
        assert set(found) == expected and len(found) == len(expected)


def test_only_neighbouring_axes_are_merged():
    assert set(groupings((512, 7, 7))) == {(512, 7, 7), (3584, 7), (512, 49)}
    assert groupings((1, 8, 8)) == ((8, 8),)
    assert groupings((64, 1, 1)) == ()


def test_separations_are_those_that_save():
    """Against a search over all pairs of factorisations."""
    m, n = 12, 18
    expected = set()
    for n1, m1 in itertools.product(range(1, n + 1), range(1, m + 1)):
        if n % n1 == 0 and m % m1 == 0 and (n1, m1) != (1, 1) and (n // n1, m // m1) != (1, 1):
            for terms in (1, 2):
                one = Separation((n1, n // n1), (m1, m // m1), terms)
                rises = [a >= b for a, b in zip(one.out_modes, one.in_modes, strict=True)]
                falls = [a <= b for a, b in zip(one.out_modes, one.in_modes, strict=True)]
                if terms <= one.sufficient_terms and one.weights < m * n and one.multiply_adds <= m * n:
                    expected |= {one} if all(rises) or all(falls) else set()
    found = separations(m, n, shape=None, modes=2, terms=2)
    assert set(found) == expected and len(found) == len(expected)
    assert [own.weights for own in found] == sorted(own.weights for own in found)
    assert separations(7, 13, shape=None, modes=2, terms=1) == [], "only a matrix of rank 1 would be smaller"
    with_map = separations(4096, 25088, shape=(512, 7, 7), modes=2, terms=1)
    assert {own.in_modes for own in with_map} == {(512, 7, 7), (3584, 7), (512, 49)}
    # 127 features cannot come of modes of 28 at full rank: the largest rank there is comes.
    assert {own.rank for own in separations(127, 784, shape=(1, 28, 28), modes=2, terms=1)} == {28}


def test_the_layer_lives_like_any_other(tmp_path):
    layer = _layer(Separation((3, 4), (2, 5), 2), torch.float32)
    x = _random(3, 12, dtype=torch.float32)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    other = _layer(Separation((3, 4), (2, 5), 2), torch.float32, seed=9)
    assert not torch.equal(other(x), y)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    torch.testing.assert_close(layer.double()(x.double()).float(), y)
    assert len([*layer.parameters()]) == 5
    exported = torch.export.export(
        layer.float().eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    torch.export.save(exported, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    for count in (1, 3, 7):
        x = _random(count, 12, dtype=torch.float32)
        torch.testing.assert_close(again(x), layer(x))


def test_it_stands_in_for_a_linear_layer_whose_weight_is_taken():
    """torch's own encoder layer computes with the weights of its linear layers in eval mode."""
    encoder = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True).eval()
    separable = copy.deepcopy(encoder)
    separable.linear1 = _layer(Separation((3, 4), (4, 6)), torch.float32)
    with torch.no_grad():
        encoder.linear1.weight.copy_(_dense(separable.linear1))
        encoder.linear1.bias.copy_(separable.linear1.bias)
        x = _random(2, 5, 12, dtype=torch.float32)
        torch.testing.assert_close(separable(x), encoder(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 2)])
def test_the_pointwise_convolution_is_that_of_the_dense_product(stride):
    layer = SeparablePointwise(_layer(Separation((3, 4), (2, 5), 2)), stride)
    x = _random(2, 12, 5, 7)
    expected = nn.functional.conv2d(x, _dense(layer.linear)[:, :, None, None], layer.linear.bias, stride)
    torch.testing.assert_close(layer(x), expected)
