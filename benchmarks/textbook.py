"""The yardstick: a robust bilevel search step as it is usually written.

One module per candidate operation per edge, NCHW throughout, attacks by a full backward pass through trainable
parameters, a rebuilt model for each virtual step, and the virtual step computed once per objective. It computes
what ``nas.search`` computes, from the same weights, so that the two can be compared in results and in time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.threat_model import ThreatModel
from search_spaces.cell_space import CellSpace
from search_spaces.mixed import MixedEdges
from search_spaces.operations import OPERATIONS, FactorisedReduce
from search_spaces.supernet import MixedCell, Supernet


class SeparableConv(nn.Sequential):
    """[ReLU, depthwise, 1x1, BN without affine part], repeated."""

    def __init__(self, channels: int, kernel: int, stride: int, dilation: int, repeats: int) -> None:
        stages: list[nn.Module] = []
        padding = dilation * (kernel - 1) // 2
        for index in range(repeats):
            step = stride if index == 0 else 1
            stages += [
                nn.ReLU(),
                nn.Conv2d(channels, channels, kernel, step, padding, dilation, groups=channels, bias=False),
                nn.Conv2d(channels, channels, 1, bias=False),
                nn.BatchNorm2d(channels, affine=False),
            ]
        super().__init__(*stages)


class Halve(nn.Module):
    """The factorised reduction."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        first = (out_channels + 1) // 2
        self.even = nn.Conv2d(in_channels, first, 1, bias=False)
        self.odd = nn.Conv2d(in_channels, out_channels - first, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.bn(torch.cat([self.even(x[:, :, ::2, ::2]), self.odd(x[:, :, 1::2, 1::2])], dim=1))


class MixedOperation(nn.Module):
    """The weighted sum of all candidates on one edge."""

    def __init__(self, source: MixedEdges, names: tuple[str, ...]) -> None:
        super().__init__()
        channels, stride = source.channels, source.stride
        self.candidates = nn.ModuleList()
        for name in names:
            operation = OPERATIONS[name]
            if operation.kind == "max_pool":
                module: nn.Module = nn.Sequential(nn.MaxPool2d(3, stride, 1), nn.BatchNorm2d(channels, affine=False))
            elif operation.kind == "avg_pool":
                module = nn.Sequential(
                    nn.AvgPool2d(3, stride, 1, count_include_pad=False), nn.BatchNorm2d(channels, affine=False)
                )
            elif operation.kind == "skip":
                module = Halve(channels, channels) if stride > 1 else nn.Identity()
            else:
                module = SeparableConv(channels, operation.kernel, stride, operation.dilation, operation.repeats)
            self.candidates.append(module)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(weight * candidate(x) for weight, candidate in zip(weights, self.candidates, strict=True))  # type: ignore[return-value]


class TextbookCell(nn.Module):
    """Node by node, edge by edge."""

    def __init__(self, source: MixedCell, names: tuple[str, ...]) -> None:
        super().__init__()
        self.preprocess0 = _preprocess(source.preprocess0)
        self.preprocess1 = _preprocess(source.preprocess1)
        self.nodes = source.nodes
        self.edges = nn.ModuleList(
            MixedOperation(source.sources[origin], names)  # type: ignore[arg-type]
            for node in range(source.nodes)
            for origin in range(node + 2)
        )

    def forward(self, input0: Tensor, input1: Tensor, weights: Tensor) -> Tensor:
        values = [self.preprocess0(input0), self.preprocess1(input1)]
        row = 0
        for _ in range(self.nodes):
            total = 0
            for value in list(values):
                total = total + self.edges[row](value, weights[row])
                row += 1
            values.append(total)  # type: ignore[arg-type]
        return torch.cat(values[2:], dim=1)


class TextbookSupernet(nn.Module):
    """The network of ``source`` as separate modules; ``read`` copies its weights."""

    def __init__(self, source: Supernet, names: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds = source.kinds
        self.normalise = copy.deepcopy(source.normalise)
        self.stem = nn.Sequential(
            nn.Conv2d(source.stem[0].in_channels, source.stem[0].out_channels, 3, 1, 1, bias=False),  # type: ignore
            nn.BatchNorm2d(source.stem[0].out_channels),  # type: ignore[arg-type]
        )
        if len(source.stem) != 2:
            raise ValueError("the yardstick has a stem of one convolution")
        self.cells = nn.ModuleList(TextbookCell(cell, names) for cell in source.cells)  # type: ignore[arg-type]
        self.classifier = nn.Linear(source.classifier.in_features, source.classifier.out_features)
        self.alpha = nn.ParameterDict({kind: value.detach().clone() for kind, value in source.alpha.items()})
        self.read(source, names)

    def forward(self, x: Tensor) -> Tensor:
        weights = {kind: torch.softmax(alpha, -1) for kind, alpha in self.alpha.items()}
        previous = current = self.stem(self.normalise(x))
        for kind, cell in zip(self.kinds, self.cells, strict=True):
            previous, current = current, cell(previous, current, weights[kind])
        return self.classifier(current.mean((2, 3)))

    def weight_parameters(self) -> list[nn.Parameter]:
        """Everything but alpha."""
        architecture = {id(parameter) for parameter in self.alpha.values()}
        return [parameter for parameter in self.parameters() if id(parameter) not in architecture]

    @torch.no_grad()
    def read(self, source: Supernet, names: tuple[str, ...]) -> None:
        """Take the weights of ``source``."""
        for kind, alpha in source.alpha.items():
            self.alpha[kind].copy_(alpha)
        self.stem[0].weight.copy_(source.stem[0].weight)  # type: ignore
        self.classifier.load_state_dict(source.classifier.state_dict())
        for mine, theirs in zip(self.cells, source.cells, strict=True):
            for own, other in ((mine.preprocess0, theirs.preprocess0), (mine.preprocess1, theirs.preprocess1)):
                convolutions = [m for m in other.modules() if isinstance(m, nn.Conv2d)]
                for a, b in zip([m for m in own.modules() if isinstance(m, nn.Conv2d)], convolutions, strict=True):  # type: ignore
                    a.weight.copy_(b.weight)
            row = 0
            for node in range(theirs.nodes):  # type: ignore[arg-type]
                for origin in range(node + 2):
                    self._read_edge(mine.edges[row], theirs.sources[origin], node - max(origin - 1, 0), names)  # type: ignore
                    row += 1

    @staticmethod
    def _read_edge(mine: MixedOperation, theirs: MixedEdges, edge: int, names: tuple[str, ...]) -> None:
        convs = [i for i, name in enumerate(names) if OPERATIONS[name].kind == "conv"]
        convs.sort(key=lambda i: -OPERATIONS[names[i]].repeats)
        part = slice(edge * theirs.channels, (edge + 1) * theirs.channels)
        for place, column in enumerate(convs):
            stages = [m for m in mine.candidates[column].modules() if isinstance(m, nn.Conv2d)]
            sources = [(theirs.depthwise1, theirs.pointwise1), (theirs.depthwise2, theirs.pointwise2)]
            for stage in range(len(stages) // 2):
                depthwise, pointwise = sources[stage]
                stages[2 * stage].weight.copy_(depthwise[place][part])
                stages[2 * stage + 1].weight.copy_(pointwise[place * theirs.edges + edge][:, :, None, None])
        for candidate in mine.candidates:
            if isinstance(candidate, Halve):
                candidate.even.weight.copy_(theirs.halves_even[edge][:, :, None, None])
                candidate.odd.weight.copy_(theirs.halves_odd[edge][:, :, None, None])


def _preprocess(source: nn.Module) -> nn.Module:
    if isinstance(source, FactorisedReduce):
        return Halve(source.even.in_channels, source.bn.num_features)
    _, convolution, norm = source  # type: ignore[misc]
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(convolution.in_channels, convolution.out_channels, 1, bias=False),
        nn.BatchNorm2d(norm.num_features, affine=False),
    )


@dataclass
class TextbookSearch:
    """Settings and state of the yardstick's step: a second-order min-norm step on (natural, adversarial) loss."""

    model: TextbookSupernet
    rebuild: Callable[[], TextbookSupernet]
    threat_model: ThreatModel
    attack_steps: int
    step_size: float
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip: float = 5.0
    radius: float = 0.01
    scale: float = 0.1

    def __post_init__(self) -> None:
        self.sgd = torch.optim.SGD(
            self.model.weight_parameters(), self.learning_rate, self.momentum, weight_decay=self.weight_decay
        )
        self.adam = torch.optim.Adam(list(self.model.alpha.values()), 0.02, (0.5, 0.999), weight_decay=1e-3)
        self.passes = 0

    def loss(self, model: TextbookSupernet, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy; counts the pass."""
        self.passes += 1
        return F.cross_entropy(model(x), y)

    def attack(self, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        """PGD by a full backward pass through trainable parameters."""
        x_adv = start
        for _ in range(self.attack_steps):
            x_adv = x_adv.detach().requires_grad_(True)
            self.model.zero_grad()
            self.loss(self.model, x_adv, y).backward()
            assert x_adv.grad is not None
            x_adv = self.threat_model.project(
                x_adv.detach() + self.step_size * self.threat_model.geometry.steepest(x_adv.grad), x
            )
        self.model.zero_grad()
        return x_adv.detach()

    def architecture_gradient(
        self, x: Tensor, y: Tensor, held_out: Tensor, labels: Tensor
    ) -> tuple[Tensor, TextbookSupernet]:
        """The second-order gradient of the loss on ``held_out``, through a rebuilt model after one weight step."""
        model = self.model
        weights = model.weight_parameters()
        gradients = torch.autograd.grad(self.loss(model, x, y), weights)
        unrolled = self.rebuild()
        unrolled.load_state_dict(model.state_dict())
        with torch.no_grad():
            for own, weight, gradient in zip(unrolled.weight_parameters(), weights, gradients, strict=True):
                buffer = self.sgd.state[weight].get("momentum_buffer")
                update = gradient + self.weight_decay * weight
                if buffer is not None:
                    update = update + self.momentum * buffer
                own.copy_(weight - self.learning_rate * update)
        unrolled.train()
        self.loss(unrolled, held_out, labels).backward()
        direct = [parameter.grad for parameter in unrolled.alpha.values()]
        vector = [parameter.grad for parameter in unrolled.weight_parameters()]
        radius = self.radius / torch.cat([v.flatten() for v in vector]).norm()  # type: ignore[union-attr]
        sides = []
        for factor in (radius, -2 * radius):
            for weight, v in zip(weights, vector, strict=True):
                weight.data.add_(v, alpha=float(factor))  # type: ignore[arg-type]
            sides.append(torch.autograd.grad(self.loss(model, x, y), list(model.alpha.values())))
        for weight, v in zip(weights, vector, strict=True):
            weight.data.add_(v, alpha=float(radius))  # type: ignore[arg-type]
        parts = []
        for d, ahead, behind in zip(direct, *sides, strict=True):
            parts.append((d - self.learning_rate * (ahead - behind) / (2 * radius)).flatten())  # type: ignore[operator]
        return torch.cat(parts), unrolled

    def step(self, x: Tensor, y: Tensor, held_out: Tensor, labels: Tensor, starts: tuple[Tensor, Tensor]) -> Tensor:
        """One search step; returns the architecture direction."""
        x_adv = self.attack(x, y, starts[0])
        held_out_adv = self.attack(held_out, labels, starts[1])
        natural, _ = self.architecture_gradient(x_adv, y, held_out, labels)
        adversarial, _ = self.architecture_gradient(x_adv, y, held_out_adv, labels)
        adversarial = self.scale * adversarial
        difference = adversarial - natural
        gamma = (difference @ adversarial / (difference @ difference)).clamp(0, 1)
        direction = gamma * natural + (1 - gamma) * adversarial
        offset = 0
        for parameter in self.model.alpha.values():
            parameter.grad = direction[offset : offset + parameter.numel()].view_as(parameter).clone()
            offset += parameter.numel()
        self.adam.step()
        self.model.zero_grad()
        self.loss(self.model, x_adv, y).backward()
        nn.utils.clip_grad_norm_(self.model.weight_parameters(), self.clip)
        self.sgd.step()
        self.model.zero_grad()
        return direction


def textbook_of(supernet: Supernet, space: CellSpace) -> TextbookSupernet:
    """The yardstick's network with the weights of ``supernet``, on its device and in its precision."""
    parameter = next(supernet.parameters())
    return TextbookSupernet(supernet, space.operations).to(parameter.device, parameter.dtype)
