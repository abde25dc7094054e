"""GDWS: trained convolutions become generalised depthwise-separable ones, without any training after."""

from __future__ import annotations

import base64
import copy
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.pgd import Pgd
from nas.compression.generalised_separable import Choice, most_kernels, separated, shared_out, step_cost
from nas.compression.layers import Layer, deployed_layers, exchanged, kept_dense
from nas.compression.plan import LayerPlan, Plan
from nas.data.split import subset
from nas.errors import InputError
from nas.model_state import crafting
from nas.objective import Attack, Setting
from nas.randomness import generator

MARGIN = 1e-6
"""Added to differences of logits, so that a tie counts much, but not infinitely."""

ROOM = 1 << 25
"""Numbers that the gradients of one layer may take at a time."""


@dataclass(frozen=True)
class Gdws:
    """GDWS: convolutions become gather, depthwise and 1x1, nearest to the trained ones, with no fine-tuning.

    Dbouk & Shanbhag, NeurIPS 2021, arXiv 2110.14871, of which the abstract and the authors' program were read, not the
    body. Input channel c of a layer gets g_c depthwise kernels, those of the largest singular values of its block of
    the weight, which is optimal within a layer. What is lost, sum_c alpha_c |W_c - Q_c|^2, is either minimised within a
    budget or bounded:

    keep: share that stays at most of the numbers in all weights that compete (their multiplications per output pixel
    share it), above 0 and at most 1, spread over the layers greedily (``shared_out``); 0.5 where neither is given.
    error: what may be lost in each layer, at least 0; every layer then takes the fewest kernels within that. Only one
    of the two can be in force. Layers that would not get smaller stay dense.

    step: the kernels of a layer are a multiple of it, but for those of exact rank and for the smallest layers. Engines
    want it: ONNX Runtime takes two to four times as long for channels that are no multiple of 8.

    weights: "unit", alpha = 1; "relative", alpha = 1 / |W|^2 in every layer, the share of its squared norm that is
    lost (not of the paper; with it ``error`` has no unit); or "adversarial", the paper's, from gradients on attacked
    images (``error_weights``), with which an error bounds how often decisions change. The first two need no data; the
    first keeps most in the comparisons made here. For "adversarial": attack makes the images, from
    ``samples`` training images (all, where there are fewer); competitors: classes beside the predicted one that count,
    those of the largest logits, 0 = all; margin: times the median difference between the two largest logits is added to
    all differences (as squares). Without it, margin = 0 as in the paper, a few images near a decision outweigh all
    others: on networks trained on digits, one or two of 1000.
    """

    retrains: ClassVar[bool] = False

    keep: float | None = None
    error: float | None = None
    weights: Literal["unit", "relative", "adversarial"] = "unit"
    samples: int = 1000
    competitors: int = 5
    margin: float = 1.0
    step: int = 8
    attack: Attack = field(default_factory=Pgd)

    def __post_init__(self) -> None:
        if self.keep is not None and self.error is not None:
            raise InputError("keep is a budget and error a bound: give one of them, not both")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise InputError(f"keep must be above 0 and at most 1, not {self.keep}")
        if self.error is not None and not 0 <= self.error < math.inf:
            raise InputError(f"error must be a finite number of at least 0, not {self.error}")
        if self.weights not in ("unit", "relative", "adversarial"):
            raise InputError(f"weights must be 'unit', 'relative' or 'adversarial', not '{self.weights}'")
        if self.samples < 1:
            raise InputError(f"samples must be at least 1, not {self.samples}")
        if self.competitors < 0:
            raise InputError(f"competitors must be at least 0 (0 = all classes), not {self.competitors}")
        if not 1 <= self.step <= 64:
            raise InputError(f"step must be from 1 to 64, not {self.step}")
        if not 0 <= self.margin < math.inf:
            raise InputError(f"margin must be a finite number of at least 0, not {self.margin}")

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        """How many kernels every input channel of every convolution gets."""
        layers = deployed_layers(model)
        if not layers:
            raise InputError("this network has no layer left that gdws may look at")
        reasons = _left_alone(model, layers)
        competing = {n: layer for n, layer in layers.items() if n not in reasons and isinstance(layer, nn.Conv2d)}
        alphas: Mapping[str, Tensor] = {}
        if self.weights == "relative":
            alphas = {name: _share_of_norm(layer) for name, layer in competing.items()}
        if self.weights == "adversarial" and competing:
            alphas = self._alphas(model, competing, setting)
            for name in competing.keys() - alphas.keys():
                reasons[name] = "the network does not call it with one map for each image"
                del competing[name]
        choices = {
            name: Choice.of(layer.weight, layer.groups, alphas.get(name), self.step)
            for name, layer in competing.items()
        }
        steps = self._steps(choices, reasons)
        plans = []
        for name, layer in layers.items():
            found = steps.get(name)
            if found is None:
                plans.append(LayerPlan(name, "skipped", reasons[name], {}))
                continue
            choice = choices[name]
            kernels = choice.kernels(found)
            numbers = _numbers(competing[name], kernels)
            reason = (
                f"{sum(kernels)} kernels, {min(kernels)} to {max(kernels)} a channel: {numbers} numbers "
                f"for {choice.dense}, error {float(choice.errors[found]):.3g}"
            )
            data = {"shape": list(layer.weight.shape), "kernels": _pack(kernels)}
            plans.append(LayerPlan(name, "replaced", reason, data))
        return Plan("gdws", tuple(plans))

    @staticmethod
    def apply(plan: Plan, model: nn.Module, *, fit: bool = True) -> nn.Module:
        """A copy of ``model`` with a ``GeneralisedSeparableConv2d`` in place of each layer that the plan replaces."""
        compressed = copy.deepcopy(model)
        layers = deployed_layers(compressed)
        for layer_plan in plan.layers:
            layer = layers.pop(layer_plan.name, None)
            if layer is None:
                raise InputError(f"the plan is for another network: there is no layer '{layer_plan.name}'")
            if layer_plan.action != "replaced":
                continue
            if not isinstance(layer, nn.Conv2d):
                raise InputError(f"the plan is for another network: '{layer_plan.name}' is no convolution")
            exchanged(compressed, layer_plan.name, separated(layer, _unpack(layer_plan, layer), fit=fit))
        return compressed

    def _steps(self, choices: Mapping[str, Choice], reasons: dict[str, str]) -> dict[str, int | None]:
        """Kernels in each group of each layer; None for one that stays dense, whose reason is added to ``reasons``."""
        found: dict[str, int | None] = {}
        if self.error is not None:
            for name, choice in choices.items():
                steps = choice.steps_within(self.error)
                found[name] = steps if steps <= choice.limit else None
                reasons[name] = (
                    f"break-even: kernels within the error take {steps * choice.cost} numbers, the layer {choice.dense}"
                )
            return found
        keep = 0.5 if self.keep is None else self.keep
        dense = sum(choice.dense for choice in choices.values())
        budget, least = int(keep * dense), sum(choice.cost for choice in choices.values())
        if not choices and keep < 1:
            told = ", ".join(f"{count} x {reason}" for reason, count in Counter(reasons.values()).items())
            raise InputError(f"this network has no layer that gdws could make smaller ({told})")
        if budget < least:
            raise InputError(
                f"keep = {keep} is below what {self.step} kernels for each layer of this network take: keep at least "
                f"{-(-least * 10000 // dense) / 10000}" + (", or lower step" if self.step > 1 else "")
            )
        for name, within in zip(choices, shared_out([*choices.values()], budget), strict=True):
            found[name] = within
            reasons[name] = "break-even: it fits the budget as it is, without error"
        return found

    def _alphas(
        self, model: nn.Module, layers: Mapping[str, nn.Conv2d], setting: Setting | None
    ) -> Mapping[str, Tensor]:
        if setting is None:
            raise InputError("adversarial weights need data: give them, or set weights to 'unit'")
        data, rows = setting.data, setting.split.training
        chosen = subset(data.y_train.cpu()[rows], min(self.samples, len(rows)), generator(setting.seed, "gdws samples"))
        like = next(model.parameters())
        stream = generator(setting.seed, "gdws attack", device=like.device)
        images = []
        for batch in rows[chosen].to(data.x_train.device).split(setting.batch_size):
            x, y = data.x_train[batch].to(like) / 255, data.y_train[batch].to(like.device)
            images.append(self.attack(model, x, y, generator=stream))
        with torch.no_grad(), crafting(model):
            top = torch.cat([model(x) for x in images]).topk(2).values
        floor = self.margin * float((top[:, 0] - top[:, 1]).median())
        sums: dict[str, Tensor] = {}
        for x in images:
            for name, alpha in error_weights(model, layers, x, self.competitors, floor).items():
                sums[name] = sums.get(name, 0) + alpha * (len(x) / len(chosen))
        if not all(bool(alpha.isfinite().all()) for alpha in sums.values()):
            raise InputError("the gradients that gdws weighs errors by are not finite: set weights to 'unit'")
        return sums


