"""Batch-norm folding: the normalisation after a convolution becomes part of its weights."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nas.compression.dataflow import DataFlow, Step, example_images, trace
from nas.compression.layers import deployed_layers, exchanged
from nas.compression.masks import Mask
from nas.compression.plan import LayerPlan, Plan
from nas.errors import InputError
from nas.objective import Setting


@dataclass(frozen=True)
class BatchNormFolding:
    """Batch-norm folding: normalisations that follow a convolution become part of its weights; nothing is lost.

    With scale s = gamma / sqrt(variance + eps), a normalisation in eval mode of W * x + b is the convolution with
    weights s W (per output channel) and bias (b - mean) s + beta: the same function up to rounding, the practice of
    Jacob et al. (CVPR 2018, arXiv 1712.05877). That holds where the normalisation alone takes the output of the
    convolution, or of several whose outputs stand side by side, and where each is called once. In the networks of cell
    spaces ([ReLU, depthwise, 1x1, BN]) these are all of them. The folded network has no statistics left to train with.

    In eager mode on a CPU, cells then run on torch's own kernels, which is slower: those of this project normalise as
    they compute.
    """

    retrains: ClassVar[bool] = False

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        """Which convolutions of ``model`` take over which normalisation, then the normalisations that stay.

        setting: only the shape of its images counts; without, the network is traced with 32x32 pixels.
        """
        layers = deployed_layers(model)
        if not layers:
            raise InputError("this network has no convolution or linear layer that batch-norm folding may touch")
        norms = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.BatchNorm2d) and not name.startswith("auxiliary.")
        }
        taken: dict[str, dict[str, Any]] = {}
        stay: list[LayerPlan] = []
        if norms:
            flow = trace(model, example_images(model, setting), {**layers, **norms})
            places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
            shared = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
            for name, norm in norms.items():
                fed = _feeding(flow, name)
                reason = _unfit(norm, fed, layers, flow, places, shared)
                if reason:
                    stay.append(LayerPlan(name, "skipped", reason, {}))
                    continue
                start = 0
                for step in fed:
                    assert step.layer is not None
                    stop = start + layers[step.layer].weight.shape[0]
                    taken[step.layer] = {"norm": name, "channels": [start, stop]}
                    start = stop
        plans = []
        for name, layer in layers.items():
            if name in taken:
                plans.append(LayerPlan(name, "replaced", f"takes over {taken[name]['norm']}", taken[name]))
            else:
                kind = "convolution" if isinstance(layer, nn.Conv2d) else "linear layer"
                plans.append(LayerPlan(name, "skipped", f"{kind} without a batch normalisation to take over", {}))
        return Plan("fold_batchnorm", (*plans, *stay))

    @staticmethod
    def apply(plan: Plan, model: nn.Module, *, fit: bool = True) -> nn.Module:
        """A copy of ``model`` with the plan's normalisations in the convolutions before them."""
        compressed = copy.deepcopy(model)
        modules = dict(compressed.named_modules())
        covered: dict[str, list[tuple[int, int]]] = {}
        for layer in plan.layers:
            if layer.name not in modules:
                raise InputError(f"the plan is for another network: there is no layer '{layer.name}'")
            if layer.action != "replaced":
                continue
            convolution, norm, start, stop = _checked(layer, modules)
            covered.setdefault(layer.data["norm"], []).append((start, stop))
            _fold(convolution, norm, slice(start, stop), fit=fit)
        for name, parts in covered.items():
            ends = [0, *(stop for _, stop in sorted(parts))]
            if [start for start, _ in sorted(parts)] != ends[:-1] or ends[-1] != modules[name].num_features:
                raise InputError(f"the plan is for another network: '{name}' would be folded in part only")
            exchanged(compressed, name, nn.Identity())
        return compressed


