"""What exported source files are made of: layers in ordinary torch and a reader of weights.

source.py copies the text of these definitions into the files it writes. They are code here, not strings, so that they
are checked like the rest. They may use json, math, Path, torch, nn, Tensor and each other, and nothing else. Where
layers of a block were exchanged, its file gives it its layers by name, and its constructor here is left out: a forward
pass may use nothing but the attributes that are layers, and numbers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn


class Layers(nn.Module):
    """A block of layers that are given by name."""

    def __init__(self, **layers: nn.Module | None) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


# Cells


class Preprocess(nn.Module):
    """Activation, 1x1 convolution, batch norm: brings an input of a cell to its number of channels."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.activation = nn.ReLU()
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.activation(x)))


class FactorisedReduce(nn.Module):
    """Halves the map: activation, 1x1 convolutions of the even and the odd pixels side by side, batch norm."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        odd = channels // 2
        self.activation = nn.ReLU()
        self.even = nn.Conv2d(in_channels, channels - odd, 1, bias=False)
        self.odd = nn.Conv2d(in_channels, odd, 1, bias=False) if odd else None
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        # One row or column of zeros makes both halves the same size where the map is odd.
        x = nn.functional.pad(self.activation(x), (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        y = self.even(x[:, :, ::2, ::2])
        if self.odd is not None:
            y = torch.cat([y, self.odd(x[:, :, 1::2, 1::2])], dim=1)
        return self.bn(y)


class SeparableConv(nn.Module):
    """Activation, depthwise K x K convolution, 1x1 convolution, batch norm."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.activation = nn.ReLU()
        self.depthwise = nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.pointwise(self.depthwise(self.activation(x))))


# Networks of stages


class ConvBlock(nn.Module):
    """3x3 convolution, batch norm, activation."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


class BiasedConvBlock(nn.Module):
    """3x3 convolution with bias, batch norm, activation."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut around them; the activation comes after the sum."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.activation(self.bn1(self.conv1(x)))))
        return self.activation(y + self.shortcut(x))


class ResidualBlock(nn.Module):
    """Batch norm and activation first, then the path, around which the shortcut goes."""

    def __init__(self, first: nn.Module, path: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.path, self.shortcut = first, path, shortcut

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        # Where the shape changes, the shortcut is a convolution of what the path takes, too.
        kept = x if self.shortcut is None else self.shortcut(first)
        return kept + self.path(first)


class GatedResidualBlock(nn.Module):
    """A residual block that adds what its path gives once as it is, and once normalised and gated."""

    def __init__(self, first: nn.Module, path: nn.Module, gate: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.path, self.gate, self.shortcut = first, path, gate, shortcut

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        kept = x if self.shortcut is None else self.shortcut(first)
        y = self.path(first)
        return kept + y + self.gate(y)


class BasicPath(nn.Module):
    """Two 3x3 convolutions with batch norm and activation between them."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.activation(self.bn(self.conv1(x))))


class BottleneckPath(nn.Module):
    """A 3x3 convolution of ``groups`` groups between two 1x1 convolutions, batch norm and activation between them."""

    def __init__(self, in_channels: int, inner: int, channels: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.activation1 = nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.activation2 = nn.ReLU()
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation1(self.bn1(self.conv1(x)))
        return self.conv3(self.activation2(self.bn2(self.conv2(y))))


class GroupedConv(nn.Module):
    """3x3 convolution of ``groups`` groups, batch norm, activation."""

    def __init__(self, channels: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.bn(self.conv(x)))


class Hierarchical(nn.Module):
    """Convolutions in a row over the parts of a map: part i together with the result of part i - 1; the last is kept.

    With a stride the parts are convolved each on its own, and the last is pooled.
    """

    def __init__(self, parts: int, width: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([GroupedConv(width, stride, groups) for _ in range(parts - 1)])
        self.pool: nn.Module = nn.AvgPool2d(3, stride, padding=1) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        *parts, last = torch.chunk(x, len(self.convolutions) + 1, dim=1)
        in_a_row = isinstance(self.pool, nn.Identity)
        done: list[Tensor] = []
        for part, convolution in zip(parts, self.convolutions, strict=True):
            done.append(convolution(part + done[-1] if done and in_a_row else part))
        return torch.cat([*done, self.pool(last)], dim=1)


class RobustPath(nn.Module):
    """The path of a robust block: ``scales`` parts of ``width`` channels between two 1x1 convolutions."""

    def __init__(
        self, in_channels: int, scales: int, width: int, channels: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, scales * width, 1, bias=False)
        self.bn = nn.BatchNorm2d(scales * width)
        self.activation = nn.ReLU()
        self.parts = Hierarchical(scales, width, stride, groups)
        self.conv2 = nn.Conv2d(scales * width, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.parts(self.activation(self.bn(self.conv1(x)))))


class SqueezeExcitation(nn.Module):
    """Squeeze and excitation: every channel times a gate that follows from the means of all channels."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.ReLU()
        self.excite = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.excite(self.activation(self.squeeze(self.pool(x))))) * x


class EncoderLayer(nn.Module):
    """A layer of a transformer: attention of all tokens, then two linear layers for each, both around a shortcut."""

    def __init__(self, features: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features, eps=1e-6)
        self.attention = nn.MultiheadAttention(features, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(features, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, features))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = self.attention(y, y, y, need_weights=False)[0] + x
        return x + self.mlp(self.norm2(x))


# What compression puts in the place of a layer


class GeneralisedSeparable(nn.Module):
    """A convolution by depthwise kernels, ``kernels[c]`` of them for input channel c, and a 1x1 convolution."""

    index: Tensor

    def __init__(self, kernels: tuple[int, ...], depthwise: nn.Module, pointwise: nn.Module) -> None:
        super().__init__()
        channels = [channel for channel, count in enumerate(kernels) for _ in range(count)]
        self.register_buffer("index", torch.tensor(channels), persistent=False)
        self.depthwise, self.pointwise = depthwise, pointwise

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x.index_select(1, self.index)))


