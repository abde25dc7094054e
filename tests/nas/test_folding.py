"""Networks with constant weights compute what they computed before, faster, and are left as found."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import resnet18

from nas import winograd
from nas.attacks.gradient import input_gradient
from nas.folding import constant_convolutions, joinable
from nas.model_state import crafting
from search_spaces.native import library


class _Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


class _Block(nn.Module):
    """A residual block in which one ReLU is used twice and a normalisation follows an addition."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.second = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.after = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.norm(self.second(self.activation(self.first(x))))
        return self.activation(self.after(x + y))


def _settled(model, shape=(3, 8, 8), dtype=torch.float64, seed=0):
    """``model`` with statistics, scales and shifts that are not the initial ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            model(2 * torch.rand(16, *shape) - 0.3)
    return model.to(dtype).eval()


def foldable(model):
    """Convolutions that take over a normalisation."""
    return {convolution: after.norm for convolution, after in joinable(model).items() if after.norm is not None}


def _blocks():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.ReLU(), _Block(6),
        nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5),
    )  # fmt: skip


def _resnet(channels=3):
    torch.manual_seed(0)
    model = resnet18(num_classes=5)
    model.conv1, model.maxpool = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def _input(n=4, dtype=torch.float64):
    torch.manual_seed(3)
    return torch.rand(n, 3, 8, 8, dtype=dtype), torch.arange(n) % 5


def _gradient(model, x, y):
    point = x.clone().requires_grad_(True)
    logits = model(point)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), point)
    return gradient, logits.detach()


def _same_function(model, x, y, **tolerance):
    expected, logits = _gradient(model, x, y)
    with crafting(model):
        gradient, _, crafted = input_gradient(model, x, y, "cross_entropy", None)
        with torch.no_grad():
            torch.testing.assert_close(model(x), logits, **tolerance)
    torch.testing.assert_close(crafted, logits, **tolerance)
    torch.testing.assert_close(gradient, expected, **tolerance)
    assert float(expected.abs().max()) > 1e-6


@pytest.mark.parametrize(("make", "folds"), [(_blocks, 4), (_resnet, 20)])
def test_gradients_and_logits_are_the_same_in_double_precision(make, folds):
    model = _settled(make())
    assert len(foldable(model)) == folds
    _same_function(model, *_input(), rtol=1e-9, atol=1e-12)


def test_a_residual_network_in_single_precision():
    """Sixteen blocks of rounding: against the same network in double precision, no worse than the direct form is."""
    exact = _settled(_resnet())
    model = copy.deepcopy(exact).float()
    x, y = _input(32)
    _, expected = _gradient(exact, x, y)
    _, direct = _gradient(model, x.float(), y)
    with crafting(model):
        _, _, crafted = input_gradient(model, x.float(), y, "cross_entropy", None)
    error = float((crafted - expected).norm() / expected.norm())
    assert error < 1e-5
    assert error < 20 * float((direct - expected).norm() / expected.norm())


def test_what_is_folded_really_passes_the_normalisation_by():
    model = _settled(_blocks())
    with crafting(model):
        x = torch.rand(2, 6, 6, 6, dtype=torch.float64)
        assert model[1](x) is x
        assert model[4].norm(x) is x
        assert model[4].after(x) is not x, "it takes a sum"
    assert "forward" not in vars(model[0])
    assert model[1](x) is not x


def test_a_rectified_map_in_single_precision():
    """The ReLU after a fast convolution is part of it: used again elsewhere, changed in place or absent."""

    class Rectifies(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3, padding=1)
            self.conv1, self.conv2, self.conv3 = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
            self.norm, self.relu, self.classifier = nn.BatchNorm2d(16), nn.ReLU(), nn.Linear(16, 5)
            self.change = change

        def forward(self, x):
            x = self.relu(self.conv1(self.conv(x)))
            y = self.relu(self.norm(self.conv2(x)))
            y = self.change(y)
            return self.classifier(self.relu(self.conv3(self.relu(y) - 0.1) - x).mean((2, 3)))

    x, y = _input(16)
    for change, in_place in ((lambda y: y, False), (lambda y: y - 0.05, False), (lambda y: y.sub_(0.05), True)):
        exact = _settled(Rectifies(change))
        model = copy.deepcopy(exact).float()
        assert [after.relu is model.relu for after in joinable(model).values()] == [True, True]
        with torch.no_grad(), crafting(model):
            assert float(model.conv1(torch.randn(16, 16, 8, 8)).min()) == 0
            torch.testing.assert_close(model(x.float()).double(), exact(x), rtol=1e-4, atol=1e-5)
        if in_place:
            continue  # no ReLU lets its result be changed before its gradient is taken
        expected, _ = _gradient(exact, x, y)
        with crafting(model):
            gradient, _, _ = input_gradient(model, x.float(), y, "cross_entropy", None)
        close = (gradient - expected).abs() < 1e-3 * expected.abs().max()
        assert float(close.double().mean()) > 0.99, "up to kinks"


def _shared_convolution():
    model = _blocks()
    model[4].second = model[4].first[0]
    return model


def _shared_norm():
    model = _blocks()
    model[4].norm = model[4].first[1] = nn.BatchNorm2d(6)
    return model


class _Reads(nn.Module):
    """Its forward pass is any function of the one block of layers it has."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), how
        self.classifier = nn.Linear(4, 5)

    def forward(self, x):
        return self.classifier(self.how(self, x).mean((2, 3)))


