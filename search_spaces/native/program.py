"""What a cell computes, as a program for the native kernels: built once for a shape, run at every pass."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from search_spaces.native.library import library

POINTWISE, DEPTHWISE, HALVES = 0, 1, 2
POOLS = {"max_pool": 0, "avg_pool": 1}

Pointer = tuple[int, int]
"""A buffer and an offset in it, in bytes."""

NULL: Pointer = (-1, 0)
WORKSPACE, OUT, MIXING, G_OUT, G_MIXING, G_WORKSPACE, FIRST_INPUT = range(7)
ALIGNMENT = 64


@dataclass(frozen=True)
class Slot:
    """A tensor of a list, from its ``offset``-th element on."""

    index: int
    offset: int = 0


@dataclass(frozen=True)
class Convolution:
    """One candidate with weights, on all edges: where its weights and normalisations lie.

    kind: POINTWISE ([ReLU, 1x1, BN]), DEPTHWISE ([ReLU, depthwise, 1x1, BN] once or twice) or HALVES (two 1x1
    convolutions on the even and the odd pixels). The slots of weights, scales and shifts point into the step's
    parameters, norm1 and norm2 into its normalisations.
    """

    kind: int
    pointwise1: Slot
    norm1: Slot
    kernel: int = 0
    dilation: int = 1
    depthwise1: Slot | None = None
    odd1: Slot | None = None
    depthwise2: Slot | None = None
    pointwise2: Slot | None = None
    norm2: Slot | None = None
    scale1: Slot | None = None
    shift1: Slot | None = None
    scale2: Slot | None = None
    shift2: Slot | None = None

    @property
    def repeats(self) -> int:
        """1 or 2."""
        return 1 if self.norm2 is None else 2


@dataclass(frozen=True)
class Source:
    """All candidates on the E edges leaving one node. pool_norms: which normalisations the pools have, if any.

    The mixing weights have a column for each convolution, then for each pool, then for the skip connection.
    parameters: how many tensors the slots of the convolutions refer to.
    """

    edges: int
    in_channels: int
    out_channels: int
    stride: int
    convolutions: tuple[Convolution, ...] = ()
    pools: tuple[str, ...] = ()
    pool_norms: tuple[int, ...] = ()
    skip: bool = False
    parameters: int = 0

    @property
    def columns(self) -> int:
        """Mixing weights of an edge."""
        return len(self.convolutions) + len(self.pools) + self.skip


@dataclass(frozen=True)
class Step:
    """A source at work: which value it reads, and which value each of its edges adds to.

    Values are numbered: first the inputs of the program, then whatever steps write. mixed: mixing weights are given;
    otherwise they are 1.
    """

    source: Source
    x: int
    targets: tuple[int, ...]
    norms: int
    mixed: bool = False


class Program:
    """Steps for inputs of given shapes [C, H, W] and a given batch.

    outputs: the values that, side by side, are the result. norms: the normalisation layers of all steps in turn;
    ``training`` says whether they use the statistics of the batch.
    """

    def __init__(
        self,
        inputs: Sequence[tuple[int, int, int]],
        batch: int,
        steps: Sequence[Step],
        outputs: Sequence[int],
        norms: Sequence[nn.BatchNorm2d],
        dtype: torch.dtype,
        training: bool,
    ) -> None:
        self.dtype, self.batch, self.inputs = dtype, batch, len(inputs)
        self.size = 4 if dtype == torch.float32 else 8
        self.parameters = sum(step.source.parameters for step in steps)
        self.norms = len(norms)
        self.workspace = self.g_workspace = self.mixing = 0
        shapes = dict(enumerate(inputs))
        for step in steps:
            channels, height, width = shapes[step.x]
            if channels != step.source.in_channels:
                raise ValueError(f"a source of {step.source.in_channels} channels cannot read {channels}")
            stride = step.source.stride
            for target in step.targets:
                shapes[target] = (step.source.out_channels, -(-height // stride), -(-width // stride))
        values = {i: (FIRST_INPUT + i, 0) for i in range(len(inputs))}
        gradients = {i: (FIRST_INPUT + len(inputs) + i, 0) for i in range(len(inputs))}
        offset = 0
        for value in outputs:
            values[value], gradients[value] = (OUT, offset), (G_OUT, offset)
            offset += self._bytes(shapes[value])
        _, height, width = shapes[outputs[0]]
        self.out_shape = (sum(shapes[value][0] for value in outputs), height, width, batch)
        for value, shape in shapes.items():
            if value not in values:
                values[value] = self._reserve(self._bytes(shape))
                gradients[value] = (G_WORKSPACE, self.g_workspace)
                self.g_workspace += self._bytes(shape)
        counts = [0] * len(norms)
        for index, step in enumerate(steps):
            until = steps[index + 1].norms if index + 1 < len(steps) else len(norms)
            _, height, width = shapes[step.targets[0]]
            counts[step.norms : until] = [batch * height * width] * (until - step.norms)
        statistics = []
        table = array("q", [training, len(norms), len(steps)])
        buffers = FIRST_INPUT + 2 * len(inputs) + 2 * self.parameters
        for index, (norm, count) in enumerate(zip(norms, counts, strict=True)):
            mean, rstd = (self._reserve(norm.num_features * self.size) for _ in range(2))
            statistics.append((mean, rstd))
            momentum = -1.0 if norm.momentum is None else norm.momentum
            table.extend((norm.num_features, count, _bits(norm.eps), _bits(momentum)))
            for pointer in (*((buffers + 3 * index + i, 0) for i in range(3)), mean, rstd):
                table.extend(pointer)
        first, written = 0, set(range(len(inputs)))
        for index, step in enumerate(steps):
            until = steps[index + 1].norms if index + 1 < len(steps) else len(norms)
            own = norms[step.norms : until]
            self._step(
                table, step, shapes, values, gradients, statistics[step.norms : until], first, written,
                own[0].eps if own else 0.0,
            )  # fmt: skip
            first += step.source.parameters
        self.table = table

    def _bytes(self, shape: tuple[int, int, int]) -> int:
        return shape[0] * shape[1] * shape[2] * self.batch * self.size

    def _reserve(self, size: int) -> Pointer:
        place = (WORKSPACE, self.workspace)
        self.workspace += -(-size // ALIGNMENT) * ALIGNMENT
        return place

    def _step(
        self,
        table: array[int],
        step: Step,
        shapes: dict[int, tuple[int, int, int]],
        values: dict[int, Pointer],
        gradients: dict[int, Pointer],
        statistics: Sequence[tuple[Pointer, Pointer]],
        first: int,
        written: set[int],
        epsilon: float,
    ) -> None:
        source, (channels, height, width) = step.source, shapes[step.x]
        if source.columns > 32 or any(op.kernel > 7 for op in source.convolutions):
            raise ValueError("the native kernels take at most 32 candidates and kernels of at most 7x7")
        parameter = FIRST_INPUT + 2 * self.inputs + first
        gradient = parameter + self.parameters

        def at(buffer: int, slot: Slot | None) -> Pointer:
            return NULL if slot is None else (buffer + slot.index, slot.offset * self.size)

        def of(slot: Slot | None, which: int) -> Pointer:
            if slot is None:
                return NULL
            buffer, offset = statistics[slot.index][which]
            return buffer, offset + slot.offset * self.size

        table.extend((source.edges, channels, source.out_channels, height, width, self.batch, source.stride))
        table.extend((len(source.convolutions), len(source.pools), int(source.skip), _bits(epsilon)))
        mixing = g_mixing = NULL
        if step.mixed:
            mixing, g_mixing = (MIXING, self.mixing * self.size), (G_MIXING, self.mixing * 8)
            self.mixing += source.edges * source.columns
        # Gradients of inputs are written by the one step that reads them, those of other values added up.
        for pointer in (values[step.x], mixing, gradients[step.x]):
            table.extend(pointer)
        table.append(step.x >= self.inputs)
        table.extend(g_mixing)
        for target in step.targets:
            table.extend(values[target])
            table.append(target in written)
            table.extend(gradients[target])
            written.add(target)
        out = self._bytes(shapes[step.targets[0]])
        for op in source.convolutions:
            table.extend((op.kind, op.kernel, op.dilation, op.repeats))
            weights = (op.depthwise1, op.pointwise1, op.odd1, op.depthwise2, op.pointwise2)
            affine = (op.scale1, op.shift1, op.scale2, op.shift2)
            pointers = [at(parameter, slot) for slot in (*weights, *affine)]
            pointers += [at(gradient, slot) for slot in (*weights, *affine)]
            pointers += [self._reserve(source.edges * out)]
            pointers += [self._reserve(source.edges * out) if op.repeats == 2 else NULL]
            pointers += [of(op.norm1, 0), of(op.norm1, 1), of(op.norm2, 0), of(op.norm2, 1)]
            for pointer in pointers:
                table.extend(pointer)
        for index, pool in enumerate(source.pools):
            norm = Slot(source.pool_norms[index]) if source.pool_norms else None
            table.append(POOLS[pool])
            table.extend(self._reserve(out))
            table.extend(self._reserve(out // self.size) if pool == "max_pool" else NULL)
            table.extend(of(norm, 0))
            table.extend(of(norm, 1))

    def forward(
        self, inputs: Sequence[Tensor], mixing: Tensor, parameters: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d],
        record: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The result [C, H, W, N] for inputs [C_i, H_i, W_i, N], and what ``backward`` needs of it."""
        workspace = inputs[0].new_empty(self.workspace, dtype=torch.uint8)
        out = inputs[0].new_empty(self.out_shape)
        self._run([workspace, out, mixing, None, None, None], inputs, None, parameters, None, norms, 0, record, 0)
        return out, workspace

    def backward(
        self,
        inputs: Sequence[Tensor],
        mixing: Tensor,
        parameters: Sequence[Tensor],
        workspace: Tensor,
        out: Tensor,
        g_out: Tensor,
        g_inputs: Sequence[Tensor | None],
        g_mixing: Tensor,
        g_parameters: Sequence[Tensor] | None,
    ) -> None:
        """Write the gradients; ``g_out`` is used up. g_mixing is float64."""
        g_workspace = inputs[0].new_zeros(self.g_workspace, dtype=torch.uint8)
        fixed = [workspace, out, mixing, g_out, g_mixing, g_workspace]
        self._run(fixed, inputs, g_inputs, parameters, g_parameters, None, 1, False, g_parameters is not None)

    def _run(
        self,
        fixed: Sequence[Tensor | None],
        inputs: Sequence[Tensor],
        g_inputs: Sequence[Tensor | None] | None,
        parameters: Sequence[Tensor],
        g_parameters: Sequence[Tensor] | None,
        norms: Sequence[nn.BatchNorm2d] | None,
        backward: int,
        record: bool,
        weights: int,
    ) -> None:
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*fixed, *inputs)]
        addresses += [0 if g is None else g.data_ptr() for g in g_inputs] if g_inputs is not None else [0] * self.inputs
        addresses += [tensor.data_ptr() for tensor in parameters]
        addresses += [g.data_ptr() for g in g_parameters] if g_parameters is not None else [0] * self.parameters
        for norm in norms or ():
            held = norm._buffers
            for buffer in (held["running_mean"], held["running_var"], held["num_batches_tracked"]):
                addresses.append(0 if buffer is None else buffer.data_ptr())
        if norms is None:
            addresses += [0] * (3 * self.norms)
        buffers = array("Q", addresses)
        loaded = library()
        if loaded is None:
            raise RuntimeError("the native kernels are not there")
        function = loaded.run_float if self.dtype == torch.float32 else loaded.run_double
        pointers = ctypes.c_void_p(buffers.buffer_info()[0])
        table = ctypes.c_void_p(self.table.buffer_info()[0])
        status = function(table, pointers, backward, int(record), weights, torch.get_num_threads())
        if status:
            raise torch.OutOfMemoryError("the native kernels could not get memory for their intermediate maps")


def _bits(value: float) -> int:
    """A double as the integer of the same bits."""
    (integer,) = struct.unpack("q", struct.pack("d", value))
    assert isinstance(integer, int)
    return integer