def _feeding(flow: DataFlow, norm: str) -> list[Step]:
    """The steps whose outputs, side by side, are all that ``norm`` takes, in its one call; none where it has more."""
    calls = flow.calls(norm)
    if len(calls) != 1:
        return []
    before = flow.maker(calls[0].takes[0])
    if before is None or len(flow.takers(calls[0].takes[0])) != 1:
        return []
    if before.operation != "cat":
        return [before]
    found = [flow.maker(value) for value in before.takes if len(flow.takers(value)) == 1]
    return [step for step in found if step is not None] if len(found) == len(before.takes) else []


def _unfit(
    norm: nn.BatchNorm2d, fed: list[Step], layers: dict[str, Any], flow: DataFlow, places: Counter[int],
    shared: Counter[int],
) -> str:  # fmt: skip
    """Why ``norm`` cannot be folded into the steps ``fed``; empty where it can."""
    if norm.running_mean is None or norm.running_var is None:
        return "uses the statistics of the batch"
    if not fed:
        return "is not called once, or something else takes what it takes"
    if not all(isinstance(layers.get(step.layer or ""), nn.Conv2d) for step in fed):
        return "does not directly follow a convolution"
    convolutions = [layers[step.layer or ""] for step in fed]
    if any(len(flow.calls(step.layer or "")) != 1 or places[id(layers[step.layer or ""])] != 1 for step in fed):
        return "follows a convolution that is used twice"
    if any(shared[id(p)] > 1 for module in (norm, *convolutions) for p in module.parameters()):
        return "shares its weights, or the convolution does"
    if sum(convolution.out_channels for convolution in convolutions) != norm.num_features:
        return "takes other channels than those of the convolutions before it"
    if not all(isinstance(part, Mask) for convolution in convolutions for part in _parametrisations(convolution)):
        return "follows a convolution whose weight is computed from something else"
    return ""


def _parametrisations(convolution: nn.Conv2d) -> list[nn.Module]:
    if not parametrize.is_parametrized(convolution):
        return []
    return [part for parts in convolution.parametrizations.values() for part in parts]  # type: ignore[union-attr, operator]


def _checked(layer: LayerPlan, modules: dict[str, nn.Module]) -> tuple[nn.Conv2d, nn.BatchNorm2d, int, int]:
    """Convolution, normalisation and channels of a plan, as far as they fit together."""
    convolution, norm = modules[layer.name], modules.get(str(layer.data.get("norm")))
    match layer.data.get("channels"):
        case [int(start), int(stop)] if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            if 0 <= start < stop <= norm.num_features and stop - start == convolution.out_channels:
                return convolution, norm, start, stop
    raise InputError(f"the plan is for another network: '{layer.name}' cannot take over what it names")


@torch.no_grad()
def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d, channels: slice, *, fit: bool) -> None:
    """Give ``convolution`` the weights and the bias that make ``channels`` of ``norm`` superfluous."""
    parametrised = parametrize.is_parametrized(convolution)
    # A mask stays: masked weights times a factor per channel are masked still.
    weight: Tensor = convolution.parametrizations.weight.original if parametrised else convolution.weight  # type: ignore[union-attr, assignment]
    bias = convolution.bias
    shift = weight.new_zeros(len(weight))
    if fit:
        if norm.running_mean is None or norm.running_var is None:
            raise InputError("a batch normalisation without running statistics cannot be folded")
        # In double precision, so that the only rounding is that of the result.
        scale = torch.rsqrt(norm.running_var[channels].double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight[channels]
        offset = -norm.running_mean[channels].double() if bias is None else bias - norm.running_mean[channels].double()
        offset = offset * scale
        if norm.bias is not None:
            offset = offset + norm.bias[channels]
        weight.copy_(weight * scale.view(-1, 1, 1, 1))
        shift.copy_(offset)
    if bias is None:
        convolution.bias = nn.Parameter(shift, requires_grad=weight.requires_grad)
    else:
        bias.copy_(shift)


PLUGIN = BatchNormFolding