def error_weights(
    model: nn.Module, layers: Mapping[str, nn.Conv2d], x: Tensor, competitors: int = 0, floor: float = 0.0
) -> dict[str, Tensor]:
    """alpha [I] of each of ``layers`` that ``model`` calls for ``x`` [N, C, H, W], in eval mode; model is left alone.

    alpha_c = mean over x of sum_j |d(z_a - z_j)/dW_c|^2 / (2 (z_a - z_j)^2 M K2), with a the predicted class, j the
    others (0) or only the ``competitors`` of largest logits. sum_c alpha_c |W_c - Q_c|^2 then bounds, to first order
    and by Chebyshev's inequality, how often random changes of that size in each block change the decision (this reading
    is inferred; the formula is that of the authors' program, where the network is in train mode). floor: its square is
    added to those of the differences, which are 1e-6 larger besides.

    One backward pass a competitor gives the gradients of all samples at every output of a layer; that of a sample's
    own loss with respect to the weight follows from them and the layer's input.
    """
    calls: list[tuple[str, Tensor, Tensor]] = []
    with _probed(layers, len(x), calls), crafting(model), torch.enable_grad():
        logits = model(x)
        if not calls:
            return {}
        probes = [probe for _, _, probe in calls]
        classes = logits.shape[1]
        top = logits.topk(min(competitors or classes, classes - 1) + 1, dim=1).values
        sums: dict[str, Tensor] = {}
        for margin in (top[:, :1] - top[:, 1:]).unbind(1):
            ups = torch.autograd.grad(margin.sum(), probes, retain_graph=True, allow_unused=True)
            scale = 1 / (2 * ((margin.detach().double() + MARGIN).square() + floor**2))
            for name, squares in _squares(layers, calls, ups).items():
                weight = layers[name].weight
                block = weight.shape[0] // layers[name].groups * weight.shape[2:].numel()
                sums[name] = sums.get(name, 0) + (scale[:, None] * squares).mean(0) / block
    return sums


