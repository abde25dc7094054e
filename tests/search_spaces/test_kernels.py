"""Both forms of every kernel compute the same function, values and gradients, in float64."""

import pytest
import torch
import torch.nn.functional as F

from search_spaces import kernels


def _maps(height, width, channels=3, batch=4):
    generator = torch.Generator().manual_seed(height * 100 + width)
    return torch.randn(batch, channels, height, width, dtype=torch.float64, generator=generator)


def _agree(ours, reference, *inputs):
    assert ours.shape == reference.shape
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    direction = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((ours * direction).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((reference * direction).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (4, 4), (2, 2), (1, 1), (5, 8)])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_matrix_is_the_convolution(size, kernel, dilation, stride):
    x = _maps(*size).requires_grad_()
    assert kernels.matrix_form(x)
    weight = torch.randn(3, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    padding = kernels.padding_of(kernel, dilation)
    reference = F.conv2d(x, weight, None, stride, padding, dilation, groups=3)
    _agree(kernels.depthwise(x, weight, stride=stride, dilation=dilation), reference, x, weight)


@pytest.mark.parametrize("size", [(8, 8), (3, 5), (1, 1)])
def test_pointwise_pools_norm_and_concatenation(size):
    x = _maps(*size).requires_grad_()
    weight = torch.randn(5, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    _agree(kernels.pointwise(x, weight), F.conv2d(x, weight), x, weight)
    for stride in (1, 2):
        _agree(kernels.max_pool(x, stride), F.max_pool2d(x, 3, stride, 1), x)
        _agree(kernels.avg_pool(x, stride), F.avg_pool2d(x, 3, stride, 1, count_include_pad=False), x)
    _agree(kernels.concatenate([x, 2 * x]), torch.cat([x, 2 * x], 1), x)
    for training in (True, False):
        ours = [torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
        theirs = [tensor.clone() for tensor in ours]
        scale = torch.randn(3, dtype=torch.float64)
        mine = kernels.batch_norm(x, *ours, scale, None, training=training, momentum=0.1, epsilon=1e-5)
        reference = F.batch_norm(x, *theirs, scale, None, training, 0.1, 1e-5)
        _agree(mine, reference, x)
        torch.testing.assert_close(ours, theirs)


def test_large_maps_use_convolutions():
    assert not kernels.matrix_form(_maps(9, 9))


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 1)])
def test_offset_halves_have_one_size(size):
    even, odd = kernels.offset_halves(_maps(*size))
    assert even.shape == odd.shape == (4, 3, -(-size[0] // 2), -(-size[1] // 2))
    assert torch.equal(even, _maps(*size)[:, :, ::2, ::2])
