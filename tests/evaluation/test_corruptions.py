"""Corruptions against Pillow, SciPy, colorsys, closed forms and brute force, and the accuracy measured on them."""

import colorsys
import itertools
import json
import math
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import nn

from nas.errors import InputError
from nas.evaluation import corruptions
from nas.evaluation.corruptions import ABSENT, CORRUPTIONS, SEVERITIES, corrupt, corruption_accuracy
from nas.evaluation.interval import wilson

PAPER = {  # all fifteen but frost
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "fog", "brightness", "contrast", "elastic", "pixelate", "jpeg",
}  # fmt: skip
RANDOM = {
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "fog",
    "elastic",
}  # fmt: skip
KEEP_FLAT = {
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur", "contrast", "elastic", "pixelate",
}  # fmt: skip
SHAPES = [(3, 32, 32), (1, 28, 28), (2, 20, 33), (5, 8, 8), (3, 48, 70), (1, 1, 3)]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _images(n, shape, seed=0, dtype=torch.float32):
    """Coloured smooth noise with some edges in it, in [0, 1]: more like a photograph than white noise is."""
    channels, height, width = shape
    draws = np.random.default_rng(seed)
    coarse = draws.normal(size=(n, channels, height, width))
    smooth = sum(ndimage.gaussian_filter(coarse, (0, 0, s, s)) * s for s in (1, 2, 4))
    block = ndimage.gaussian_filter(draws.normal(size=(n, 1, height, width)), (0, 0, 3, 3)) > 0
    image = smooth / smooth.std() * 0.15 + 0.35 + 0.3 * block
    return torch.from_numpy(image).clamp(0, 1).to(dtype)


def _defined(shape):
    return [name for name, corruption in CORRUPTIONS.items() if corruption.channels in (None, shape[0])]


CASES = [(name, shape) for shape in SHAPES for name in _defined(shape)]


def test_all_of_the_paper_are_there_but_frost():
    assert {name for name, corruption in CORRUPTIONS.items() if not corruption.extra} == PAPER
    assert ABSENT == ("frost",)
    assert all(len(corruption.levels) == 5 for corruption in CORRUPTIONS.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_contract(name, shape, dtype):
    """Same shape and type, in [0, 1], the same from the same generator, nothing else touched."""
    x = _images(3, shape, dtype=dtype)
    x[0], x[1, :, :, 0] = 0, 1
    before, state = x.clone(), torch.random.get_rng_state()
    for severity in SEVERITIES:
        result = corrupt(name, x, severity, _generator(severity))
        assert result.shape == x.shape and result.dtype == dtype
        assert float(result.min()) >= 0 and float(result.max()) <= 1  # NaN is neither
        assert torch.equal(result, corrupt(name, x, severity, _generator(severity)))
    assert torch.equal(x, before)
    assert torch.equal(state, torch.random.get_rng_state())
    assert corrupt(name, x[:0], 3, _generator()).shape == x[:0].shape


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_is_random_differs_by_seed_and_from_image_to_image(name):
    x = _images(1, (3, 32, 32)).expand(4, -1, -1, -1)
    first, second = corrupt(name, x, 5, _generator(0)), corrupt(name, x, 5, _generator(1))
    assert torch.equal(first, second) == (name not in RANDOM)
    differ = [not torch.equal(first[0], image) for image in first[1:]]
    assert all(differ) if name in RANDOM else not any(differ)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"elastic", "glass_blur", "motion_blur", "saturate"}))
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 64, 80)])
def test_severity_is_distance(name, shape):
    x = _images(48, shape)
    distances = [float((corrupt(name, x, severity, _generator()) - x).abs().mean()) for severity in SEVERITIES]
    assert distances[0] > 0
    assert all(later > 1.01 * earlier for earlier, later in itertools.pairwise(distances)), distances