class KroneckerLinear(nn.Module):
    """A linear layer whose matrix is a sum of Kronecker products of small ones, which is never formed.

    [..., n] is seen as [..., n_1, ..., n_d] with ``modes`` n_k; factor k of a term works along axis k, in ``order``.
    """

    def __init__(
        self, modes: tuple[int, ...], order: tuple[int, ...], out_features: int, bias: bool, terms: nn.ModuleList
    ) -> None:
        super().__init__()
        self.modes, self.order, self.terms = modes, order, terms
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        axes = len(self.modes)
        x = x.unflatten(-1, self.modes)
        products = []
        for factors in self.terms:
            y, layers = x, [*factors.children()]
            for k in self.order:
                y = layers[k](y.movedim(k - axes, -1)).movedim(-1, k - axes)
            products.append(y)
        y = products[0]
        for product in products[1:]:
            y = y + product
        y = y.flatten(-axes)
        return y if self.bias is None else y + self.bias


class KroneckerPointwise(nn.Module):
    """A 1x1 convolution of stride ``stride`` whose matrix is that of a ``KroneckerLinear``."""

    def __init__(self, stride: tuple[int, int], linear: nn.Module) -> None:
        super().__init__()
        self.stride, self.linear = stride, linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, :, :: self.stride[0], :: self.stride[1]].movedim(1, -1)).movedim(-1, 1)


