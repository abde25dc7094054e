"""Pre-activation residual networks for small images: WideResNets and RobustResNets, by depth and width of stages.

Zagoruyko & Komodakis, 2016, arXiv 1605.07146 (WideResNet); Huang et al., 2021, arXiv 2110.03825 (WRN-34-R); Huang et
al., 2023, arXiv 2212.11005 (RobustResNet, scaling); Peng et al., 2023, arXiv 2308.16258 (RaWRN).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops.misc import SqueezeExcitation

from search_spaces.genotype import MAX_WIDTH, GenotypeError, Option, StageGenotype
from search_spaces.layers import Normalise
from search_spaces.stage_space import StageSpace, options_of

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}
REFERENCE_WIDTH = 160
"""The width of a stage at which a group of a robust block has ``base_width`` channels."""


@dataclass(frozen=True)
class ResidualOptions:
    """What a residual network is beside its depths and widths.

    stem: channels of the stem. block: "basic", two 3x3 convolutions; "bottleneck", 3x3 between two 1x1; "robust", the
    bottleneck of RobustResNet. se: a gate by squeeze and excitation on the way through a block, "plain" before the
    shortcut is added, or "residual", which adds the normalised and gated map beside the map itself. se_reduction: a
    gate squeezes to 1/se_reduction of its channels, at least one.

    expansion: a bottleneck or robust block puts out so many times its width. A robust block cuts the map between its
    1x1 convolutions into ``scales`` parts; its 3x3 convolutions have ``cardinality`` groups of base_width/160 of the
    stage's width each. An option that the chosen block has no use for is refused unless it is at its default.

    activation: what the published network has, as a transformer has GELU. Gates keep ReLU. A recipe's train.activation
    takes the place of either, as in every space.
    """

    stem: int = 16
    block: str = "basic"
    activation: str = "relu"
    se: str = "none"
    se_reduction: int = 16
    expansion: int = 4
    cardinality: int = 4
    scales: int = 8
    base_width: int = 10

    def __post_init__(self) -> None:
        for name, allowed in (
            ("block", ("basic", "bottleneck", "robust")),
            ("activation", tuple(ACTIVATIONS)),
            ("se", ("none", "plain", "residual")),
        ):
            if getattr(self, name) not in allowed:
                raise GenotypeError(f"option '{name}' must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name, largest in (
            ("stem", MAX_WIDTH),
            ("se_reduction", MAX_WIDTH),
            ("expansion", 64),
            ("cardinality", MAX_WIDTH),
            ("scales", 64),
            ("base_width", MAX_WIDTH),
        ):
            if not 1 <= getattr(self, name) <= largest:
                raise GenotypeError(f"option '{name}' must be from 1 to {largest}, not {getattr(self, name)}")
        idle = ["se_reduction"] if self.se == "none" else []
        idle += ["expansion"] if self.block == "basic" else []
        idle += ["cardinality", "scales", "base_width"] if self.block != "robust" else []
        for name in idle:
            if getattr(self, name) != getattr(ResidualOptions, name):
                reason = "se = 'none'" if name == "se_reduction" else f"block '{self.block}'"
                raise GenotypeError(f"option '{name}' means nothing with {reason}: leave it out")


class Activated(nn.Sequential):
    """Batch normalisation and activation, as they stand before a convolution."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__(nn.BatchNorm2d(channels), ACTIVATIONS[activation]())


class Hierarchical(nn.Module):
    """3x3 convolutions in a row over the parts of a map [N, parts * width, H, W], each with BN and activation.

    Part i is convolved together with the result of part i - 1, so that later parts see farther; the last is kept
    (Gao et al., 2019, arXiv 1904.01169). With a stride the parts are convolved each on its own, and the last is pooled.
    """

    def __init__(self, parts: int, width: int, stride: int, cardinality: int, activation: str) -> None:
        super().__init__()
        self.parts, self.stride = parts, stride
        self.convolutions = nn.ModuleList(
            nn.Sequential(_conv3x3(width, width, stride, cardinality), *Activated(width, activation))
            for _ in range(parts - 1)
        )
        self.pool = nn.AvgPool2d(3, stride, 1) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        *parts, last = torch.chunk(x, self.parts, dim=1)
        done: list[Tensor] = []
        for part, convolution in zip(parts, self.convolutions, strict=True):
            done.append(convolution(part + done[-1] if done and self.stride == 1 else part))
        return torch.cat([*done, self.pool(last)], dim=1)


