"""Which pixels a network looks at, by gradients and by perturbation, and how far such maps can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as images

from nas.attacks.gradient import input_gradient
from nas.errors import InputError
from nas.model_state import crafting
from nas.objective import Attack


@dataclass(frozen=True)
class PerturbationSaliency:
    """How far the prediction moves where a window of the image is blurred.

    Greydanus et al., ICML 2018, arXiv 1711.00138, eq. 1 and 2, with probabilities for their policy: the image is
    blended into its Gaussian blur through a soft window (a Gaussian whose deviation is half the distance of two
    windows), and S = |p(x) - p(blended)|^2 / 2 stands at the middle of the window; in between S is bilinear.

    windows: on each side of the image; costs windows^2 passes without gradients. blur: deviation of the blur in shares
    of the shorter side. A part that blurring does not change, such as an even ground, has no saliency.
    """

    windows: int = 4
    blur: float = 0.125

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise InputError(f"perturbation saliency needs at least 1 window on each side, not {self.windows}")
        if not 0 < self.blur < math.inf:
            raise InputError(f"the blur of perturbation saliency must be above 0, not {self.blur}")

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """Saliency [N, H, W] of images ``x`` [N, C, H, W] in [0, 1]; the model is in eval mode meanwhile.

        Raises ``InputError`` where there are more windows than pixels on a side.
        """
        height, width = x.shape[2:]
        if self.windows > min(height, width):
            raise InputError(f"{self.windows} windows on a side of {min(height, width)} pixels: use fewer")
        rows, columns = (self._profiles(size, x) for size in (height, width))
        change = self.blurred(x) - x
        with crafting(model), torch.no_grad():
            clean = model(x).softmax(1)
            found = []
            for row in rows:
                for column in columns:
                    moved = model(x + row[:, None] * column * change).softmax(1)
                    found.append((moved - clean).square().sum(1) / 2)
        grid = torch.stack(found, 1).unflatten(1, (1, self.windows, self.windows))
        return nn.functional.interpolate(grid, (height, width), mode="bilinear").squeeze(1)

    def blurred(self, x: Tensor) -> Tensor:
        """The images [N, C, H, W] without what is smaller than the blur."""
        side = min(x.shape[2:])
        sigma = self.blur * side
        # Cut off at three deviations, or where the mirrored image ends.
        return images.gaussian_blur(x, [2 * min(math.ceil(3 * sigma), side - 1) + 1] * 2, [sigma] * 2)

    def _profiles(self, size: int, like: Tensor) -> Tensor:
        """The windows along one side of ``size`` pixels: [windows, size]."""
        distance = size / self.windows
        middles = (torch.arange(self.windows, device=like.device, dtype=like.dtype) + 0.5) * distance
        places = torch.arange(size, device=like.device, dtype=like.dtype) + 0.5
        return (-0.5 * ((places - middles[:, None]) / (0.5 * distance)).square()).exp()


def gradient_saliency(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Sizes [N, H, W] of the gradient of the cross-entropy at images ``x`` [N, C, H, W], over all channels."""
    with crafting(model):
        gradient, _, _ = input_gradient(model, x, y, "cross_entropy", None)
    return gradient.norm(dim=1)


def most_salient(saliency: Tensor, share: float) -> Tensor:
    """The ``share`` of the pixels of each map [N, H, W] with the highest values, as a mask; none whose value is 0.

    Pixels that tie with the last one that counts are in it, too.
    """
    flat = saliency.flatten(1)
    count = round(share * flat.shape[1])
    if count == 0:
        return torch.zeros_like(saliency, dtype=torch.bool)
    least = flat.topk(count, 1).values[:, -1:]
    return ((flat >= least) & (flat > 0)).view_as(saliency)


