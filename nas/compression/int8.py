"""Post-training quantisation to int8: a differentiable twin of the network, and the QDQ graph that engines run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.compression.dataflow import DataFlow, example_images, trace
from nas.compression.fold_batchnorm import BatchNormFolding
from nas.compression.layers import Layer, deployed_layers, exchanged
from nas.compression.masks import kept_by_masks
from nas.compression.plan import LayerPlan, Plan
from nas.errors import InputError
from nas.model_state import evaluating
from nas.objective import Attack, Setting
from nas.randomness import generator

LEVELS = 255
"""Steps of an activation, stored as uint8 from 0 to 255."""
LARGEST = 127
"""Of a weight, stored as int8 from -127 to 127."""
BINS = 2048
"""Of the histograms from which "percentile" and "mse" find their ranges."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Int8Quantisation:
    """Post-training int8 quantisation of all convolutions and linear layers, batch norm folded in first.

    Weights are symmetric per output channel (step max|w| / 127), biases int32, activations affine per tensor (256
    levels between the ends of a range that holds 0), as Jacob et al. (CVPR 2018, arXiv 1712.05877) and ONNX define
    them. The compressed network computes in floating point what an int8 engine computes, rounding straight through
    (clipped values get no gradient), so that it can be attacked and trained; ``torch.onnx.export`` makes of it the QDQ
    graph (QuantizeLinear, DequantizeLinear) that ONNX Runtime carries out in int8. Quantisation is no defence: rounding
    masks gradients, so transfer the attacks of the parent too.

    ranges: how the range of an activation follows from what the calibration images give: the extremes ("minmax"), with
    ``percentile`` of all values on each side ("percentile"), or the one with the least mean squared error among scaled
    extremes ("mse").  images: how many training images calibrate, drawn by the seed of the setting.  attack: makes
    adversarial images of them that calibrate too, because these drive activations further than natural ones.
    """

    retrains: ClassVar[bool] = False

    ranges: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: float = 99.99
    images: int = 512
    attack: Attack = field(default_factory=Pgd)

    def __post_init__(self) -> None:
        if self.ranges not in ("minmax", "percentile", "mse"):
            raise InputError(f"ranges must be 'minmax', 'percentile' or 'mse', not '{self.ranges}'")
        if not 50 < self.percentile <= 100:
            raise InputError(f"percentile must be above 50 and at most 100, not {self.percentile}")
        if self.images < 1:
            raise InputError(f"calibration needs at least 1 image, not {self.images}")

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        """Which layers of ``model`` become int8, with the ranges of what they take and give."""
        if not deployed_layers(model):
            raise InputError("this network has no convolution or linear layer left that int8 may touch")
        if setting is None:
            raise InputError("int8 calibrates activations on training images: give the data set")
        folding = BatchNormFolding().plan(model, setting)
        folded = folding.apply(model).eval()
        layers = deployed_layers(folded)
        flow = trace(folded, example_images(folded, setting), layers)
        called = {name: layer for name, layer in layers.items() if flow.calls(name)}
        if not called:
            raise InputError("this network calls no convolution or linear layer that int8 may touch")
        outputs = {name: _rectified(flow, name) for name in called if _needs_output(flow, name, called)}
        ranges = self._ranges(model, folded, called, outputs, setting)
        plans = []
        for layer in folding.layers:
            if layer.name in called:
                low, high = ranges[layer.name, "input"]
                given = ranges.get((layer.name, "output"))
                data = {**layer.data, "input": [low, high], "output": None if given is None else [*given]}
                plans.append(LayerPlan(layer.name, "replaced", f"int8, takes {low:.3g} to {high:.3g}", data))
            else:
                reason = "only its weight is used, within another layer" if layer.name in layers else layer.reason
                plans.append(LayerPlan(layer.name, "skipped", reason, {}))
        return Plan("int8", tuple(plans))

    @staticmethod
    def apply(plan: Plan, model: nn.Module, *, fit: bool = True) -> nn.Module:
        """A copy of ``model`` with the plan's layers quantised."""
        entries = ("norm", "channels")
        folding = [
            replace(layer, action="replaced" if "norm" in layer.data else "skipped",
                    data={key: layer.data[key] for key in entries if key in layer.data})
            for layer in plan.layers
        ]  # fmt: skip
        compressed = BatchNormFolding.apply(Plan("fold_batchnorm", tuple(folding)), model, fit=fit)
        layers = deployed_layers(compressed)
        for layer_plan in plan.layers:
            if layer_plan.action != "replaced":
                continue
            name, layer = layer_plan.name, layers.get(layer_plan.name)
            if layer is None:
                raise InputError(f"the plan is for another network: there is no layer '{name}'")
            taken = _checked(layer_plan, "input")
            given = None if layer_plan.data.get("output") is None else _checked(layer_plan, "output")
            kind = QuantisedConv2d if isinstance(layer, nn.Conv2d) else QuantisedLinear
            exchanged(compressed, name, kind(layer, taken, given).train(layer.training))  # type: ignore[arg-type]
        return compressed

    def _ranges(
        self, model: nn.Module, folded: nn.Module, layers: Mapping[str, Layer], outputs: Mapping[str, bool],
        setting: Setting,
    ) -> dict[tuple[str, str], Range]:  # fmt: skip
        """Range of everything to quantise, by layer and side.

        outputs: whose results are quantised too, and whether only ReLUs take them.
        """
        batches = self._calibration(model, setting)
        extremes: dict[tuple[str, str], Range] = {}

        def widen(key: tuple[str, str], values: Tensor) -> None:
            low, high = extremes.get(key, (0.0, 0.0))
            least, most = float(values.min()), float(values.max())
            if not (math.isfinite(least) and math.isfinite(most)):
                raise InputError(f"'{key[0]}' does not take and give finite values: it cannot be quantised")
            extremes[key] = min(low, least), max(high, most)

        with _watched(layers, outputs, widen):
            _pass(folded, batches)
        if self.ranges == "minmax":
            return extremes
        counts: dict[tuple[str, str], Tensor] = {}

        def count(key: tuple[str, str], values: Tensor) -> None:
            low, high = extremes[key]
            if low < high:
                found = torch.histc(values.float(), BINS, low, high).double().cpu()
                counts[key] = counts[key] + found if key in counts else found

        with _watched(layers, outputs, count):
            _pass(folded, batches)
        if self.ranges == "percentile":
            clipped = {key: _percentile(extremes[key], found, self.percentile / 100) for key, found in counts.items()}
        else:
            clipped = {key: _least_error(extremes[key], found) for key, found in counts.items()}
        return {**extremes, **clipped}

    def _calibration(self, model: nn.Module, setting: Setting) -> list[Tensor]:
        """Batches of clean and adversarial training images."""
        rows, device = setting.split.training, setting.data.x_train.device
        order = torch.randperm(len(rows), generator=generator(setting.seed, "int8 images"))[: self.images]
        streams = generator(setting.seed, "int8 attack", device=device)
        like = next(model.parameters())
        batches = []
        for chosen in rows[order.sort().values].to(device).split(setting.batch_size):
            x = setting.data.x_train[chosen].to(like.dtype) / 255
            y = setting.data.y_train[chosen]
            batches += [x, self.attack(model, x, y, generator=streams).detach()]
        return batches


