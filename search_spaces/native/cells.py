"""Cells and single operations on the native kernels, wherever these can stand for torch's own operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from search_spaces.layers import offset_halves, padding_of
from search_spaces.native.functions import Call, Evaluate
from search_spaces.native.library import library
from search_spaces.native.program import DEPTHWISE, HALVES, POINTWISE, Convolution, Program, Slot, Source, Step

LANES = 16
"""Batches are filled up to a multiple of this where images do not depend on one another."""

FAST_PIXELS = 10240
"""Pixels of a map, all images together, up to which rows stay in a core's cache: 2.4 times the speed at 32x32 pixels of
what a batch of 250 has."""

Mixer = Callable[[Tensor, Tensor], Tensor]


Place = tuple[nn.Module, str]
"""Where a tensor is found: a module and the name of its parameter."""


@dataclass(frozen=True)
class Part:
    """A source and where its tensors are: what a module of a cell computes, as long as it has the same modules.

    mixer: the same for a source with mixing weights in torch's own operations, from x and [E, columns] to [E, maps].
    """

    source: Source
    parameters: Sequence[Place] = ()
    norms: Sequence[nn.BatchNorm2d] = ()
    mixer: Mixer | None = None


class Parts:
    """The parts below a module, known until one of the modules there is exchanged.

    To find them again at every pass, and to ask every module for hooks through torch's iterators, would take longer
    than the arithmetic of a small cell.
    """

    def __init__(self, owner: nn.Module, parts: Sequence[Part] | None) -> None:
        self.found = parts
        self.modules = [module for child in owner.children() for module in child.modules()]
        self.below = [(module._modules, [*module._modules.values()]) for module in (owner, *self.modules)]
        self.norms = [norm for part in parts or () for norm in part.norms]
        self.places = [place for part in parts or () for place in part.parameters]

    def stand(self) -> bool:
        """Whether all modules are still those that the parts were made of."""
        return all([*table.values()] == children for table, children in self.below)

    def watched(self) -> bool:
        """Whether a hook wants to see one of the modules at work."""
        return _watched(self.modules)

    def batch_counts(self) -> bool:
        """Whether something inside is in train mode or has no running statistics: images then may depend on others."""
        return any(m.training or m._buffers.get("running_mean", ...) is None for m in self.modules)

    def tensors(self) -> list[Tensor]:
        """The parameters of all parts, as they are now."""
        found = [module._parameters.get(name) for module, name in self.places]
        # A parametrised weight is no parameter any more, but computed.
        return [getattr(*place) if tensor is None else tensor for tensor, place in zip(found, self.places, strict=True)]


@dataclass
class Wiring:
    """Which value each part reads and which values it adds to (see ``program.Step``); what was made for it so far."""

    reads: Sequence[int]
    writes: Sequence[tuple[int, ...]]
    outputs: Sequence[int]
    programs: dict[object, Program] = field(default_factory=dict)
    parts: Parts | None = None

    def known(self, owner: nn.Module, find: Callable[[], Sequence[Part] | None]) -> Parts:
        """The parts that ``find`` gives for ``owner``, found anew where a module was exchanged."""
        if self.parts is None or not self.parts.stand():
            self.parts = Parts(owner, find())
            self.programs.clear()
        return self.parts

    def __deepcopy__(self, memo: object) -> Wiring:
        # Belongs to the modules it was made for; a copy of them makes its own.
        return Wiring(self.reads, self.writes, self.outputs)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "programs": {}, "parts": None}


def single(
    kind: int, in_channels: int, out_channels: int, stride: int, *, kernel: int = 0, dilation: int = 1,
    repeats: int = 1, affine: bool = True,
) -> Source:  # fmt: skip
    """[ReLU, convolution, BN] ``repeats`` times as a source of one edge.

    Its parameters are, for each repeat, the weights (DEPTHWISE: depthwise and 1x1; POINTWISE: 1x1; HALVES: those of the
    even and of the odd pixels), then scale and shift of the normalisation.
    """
    weights = 1 if kind == POINTWISE else 2
    stage = weights + 2 * affine
    second = repeats == 2
    operation = Convolution(
        kind,
        Slot(0 if kind != DEPTHWISE else 1),
        Slot(0),
        kernel,
        dilation,
        depthwise1=Slot(0) if kind == DEPTHWISE else None,
        odd1=Slot(1) if kind == HALVES else None,
        depthwise2=Slot(stage) if second else None,
        pointwise2=Slot(stage + 1) if second else None,
        norm2=Slot(1) if second else None,
        scale1=Slot(weights) if affine else None,
        shift1=Slot(weights + 1) if affine else None,
        scale2=Slot(stage + weights) if affine and second else None,
        shift2=Slot(stage + weights + 1) if affine and second else None,
    )
    return Source(1, in_channels, out_channels, stride, (operation,), parameters=repeats * stage)


@lru_cache(maxsize=256)
def pool(kind: str, channels: int, stride: int, *, normalised: bool = False) -> Source:
    """A pool as a source of one edge."""
    return Source(1, channels, channels, stride, pools=(kind,), pool_norms=(0,) if normalised else ())


@lru_cache(maxsize=256)
def skip(channels: int) -> Source:
    """The identity as a source of one edge."""
    return Source(1, channels, channels, 1, skip=True)


def staged(source: Source, stages: Sequence[tuple[Sequence[Place], nn.BatchNorm2d]]) -> Part | None:
    """``single`` with the weights and the normalisation of each repeat; None where they do not fit it."""
    places = [
        (module, name)
        for weights, norm in stages
        for module, name in (*weights, (norm, "weight"), (norm, "bias"))
        if getattr(module, name) is not None
    ]
    if len(places) != source.parameters:
        return None
    return Part(source, places, [norm for _, norm in stages])


def evaluate(find: Callable[[], Part | None], x: Tensor, owner: nn.Module) -> Tensor | None:
    """What the part that ``find`` gives makes of ``x`` [N, C, H, W], or None where torch has to compute it.

    owner: as in ``run``.
    """

    def find_all() -> Sequence[Part] | None:
        part = find()
        return None if part is None else [part]

    wiring = owner.__dict__.get("_wiring")
    if wiring is None:
        wiring = owner.__dict__["_wiring"] = Wiring((0,), ((1,),), (1,))
    return run(wiring, find_all, [x], None, owner)


def run(
    wiring: Wiring, find: Callable[[], Sequence[Part] | None], inputs: Sequence[Tensor], mixing: Tensor | None,
    owner: nn.Module,
) -> Tensor | None:  # fmt: skip
    """Carry out the parts that ``find`` gives: the values ``wiring.outputs`` side by side [N, C, H, W].

    None where torch has to: parts are unknown (``find`` gives None), or see ``suits``. mixing: the mixing weights of
    all parts that have a mixer, flat. owner: the module whose children the parts are made of, and which nobody may
    be watching; ``find`` is asked again only when one of the modules below it was exchanged.
    """
    x = inputs[0]
    if not suits(x):
        return None
    known = wiring.known(owner, find)
    parts = known.found
    if parts is None or known.watched():
        return None
    norms, parameters = known.norms, known.tensors()
    batch_statistics = {norm.training or norm._buffers["running_mean"] is None for norm in norms}
    recording = {norm.track_running_stats and norm._buffers["running_mean"] is not None for norm in norms}
    if len(batch_statistics) > 1 or any(norm.eps != part.norms[0].eps for part in parts for norm in part.norms):
        return None
    training = batch_statistics == {True}
    if training and (len(recording) > 1 or x.shape[0] % 4):
        return None
    if any(t.dtype != x.dtype or t.device != x.device or not t.is_contiguous() for t in parameters):
        return None
    lanes = LANES if x.shape[0] > 8 else 4
    batch = x.shape[0] if training else -(-x.shape[0] // lanes) * lanes
    shapes = [(x.shape[1], x.shape[2], x.shape[3]) for x in inputs]
    program = _program(wiring, parts, shapes, batch, x.dtype, norms, training)

    def reference(mixing: Tensor, *tensors: Tensor) -> Tensor:
        given = tensors[len(inputs) :]
        if any(part.mixer for part in parts) and not all(map(_are_one, given, parameters)):
            raise RuntimeError("a second derivative of mixed edges needs their parameters to be leaves of the graph")
        return _by_torch(wiring, parts, mixing, tensors[: len(inputs)], list(given))

    if mixing is None:
        mixing = x.new_ones(1)
    call = Call(program, norms, training and recording == {True}, reference)
    y: Tensor = Evaluate.apply(call, mixing, *inputs, *parameters)
    return y


def _program(
    wiring: Wiring, parts: Sequence[Part], shapes: Sequence[tuple[int, int, int]], batch: int, dtype: torch.dtype,
    norms: Sequence[nn.BatchNorm2d], training: bool,
) -> Program:  # fmt: skip
    """The program of ``parts``, from what was made before if it fits."""
    key = (*shapes, batch, dtype, training, *[(norm.num_features, norm.eps, norm.momentum) for norm in norms])
    known = wiring.programs.get(key)
    if known is not None:
        return known
    steps, first = [], 0
    for part, reads, writes in zip(parts, wiring.reads, wiring.writes, strict=True):
        steps.append(Step(part.source, reads, writes, first, part.mixer is not None))
        first += len(part.norms)
    program = Program(shapes, batch, steps, wiring.outputs, norms, dtype, training)
    if len(wiring.programs) >= 16:
        wiring.programs.clear()
    wiring.programs[key] = program
    return program


def traced() -> bool:
    """Whether somebody writes down what is computed, for batches of any size: no question may be asked about sizes."""
    return (
        torch.compiler.is_exporting()
        or torch.compiler.is_compiling()
        or torch.onnx.is_in_onnx_export()
        or torch.jit.is_tracing()
    )


def suits(x: Tensor) -> bool:
    """Whether the kernels can take ``x``: images on a CPU, nobody tracing or counting."""
    return (
        not traced()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.dim() == 4
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        # Counters, fake tensors and function transforms have to see torch's own operations.
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and library() is not None
    )


def in_pieces(network: nn.Module, x: Tensor, pixels: int) -> Sequence[Tensor]:
    """``x`` [N, C, H, W] in batches of the best size for the kernels, where ``network`` treats each image alone.

    pixels: of the largest map. Otherwise, or where somebody watches a module at work, ``x`` as it is.
    """
    size = max(LANES, FAST_PIXELS // pixels // LANES * LANES)
    if traced() or len(x) <= size or not suits(x):
        return [x]
    inside = network.__dict__.get("_inside")
    if inside is None or not inside.stand():
        inside = network.__dict__["_inside"] = Parts(network, None)
    if inside.batch_counts() or inside.watched():
        return [x]
    return x.split(-(-len(x) // -(-len(x) // size)))


def hooked(*modules: nn.Module) -> bool:
    """Whether a hook wants to see ``modules`` or a part of them at work."""
    return _watched(part for module in modules for part in module.modules())


def _watched(modules: Iterable[nn.Module]) -> bool:
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return True
    return False


def concatenate(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenation along the channels of [N, C_i, H, W] that keeps the memory order."""
    if not traced() and all(x.permute(1, 2, 3, 0).is_contiguous() for x in tensors):
        return torch.cat([x.permute(1, 2, 3, 0) for x in tensors], dim=0).permute(3, 0, 1, 2)
    return torch.cat([*tensors], dim=1)


