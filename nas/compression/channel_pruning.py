"""Structured channel pruning: whole channels go, with everything that depends on them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nas.attacks.pgd import Pgd
from nas.compression.dataflow import example_images, trace
from nas.compression.generalised_separable import GeneralisedSeparableConv2d
from nas.compression.layers import deployed_layers, exchanged, kept_dense
from nas.compression.masks import Mask
from nas.compression.packing import pack, unpack
from nas.compression.plan import LayerPlan, Plan
from nas.errors import InputError
from nas.model_state import evaluating
from nas.objective import Attack, Setting
from nas.randomness import generator

Sliced = nn.Conv2d | nn.Linear | nn.BatchNorm2d
"""Modules that channels are taken from."""

SIDES = ("outputs", "inputs")

Place = tuple[str, str, int]
"""A channel of a module: its name, its side (of depthwise convolutions and norms there are only outputs), the index."""

Channel = set[Place]
"""Places that can only be removed together."""


@dataclass(frozen=True)
class ChannelPruning:
    """Structured channel pruning: the least important channels go, in all layers that have to agree on them.

    Layers whose channels meet in an addition, a concatenation or a depthwise convolution form a group, found in the
    graph of one pass by Torch-Pruning (DepGraph: Fang et al., CVPR 2023, arXiv 2301.12900); of a group whole channels
    are removed. What remains is a smaller dense network, which is faster on any hardware. The classes and the channels
    of images stay, as do groups with layer normalisation, attention or parameters of their own, grouped convolutions
    and layers that are called twice; every layer keeps at least one channel.

    keep: share of the parameters of the whole deployed network that stays at most, above 0 and at most 1.
    importance: of a channel, "magnitude": mean over the layers of its group of the squared norm of its weights;
    "taylor": of |w dL/dw| summed over its weights (Molchanov et al., CVPR 2019, arXiv 1906.10771), L the loss on
    ``images`` training images under ``attack``.  scope: "layer" takes the same share of channels from every group,
    "network" ranks the channels of all groups together, by importance over the mean of their group.  step: every
    layer keeps a multiple of it, and those of no more channels keep all: 8 suits engines whose kernels want that many.
    With scope "network", layers that consist of halves may not: each half keeps a multiple.
    """

    retrains: ClassVar[bool] = True

    keep: float = 0.5
    importance: Literal["magnitude", "taylor"] = "magnitude"
    scope: Literal["layer", "network"] = "layer"
    images: int = 256
    attack: Attack = field(default_factory=Pgd)
    step: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError(f"keep must be above 0 and at most 1, not {self.keep}")
        if self.importance not in ("magnitude", "taylor"):
            raise InputError(f"importance must be 'magnitude' or 'taylor', not '{self.importance}'")
        if self.scope not in ("layer", "network"):
            raise InputError(f"scope must be 'layer' or 'network', not '{self.scope}'")
        if self.images < 1:
            raise InputError(f"importance needs at least 1 image, not {self.images}")
        if self.step < 1:
            raise InputError(f"step must be at least 1 channel, not {self.step}")

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        """Which channels of ``model`` stay. setting: only "taylor" needs more of it than the shape of its images."""
        deployed = deployed_layers(model)
        if not deployed:
            raise InputError("this network has no convolution or linear layer that channel pruning may touch")
        if any(isinstance(module, GeneralisedSeparableConv2d) for module in model.modules()):
            raise InputError("channels cannot be pruned after gdws, which repeats them: prune channels before")
        if self.importance == "taylor" and setting is None:
            raise InputError("importance 'taylor' needs training images: give the data set")
        images = example_images(model, setting)
        network = _unparametrised(model)
        groups, reasons = _groups(network, images, _untouchable(model, network, images))
        if not groups:
            raise InputError("no channel of this network can be removed: all are tied to something that must stay")
        strengths = self._strengths(model, network, setting)
        layers = {name: m for name, m in network.named_modules() if isinstance(m, Sliced)}
        kept = _Kept(layers)
        total = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary."))
        surplus = total - self.keep * total
        for channels in _order(groups, strengths, kept.shapes, self.scope, self.step):
            if surplus <= 0:
                break
            if not kept.is_last(channels):
                surplus -= kept.remove(channels)
        if surplus > 0:
            least = (self.keep * total + surplus) / total
            left = "a channel" if self.step == 1 else f"{self.step} channels"
            raise InputError(
                f"keep = {self.keep:g} cannot be reached: with {left} left in every layer {least:.3g} stays"
            )
        plans = []
        for name in layers:
            sides = {side: mask for side, mask in kept.masks[name].items() if not bool(mask.all())}
            if sides:
                told = " and ".join(f"{int(mask.sum())} of {len(mask)} {side}" for side, mask in sides.items())
                data = {"shape": kept.shapes[name], **{side: pack(mask) for side, mask in sides.items()}}
                plans.append(LayerPlan(name, "replaced", f"{told} kept", data))
            elif name in deployed:
                plans.append(LayerPlan(name, "skipped", reasons.get(name, "all channels are kept"), {}))
        plan = Plan("channel_pruning", tuple(plans))
        with evaluating(model), torch.no_grad():
            expected = model(images)
            if plan.apply(model).eval()(images).shape != expected.shape:
                raise InputError("the channels of this network cannot be told apart: pruned, it gives another output")
        return plan

    @staticmethod
    def apply(plan: Plan, model: nn.Module, *, fit: bool = True) -> nn.Module:
        """A copy of ``model`` in which only the plan's channels are left."""
        compressed = copy.deepcopy(model)
        modules = dict(compressed.named_modules())
        for layer in plan.layers:
            module = modules.get(layer.name)
            if module is None:
                raise InputError(f"the plan is for another network: there is no layer '{layer.name}'")
            if layer.action != "replaced":
                continue
            if not isinstance(module, Sliced) or layer.data.get("shape") != _shape(module):
                raise InputError(f"the plan is for another network: '{layer.name}' has another shape")
            outputs, inputs = (
                unpack(layer.data[side], torch.Size([count]), layer.name) if side in layer.data else None
                for side, count in zip(SIDES, (*_shape(module), 0), strict=False)
            )
            if any(mask is not None and not bool(mask.any()) for mask in (outputs, inputs)):
                raise InputError(f"the plan's mask of layer '{layer.name}' is damaged")
            _slice(module, outputs, inputs)
        return compressed

    def _strengths(self, model: nn.Module, network: nn.Module, setting: Setting | None) -> dict[str, Tensor]:
        """By module, what each weight contributes to the importance of its channels."""
        modules = {
            name: m
            for name, m in network.named_modules()
            if isinstance(m, Sliced) and m.weight is not None and not name.startswith("auxiliary.")
        }
        if self.importance == "magnitude":
            return {name: module.weight.detach().square() for name, module in modules.items()}
        assert setting is not None
        weights = [module.weight for module in modules.values()]
        sums = [torch.zeros_like(weight) for weight in weights]
        device = setting.data.x_train.device
        rows = setting.split.training
        order = torch.randperm(len(rows), generator=generator(setting.seed, "channel pruning images"))[: self.images]
        streams = generator(setting.seed, "channel pruning attack", device=device)
        for chosen in rows[order.sort().values].to(device).split(setting.batch_size):
            x, y = setting.data.x_train[chosen].to(weights[0].dtype) / 255, setting.data.y_train[chosen]
            x = self.attack(model, x, y, generator=streams)
            loss = F.cross_entropy(network(x), y, reduction="sum")
            for total, gradient in zip(sums, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                total += 0 if gradient is None else gradient
        return {
            name: (weight.detach() * total).abs() for name, weight, total in zip(modules, weights, sums, strict=True)
        }


class _Kept:
    """Which channels of each module are still there."""

    def __init__(self, layers: Mapping[str, Sliced]) -> None:
        self.shapes = {name: _shape(layer) for name, layer in layers.items()}
        self.masks = {
            name: {side: torch.ones(count, dtype=torch.bool) for side, count in zip(SIDES, shape, strict=False)}
            for name, shape in self.shapes.items()
        }
        self.counts = {name: [*shape] for name, shape in self.shapes.items()}
        # Parameters for each pair of output and input, and for each output.
        self.pair = {
            name: layer.weight[0, 0].numel() if layer.weight.dim() > 1 else 0 for name, layer in layers.items()
        }
        self.single = {
            name: sum(len(p) for p in layer.parameters() if p.dim() == 1) // self.shapes[name][0]
            for name, layer in layers.items()
        }

    def is_last(self, channels: Channel) -> bool:
        """Whether a module would have nothing left without ``channels``."""
        gone = Counter((name, side) for name, side, _ in channels)
        return any(self.counts[name][SIDES.index(side)] <= count for (name, side), count in gone.items())

    def remove(self, channels: Channel) -> int:
        """Remove all places of channels; how many parameters of the deployed network go with them."""
        names = {name for name, _, _ in channels}
        before = sum(map(self._size, names))
        for name, side, index in channels:
            self.masks[name][side][index] = False
            self.counts[name][SIDES.index(side)] -= 1
        return before - sum(map(self._size, names))

    def _size(self, name: str) -> int:
        if name.startswith("auxiliary."):
            return 0
        outputs, inputs = (*self.counts[name], 1)[:2]
        return outputs * (inputs * self.pair[name] + self.single[name])


def _order(
    groups: Sequence[Sequence[Channel]],
    strengths: Mapping[str, Tensor],
    shapes: Mapping[str, list[int]],
    scope: str,
    step: int,
) -> Iterator[Channel]:
    """Channels from the least important to the most important one, as many of a group at once as leave its step."""
    sums: dict[tuple[str, str], list[float]] = {}
    for name, strength in strengths.items():
        sums[name, "outputs"] = (strength.flatten(1).sum(1) if strength.dim() > 1 else strength).tolist()
        if strength.dim() > 1:
            sums[name, "inputs"] = strength.transpose(0, 1).flatten(1).sum(1).tolist()
    order: dict[tuple[float, str, int], Channel] = {}
    for group in groups:
        places = [[sums[name, side][i] for name, side, i in channel if (name, side) in sums] for channel in group]
        scores = [sum(values) / max(len(values), 1) for values in places]
        mean = sum(scores) / len(scores) or 1.0
        turns, ranked = _turns(group, shapes), sorted(range(len(group)), key=scores.__getitem__)
        layer, width = _widest(group, shapes)[:2]
        # The halves of a layer go at once, so that each has to keep a multiple of half a step only.
        together = step > 1 and scope == "layer" and step * len(group) % width == 0
        own = step * len(group) // width if together else step
        stops = [stop for stop in range(len(group) % own or own, len(group) + 1, own) if len(group) > own]
        for start, stop in zip([0, *stops], stops, strict=False):
            chosen = ranked[start:stop]
            turn = turns[stop - 1] if scope == "layer" else sum(scores[i] for i in chosen) / len(chosen) / mean
            key = (stop / len(group), layer, -1) if together else (turn, "", len(order))
            order.setdefault(key, set()).update(*(group[i] for i in chosen))
    for key in sorted(order, key=lambda key: key[0]):
        yield order[key]


def _turns(group: Sequence[Channel], shapes: Mapping[str, list[int]]) -> list[float]:
    """The shares of all channels at which one of ``group`` goes after the other.

    They are counted in the widest layer that the group is a part of: layers that were equally wide stay so, and so do
    the halves of one that is put together of two, as the native kernels of cells need it.
    """
    _, width, start, stop = _widest(group, shapes)
    if stop - start != len(group):
        return [(rank + 1) / len(group) for rank in range(len(group))]

    def left(count: int) -> int:
        # Of ``count`` channels of the layer; both ends rounded half up.
        return (2 * count * stop + width) // (2 * width) - (2 * count * start + width) // (2 * width)

    return [gone / width for gone in range(1, width + 1) if left(width - gone) < left(width - gone + 1)]


def _widest(group: Sequence[Channel], shapes: Mapping[str, list[int]]) -> tuple[str, int, int, int]:
    """The widest layer that ``group`` is a part of, its width, and from where to where the group's channels lie."""
    spans: dict[str, list[int]] = {}
    for channel in group:
        for name, side, index in channel:
            if side == "outputs":
                spans.setdefault(name, []).append(index)
    widest = max(spans, key=lambda name: (shapes[name][0], name))
    return widest, shapes[widest][0], min(spans[widest]), max(spans[widest]) + 1


def _unparametrised(model: nn.Module) -> nn.Module:
    """A copy with the weights that the network uses, all of which can get gradients, in eval mode."""
    network = copy.deepcopy(model).eval()
    for name, module in [*network.named_modules()]:
        if isinstance(module, nn.Conv2d | nn.Linear) and parametrize.is_parametrized(module):
            # Not by torch.nn.utils.parametrize, which would take the weight from the class, shared with the model.
            kind: Any = type(module).__bases__[0]
            plain = kind.__new__(kind)
            parametrised: Any = module.parametrizations
            weights = {given: nn.Parameter(getattr(module, given).detach()) for given in parametrised}
            parameters = {**module._parameters, **weights}
            vars(plain).update({**vars(module), "_parameters": parameters, "_modules": {}})
            exchanged(network, name, plain)
    return network.requires_grad_(True)


def _groups(network: nn.Module, images: Tensor, fixed: dict[str, str]) -> tuple[list[list[Channel]], dict[str, str]]:
    """The groups of channels that can be removed, and why layers are in none.

    fixed: layers none of whose channels can be removed, with the reason.
    """
    import torch_pruning

    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(
            network, images, forward_fn=_with_auxiliary, verbose=False
        )
    names = {module: name for name, module in network.named_modules()}
    last = [name for name, reason in kept_dense(deployed_layers(network)).items() if reason == "classifier"]
    groups: list[list[Channel]] = []
    reasons = dict(fixed)
    taken: set[Place] = set()
    for found in graph.get_all_groups():
        channels: dict[int, Channel] = {}
        reason = ""
        for item in found:
            module = item.dep.target.module
            if type(module).__module__.startswith("torch_pruning"):
                if type(module).__name__ == "_OutputOp":
                    reason = reason or "its channels are the result"
                if type(module).__name__ == "_SplitOp":
                    reason = reason or "its channels are cut into parts"
                continue
            if not isinstance(module, Sliced):
                kind = "a parameter" if isinstance(module, nn.Parameter) else type(module).__name__
                reason = reason or f"its channels are tied to {kind}"
                continue
            name = names[module]
            inputs = item.dep.handler in (torch_pruning.prune_conv_in_channels, torch_pruning.prune_linear_in_channels)
            side = "inputs" if inputs and len(_shape(module)) > 1 else "outputs"
            if side == "outputs" and name in last:
                reason = reason or "its channels are the classes"
            reason = reason or fixed.get(name, "")
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                if root is None:
                    reason = reason or "its channels cannot be told apart"
                else:
                    channels.setdefault(root, set()).add((name, side, index))
        own = {place for channel in channels.values() for place in channel}
        if len(own) < sum(map(len, channels.values())) or own & taken:
            reason = reason or "its channels cannot be told apart"
        if all(name.startswith("auxiliary.") for name, _, _ in own):
            continue
        if reason:
            reasons.update({name: reason for name, side, _ in own if side == "outputs"})
        else:
            taken |= own
            # Channels of the same layers: not those of one half of a concatenation among those of the other.
            alike: dict[frozenset[tuple[str, str]], list[Channel]] = {}
            for root in sorted(channels):
                alike.setdefault(frozenset((name, side) for name, side, _ in channels[root]), []).append(channels[root])
            groups += alike.values()
    # As they stand in the network: of equal scores, those of neighbours then go together.
    position = {name: number for number, (name, _) in enumerate(network.named_modules())}
    groups.sort(key=lambda group: min(position[name] for name, _, _ in group[0]))
    return groups, reasons


def _with_auxiliary(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Logits and, of a network with an auxiliary head, what that gives: its first layer must fit what is left."""
    head = getattr(network, "auxiliary", None)
    if not isinstance(head, nn.Module):
        return [network(images)]
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, given, y: seen.append(y))
    network.training = True  # itself, not its layers: only in train mode is the head called
    try:
        return [network(images), *seen]
    finally:
        network.training = False
        handle.remove()


def _untouchable(model: nn.Module, network: nn.Module, images: Tensor) -> dict[str, str]:
    """Layers that stay as they are, with the reason."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, Sliced)}
    flow = trace(network, images, layers)
    calls = Counter(step.layer for step in flow.steps if step.layer is not None)
    shared = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    originals = dict(model.named_modules())
    reasons = {}
    for name, module in layers.items():
        original = originals[name]
        if calls[name] != 1 and not name.startswith("auxiliary."):
            reasons[name] = "called more than once" if calls[name] else "only its weight is used, within another layer"
        elif any(shared[id(p)] > 1 for p in original.parameters()):
            reasons[name] = "shares its weight"
        elif isinstance(module, nn.Conv2d) and module.groups > 1 and not _depthwise(module):
            reasons[name] = "grouped convolution"
        elif parametrize.is_parametrized(original) and not all(
            isinstance(part, Mask)
            for parts in original.parametrizations.values()
            for part in parts  # type: ignore[union-attr, operator]
        ):
            reasons[name] = "its weight is computed from something else"
    return reasons


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def _shape(module: Sliced) -> list[int]:
    """How many outputs and inputs can be told apart; only outputs where these are one with the inputs."""
    if isinstance(module, nn.BatchNorm2d):
        return [module.num_features]
    if isinstance(module, nn.Linear):
        return [module.out_features, module.in_features]
    return [module.out_channels] if module.groups > 1 else [module.out_channels, module.in_channels]


@torch.no_grad()
def _slice(module: Sliced, outputs: Tensor | None, inputs: Tensor | None) -> None:
    """Leave only the channels in the masks."""

    def left(tensor: Tensor, *masks: Tensor | None) -> Tensor:
        for axis, mask in enumerate(masks):
            if mask is not None:
                tensor = tensor.index_select(axis, mask.nonzero().flatten().to(tensor.device))
        return tensor.clone()

    weights = (outputs, inputs) if len(_shape(module)) > 1 else (outputs,)
    for owner in (module, *_parametrisations(module)):
        for name, parameter in [*owner._parameters.items()]:
            if parameter is not None:
                masks = weights if parameter.dim() > 1 else (outputs,)
                setattr(owner, name, nn.Parameter(left(parameter, *masks), requires_grad=parameter.requires_grad))
        for name, buffer in [*owner._buffers.items()]:
            if buffer is not None and buffer.dim() > 0:
                owner._buffers[name] = left(buffer, *(weights if buffer.dim() > 1 else (outputs,)))
    given = None if outputs is None else int(outputs.sum())
    if isinstance(module, nn.BatchNorm2d):
        module.num_features = given or module.num_features
    elif isinstance(module, nn.Linear):
        module.out_features = given or module.out_features
        module.in_features = module.in_features if inputs is None else int(inputs.sum())
    elif module.groups > 1:
        module.groups = module.in_channels = module.out_channels = given or module.out_channels
    else:
        module.out_channels = given or module.out_channels
        module.in_channels = module.in_channels if inputs is None else int(inputs.sum())


def _parametrisations(module: nn.Module) -> list[nn.Module]:
    """Lists of masks and the masks themselves."""
    if not parametrize.is_parametrized(module):
        return []
    return [*module.parametrizations.modules()]  # type: ignore[union-attr, operator]


PLUGIN = ChannelPruning