class FakeQuantise(nn.Module):
    """Values rounded to 256 levels, of which one is 0; beyond the ends they are clipped and get no gradient."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, ends: Range) -> None:
        super().__init__()
        scale, zero_point = levels(ends)
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.float()
        if torch.onnx.is_in_onnx_export():
            return _as_onnx(x, scale, self.zero_point)
        if x.is_meta:  # which torch's kernel does not know: only shapes are asked for
            return x.clone()
        return torch.fake_quantize_per_tensor_affine(x, scale, self.zero_point.int(), 0, LEVELS)


class _Weights(nn.Module):
    """Weight and bias of a layer on their int8 and int32 grids: ``forward()`` gives both.

    mask: which weights masks of the layer leave, None without any. Masked weights are zeros and, getting no gradient,
    stay so.
    """

    scale: Tensor
    zero_point: Tensor
    mask: Tensor | None

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        weight = layer.weight.detach().clone()
        self.weight = nn.Parameter(weight, requires_grad=_trained(layer))
        self.bias = None if layer.bias is None else copy.deepcopy(layer.bias)
        largest = weight.abs().flatten(1).amax(1).float()
        # A channel of zeros has no step of its own; so does one whose weights are too small for a step.
        scale = torch.where(largest > 1e-30, largest / LARGEST, torch.ones_like(largest))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(len(weight), dtype=torch.int8, device=weight.device))
        # Of the plans before this one, which are applied whenever it is.
        self.register_buffer("mask", kept_by_masks(layer), persistent=False)

    def forward(self, x_scale: Tensor) -> tuple[Tensor, Tensor | None]:
        scale = self.scale.float()
        if torch.onnx.is_in_onnx_export():
            weight = _as_onnx(self.weight, scale, self.zero_point, axis=0)
        elif self.weight.is_meta:
            weight = self.weight
        else:
            trained = torch.is_grad_enabled() and self.weight.requires_grad
            weight = self.weight * self.mask if trained and self.mask is not None else self.weight
            zero_point = self.zero_point.int()
            weight = torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -LARGEST - 1, LARGEST)
        if self.bias is None:
            return weight, None
        # The accumulator of an engine counts in steps of input times weight.
        step = (scale * x_scale.float()).to(self.bias.dtype)
        rounded = torch.round(self.bias.detach() / step) * step
        return weight, rounded + (self.bias - self.bias.detach())


class QuantisedConv2d(nn.Module):
    """An int8 convolution in floating point; output: whether, and to what range, its result is quantised too."""

    def __init__(self, layer: nn.Conv2d, taken: Range, given: Range | None) -> None:
        super().__init__()
        device = layer.weight.device
        self.weights = _Weights(layer)
        self.input = FakeQuantise(taken).to(device)
        self.output = None if given is None else FakeQuantise(given).to(device)
        self.stride, self.padding, self.dilation = layer.stride, layer.padding, layer.dilation
        self.groups, self.padding_mode = layer.groups, layer.padding_mode
        self.around: list[int] = layer._reversed_padding_repeated_twice

    def forward(self, x: Tensor) -> Tensor:
        x, (weight, bias) = self.input(x), self.weights(self.input.scale)
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.around, mode=self.padding_mode), (0, 0)
        y = F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        return y if self.output is None else self.output(y)

    def stored_bytes(self, *, sparse: bool = False) -> int:
        """Of the integers an engine takes, and their steps (``nas.compression.size``)."""
        return _stored(self, sparse)

    def extra_repr(self) -> str:
        return f"{tuple(self.weights.weight.shape)}, stride={self.stride}, padding={self.padding}, groups={self.groups}"


class QuantisedLinear(nn.Module):
    """An int8 linear layer in floating point."""

    def __init__(self, layer: nn.Linear, taken: Range, given: Range | None) -> None:
        super().__init__()
        device = layer.weight.device
        self.weights = _Weights(layer)
        self.input = FakeQuantise(taken).to(device)
        self.output = None if given is None else FakeQuantise(given).to(device)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.input(x), *self.weights(self.input.scale))
        return y if self.output is None else self.output(y)

    def stored_bytes(self, *, sparse: bool = False) -> int:
        """Of the integers an engine takes, and their steps (``nas.compression.size``)."""
        return _stored(self, sparse)

    def extra_repr(self) -> str:
        return f"{tuple(self.weights.weight.shape)}"


def _stored(layer: QuantisedConv2d | QuantisedLinear, sparse: bool) -> int:
    """int8 weights, int32 biases, a float32 step for each output, and step and zero point of each activation.

    sparse: of masked weights those that are left, and one bit for each place, where that is less.
    """
    weight, bias, mask = layer.weights.weight, layer.weights.bias, layer.weights.mask
    activations = 1 if layer.output is None else 2
    integers = weight.numel()
    if sparse and mask is not None:
        integers = min(integers, int(mask.sum()) + -(-mask.numel() // 8))
    return integers + 4 * len(weight) + (0 if bias is None else 4 * bias.numel()) + 5 * activations


def _as_onnx(x: Tensor, scale: Tensor, zero_point: Tensor, **attributes: Any) -> Tensor:
    """The same in operators of ONNX: whether torch exports its own depends on whether anything requires gradients."""
    integers = torch.onnx.ops.symbolic(
        "QuantizeLinear", (x, scale, zero_point), attributes, dtype=zero_point.dtype, shape=x.shape
    )
    y = torch.onnx.ops.symbolic(
        "DequantizeLinear", (integers, scale, zero_point), attributes, dtype=scale.dtype, shape=x.shape
    )
    assert isinstance(y, Tensor)
    return y


def levels(ends: Range) -> tuple[float, int]:
    """Step and zero point of 256 levels between the ends of a range, which is widened to hold 0."""
    low, high = min(ends[0], 0.0), max(ends[1], 0.0)
    scale = (high - low) / LEVELS
    if scale < 1e-30:  # nothing but zeros ever came
        return 1.0, 0
    return scale, min(max(round(-low / scale), 0), LEVELS)


def _trained(layer: Layer) -> bool:
    return next(layer.parameters()).requires_grad


PASSING = {
    "relu",
    "relu_",
    "max_pool2d_with_indices",
    "view",
    "_unsafe_view",
    "reshape",
    "permute",
    "transpose",
    "clone",
}
"""Operations that give the same whether values are rounded before or after (ReLU, because 0 is a level)."""


def _needs_output(flow: DataFlow, name: str, quantised: Mapping[str, Layer]) -> bool:
    """Whether a convolution has to round its own result, because something takes it that does not round what it takes.

    Engines convolve in int8 only where the result is rounded too; matrix products give floating point as well.
    """
    if isinstance(quantised[name], nn.Linear):
        return False
    values = [value for call in flow.calls(name) for value in call.makes]
    while values:
        for step in flow.takers(values.pop()):
            if step is not None and step.layer in quantised:
                continue
            if step is None or step.operation not in PASSING:
                return True
            values.append(step.makes[0])
    return False


def _rectified(flow: DataFlow, name: str) -> bool:
    """Whether only ReLUs take what ``name`` gives: values below 0 then need no level."""
    takers = [step for call in flow.calls(name) for value in call.makes for step in flow.takers(value)]
    return all(step is not None and step.operation in ("relu", "relu_") for step in takers)


@contextmanager
def _watched(layers: Mapping[str, Layer], outputs: Mapping[str, bool], see: Any) -> Iterator[None]:
    """Within it, ``see((layer, side), values)`` gets everything that is to be quantised."""

    def look(name: str, given: tuple[Tensor, ...], y: Tensor) -> None:
        see((name, "input"), given[0])
        if name in outputs:
            see((name, "output"), torch.relu(y) if outputs[name] else y)

    handles = [
        layer.register_forward_hook(lambda module, given, y, name=name: look(name, given, y))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _pass(model: nn.Module, batches: list[Tensor]) -> None:
    with evaluating(model):
        for batch in batches:
            model(batch)


def _percentile(extremes: Range, counts: Tensor, share: float) -> Range:
    """Ends beyond which, on each side, a part 1 - share of the values lies, to the width of a bin."""
    low, high = extremes
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    below = counts.cumsum(0) / counts.sum()
    first = int((below > 1 - share).nonzero()[0])
    last = int((below >= share).nonzero()[0])
    return min(float(edges[first]), 0.0), max(float(edges[last + 1]), 0.0)


def _least_error(extremes: Range, counts: Tensor) -> Range:
    """The extremes times the factor, in hundredths, with which rounding has the least squared error."""
    low, high = extremes
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    centres = (edges[1:] + edges[:-1]) / 2
    best, least = extremes, math.inf
    for hundredths in range(100, 0, -1):
        ends = low * hundredths / 100, high * hundredths / 100
        scale, zero_point = levels(ends)
        rounded = ((centres / scale).round().add(zero_point).clamp(0, LEVELS) - zero_point) * scale
        error = float((counts * (centres - rounded).square()).sum())
        if error < least:
            best, least = ends, error
    return best


def _checked(layer: LayerPlan, side: str) -> Range:
    match layer.data.get(side):
        case [float() | int() as low, float() | int() as high] if low <= 0 <= high and high - low < 1e30:
            return float(low), float(high)
    raise InputError(f"the plan's {side} range of layer '{layer.name}' is damaged")


PLUGIN = Int8Quantisation