NOT_FOLDABLE = {
    "the output of the convolution is read twice": lambda self, x: self.norm(y := self.conv(x)) + y,
    "the layers are called twice": lambda self, x: self.norm(self.conv(x)) + self.norm(self.conv(2 * x)),
    "the weight is read elsewhere": lambda self, x: self.norm(self.conv(x)) * self.conv.weight.mean(),
    "something lies between": lambda self, x: self.norm(self.conv(x).tanh()),
    "the norm comes first": lambda self, x: self.conv(self.norm(torch.cat([x, x[:, :1]], 1))[:, :3]),
    "it depends on values": lambda self, x: self.norm(self.conv(x)) if x.sum() > 0 else self.conv(x),
    "it depends on shapes": lambda self, x: self.norm(self.conv(x)) if x.shape[2] > 4 else self.conv(x),
}


@pytest.mark.parametrize("how", NOT_FOLDABLE.values(), ids=NOT_FOLDABLE)
def test_a_normalisation_that_something_else_depends_on_is_not_folded(how):
    model = _settled(_Reads(how))
    assert foldable(model) == {}
    _same_function(model, *_input(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("make", "folds"), [(_shared_convolution, 2), (_shared_norm, 2)])
def test_shared_layers_are_left_alone(make, folds):
    model = _settled(make())
    assert len(foldable(model)) == folds
    _same_function(model, *_input(), rtol=1e-9, atol=1e-12)


def test_the_same_layer_in_a_place_the_trace_does_not_look_into():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.watched = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
            self.classifier = nn.Linear(3, 5)

        def forward(self, x):
            return self.classifier((self.watched(self.norm(self.conv(x))) + self.watched[0](x)).mean((2, 3)))

    model = _settled(Hidden())
    seen = []
    model.watched.register_forward_hook(lambda module, given, result: seen.append(result))
    assert list(foldable(model)) == [model.conv]
    assert seen == [], "hooks never see a trace"
    _same_function(model, *_input(), rtol=1e-9, atol=1e-12)
    assert all(type(result) is torch.Tensor for result in seen)


@pytest.mark.parametrize("index", [0, 1])
def test_hooks_see_their_own_layer(index):
    model = _settled(_blocks())
    seen = []
    model[index].register_forward_hook(lambda module, given, result: seen.append(result.detach()))
    x, y = _input()
    model(x)
    with crafting(model):
        input_gradient(model, x, y, "cross_entropy", None)
    assert model[0] not in foldable(model)
    torch.testing.assert_close(seen[1], seen[0])


def test_batch_statistics_are_not_folded_nor_undone_by_nesting():
    model = _settled(_blocks())
    x, _ = _input()
    with crafting(model, batch_statistics=True):
        assert foldable(model) == {}
        expected = model(x)
    with crafting(model):
        assert model[1](x[:, :1].expand(-1, 6, -1, -1)).shape[1] == 6
        running = model(x)
        with crafting(model, batch_statistics=True):
            torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x), running)
    assert not torch.allclose(running, expected)