class Block(nn.Module):
    """A residual block of ``width``: [N, in_channels, H, W] to [N, out_channels, H/stride, W/stride].

    BN and activation come first (He et al., 2016, arXiv 1603.05027); where the shape changes, the shortcut is a 1x1
    convolution of what they give. The robust block's first convolution reads it, too, as the paper has it; in the
    released code it reads the block's input.
    """

    def __init__(self, in_channels: int, width: int, stride: int, options: ResidualOptions) -> None:
        super().__init__()
        self.first = Activated(in_channels, options.activation)
        if options.block == "basic":
            self.out_channels = width
            self.path = nn.Sequential(
                _conv3x3(in_channels, width, stride), *Activated(width, options.activation), _conv3x3(width, width)
            )
        else:
            self.out_channels = options.expansion * width
            inner, middle = _middle(width, stride, options)
            self.path = nn.Sequential(
                _conv1x1(in_channels, inner),
                *Activated(inner, options.activation),
                middle,
                _conv1x1(inner, self.out_channels),
            )
        changes = stride > 1 or in_channels != self.out_channels
        self.shortcut = _conv1x1(in_channels, self.out_channels, stride) if changes else None
        self.keeps_ungated = options.se == "residual"
        self.gate: nn.Module | None = None
        if options.se != "none":
            gate = SqueezeExcitation(self.out_channels, max(1, self.out_channels // options.se_reduction))
            norm = [nn.BatchNorm2d(self.out_channels)] if self.keeps_ungated else []
            self.gate = nn.Sequential(*norm, gate)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        kept = x if self.shortcut is None else self.shortcut(first)
        y: Tensor = self.path(first)
        if self.keeps_ungated:
            kept = kept + y
        return kept + (y if self.gate is None else self.gate(y))


class ResidualNetwork(nn.Module):
    """A 3x3 stem, stages of ``depths[i]`` blocks of ``widths[i]``, BN, activation, global pooling and a classifier.

    All stages but the first begin with stride 2. Weights of convolutions are drawn as by He et al. (2015, arXiv
    1502.01852), by outputs. Dropout, which WideResNets had at first, is not used by the published robust ones.
    Pixels [N, C, H, W] in [0, 1] to logits [N, classes]. Options: ``ResidualOptions``.
    """

    def __init__(
        self,
        genotype: StageGenotype,
        *,
        input_shape: tuple[int, int, int],
        classes: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        options = options_of(genotype, ResidualOptions)
        self.normalise = Normalise(mean, std)
        self.stem = _conv3x3(input_shape[0], options.stem)
        channels = options.stem
        stages = []
        for stage, (depth, width) in enumerate(zip(genotype.depths, genotype.widths, strict=True)):
            blocks = []
            for index in range(depth):
                block = Block(channels, width, 2 if stage > 0 and index == 0 else 1, options)
                blocks.append(block)
                channels = block.out_channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.final = Activated(channels, options.activation)
        self.classifier = nn.Linear(channels, classes)
        nn.init.zeros_(self.classifier.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.final(self.stages(self.stem(self.normalise(x)))).mean((2, 3)))


def wide(
    depths: Sequence[int], factors: Sequence[float], base: Sequence[int] = (16, 32, 64), **options: Option
) -> StageGenotype:
    """The network of ``depths[i]`` blocks of ``factors[i] * base[i]`` channels, rounded, in stage i.

    WRN-d-k has depths of (d - 4) / 6 and factors of k; options as in ``ResidualOptions``.
    """
    if not len(depths) == len(factors) == len(base):
        raise GenotypeError(f"{len(depths)} depths, {len(factors)} factors and {len(base)} base widths: give as many")
    widths = tuple(round(factor * width) for factor, width in zip(factors, base, strict=True))
    return SPACE.genotype(tuple(depths), widths, **options)


def _middle(width: int, stride: int, options: ResidualOptions) -> tuple[int, nn.Module]:
    """What stands between the 1x1 convolutions of a bottleneck of ``width``, and its channels."""
    if options.block == "bottleneck":
        return width, nn.Sequential(_conv3x3(width, width, stride), *Activated(width, options.activation))
    part = width * options.base_width // REFERENCE_WIDTH * options.cardinality
    if not part:
        raise GenotypeError(
            f"a stage of width {width} is too narrow for robust blocks of base_width {options.base_width}: give a "
            f"width of at least {-(-REFERENCE_WIDTH // options.base_width)} or a larger base_width"
        )
    if options.scales == 1:
        grouped = _conv3x3(part, part, stride, options.cardinality)
        return part, nn.Sequential(grouped, *Activated(part, options.activation))
    return options.scales * part, Hierarchical(options.scales, part, stride, options.cardinality, options.activation)


def _conv3x3(in_channels: int, channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, 1, groups=groups, bias=False)


def _conv1x1(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 1, stride, bias=False)


SPACE = StageSpace("residual", ResidualNetwork, options=ResidualOptions)