def test_severity_where_the_published_parameters_trade_one_effect_for_another():
    x = _images(48, (3, 32, 32))

    def distance(apply, *parameters):
        return float((apply(x, *parameters, _generator()) - x).abs().mean())

    def rising(*values):
        return list(values) == sorted(set(values))

    glass = [distance(corruptions.glass_blur, *level) for level in CORRUPTIONS["glass_blur"].levels]
    assert max(glass[:3]) < min(glass[3:]), "two rounds move more than one"
    motion = [distance(corruptions.motion_blur, *level) for level in CORRUPTIONS["motion_blur"].levels]
    assert rising(*motion[:3], motion[4])
    assert motion[3] == pytest.approx(motion[2], rel=1e-3), "the radius cuts off what is nothing at 3 sigma"
    levels = CORRUPTIONS["elastic"].levels
    assert rising(*(distance(corruptions.elastic, strength, smooth, 0) for strength, smooth, _ in levels)), "bending"
    assert rising(*(distance(corruptions.elastic, 0, 0, jitter) for _, _, jitter in reversed(levels))), "movement"
    saturate = [distance(corruptions.saturate, *level) for level in CORRUPTIONS["saturate"].levels]
    assert rising(*saturate[:2]) and rising(*saturate[2:])


@pytest.mark.parametrize("name", sorted(KEEP_FLAT))
@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 9, 40), (1, 70, 64)])
def test_a_flat_image_stays(name, shape):
    """Weights add up to one, up to and beyond the edges."""
    x = torch.rand(4, shape[0], 1, 1, generator=_generator(), dtype=torch.float64).expand(4, *shape)
    for severity in SEVERITIES:
        torch.testing.assert_close(corrupt(name, x, severity, _generator()), x.contiguous(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gaussian_noise", (0.0,)),
        ("impulse_noise", (0.0,)),
        ("speckle_noise", (0.0,)),
        ("gaussian_blur", (0.0,)),
        ("defocus_blur", (0.0, 0.0)),
        ("motion_blur", (6, 1e-3)),
        ("zoom_blur", (1,)),
        ("snow", (0.1, 0.2, 1, math.inf, 8, 3, 1.0)),
        ("fog", (0.0, 2)),
        ("brightness", (0.0,)),
        ("contrast", (1.0,)),
        ("elastic", (0.0, 0.1, 0.0)),
        ("pixelate", (1.0,)),
        ("saturate", (1.0, 0.0)),
    ],
)
def test_a_corruption_of_no_strength_is_none(name, parameters):
    x = _images(3, (3, 32, 40), dtype=torch.float64)
    x[0, :, 0] = 0
    torch.testing.assert_close(CORRUPTIONS[name].apply(x, *parameters, _generator()), x, atol=1e-12, rtol=0)


def test_shot_noise_of_many_photons_is_none():
    x = _images(3, (3, 32, 32), dtype=torch.float64)
    torch.testing.assert_close(corruptions.shot_noise(x, 1e12, _generator()), x, atol=1e-4, rtol=0)


def test_moments_of_the_noises():
    level = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64).view(1, 3, 1, 1)
    x = level.expand(40, 3, 64, 64)
    count = 40 * 64 * 64

    def moments(result):
        return result.mean((0, 2, 3)), result.std((0, 2, 3))

    expected = {
        "gaussian_noise": ((0.03,), torch.full((3,), 0.03, dtype=torch.float64)),
        "shot_noise": ((200,), (level.flatten() / 200).sqrt()),
        "speckle_noise": ((0.2,), 0.2 * level.flatten()),
    }
    for name, (parameters, deviation) in expected.items():
        mean, spread = moments(CORRUPTIONS[name].apply(x, *parameters, _generator()))
        assert ((mean - level.flatten()).abs() < 5 * deviation / math.sqrt(count)).all(), name
        torch.testing.assert_close(spread, deviation, rtol=0.02, atol=0)
    result = corruptions.impulse_noise(x, 0.06, _generator())
    for value in (0, 1):
        share = (result == value).double().mean()
        assert float(share) == pytest.approx(0.03, abs=5 * math.sqrt(0.03 / (3 * count)))
    assert ((result == x) | (result == 0) | (result == 1)).all()
    one, other = (result[:, 0] != x[:, 0]), (result[:, 1] != x[:, 1])
    both = float((one & other).double().mean())
    assert both == pytest.approx(0.06**2, rel=0.2), "channels fail independently"


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.3])
def test_gaussian_blur_is_that_of_scipy(sigma):
    x = _images(2, (3, 17, 32), dtype=torch.float64)
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4)
    torch.testing.assert_close(corruptions.gaussian_blur(x, sigma, _generator()), torch.from_numpy(expected))