def _are_one(a: Tensor, b: Tensor) -> bool:
    """Whether two objects are the same tensor of the graph: what autograd kept may come back as another object."""
    if a is b:
        return True
    if a.data_ptr() != b.data_ptr() or not (a.requires_grad and b.requires_grad):
        return False
    return get_gradient_edge(a) == get_gradient_edge(b)


def _by_torch(
    wiring: Wiring, parts: Sequence[Part], mixing: Tensor, inputs: Sequence[Tensor], parameters: list[Tensor]
) -> Tensor:
    """The same in torch's own operations, without recording statistics."""
    values: dict[int, Tensor] = dict(enumerate(inputs))
    used = 0
    for part, reads, writes in zip(parts, wiring.reads, wiring.writes, strict=True):
        source, given = part.source, parameters[: len(part.parameters)]
        parameters = parameters[len(part.parameters) :]
        if part.mixer is not None:
            size = source.edges * source.columns
            maps = part.mixer(values[reads], mixing[used : used + size].view(source.edges, -1)).unbind(0)
            used += size
        else:
            maps = (_one_by_torch(source, part.norms, values[reads], given),)
        for target, map_ in zip(writes, maps, strict=True):
            values[target] = values[target] + map_ if target in values else map_
    return torch.cat([values[value] for value in wiring.outputs], dim=1)