def sparsity(saliency: Tensor) -> Tensor:
    """Gini index [N] of each map [N, H, W]: 0 for an even one, near 1 where few pixels have it all."""
    flat = saliency.flatten(1).double().sort(1).values
    n = flat.shape[1]
    weights = 2 * torch.arange(1, n + 1, device=flat.device, dtype=flat.dtype) - n - 1
    return (flat * weights).sum(1) / (n * flat.sum(1)).clamp_min(torch.finfo(flat.dtype).tiny)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation [N] between maps [N, H, W], of equal pixels the mean rank; 0 where a map is constant."""
    ranks = [
        torch.from_numpy(rankdata(maps.flatten(1).double().cpu().numpy(), axis=1)).to(maps.device)
        for maps in (first, second)
    ]
    a, b = (rank - rank.mean(1, keepdim=True) for rank in ranks)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(torch.finfo(a.dtype).tiny)


def share_inside(gradient: Tensor, mask: Tensor) -> Tensor:
    """Share [N] of the squares of each ``gradient`` [N, C, H, W] that lies within ``mask`` [N, H, W]; 0 of nothing."""
    squares = gradient.double().square().sum(1).flatten(1)
    return (squares * mask.flatten(1)).sum(1) / squares.sum(1).clamp_min(torch.finfo(squares.dtype).tiny)


def deletion_and_insertion(
    model: nn.Module, x: Tensor, y: Tensor, saliency: Tensor, *, baseline: Tensor, steps: int = 16
) -> tuple[Tensor, Tensor]:
    """Area [N] under p(y) as the pixels of ``x`` give way to ``baseline``, most salient first, and as they come back.

    Petsiuk, Das & Saenko, BMVC 2018, arXiv 1806.07421, section 3.3: a map that says what the network looks at has a
    low first and a high second area. saliency: [N, H, W];  baseline: images like ``x``, here for both curves;  steps:
    equal parts in which the pixels are exchanged.
    """
    order = saliency.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.zeros_like(order).scatter_(1, order, torch.arange(order.shape[1], device=x.device).expand_as(order))
    rank = rank.view(len(x), 1, *saliency.shape[1:])
    deleted: list[Tensor] = []
    inserted: list[Tensor] = []
    with crafting(model), torch.no_grad():
        for step in range(steps + 1):
            gone = rank < step / steps * order.shape[1]
            for curve, first, second in ((deleted, baseline, x), (inserted, x, baseline)):
                chance = model(torch.where(gone, first, second)).softmax(1)
                curve.append(chance.gather(1, y.unsqueeze(1)).squeeze(1))
    areas = [torch.trapezoid(torch.stack(curve, 1), dx=1 / steps) for curve in (deleted, inserted)]
    return areas[0], areas[1]


def interpretability(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    attack: Attack,
    generator: torch.Generator,
    perturbation: PerturbationSaliency | None = None,
    share: float = 0.2,
) -> dict[str, Tensor]:
    """What the gradients of a network are worth as an explanation, per image: values [N] by name.

    deletion, insertion: areas of ``deletion_and_insertion`` of the gradient saliency;  sparsity: its Gini index;
    alignment: its rank correlation with the ``perturbation`` saliency;  inside: the share of its squares in the
    ``share`` of the pixels that this calls most salient;  stability: its rank correlation with itself on the images
    that ``attack`` makes. x: [N, C, H, W] in [0, 1];  y: [N].
    """
    perturbation = PerturbationSaliency() if perturbation is None else perturbation
    by_gradient, by_perturbation = gradient_saliency(model, x, y), perturbation(model, x)
    x_adv = attack(model, x, y, generator=generator)
    deletion, insertion = deletion_and_insertion(model, x, y, by_gradient, baseline=perturbation.blurred(x))
    return {
        "deletion": deletion,
        "insertion": insertion,
        "sparsity": sparsity(by_gradient),
        "alignment": rank_correlation(by_gradient, by_perturbation),
        "inside": share_inside(by_gradient.unsqueeze(1), most_salient(by_perturbation, share)),
        "stability": rank_correlation(by_gradient, gradient_saliency(model, x_adv, y)),
    }
