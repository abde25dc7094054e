"""Squeezers against brute force and scipy, and their gradients against what they should be."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from nas.detection.squeezers import BitDepth, MedianFilter, NonLocalMeans
from nas.errors import InputError

SQUEEZERS = [BitDepth(1), BitDepth(5), MedianFilter(2, 2), MedianFilter(3, 3), NonLocalMeans(5, 3, 40.0)]


def _images(shape=(3, 2, 9, 7), seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("squeezer", SQUEEZERS, ids=str)
def test_every_image_is_squeezed_by_itself_within_the_pixel_range(squeezer):
    x = _images()
    squeezed = squeezer(x)
    assert squeezed.shape == x.shape
    assert squeezed.dtype == x.dtype
    assert float(squeezed.min()) >= 0
    assert float(squeezed.max()) <= 1
    assert not torch.equal(squeezed, x)
    torch.testing.assert_close(squeezed[1:2], squeezer(x[1:2]), rtol=0, atol=1e-12)
    flat = torch.full_like(x, 1.0)
    torch.testing.assert_close(squeezer(flat), flat, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_bit_depth_is_the_nearest_level(bits):
    x = _images()
    levels = torch.linspace(0, 1, 2**bits, dtype=x.dtype)
    nearest = levels[(x.unsqueeze(-1) - levels).abs().argmin(-1)]
    torch.testing.assert_close(BitDepth(bits)(x), nearest, rtol=0, atol=1e-12)
    assert torch.equal(BitDepth(bits)(BitDepth(bits)(x)), BitDepth(bits)(x))


def test_halves_are_rounded_to_the_even_level():
    x = torch.tensor([0.5, 0.5 / 3, 1.5 / 3, 2.5 / 3], dtype=torch.float64).view(1, 1, 1, 4)
    assert BitDepth(1)(x)[..., 0].item() == 0.0
    assert (BitDepth(2)(x) * 3).round().flatten().tolist() == [2.0, 0.0, 2.0, 2.0]


def test_rounding_passes_gradients_straight_through_without_changing_the_values():
    x = _images(dtype=torch.float32).requires_grad_()
    squeezed = BitDepth(3)(x)
    with torch.no_grad():
        assert torch.equal(squeezed, (x * 7).round() / 7)
    (gradient,) = torch.autograd.grad((squeezed * 3).sum(), x)
    assert torch.equal(gradient, torch.full_like(x, 3.0))


@pytest.mark.parametrize("height,width", [(1, 1), (2, 2), (3, 3), (2, 3), (4, 1), (5, 5), (4, 6)])
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 5, 9), (1, 1, 2, 3)])
def test_the_median_is_that_of_scipy(height, width, shape):
    x = _images(shape)
    found = MedianFilter(height, width)(x)
    expected = [
        [ndimage.median_filter(channel, (height, width), mode="reflect") for channel in image] for image in x.numpy()
    ]
    assert np.array_equal(found.numpy(), np.array(expected))


def test_the_gradient_of_the_median_goes_to_the_median_pixel():
    x = _images((1, 1, 6, 6)).requires_grad_()
    assert torch.autograd.gradcheck(MedianFilter(2, 2), x)
    assert torch.autograd.gradcheck(MedianFilter(3, 3), x)


def _brute_force(image, search, block, strength):
    """Non-local means of one image [C, H, W], pixel by pixel; the borders mirrored by numpy."""
    reach, around = search // 2, block // 2
    padded = np.pad(image, ((0, 0), (reach + around,) * 2, (reach + around,) * 2), mode="symmetric")
    result = np.zeros_like(image)

    def patch(i, j):
        i, j = i + reach + around, j + reach + around
        return padded[:, i - around : i + around + 1, j - around : j + around + 1]

    for i in range(image.shape[1]):
        for j in range(image.shape[2]):
            total, mean = 0.0, 0.0
            for k in range(i - reach, i + reach + 1):
                for m in range(j - reach, j + reach + 1):
                    distance = ((patch(i, j) - patch(k, m)) ** 2).mean()
                    weight = np.exp(-distance / (strength / 255) ** 2)
                    total += weight
                    mean = mean + weight * padded[:, k + reach + around, m + reach + around]
            result[:, i, j] = mean / total
    return result


@pytest.mark.parametrize("search,block,strength", [(5, 3, 60.0), (3, 1, 20.0), (7, 5, 100.0), (1, 3, 2.0)])
def test_non_local_means_is_the_weighted_mean_pixel_by_pixel(search, block, strength):
    x = _images((2, 3, 7, 5))
    found = NonLocalMeans(search, block, strength)(x)
    expected = np.array([_brute_force(image, search, block, strength) for image in x.numpy()])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    if search == 1:
        torch.testing.assert_close(found, x, rtol=0, atol=1e-15)
    else:
        assert float((found - x).abs().max()) > 0.01


def test_non_local_means_has_the_true_gradient():
    x = _images((1, 2, 5, 4)).requires_grad_()
    assert torch.autograd.gradcheck(NonLocalMeans(3, 3, 60.0), x)


def test_non_local_means_removes_noise_that_a_pattern_repeats_through():
    """Stripes one pixel wide: a median or mean filter would wipe them out with the noise."""
    clean = (torch.arange(16) % 2).double().expand(1, 1, 16, 16) * 0.8 + 0.1
    noisy = clean + 0.02 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoised = NonLocalMeans(13, 3, 20.0)(noisy)
    assert float((denoised - clean).abs().mean()) < 0.4 * float((noisy - clean).abs().mean())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: BitDepth(0),
        lambda: BitDepth(17),
        lambda: MedianFilter(0, 2),
        lambda: NonLocalMeans(4, 3),
        lambda: NonLocalMeans(5, 2),
        lambda: NonLocalMeans(5, 3, 0.0),
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError):
        wrong()