class Rounding(nn.Module):
    """Values rounded to 256 levels, (k - zero_point) scale; beyond the ends they are clipped and get no gradient."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1 / 32))
        self.register_buffer("zero_point", torch.tensor(128, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point.int(), 0, 255)


class Int8Weight(nn.Module):
    """Weights as int8 numbers with a step for each output, and a bias that is a multiple of the engine's own step.

    ``forward()`` gives weight and bias as floating-point numbers.
    """

    scale: Tensor

    def __init__(self, shape: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randint(-127, 128, shape, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.full(shape[:1], 1 / 127 / math.sqrt(math.prod(shape[1:]))))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.weight * self.scale.view(-1, *[1] * (self.weight.dim() - 1)), self.bias


class Int8Conv2d(nn.Module):
    """An int8 convolution in floating point: input, weight and, where ``rounds_output``, the result are rounded."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1,
        groups: int = 1, bias: bool = True, rounds_output: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.input = Rounding()
        self.weights = Int8Weight((out_channels, in_channels // groups, kernel, kernel), bias)
        self.output = Rounding() if rounds_output else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weights()
        x = self.input(x)
        return self.output(nn.functional.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups))


class Int8Linear(nn.Module):
    """An int8 linear layer in floating point: input, weight and, where ``rounds_output``, the result are rounded."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, rounds_output: bool = False) -> None:
        super().__init__()
        self.input = Rounding()
        self.weights = Int8Weight((out_features, in_features), bias)
        self.output = Rounding() if rounds_output else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weights()
        return self.output(nn.functional.linear(self.input(x), weight, bias))


# Activations


class Borrowed(nn.Module):
    """The activation of another place, whose weights are stored there."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = (activation,)  # in a tuple, which registers nothing

    def forward(self, x: Tensor) -> Tensor:
        return self.activation[0](x)


class ChannelPrelu(nn.Module):
    """PReLU: x above 0, a slope of the channel times x below; of maps, vectors, and tokens with channels last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        slope = self.weight if x.dim() < 4 else self.weight.view(-1, 1, 1)
        return x.clamp_min(0) - slope * (-x).clamp_min(0)


class Sparta(nn.Module):
    """x times a gate that looks around: sigmoid(beta x + bias + around(x)). Maps, vectors, and tokens of a square.

    rectified: twice the gate times ReLU(x) instead. own: as many betas and biases as there are, 1 or one a channel.
    """

    def __init__(self, own: int, rectified: bool) -> None:
        super().__init__()
        self.rectified = rectified
        self.beta = nn.Parameter(torch.full((own,), 0.0 if rectified else 1.0))
        self.bias = nn.Parameter(torch.zeros(own))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return self.gated(x[:, :, None, None])[:, :, 0, 0]
        return self.tokens(x) if x.dim() == 3 else self.gated(x)

    def tokens(self, x: Tensor) -> Tensor:
        """Tokens row by row; where they are one more than a square, the first is a map of one pixel."""
        alone = 0 if math.isqrt(x.shape[1]) ** 2 == x.shape[1] else 1
        side = math.isqrt(x.shape[1] - alone)
        maps = x[:, alone:].transpose(1, 2).unflatten(2, (side, side))
        y = self.gated(maps).flatten(2).transpose(1, 2)
        if not alone:
            return y
        return torch.cat([self.gated(x[:, 0, :, None, None])[:, None, :, 0, 0], y], 1)

    def gated(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.beta.view(-1, 1, 1) * x + self.bias.view(-1, 1, 1) + self.around(x))
        return x.clamp_min(0) * (2 * gate) if self.rectified else x * gate

    def around(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class DepthwiseSparta(Sparta):
    """Sparta that looks around by a depthwise convolution; with ``own`` = 1 by one kernel for all channels."""

    def __init__(self, own: int, kernel: int, rectified: bool = False) -> None:
        super().__init__(own, rectified)
        self.weight = nn.Parameter(torch.zeros(own, 1, kernel, kernel))

    def around(self, x: Tensor) -> Tensor:
        weight = self.weight.expand(x.shape[1], -1, -1, -1)
        return nn.functional.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])


class SqueezedSparta(Sparta):
    """Sparta that looks around by a depthwise convolution, then 1x1 ones to fewer channels and back."""

    def __init__(self, channels: int, kernel: int, narrow: int, rectified: bool = False) -> None:
        super().__init__(channels, rectified)
        self.weight = nn.Parameter(torch.full((channels, 1, kernel, kernel), 1 / kernel**2))
        self.narrow = nn.Parameter(torch.randn(narrow, channels, 1, 1) / math.sqrt(channels))
        self.wide = nn.Parameter(torch.zeros(channels, narrow, 1, 1))

    def around(self, x: Tensor) -> Tensor:
        y = nn.functional.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2, groups=x.shape[1])
        return nn.functional.conv2d(nn.functional.conv2d(y, self.narrow), self.wide)


class PooledSparta(Sparta):
    """Sparta that looks around by a 3x3 average, then a 1x1 convolution."""

    def __init__(self, channels: int, rectified: bool = False) -> None:
        super().__init__(channels, rectified)
        self.weight = nn.Parameter(torch.zeros(channels, channels, 1, 1))

    def around(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False), self.weight)


class PointwiseSparta(Sparta):
    """Sparta that sees no neighbour: a sum of ``terms`` tanh(x - c_j) in each channel."""

    def __init__(self, channels: int, terms: int, rectified: bool = False) -> None:
        super().__init__(channels, rectified)
        self.weight = nn.Parameter(torch.zeros(channels, terms))
        self.centres = torch.linspace(-3, 3, terms).tolist()

    def around(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for weight, centre in zip(self.weight.unbind(1), self.centres, strict=True):
            y = y + weight.view(-1, 1, 1) * torch.tanh(x - centre)
        return y


class Lossy(nn.Module):
    """A map that loses information; ``level`` 0 is a clipped rectifier, 1 the map itself, ``bound`` its upper end.

    Backwards, where ``value`` is a staircase, the gradient is that of ``slope``: 1 inside [0, u], 0 outside.
    """

    level: Tensor
    stairs = False

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.register_buffer("level", torch.ones(()))
        if learned:
            self.bound = nn.Parameter(torch.tensor(2.33))
        else:
            self.register_buffer("bound", torch.tensor(2.33))

    def forward(self, x: Tensor) -> Tensor:
        u = self.bound.clamp_min(1e-3)
        value = self.value(x, u)
        if not (self.stairs and torch.is_grad_enabled()):
            return value
        slope = self.slope(x, u)
        return value.detach() + (slope - slope.detach())

    def slope(self, x: Tensor, u: Tensor) -> Tensor:
        """A function whose derivative stands for that of ``value``."""
        return x.clamp(torch.zeros_like(u), u)

    def value(self, x: Tensor, u: Tensor) -> Tensor:
        raise NotImplementedError


class ClipQuant(Lossy):
    """Values clipped to [0, u] and rounded to multiples of u / levels."""

    stairs = True

    def __init__(self, levels: int, learned: bool = False) -> None:
        super().__init__(learned)
        self.levels = levels

    def value(self, x: Tensor, u: Tensor) -> Tensor:
        clipped = torch.minimum(x.clamp_min(0), u)
        cell = self.level * u / self.levels
        return torch.where(cell > 0, cell * torch.round(clipped / cell.clamp_min(1e-12)), clipped)


class DeadZone(Lossy):
    """Values less ``threshold`` u, clipped to [0, u]."""

    def __init__(self, threshold: float, learned: bool = False) -> None:
        super().__init__(learned)
        self.threshold = threshold

    def value(self, x: Tensor, u: Tensor) -> Tensor:
        return torch.minimum((x - self.level * (self.threshold * u)).clamp_min(0), u)


class Binary(Lossy):
    """1 above ``threshold`` u, else 0."""

    stairs = True

    def __init__(self, threshold: float, learned: bool = False) -> None:
        super().__init__(learned)
        self.threshold = threshold

    def value(self, x: Tensor, u: Tensor) -> Tensor:
        clipped = torch.minimum(x.clamp_min(0), u)
        return (1 - self.level) * clipped + self.level * torch.ceil((x - self.threshold * u).clamp(0, 1))

    def slope(self, x: Tensor, u: Tensor) -> Tensor:
        return super().slope(x, u) / u.detach()


class SteepSigmoid(Lossy):
    """u sigmoid(steepness (x - threshold u))."""

    def __init__(self, steepness: float, threshold: float, learned: bool = False) -> None:
        super().__init__(learned)
        self.steepness, self.threshold = steepness, threshold

    def value(self, x: Tensor, u: Tensor) -> Tensor:
        return u * torch.sigmoid(self.steepness**self.level * (x - self.threshold * u))


class TopK(Lossy):
    """Of all positive values of an image the share ``keep`` of the largest; the others are 0."""

    def __init__(self, keep: float, learned: bool = False) -> None:
        super().__init__(learned)
        self.keep = keep

    def value(self, x: Tensor, u: Tensor) -> Tensor:
        values = x.clamp_min(0).flatten(1)
        share = 1 - self.level * (1 - self.keep)
        last = (torch.ceil(values.shape[1] * share).long() - 1).clamp_min(0)
        least = values.detach().sort(1, descending=True).values.index_select(1, last.view(1))
        return torch.where(values >= least, values, 0).view_as(x)


# Weights


def read_weights(path: str | Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must have the names, types and shapes of ``expected``."""
    content = bytearray(Path(path).read_bytes())
    body = 8 + int.from_bytes(content[:8], "little")  # eight bytes: the length of the JSON header; header; tensors
    try:
        header = json.loads(content[8:body]) if body <= len(content) else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file, or it is cut short")
    header.pop("__metadata__", None)
    if header.keys() != expected.keys():
        example = min(header.keys() ^ expected.keys())
        raise ValueError(f"{path} holds the weights of another network (for example '{example[:80]}' is in one only)")
    if len(content) - body != sum(tensor.nbytes for tensor in expected.values()):
        raise ValueError(f"{path} has the wrong size: it is cut short or damaged")
    names = {torch.float32: "F32", torch.int64: "I64", torch.int8: "I8", torch.uint8: "U8"}
    tensors = {}
    for name, like in expected.items():
        dtype = names[like.dtype]
        entry = header[name] if isinstance(header[name], dict) else {}
        if (entry.get("dtype"), entry.get("shape")) != (dtype, list(like.shape)):
            raise ValueError(f"{path}: '{name}' is not {dtype} of shape {list(like.shape)}, as the network needs")
        match entry.get("data_offsets"):
            case [int(start), int(end)] if start >= 0 and end - start == like.nbytes and body + end <= len(content):
                data = content[body + start : body + end]
                tensors[name] = torch.frombuffer(data, dtype=like.dtype).view(like.shape)
            case _:
                raise ValueError(f"{path} is damaged: '{name}' does not lie inside the file")
    return tensors
