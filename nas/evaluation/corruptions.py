"""Accuracy on common corruptions (Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261), made from the images at hand.

Fourteen of the fifteen corruptions of the paper, and three of its extras. Frost is absent: it lays photographs of frost
over the image, which are not at hand, and nothing stands in for it; nor is the extra "spatter" here. An average over
these corruptions is therefore not the mean corruption accuracy of CIFAR-10-C, though it is close to it in kind.

Severities 1 to 5 have the parameters of the script that made CIFAR-10-C, for images of 32x32. What that script measures
in pixels grows with the shorter side of larger images; on smaller ones it stays, since a blur by a quarter of a pixel
would be none. What it measures in shares of the image (elastic, pixelate, zoom blur) follows the side both ways.
The parameters of ImageNet-C are others. The script cuts its results down to 8 bits; here only jpeg does.

The mean distance to clean images of 32x32 rises with severity, but for four of the published rows: elastic trades
movement for bending, glass and motion blur one parameter for another, saturate takes colour away before it adds some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from nas.attacks.losses import right
from nas.errors import InputError, nearest
from nas.evaluation.interval import wilson
from nas.model_state import constant, evaluating
from nas.randomness import generator as stream

SEVERITIES = (1, 2, 3, 4, 5)
ABSENT = ("frost",)

CHUNK = 128
"""Images that share a random stream, so that what is drawn for an image does not depend on the batch size."""


@dataclass(frozen=True)
class Corruption:
    """One corruption: ``corruption(x, severity, generator)`` for images x [N, C, H, W] in [0, 1].

    apply: called (x, *parameters, generator);  levels: the parameters of severities 1 to 5;  extra: not among the
    fifteen that a mean is taken over;  channels: the number of channels it is defined for, None for any.
    """

    apply: Callable[..., Tensor]
    levels: tuple[tuple[float, ...], ...]
    extra: bool = False
    channels: int | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
        return self.apply(x, *self.levels[severity - 1], generator).clamp(0, 1)


def corrupt(name: str, x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Images ``x`` [N, C, H, W], float in [0, 1], under the corruption ``name`` at ``severity`` 1 to 5; shaped alike.

    Random draws come from ``generator`` on its own device. InputError for an unknown name, another severity, integer
    images, and a corruption that is not defined for this number of channels.
    """
    _check([name], [severity], x)
    return CORRUPTIONS[name](x, severity, generator)


def corruption_accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    batch_size: int = 512,
    names: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    tick: Callable[[float], None] = lambda progress: None,
) -> dict[str, Any]:
    """Accuracy of ``model`` in eval mode on corrupted images ``x`` [N, C, H, W] in [0, 1] with labels ``y`` [N].

    names: the corruptions, by default all but the extras. The result is ready for JSON: ``natural`` accuracy,
    ``accuracy`` by name and severity, ``by_corruption``, the ``mean`` over all and its 95 % ``interval`` over the draw
    of images (Wilson's, wider than needed: an image counts by the share of its versions that are right), the settings,
    and what of the benchmark is ``absent``. The same seed corrupts alike whatever the batch size.
    """
    chosen = (
        [name for name, corruption in CORRUPTIONS.items() if not corruption.extra] if names is None else list(names)
    )
    if len(x) != len(y) or len(x) == 0:
        raise InputError(
            f"{len(x)} images and {len(y)} labels: an evaluation needs the same number of both, at least 1"
        )
    _check(chosen, severities, x)
    if not (float(x.min()) >= 0 and float(x.max()) <= 1):  # NaN is neither
        raise InputError("images must have pixels in [0, 1]; normalisation belongs inside the model")
    if not chosen or not severities:
        raise InputError("no corruption to evaluate: give at least one name and one severity")
    accuracy: dict[str, dict[str, float]] = {name: {} for name in chosen}
    total = len(chosen) * len(severities)
    with evaluating(model), constant(model), torch.no_grad():
        natural = _accuracy(model, x, y, batch_size)
        for number, (name, severity) in enumerate((name, severity) for name in chosen for severity in severities):
            versions = [
                CORRUPTIONS[name](images, severity, stream(seed, f"corruption {name}", severity, part, device=x.device))
                for part, images in enumerate(x.split(CHUNK))
            ]
            accuracy[name][str(severity)] = _accuracy(model, torch.cat(versions), y, batch_size)
            tick((number + 1) / total)
    by_corruption = {name: sum(values.values()) / len(values) for name, values in accuracy.items()}
    mean = sum(by_corruption.values()) / len(by_corruption)
    return {
        "n": len(x),
        "seed": seed,
        "severities": list(severities),
        "natural": natural,
        "accuracy": accuracy,
        "by_corruption": by_corruption,
        "mean": mean,
        "interval": list(wilson(round(mean * len(x)), len(x))),
        "absent": list(ABSENT),
    }


