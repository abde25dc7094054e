"""The momentum iterative method, with what makes its results transfer to other networks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.gradient import check_loss, check_start, objective_gradient, per_image
from nas.attacks.losses import LOSSES
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class Momentum:
    """Momentum iterative FGSM (MI-FGSM), with input diversity and translation-invariant smoothing for transfer.

    Dong et al., CVPR 2018, arXiv 1710.06081, algorithm 1: g <- decay g + gradient / |gradient|_1, then a step along the
    steepest direction of g from the clean image. With decay 0 and neither option it is I-FGSM.

    diversity: probability with which a step sees the batch shrunk to a random size between ``smallest`` and the full
    one, at a random place among zeros (DI, Xie et al., CVPR 2019, arXiv 1803.06978; shrunk rather than enlarged,
    because networks for small images take one size). Size and place are one draw for the whole batch.
    smoothing: odd size of the Gaussian kernel the gradient is convolved with, cut off at three standard deviations (one
    of 3 hardly smooths); 0 for none (TI, Dong et al., CVPR 2019, arXiv 1904.02884). step_size is in pixel units; 0
    means epsilon / steps.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    steps: int = 10
    step_size: float = 0.0
    decay: float = 1.0
    loss: str = "cross_entropy"
    diversity: float = 0.0
    smallest: float = 0.9
    smoothing: int = 0

    def __post_init__(self) -> None:
        check_loss(self.loss)
        check_start(self.loss, random_start=False)
        if self.steps < 1:
            raise InputError(f"attack steps must be at least 1, not {self.steps}")
        if not self.step_size >= 0:
            raise InputError(f"attack step_size must be at least 0 (0 = automatic), not {self.step_size}")
        if not 0 <= self.decay < float("inf"):
            raise InputError(f"the decay of momentum must be a number of at least 0, not {self.decay}")
        if not 0 <= self.diversity <= 1:
            raise InputError(f"diversity is a probability in [0, 1], not {self.diversity}")
        if not 0 < self.smallest <= 1:
            raise InputError(f"smallest is a share of the image size in (0, 1], not {self.smallest}")
        if self.smoothing < 0 or (self.smoothing and self.smoothing % 2 == 0):
            raise InputError(f"smoothing is an odd kernel size or 0 for none, not {self.smoothing}")

    @property
    def step(self) -> float:
        """The step size in force."""
        return self.step_size or self.threat_model.epsilon / self.steps

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]."""
        threat_model, loss = self.threat_model, LOSSES[self.loss]
        x_adv, accumulated = x, torch.zeros_like(x)
        with crafting(model):
            for _ in range(self.steps):
                place = self._draw(x.shape[2], x.shape[3], generator)

                def objective(images: Tensor, place: Place = place) -> Tensor:
                    return loss(model(placed(images, *place)), y, None)

                gradient, _ = objective_gradient(objective, x_adv)
                if self.smoothing:
                    gradient = smoothed(gradient, self.smoothing)
                # Scaled to the largest entry first: a sum of very small gradients leaves the range of the type.
                tiny = torch.finfo(x.dtype).tiny
                gradient = gradient / per_image(gradient.flatten(1).abs().amax(1).clamp_min(tiny), x)
                gradient = gradient / per_image(gradient.flatten(1).abs().sum(1).clamp_min(tiny), x)
                accumulated = self.decay * accumulated + gradient
                x_adv = threat_model.project(x_adv + self.step * threat_model.geometry.steepest(accumulated), x)
        return x_adv

    def _draw(self, height: int, width: int, generator: torch.Generator) -> Place:
        """Size, top and left of the images that the next step sees."""
        if not self.diversity:
            return (height, width), 0, 0
        chance, scale, down, right = torch.rand(4, generator=generator, device=generator.device).tolist()
        if chance >= self.diversity:
            return (height, width), 0, 0
        scale = self.smallest + (1 - self.smallest) * scale
        size = max(round(height * scale), 1), max(round(width * scale), 1)
        return size, int(down * (height - size[0] + 1)), int(right * (width - size[1] + 1))

    def __str__(self) -> str:
        options = f", diversity {self.diversity:.6g} from {self.smallest:.6g}" if self.diversity else ""
        options += f", smoothing {self.smoothing}" if self.smoothing else ""
        return (
            f"MI-FGSM-{self.steps}, {self.threat_model}, step {self.step:.6g}, decay {self.decay:.6g}, "
            f"{self.loss}{options}"
        )


Place = tuple[tuple[int, int], int, int]
"""Size (height, width), top and left of an image within a larger one."""


def placed(images: Tensor, size: tuple[int, int], top: int, left: int) -> Tensor:
    """``images`` [N, C, H, W] resized to ``size`` at (top, left) of an image of zeros of the old size."""
    height, width = images.shape[2:]
    if size == (height, width):
        return images
    small = F.interpolate(images, size, mode="bilinear", align_corners=False)
    return F.pad(small, (left, width - size[1] - left, top, height - size[0] - top))


def smoothed(gradient: Tensor, kernel: int) -> Tensor:
    """Each channel of ``gradient`` [N, C, H, W] convolved with a Gaussian of ``kernel`` x ``kernel`` pixels."""
    places = torch.linspace(-3, 3, kernel, device=gradient.device, dtype=gradient.dtype) if kernel > 1 else None
    if places is None:
        return gradient
    weights = torch.exp(-places.square() / 2)
    weights = weights / weights.sum()
    channels, half = gradient.shape[1], kernel // 2
    across = weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    gradient = F.conv2d(gradient, across, padding=(0, half), groups=channels)
    return F.conv2d(gradient, across.transpose(2, 3), padding=(half, 0), groups=channels)


PLUGIN = Momentum