@contextmanager
def _probed(layers: Mapping[str, nn.Conv2d], samples: int, calls: list[tuple[str, Tensor, Tensor]]) -> Iterator[None]:
    """Within it, ``calls`` of ``layers`` with so many maps are noted: name, input, and a zero added to the output.

    It is the zero that is differentiated by: an activation in place may overwrite the output itself.
    """

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            probe = torch.zeros_like(output, requires_grad=True)
            if args[0].dim() == 4 and len(args[0]) == samples:
                calls.append((name, args[0].detach(), probe))
            return output + probe

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _squares(
    layers: Mapping[str, nn.Conv2d], calls: list[tuple[str, Tensor, Tensor]], ups: tuple[Tensor | None, ...]
) -> dict[str, Tensor]:
    """|dz/dW_c|^2 of each sample and block, [N, I] by layer, from the gradients ``ups`` at the outputs of ``calls``."""
    found = {}
    for name in dict.fromkeys(name for name, _, _ in calls):
        layer = layers[name]
        own = [(x, up) for (called, x, _), up in zip(calls, ups, strict=True) if called == name and up is not None]
        if not own:  # nothing of it reaches the logits
            found[name] = torch.zeros(1, layer.in_channels, device=layer.weight.device)
            continue
        taps = layer.in_channels * layer.weight.shape[2:].numel()
        most = taps * max(layer.out_channels // layer.groups, *(up.shape[2:].numel() for _, up in own))
        parts = [zip(x.split(max(1, ROOM // most)), up.split(max(1, ROOM // most)), strict=True) for x, up in own]
        found[name] = torch.cat([_squares_of(layer, part) for part in zip(*parts, strict=True)])
    return found


def _squares_of(layer: nn.Conv2d, calls: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """|dz/dW_c|^2 of each sample and block [n, I]; calls: input of ``layer`` and gradient at its output."""
    gradient: Tensor | None = None
    for x, up in calls:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
        columns = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).unflatten(1, (layer.groups, -1))
        up = up.flatten(2).unflatten(1, (layer.groups, -1))
        if len(calls) == 1 and up.shape[3] < up.shape[2]:
            # Fewer pixels than outputs: the same sum over outputs without the gradient itself.
            squares = ((columns @ (up.transpose(2, 3) @ up)) * columns).sum(3)
            break
        product = up @ columns.transpose(2, 3)
        gradient = product if gradient is None else gradient + product
        squares = gradient.square().sum(2)
    return squares.unflatten(2, (layer.in_channels // layer.groups, -1)).sum(3).flatten(1)


def _left_alone(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Layers that do not compete, with the reason."""
    reasons = kept_dense(layers)
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for name, layer in layers.items():
        if name in reasons:
            continue
        if not isinstance(layer, nn.Conv2d):
            reasons[name] = "linear layer"
        elif layer.weight.shape[2:].numel() == 1:
            reasons[name] = "1x1 convolution: no kernel to separate"
        elif layer.weight.shape[1] == 1:
            reasons[name] = "depthwise convolution: already separate"
        elif (type(layer).forward, type(layer)._conv_forward) != (nn.Conv2d.forward, nn.Conv2d._conv_forward):
            reasons[name] = f"{type(layer).__name__} has a forward pass of its own"
        elif any(users[id(parameter)] > 1 for parameter in layer.parameters()):
            reasons[name] = "shares its weight with another layer"
    return reasons


def _numbers(layer: nn.Conv2d, kernels: list[int]) -> int:
    """In the weights that stand in place of those of ``layer``."""
    return sum(kernels) // layer.groups * step_cost(layer.weight.shape, layer.groups)


def _share_of_norm(layer: nn.Conv2d) -> Tensor:
    """alpha [I] with which the error is a share of the squared norm of the weight; 0 where that is 0."""
    norm = layer.weight.detach().double().square().sum()
    return torch.where(norm > 0, 1 / norm, 0.0).expand(layer.in_channels)


def _pack(kernels: list[int]) -> str:
    return base64.b64encode(zlib.compress(np.array(kernels, "<u4").tobytes(), 9)).decode()


def _unpack(plan: LayerPlan, layer: nn.Conv2d) -> list[int]:
    """g_c of each input channel in the plan's data. Raises ``InputError`` where they are not possible for ``layer``."""
    shape, channels = list(layer.weight.shape), layer.in_channels
    if plan.data.get("shape") != shape:
        raise InputError(f"the plan is for another network: '{plan.name}' has shape {shape}, its kernels another one")
    try:
        # The size is known from the network: a bomb cannot unfold beyond it. A stream of another length is damaged.
        stream = zlib.decompressobj()
        unfolded = stream.decompress(base64.b64decode(plan.data["kernels"], validate=True), 4 * channels + 1)
        if not stream.eof or len(unfolded) != 4 * channels:
            raise ValueError("not one number for each channel")
        kernels = np.frombuffer(unfolded, "<u4").astype(np.int64)
    except (KeyError, TypeError, ValueError, zlib.error):
        raise InputError(f"the plan's kernels of layer '{plan.name}' are damaged") from None
    most, sums = most_kernels(shape, layer.groups), kernels.reshape(layer.groups, -1).sum(1)
    if kernels.max() > most or sums[0] < 1 or (sums != sums[0]).any():
        raise InputError(
            f"the plan's kernels of layer '{plan.name}' are not possible: at most {most} a channel, at least one in "
            "each group, and in each group as many"
        )
    return [int(count) for count in kernels]


PLUGIN = Gdws