def _accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> float:
    pairs = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return sum(int(right(model(images), labels).sum()) for images, labels in pairs) / len(x)


def _check(names: Sequence[str], severities: Sequence[int], x: Tensor) -> None:
    for name in names:
        if name in ABSENT:
            raise InputError(f"corruption '{name}' is absent: it needs photographs of {name}, which are not at hand")
        if name not in CORRUPTIONS:
            raise InputError(f"unknown corruption '{name}'; {nearest(name, CORRUPTIONS)}")
    for severity in severities:
        if severity not in SEVERITIES:
            raise InputError(f"severity {severity} does not exist; severities are 1 (mild) to 5 (severe)")
    if not x.is_floating_point() or x.ndim != 4:
        raise InputError(f"images must be floating point [N, C, H, W] in [0, 1], not {x.dtype} {list(x.shape)}")
    for name in names:
        channels = CORRUPTIONS[name].channels
        if channels is not None and x.shape[1] != channels:
            raise InputError(
                f"corruption '{name}' is for {channels} channels, these images have {x.shape[1]}; leave it out"
            )


# ---------------------------------------------------------------------------------------------------------------- noise


def gaussian_noise(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Noise of a sensor in low light: independent normal noise of one standard deviation on every value."""
    return x + deviation * _normal(x.shape, x, generator)


def shot_noise(x: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    """Light comes in photons: every value is a Poisson count, ``photons`` of them on average for white."""
    rates = (x * photons).to(generator.device)
    return torch.poisson(rates, generator=generator).to(x.device) / photons


def impulse_noise(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Dead values, salt and pepper: a ``share`` of the values, channel by channel, becomes 0 or 1, equally likely."""
    draw = _uniform(x.shape, x, generator)
    return torch.where(draw < share, (draw < share / 2).to(x), x)


def speckle_noise(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Noise that grows with the brightness: every value times a normal factor around 1."""
    return x + x * deviation * _normal(x.shape, x, generator)


# ----------------------------------------------------------------------------------------------------------------- blur


def gaussian_blur(x: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Convolution with a Gaussian of ``sigma`` pixels, cut off at 4 sigma; edges are repeated beyond the image."""
    del generator
    return _smoothed(x, sigma * _scale(x))


def defocus_blur(x: Tensor, radius: float, alias: float, generator: torch.Generator) -> Tensor:
    """A lens out of focus: a disc of ``radius`` pixels, its edge smoothed by a Gaussian of ``alias`` pixels.

    The disc is sampled at whole pixels and the Gaussian cut off after one, as released: below a radius of 1, the
    Gaussian is what blurs. For larger images this kernel is enlarged, bilinearly.
    """
    del generator
    reach = math.floor(radius) + 1
    place = torch.arange(-reach, reach + 1, device=x.device)
    disc = (place[:, None] ** 2 + place**2 <= radius**2).to(x)
    kernel = _convolved(disc[None, None], _gaussian(alias, 1), "edge")[0, 0]
    scale = _scale(x)
    far = math.ceil((reach + 1) * scale) - 1
    enlarged = torch.arange(-far, far + 1, device=x.device, dtype=x.dtype) / scale
    share = (1 - (enlarged[:, None] - place).abs()).clamp(min=0)
    kernel = share @ kernel @ share.T
    n, c, h, w = x.shape
    padded = _padded(_padded(x, 2, far, "mirror"), 3, far, "mirror")
    return F.conv2d(padded.flatten(0, 1).unsqueeze(1), (kernel / kernel.sum())[None, None]).view(n, c, h, w)


def glass_blur(x: Tensor, sigma: float, reach: float, rounds: float, generator: torch.Generator) -> Tensor:
    """Frosted glass: every pixel shows one nearby, between two Gaussian blurs; a frame of ``reach`` pixels stays.

    The paper exchanges neighbours one after the other. The released script, whose exchange assigns through views of the
    array, copies instead: each pixel takes the colour of one up to ``reach`` rows and columns before and fewer than
    ``reach`` after it. For a reach of 1, which all severities have at 32x32, that is this, which takes all at once.
    """
    scale = _scale(x)
    x = _smoothed(x, sigma * scale)
    n, _, h, w = x.shape
    far = max(1, round(reach * scale))
    row, column = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    inside = (row > far) & (row <= h - far) & (column > far) & (column <= w - far)
    for _ in range(int(rounds)):
        moves = torch.randint(-far, far, (2, n, h, w), generator=generator, device=generator.device).to(x.device)
        moves = moves * inside
        x = _taken(x, row + moves[0], column + moves[1])
    return _smoothed(x, sigma * scale)


def motion_blur(x: Tensor, radius: float, sigma: float, generator: torch.Generator) -> Tensor:
    """The camera moves: half a Gaussian along a line within 45 degrees of the horizontal, drawn for each image.

    As ImageMagick computes it, which the release calls through wand: 2 ceil(radius) + 1 values one pixel apart, from
    the pixel onwards to one side only, each read at the nearest pixel; the edge is repeated.
    """
    angle = (_uniform((len(x),), x, generator) - 0.5) * math.pi / 2
    return _streaked(x, radius * _scale(x), sigma * _scale(x), angle)


def zoom_blur(x: Tensor, zooms: float, generator: torch.Generator) -> Tensor:
    """The camera comes closer: the mean of the image and of it magnified by 1, 1.01, 1.02, ... (``zooms`` of them).

    As released, whole pixels are cropped before and after: images up to a side of 8 first change at severity 2.
    """
    del generator
    total = x
    for step in range(int(zooms)):
        total = total + _zoomed(x, 1 + step / 100)
    return total / (zooms + 1)


# -------------------------------------------------------------------------------------------------------------- weather


def snow(
    x: Tensor,
    level: float,
    spread: float,
    size: float,
    threshold: float,
    radius: float,
    sigma: float,
    keep: float,
    generator: torch.Generator,
) -> Tensor:
    """Falling snow: the picture whitened by 1 - ``keep``, and flakes blurred along their fall added on top, twice.

    Flakes are normal noise (mean ``level``, deviation ``spread``) magnified by ``size``, without what is below
    ``threshold``; blurred as in ``motion_blur``, the second time turned by 180 degrees. Whitening uses the luma of
    three channels, the mean of any other number.
    """
    n, c, h, w = x.shape
    scale = _scale(x)
    crop = [math.ceil(side / (size * scale)) for side in (h, w)]
    flakes = level + spread * _normal((n, 1, *crop), x, generator)
    flakes = _magnified(flakes, size * scale, (h, w))
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
    angle = -(0.25 + 0.5 * _uniform((n,), x, generator)) * math.pi
    flakes = _streaked(flakes, radius * scale, sigma * scale, angle)
    luma = x.new_tensor([0.299, 0.587, 0.114]) if c == 3 else x.new_full((c,), 1 / c)
    grey = (x * luma[:, None, None]).sum(1, keepdim=True)
    whitened = keep * x + (1 - keep) * x.maximum(1.5 * grey + 0.5)
    return whitened + flakes + flakes.flip(2, 3)


def fog(x: Tensor, strength: float, decay: float, generator: torch.Generator) -> Tensor:
    """Fog of uneven density, a plasma fractal (diamond-square) added to the image, whose range is then brought back.

    ``decay``: how much smoother each finer level is. As released, the brightest value of each image stays the limit.
    """
    n, _, h, w = x.shape
    levels = math.ceil(math.log2(max(h, w)))
    density = _plasma(n, levels, decay, x, generator)[:, :, :h, :w]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + strength * density) * brightest / (brightest + strength)


def brightness(x: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Daylight: ``amount`` is added to the value of HSV, the largest channel; hue and saturation stay.

    That multiplies all channels of a pixel by one factor, for any number of them; black becomes grey.
    """
    del generator
    value = x.amax(1, keepdim=True)
    brighter = (value + amount).clamp(max=1)
    return torch.where(value > 0, x * (brighter / torch.where(value > 0, value, 1)), brighter)


# -------------------------------------------------------------------------------------------------------------- digital


def contrast(x: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Poor contrast: the distance of every value from its channel's mean over the image, times ``factor``."""
    del generator
    mean = x.mean((2, 3), keepdim=True)
    return mean + factor * (x - mean)


def elastic(x: Tensor, strength: float, smoothness: float, jitter: float, generator: torch.Generator) -> Tensor:
    """Stretched and bent: a random affine map, then a random smooth displacement of every pixel, each bilinear.

    In shares of the shorter side: three corners of a square around the middle, a third to each side, move by up to
    ``jitter`` in either direction and take the image along; displacements are uniform noise in [-1, 1] under a Gaussian
    of ``smoothness`` (cut off at 3 sigma), times ``strength``. What lies beyond the edge is mirrored at the edge pixel;
    in the release's second step the mirror stands half a pixel further out.
    """
    n, _, h, w = x.shape
    side = min(h, w)
    middle, arm = x.new_tensor([h // 2, w // 2]), max(1, side // 3)
    points = middle + arm * x.new_tensor([[1, 1], [-1, 1], [-1, -1]])
    moved = points + jitter * side * (2 * _uniform((n, 3, 2), x, generator) - 1)
    # The pixel that is seen at a place: the map that takes the moved points to where they came from.
    inverse = torch.linalg.solve(torch.cat([moved, moved.new_ones(n, 3, 1)], 2), points.expand(n, 3, 2))
    row = torch.arange(h, device=x.device, dtype=x.dtype)[:, None].expand(h, w)
    column = torch.arange(w, device=x.device, dtype=x.dtype).expand(h, w)
    source = torch.stack([row, column, torch.ones_like(row)], -1).view(1, h * w, 3) @ inverse
    x = _interpolated(x, source[..., 0].view(n, h, w), source[..., 1].view(n, h, w))
    sigma = smoothness * side
    noise = 2 * _uniform((n, 2, h, w), x, generator) - 1
    bend = strength * side * _convolved(noise, _gaussian(sigma, int(3 * sigma + 0.5)), "mirror")
    return _interpolated(x, row + bend[:, 0], column + bend[:, 1])


def pixelate(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Too few pixels: averaged down to a ``share`` of either side, and up again, each pixel repeated.

    With Pillow's box filter: a pixel belongs, as a whole, to the box that holds its centre.
    """
    del generator
    _, _, h, w = x.shape
    rows, columns = _boxes(h, int(h * share), x), _boxes(w, int(w * share), x)
    return rows @ x @ columns.T


def jpeg(x: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    """JPEG compression by Pillow at ``quality``, through 8 bits, image by image on the CPU.

    Three channels are one RGB file with its usual subsampling of colour; any other number, one grey file a channel.
    """
    del generator
    n, c, h, w = x.shape
    values = (x * 255).round().byte().cpu()
    pictures = values.permute(0, 2, 3, 1) if c == 3 else values.view(n * c, h, w)
    decoded = torch.empty_like(pictures)
    for number, picture in enumerate(pictures):
        file = BytesIO()
        Image.fromarray(picture.contiguous().numpy()).save(file, "JPEG", quality=int(quality))
        decoded[number] = torch.from_numpy(np.array(Image.open(file)))
    return (decoded.permute(0, 3, 1, 2) if c == 3 else decoded.view(n, c, h, w)).to(x) / 255


def saturate(x: Tensor, factor: float, offset: float, generator: torch.Generator) -> Tensor:
    """The saturation of HSV times ``factor`` plus ``offset``, at most 1; three channels only.

    Severities 1 and 2 take colour away, 3 to 5 add it. Grey pixels have hue 0, red: an offset shows it, as released.
    """
    del generator
    value, darkest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    depth = value - darkest
    saturation = depth / torch.where(value > 0, value, 1)
    wanted = (saturation * factor + offset).clamp(0, 1)
    # How far each channel stays below the value, as a share of the farthest; that of red for what has no hue.
    red = x.new_tensor([0, 1, 1])[:, None, None]
    hue = torch.where(depth > 0, (value - x) / torch.where(depth > 0, depth, 1), red)
    return value * (1 - wanted * hue)


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, ((0.04,), (0.06,), (0.08,), (0.09,), (0.1,))),
    "shot_noise": Corruption(shot_noise, ((500,), (250,), (100,), (75,), (50,))),
    "impulse_noise": Corruption(impulse_noise, ((0.01,), (0.02,), (0.03,), (0.05,), (0.07,))),
    "defocus_blur": Corruption(defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": Corruption(glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": Corruption(motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": Corruption(zoom_blur, ((7,), (12,), (16,), (21,), (26,))),
    "snow": Corruption(
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "fog": Corruption(fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption(brightness, ((0.05,), (0.1,), (0.15,), (0.2,), (0.3,))),
    "contrast": Corruption(contrast, ((0.75,), (0.5,), (0.4,), (0.3,), (0.15,))),
    "elastic": Corruption(
        elastic, ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    ),
    "pixelate": Corruption(pixelate, ((0.95,), (0.9,), (0.85,), (0.75,), (0.65,))),
    "jpeg": Corruption(jpeg, ((80,), (65,), (58,), (50,), (40,))),
    "speckle_noise": Corruption(speckle_noise, ((0.06,), (0.1,), (0.12,), (0.16,), (0.2,)), extra=True),
    "gaussian_blur": Corruption(gaussian_blur, ((0.4,), (0.6,), (0.7,), (0.8,), (1,)), extra=True),
    "saturate": Corruption(saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)), extra=True, channels=3),
}


# ------------------------------------------------------------------------------------- what several of them are made of


def _scale(x: Tensor) -> float:
    """Pixels here for one pixel of a 32x32 image."""
    return max(1.0, min(x.shape[2:]) / 32)


def _normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal, drawn where the generator lives and brought to the images."""
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform in [0, 1), likewise."""
    return torch.rand(tuple(shape), generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _gaussian(sigma: float, reach: int) -> list[float]:
    """2 reach + 1 weights of a Gaussian that is cut off there; all of it at the middle for sigma 0."""
    weights = [math.exp(-0.5 * (place / max(sigma, 1e-9)) ** 2) for place in range(-reach, reach + 1)]
    return [weight / sum(weights) for weight in weights]


def _smoothed(x: Tensor, sigma: float) -> Tensor:
    return _convolved(x, _gaussian(sigma, int(4 * sigma + 0.5)), "edge")


def _convolved(x: Tensor, weights: list[float], border: str) -> Tensor:
    """x [N, C, H, W] under the symmetric ``weights`` (2 r + 1 of them) along rows and columns."""
    for dimension in (2, 3):
        padded = _padded(x, dimension, len(weights) // 2, border)
        # For few weights and one channel at a time, sums of shifted images are faster than a convolution.
        total = torch.zeros_like(x)
        for shift, weight in enumerate(weights):
            total.add_(padded.narrow(dimension, shift, x.shape[dimension]), alpha=weight)
        x = total
    return x


def _padded(x: Tensor, dimension: int, amount: int, border: str) -> Tensor:
    """``x`` grown by ``amount`` on both sides of a dimension, by any amount: "edge" repeated, or a "mirror" in it."""
    size = x.shape[dimension]
    place = torch.arange(-amount, size + amount, device=x.device)
    if border == "edge":
        return x.index_select(dimension, place.clamp(0, size - 1))
    period = max(2 * (size - 1), 1)
    place = place % period
    return x.index_select(dimension, place.minimum(period - place) % size)


def _taken(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The pixels of x [N, C, H, W] at whole ``rows`` and ``columns``, broadcast to [N, H, W]; the edge is repeated."""
    n, c, h, w = x.shape
    place = (rows.clamp(0, h - 1) * w + columns.clamp(0, w - 1)).view(n, 1, h * w)
    return x.flatten(2).gather(2, place.expand(n, c, h * w)).view(n, c, h, w)


def _interpolated(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x [N, C, H, W] at real ``rows`` and ``columns`` [N, H, W], bilinear, mirrored at the edge pixels."""
    h, w = x.shape[2:]
    grid = torch.stack([2 * columns / max(w - 1, 1) - 1, 2 * rows / max(h - 1, 1) - 1], -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def _streaked(x: Tensor, radius: float, sigma: float, angle: Tensor) -> Tensor:
    """Half a Gaussian of ``sigma`` pixels along ``angle`` [N] (radians, downwards from the horizontal)."""
    _, _, h, w = x.shape
    weights = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(2 * math.ceil(radius) + 1)]
    weights = [weight for weight in weights if weight > 1e-5]  # far below a step of 8 bits
    row, column = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    result = torch.zeros_like(x)
    for distance, weight in enumerate(weights):
        down = (distance * angle.sin()).round().long()[:, None, None]
        along = (distance * angle.cos()).round().long()[:, None, None]
        result.add_(_taken(x, row + down, column + along), alpha=weight / sum(weights))
    return result


def _zoomed(x: Tensor, zoom: float) -> Tensor:
    """The middle of the image magnified to its size; ``zoom`` is at least 1."""
    h, w = x.shape[2:]
    high, wide = math.ceil(h / zoom), math.ceil(w / zoom)
    top, left = (h - high) // 2, (w - wide) // 2
    return _magnified(x[:, :, top : top + high, left : left + wide], zoom, (h, w))


def _magnified(x: Tensor, zoom: float, size: tuple[int, int]) -> Tensor:
    """``x`` magnified bilinearly, corners on corners, and cut down to the middle [h, w] of it."""
    h, w = size
    high, wide = (max(now, math.floor(before * zoom + 0.5)) for now, before in zip(size, x.shape[2:], strict=True))
    x = F.interpolate(x, (high, wide), mode="bilinear", align_corners=True)
    top, left = (high - h) // 2, (wide - w) // 2
    return x[:, :, top : top + h, left : left + w]


def _plasma(n: int, levels: int, decay: float, like: Tensor, generator: torch.Generator) -> Tensor:
    """Diamond-square heights [n, 1, 2^levels, 2^levels] on a torus, from 0 to 1 in each map.

    Each level doubles the side: a new point is the mean of its four neighbours plus uniform noise, whose range falls by
    decay squared from one level to the next.
    """
    heights = like.new_zeros(n, 1, 1, 1)
    for level in range(levels):
        noise = decay ** (-2 * level) * (2 * _uniform((3, *heights.shape), like, generator) - 1)
        below, beside = heights.roll(-1, 2), heights.roll(-1, 3)
        centre = (heights + below + beside + below.roll(-1, 3)) / 4 + noise[0]
        across = (heights + beside + centre + centre.roll(1, 2)) / 4 + noise[1]
        down = (heights + below + centre + centre.roll(1, 3)) / 4 + noise[2]
        even, odd = torch.stack([heights, across], -1), torch.stack([down, centre], -1)
        heights = torch.stack([even.flatten(3), odd.flatten(3)], 3).flatten(2, 3)
    heights = heights - heights.amin((2, 3), keepdim=True)
    return heights / heights.amax((2, 3), keepdim=True).clamp(min=torch.finfo(like.dtype).tiny)


def _boxes(size: int, boxes: int, like: Tensor) -> Tensor:
    """[size, size]: each pixel becomes the mean of the pixels whose centre is in the same of ``boxes`` equal boxes."""
    boxes = max(boxes, 1)
    # In whole numbers: a centre (2 i + 1) / (2 size) on the border of two boxes, where Pillow's rounding decides, goes
    # into the first of them.
    box = ((2 * torch.arange(size, device=like.device) + 1) * boxes - 1) // (2 * size)
    same = (box[:, None] == box).to(like)
    return same / same.sum(1, keepdim=True)