def test_a_parametrised_weight_is_folded_with_its_value():
    model = _blocks()
    parametrize.register_parametrization(model[0], "weight", _Double())
    model = _settled(model)
    assert model[0] in foldable(model)
    _same_function(model, *_input(), rtol=1e-9, atol=1e-12)


def test_tracing_leaves_no_mark():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls, self.last = _blocks(), 0, []
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.passes.add_(1)
            self.last.append(x)
            return self.inner(x) + 0 * torch.rand(5)

    model = _settled(Counts())
    model.calls, model.last = 0, []
    model.passes.zero_()
    stream = torch.get_rng_state()
    assert len(foldable(model)) == 4
    assert (model.calls, model.last, float(model.passes)) == (0, [], 0)
    assert torch.equal(torch.get_rng_state(), stream)


def test_everything_is_restored_after_an_error():
    model = _settled(_resnet(), dtype=torch.float32)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError), constant_convolutions(model):
        raise FloatingPointError
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_that_change_between_two_attacks_are_seen():
    model = _settled(_resnet(), dtype=torch.float32)
    x, _ = _input(32, torch.float32)
    with torch.no_grad():
        for _ in range(2):
            expected = model(x)
            with crafting(model):
                torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
            for parameter in model.parameters():
                parameter.mul_(0.9)


SHAPES = [(8, 16, 32, 9, 13), (2, 48, 80, 32, 32), (40, 112, 16, 7, 7), (33, 96, 64, 4, 4)]


@pytest.mark.skipif(winograd.kernels() is None, reason="no compiler")
@pytest.mark.parametrize(("n", "inputs", "outputs", "height", "width"), SHAPES)
@pytest.mark.parametrize(("with_bias", "rectifies"), [(True, False), (False, False), (True, True)])
def test_the_fast_convolution_against_the_direct_one(n, inputs, outputs, height, width, with_bias, rectifies):
    torch.manual_seed(1)
    x, gradient = torch.randn(n, inputs, height, width), torch.randn(n, outputs, height, width)
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=with_bias)
    assert winograd.suits(layer, layer.weight) and winograd.pays(x)
    fast = winograd.Convolution(layer.weight, layer.bias, rectifies=rectifies)
    point, exact = x.clone().requires_grad_(True), x.double().requires_grad_(True)
    y = fast(point)
    (found,) = torch.autograd.grad(y, point, gradient)
    expected = F.conv2d(exact, layer.weight.double(), layer.bias.double() if with_bias else None, padding=1)
    if rectifies:
        expected = expected * (y > 0)  # the sign of what is nearly zero is a matter of rounding
        assert float(y.detach().min()) == 0
    (slope,) = torch.autograd.grad(expected, exact, gradient.double())
    for ours, theirs in ((y, expected), (found, slope)):
        assert float((ours.detach() - theirs.detach()).norm() / theirs.norm().detach()) < 2e-6
    alone = x[: -(-32 * 16 // (height * width))]
    assert torch.equal(fast(alone), y[: len(alone)]), "a sample does not depend on its batch"
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.equal(fast(x), y), "nor on the number of threads"
    torch.set_num_threads(threads)


def test_other_convolutions_do_not_take_the_fast_form():
    for layer in (
        nn.Conv2d(32, 32, 3),
        nn.Conv2d(32, 32, 3, padding=1, stride=2),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(32, 32, 1),
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1).double(),
    ):
        assert not winograd.suits(layer, layer.weight)
    assert not winograd.pays(torch.rand(1, 32, 8, 8))
    assert not winograd.pays(torch.rand(64, 32, 2, 2))
    assert not winograd.pays(torch.rand(64, 32, 8, 8, dtype=torch.float64))
    with torch.autocast("cpu"):
        assert not winograd.pays(torch.rand(64, 32, 8, 8))


def test_without_a_compiler_everything_runs_on_torch(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    winograd.kernels.cache_clear()
    library._built.cache_clear()
    model = _settled(_resnet(), dtype=torch.float32)
    x, y = _input(32, torch.float32)
    _, expected = _gradient(model, x, y)
    try:
        with crafting(model):
            _, _, logits = input_gradient(model, x, y, "cross_entropy", None)
        assert "no-such-compiler" in library.why_not()
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    finally:
        winograd.kernels.cache_clear()
        library._built.cache_clear()