@pytest.mark.parametrize(("radius", "alias"), CORRUPTIONS["defocus_blur"].levels)
def test_defocus_blur_is_a_smoothed_disc(radius, alias):
    x = _images(2, (2, 32, 33), dtype=torch.float64)
    place = np.arange(-4, 5)
    disc = (place[:, None] ** 2 + place**2 <= radius**2).astype(float)
    weights = np.exp(-0.5 * (np.array([-1, 0, 1]) / alias) ** 2)
    kernel = ndimage.convolve(disc, np.outer(weights, weights), mode="constant")
    expected = ndimage.convolve(x.numpy(), (kernel / kernel.sum())[None, None], mode="mirror")
    torch.testing.assert_close(corruptions.defocus_blur(x, radius, alias, _generator()), torch.from_numpy(expected))


@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur"])
@pytest.mark.parametrize("severity", [3, 5])
def test_blurs_widen_with_the_image(name, severity):
    """A point's image at side 96 is three times as wide as at side 32."""

    def width(side):
        x = torch.zeros(1, 1, side, side, dtype=torch.float64)
        x[0, 0, side // 2, side // 2] = 1
        spot = corrupt(name, x, severity, _generator())[0, 0].sum(0)
        return float((spot * (torch.arange(side) - side // 2) ** 2).sum().sqrt())

    # The triangle of the bilinear enlargement, one small pixel wide, is part of what is seen.
    assert width(96) == pytest.approx(3 * width(32), rel=0.35)
    assert width(96) > 2.5 * width(32)


def test_glass_blur_is_the_pixel_by_pixel_pass_of_the_release():
    """From the last pixel back, each takes the colour of one at most a row and a column before it."""
    n, h, w = 2, 12, 9
    x = _images(n, (3, h, w), dtype=torch.float64)
    moves = torch.randint(-1, 1, (2, n, h, w), generator=_generator(5))
    expected = x.clone()
    for image in range(n):
        for row in range(h - 1, 1, -1):
            for column in range(w - 1, 1, -1):
                down, along = moves[:, image, row, column].tolist()
                expected[image, :, row, column] = expected[image, :, row + down, column + along]
    assert torch.equal(corruptions.glass_blur(x, 0.0, 1, 1, _generator(5)), expected)
    assert not torch.equal(expected, x)


@pytest.mark.parametrize("degrees", [0.0, 30.0, -45.0, -90.0])
def test_motion_draws_half_a_gaussian_along_the_angle(degrees):
    radius, sigma, side = 6, 2.0, 41
    x = torch.zeros(1, 2, side, side, dtype=torch.float64)
    x[:, :, 20, 20] = 1
    streak = corruptions._streaked(x, radius, sigma, torch.tensor([math.radians(degrees)], dtype=torch.float64))
    weights = torch.exp(-0.5 * (torch.arange(13, dtype=torch.float64) / sigma) ** 2)
    expected = torch.zeros_like(x)
    for distance, weight in enumerate(weights / weights.sum()):
        row = 20 - round(distance * math.sin(math.radians(degrees)))
        column = 20 - round(distance * math.cos(math.radians(degrees)))
        expected[:, :, row, column] += weight
    torch.testing.assert_close(streak, expected, atol=1e-5, rtol=0)


def test_motion_stays_within_45_degrees_of_the_horizontal():
    x = torch.zeros(200, 1, 63, 63, dtype=torch.float64)
    x[:, :, 31, 31] = 1
    streaks = corruptions.motion_blur(x, 9, 2.5, _generator()).squeeze(1)
    place = torch.arange(63) - 31.0
    rows, columns = (streaks * place[:, None]).sum((1, 2)), (streaks * place).sum((1, 2))
    angles = torch.atan2(-rows, -columns).rad2deg()
    assert (angles.abs() < 50).all()
    assert float(angles.min()) < -40 and float(angles.max()) > 40


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 24, 40)])
def test_zoom_blur_is_that_of_scipy(shape):
    x = _images(2, shape, dtype=torch.float64)
    _, h, w = shape
    total, count = x.numpy().copy(), 16
    for step in range(count):
        factor = 1 + step / 100 + 1e-12  # so that halves are rounded up
        high, wide = math.ceil(h / (1 + step / 100)), math.ceil(w / (1 + step / 100))
        top, left = (h - high) // 2, (w - wide) // 2
        crop = x.numpy()[:, :, top : top + high, left : left + wide]
        enlarged = ndimage.zoom(crop, (1, 1, factor, factor), order=1)
        top, left = (enlarged.shape[2] - h) // 2, (enlarged.shape[3] - w) // 2
        total += enlarged[:, :, top : top + h, left : left + w]
    torch.testing.assert_close(corruptions.zoom_blur(x, count, _generator()), torch.from_numpy(total / (count + 1)))


def test_snow_whitens_the_picture_and_adds_what_is_the_same_upside_down():
    x = _images(3, (3, 32, 32), dtype=torch.float64) * 0.3
    result = corruptions.snow(x, 0.1, 0.2, 1, 0.5, 10, 4, 0.9, _generator())
    grey = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    flakes = result - (0.9 * x + 0.1 * torch.maximum(x, 1.5 * grey + 0.5))
    torch.testing.assert_close(flakes, flakes.flip(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(flakes, flakes[:, :1].expand_as(flakes), atol=1e-6, rtol=0)
    assert float(flakes.min()) > -1e-6 and float(flakes.max()) > 0.05
    vertical = (flakes[:, :, 1:] - flakes[:, :, :-1]).abs().mean()
    assert float(vertical) < float((flakes[..., 1:] - flakes[..., :-1]).abs().mean()), "flakes are long in their fall"


def test_fog_is_a_plasma_fractal_of_the_images_range():
    """On black with one white pixel the density can be read off; on an image of value v nothing is brighter than v."""
    x = torch.zeros(2, 1, 32, 32, dtype=torch.float64)
    x[:, :, 3, 4] = 1
    result = corruptions.fog(x, 1.5, 2, _generator(3))
    density = (result * 2.5 - x) / 1.5
    expected = corruptions._plasma(2, 5, 2, x, _generator(3))
    torch.testing.assert_close(density, expected)
    assert (expected.amin((2, 3)) == 0).all() and (expected.amax((2, 3)) == 1).all()
    flat = corruptions.fog(torch.full((2, 3, 20, 50), 0.6), 0.75, 2.5, _generator())
    assert float(flat.max()) <= 0.6 + 1e-6
    assert torch.equal(flat[:, :1].expand_as(flat), flat)


def test_plasma_is_built_midpoint_by_midpoint():
    """Without noise a level is the mean of its neighbours; the noise of a level has the range decay^(-2 level)."""
    draws = _generator(7)
    noise = [2 * torch.rand((3, 1, 1, side, side), generator=draws, dtype=torch.float64) - 1 for side in (1, 2)]
    heights = torch.zeros(4, 4, dtype=torch.float64)
    for level, step in enumerate((4, 2)):
        half, amplitude = step // 2, 3.0 ** (-2 * level)
        for row in range(0, 4, step):
            for column in range(0, 4, step):
                corners = [heights[(row + a) % 4, (column + b) % 4] for a in (0, step) for b in (0, step)]
                drawn = noise[level][0, 0, 0, row // step, column // step]
                heights[row + half, column + half] = sum(corners) / 4 + amplitude * drawn
        for row in range(0, 4, step):
            for column in range(0, 4, step):
                for which, (r, c) in ((1, (row, column + half)), (2, (row + half, column))):
                    around = [(r + half, c), (r - half, c), (r, c + half), (r, c - half)]
                    mean = sum(heights[a % 4, b % 4] for a, b in around) / 4
                    heights[r, c] = mean + amplitude * noise[level][which, 0, 0, row // step, column // step]
    expected = (heights - heights.min()) / (heights.max() - heights.min())
    like = torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(corruptions._plasma(1, 2, 3.0, like, _generator(7))[0, 0], expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_and_saturate_are_those_of_hsv(severity):
    x = _images(2, (3, 6, 7), dtype=torch.float64)
    x[0, :, 0], x[0, :, 1], x[0, :, 2] = 0, 1, 0.5  # black, white and grey
    amount, (factor, offset) = (
        *CORRUPTIONS["brightness"].levels[severity - 1],
        CORRUPTIONS["saturate"].levels[severity - 1],
    )
    brighter, coloured = torch.empty_like(x), torch.empty_like(x)
    for image in range(2):
        for row in range(6):
            for column in range(7):
                h, s, v = colorsys.rgb_to_hsv(*x[image, :, row, column].tolist())
                brighter[image, :, row, column] = x.new_tensor(colorsys.hsv_to_rgb(h, s, min(v + amount, 1)))
                coloured[image, :, row, column] = x.new_tensor(
                    colorsys.hsv_to_rgb(h, min(max(s * factor + offset, 0), 1), v)
                )
    torch.testing.assert_close(corrupt("brightness", x, severity, _generator()), brighter)
    torch.testing.assert_close(corrupt("saturate", x, severity, _generator()), coloured)


def test_contrast_scales_the_deviation_and_keeps_the_mean():
    x = _images(3, (2, 16, 20), dtype=torch.float64)
    result = corruptions.contrast(x, 0.4, _generator())
    torch.testing.assert_close(result.mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(result.std((2, 3)), 0.4 * x.std((2, 3)))


def test_elastic_without_bending_is_affine_and_moves_no_further_than_the_jitter():
    """On images that hold their own coordinates, the result tells where each pixel came from."""
    side, n = 48, 20
    row = torch.arange(side, dtype=torch.float64)[:, None].expand(side, side) / (side - 1)
    x = torch.stack([row, row.T]).expand(n, 2, side, side)
    jitter = 0.05
    result = corruptions.elastic(x, 0, 0, jitter, _generator())
    inner = result[:, :, 16:-16, 16:-16] * (side - 1)
    for axis in (2, 3):
        torch.testing.assert_close(inner.diff(n=2, dim=axis), torch.zeros_like(inner.diff(n=2, dim=axis)))
    movement = (result[:, :, 8:-7:16, 8:-7:16] - x[:, :, 8:-7:16, 8:-7:16]) * (side - 1)
    corners = movement[:, :, [-1, 0, 0], [-1, -1, 0]]  # the inverse map moves them by about the jitter
    assert float(corners.abs().max()) < 1.6 * jitter * side
    assert float(corners.abs().max()) > 0.7 * jitter * side


def test_elastic_bends_by_smooth_displacements_of_the_given_strength():
    side, n = 64, 30
    row = torch.arange(side, dtype=torch.float64)[:, None].expand(side, side) / (side - 1)
    x = torch.stack([row, row.T]).expand(n, 2, side, side)
    strength, smoothness = 0.1, 0.04
    result = corruptions.elastic(x, strength, smoothness, 0, _generator())
    movement = ((result - x) * (side - 1))[:, :, 12:-12, 12:-12]
    sigma = smoothness * side
    # Uniform noise of deviation 1 / sqrt(3) under a Gaussian in two dimensions.
    expected = strength * side / math.sqrt(3) / (2 * math.sqrt(math.pi) * sigma)
    assert float(movement.std()) == pytest.approx(expected, rel=0.1)
    neighbours = (movement[..., 1:] * movement[..., :-1]).mean() / movement.pow(2).mean()
    assert float(neighbours) == pytest.approx(math.exp(-1 / (4 * sigma**2)), abs=0.02)


@pytest.mark.parametrize("share", [level for (level,) in CORRUPTIONS["pixelate"].levels] + [0.5])
@pytest.mark.parametrize("size", [(32, 32), (28, 28), (64, 96), (17, 45)])
def test_pixelate_is_that_of_pillow(share, size):
    """But where the centre of a pixel lies on the border of two boxes, where Pillow's floating point decides."""
    h, w = size
    x = _images(1, (1, h, w), dtype=torch.float32)
    small = Image.fromarray(x[0, 0].numpy()).resize((int(w * share), int(h * share)), Image.Resampling.BOX)
    expected = torch.from_numpy(np.array(small.resize((w, h), Image.Resampling.BOX)))
    found = corruptions.pixelate(x, share, _generator())[0, 0]
    clear = []
    for side in (h, w):
        boxes = int(side * share)
        on_border = {n // (2 * side) for i in range(side) if (n := (2 * i + 1) * boxes) % (2 * side) == 0}
        into = torch.tensor([((2 * i + 1) * boxes) // (2 * side) for i in range(side)])
        beside = torch.tensor(sorted(on_border | {box - 1 for box in on_border}), dtype=torch.long)
        clear.append(~torch.isin(into, beside))
    clear = clear[0][:, None] & clear[1]
    assert clear.double().mean() > 0.5
    torch.testing.assert_close(found[clear], expected[clear], atol=1e-5, rtol=0)


def test_jpeg_is_that_of_pillow_image_by_image():
    x = _images(3, (3, 20, 33))
    result = corrupt("jpeg", x, 4, _generator())
    for image, found in zip(x, result, strict=True):
        file = BytesIO()
        Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy(), "RGB").save(file, "JPEG", quality=50)
        expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
        torch.testing.assert_close(found, expected)
    single = corrupt("jpeg", x[:, :1], 4, _generator())
    pair = corrupt("jpeg", x[:, [1, 0]], 4, _generator())
    assert torch.equal(pair[:, 1:], single), "any other number of channels: each by itself"


# ------------------------------------------------------------------------------------------------------------- accuracy


class _Bright(nn.Module):
    """Class 1 where the mean is above one half; dropout and normalisation would show train mode."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.sizes = []

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.sizes.append(len(x))
        mean = self.dropout(x).mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def _labelled(n=40, shape=(3, 16, 16)):
    x = _images(n, shape)
    return x, (x.mean((1, 2, 3)) > 0.5).long()


def test_accuracy_is_counted_by_corruption_and_severity():
    x, y = _labelled()
    model = _Bright().train()
    ticks = []
    names = ["brightness", "contrast", "gaussian_noise"]
    result = corruption_accuracy(model, x, y, seed=3, names=names, severities=[1, 5], tick=ticks.append)
    assert model.training and model.dropout.training
    assert json.loads(json.dumps(result)) == result
    assert (result["n"], result["seed"], result["severities"], result["absent"]) == (40, 3, [1, 5], ["frost"])
    assert result["natural"] == 1
    for severity, amount in ((1, 0.05), (5, 0.3)):
        brighter = corruptions.brightness(x, amount, _generator()).mean((1, 2, 3)) > 0.5
        assert result["accuracy"]["brightness"][str(severity)] == float((brighter == y).double().mean())
    assert result["accuracy"]["contrast"] == {"1": 1, "5": 1}, "the mean is what this model reads"
    assert result["accuracy"]["brightness"]["5"] < result["accuracy"]["brightness"]["1"] < 1
    values = [value for row in result["accuracy"].values() for value in row.values()]
    assert result["mean"] == pytest.approx(sum(values) / 6)
    assert list(result["by_corruption"]) == names
    assert result["by_corruption"]["brightness"] == pytest.approx(sum(result["accuracy"]["brightness"].values()) / 2)
    assert result["interval"] == list(wilson(round(result["mean"] * 40), 40))
    assert ticks == [pytest.approx(k / 6) for k in range(1, 7)]


def test_by_default_all_but_the_extras_whatever_the_channels():
    x, y = _labelled(6, (2, 8, 8))
    result = corruption_accuracy(_Bright(), x, y, seed=0)
    assert set(result["accuracy"]) == PAPER
    assert all(list(row) == ["1", "2", "3", "4", "5"] for row in result["accuracy"].values())


def test_the_seed_decides_and_the_batch_size_does_not(monkeypatch):
    monkeypatch.setattr(corruptions, "CHUNK", 16)
    x, y = _labelled()

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.images = []

        def forward(self, x):
            self.images.append(x)
            return x.mean((2, 3))

    def images(seed, batch_size):
        model = Seen()
        corruption_accuracy(
            model, x, y, seed=seed, batch_size=batch_size, names=["gaussian_noise", "snow"], severities=[3]
        )
        assert max(map(len, model.images)) <= batch_size
        return torch.cat(model.images)

    first = images(0, 512)
    assert torch.equal(first, images(0, 7))
    changed = (first != images(1, 512)).flatten(1).any(1)
    assert not changed[:40].any() and changed[40:].all(), "clean images first"
    noise = first[40:80] - x
    assert len(torch.unique(noise, dim=0)) == 40, "no two images, of whatever chunk, have the same noise"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["frost"]}, "photographs of frost"),
        ({"names": ["motionblur"]}, "did you mean 'motion_blur'"),
        ({"names": []}, "at least one name"),
        ({"severities": [0]}, "severity 0 does not exist"),
        ({"severities": [6]}, "severity 6 does not exist"),
        ({"severities": []}, "one severity"),
        ({"x": torch.full((4, 3, 8, 8), 2.0)}, r"pixels in \[0, 1\]"),
        ({"x": torch.full((4, 3, 8, 8), torch.nan)}, r"pixels in \[0, 1\]"),
        ({"x": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, "floating point"),
        ({"x": torch.zeros(4, 8, 8)}, r"\[N, C, H, W\]"),
        ({"x": torch.zeros(4, 1, 8, 8), "names": ["saturate"]}, "for 3 channels, these images have 1"),
        ({"y": torch.zeros(3).long()}, "4 images and 3 labels"),
        ({"x": torch.zeros(0, 3, 8, 8), "y": torch.zeros(0).long()}, "0 images"),
    ],
)
def test_wrong_input_is_answered_in_one_line(change, message):
    settings = {"x": torch.zeros(4, 3, 8, 8), "y": torch.zeros(4).long(), "names": None, "severities": [1]} | change
    with pytest.raises(InputError, match=message) as caught:
        corruption_accuracy(_Bright(), settings.pop("x"), settings.pop("y"), seed=0, **settings)
    assert "\n" not in str(caught.value)


def test_corrupt_checks_what_it_is_given():
    x = torch.zeros(1, 1, 8, 8)
    for name, severity in (("frost", 1), ("rain", 1), ("fog", 6), ("saturate", 1)):
        with pytest.raises(InputError):
            corrupt(name, x, severity, _generator())
    with pytest.raises(InputError):
        corrupt("fog", x.byte(), 1, _generator())