def _one_by_torch(source: Source, norms: Sequence[nn.BatchNorm2d], x: Tensor, given: list[Tensor]) -> Tensor:
    if source.skip:
        return x
    if source.pools:
        y = F.max_pool2d(x, 3, source.stride, 1) if source.pools[0] == "max_pool" else F.avg_pool2d(
            x, 3, source.stride, 1, count_include_pad=False
        )  # fmt: skip
        return _normalised(norms[0], y, None, None) if norms else y
    (op,) = source.convolutions
    stride = source.stride
    for norm in norms:
        x = torch.relu(x)
        if op.kind == HALVES:
            pairs = zip(offset_halves(x), (given.pop(0), given.pop(0)), strict=True)
            x = torch.cat([F.conv2d(half, weight) for half, weight in pairs], 1)
        elif op.kind == POINTWISE:
            x = F.conv2d(x, given.pop(0))
        else:
            padding = padding_of(op.kernel, op.dilation)
            x = F.conv2d(x, given.pop(0), None, stride, padding, op.dilation, groups=x.shape[1])
            x = F.conv2d(x, given.pop(0))
            stride = 1
        scale, shift = (given.pop(0), given.pop(0)) if op.scale1 is not None else (None, None)
        x = _normalised(norm, x, scale, shift)
    return x


def _normalised(norm: nn.BatchNorm2d, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    batch = norm.training or norm.running_mean is None
    mean, variance = (None, None) if batch else (norm.running_mean, norm.running_var)
    return F.batch_norm(x, mean, variance, scale, shift, batch, 0.0, norm.eps)
