"""Calls of the native kernels: tensors in, tensors out, nothing of autograd (see ``functions.py``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from search_spaces.native.library import library

POINTWISE, DEPTHWISE, HALVES = 0, 1, 2
POOLS = {"max_pool": 0, "avg_pool": 1}
LANES = 4
"""The batch has to be a multiple of this."""


@dataclass(frozen=True)
class Slot:
    """A tensor of a list, from its ``offset``-th element on."""

    index: int
    offset: int = 0


@dataclass(frozen=True)
class Convolution:
    """One candidate with weights, on all edges: where its weights and normalisations lie.

    kind: POINTWISE, DEPTHWISE or HALVES (two 1x1 convolutions on the even and the odd pixels). The slots of
    weights, scales and shifts point into the list of parameters, norm1 and norm2 into the lists of statistics.
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
    """All candidates on the E edges leaving one node. pool_norms: whether pools are normalised, with which statistics.

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


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Op(ctypes.Structure):
    _fields_ = (
        _fields(ctypes.c_int64, "kind kernel dilation repeats")
        + _fields(ctypes.c_void_p, "depthwise1 pointwise1 odd1 depthwise2 pointwise2 z1 z2 mean1 rstd1 mean2 rstd2")
        + _fields(ctypes.c_void_p, "scale1 shift1 scale2 shift2 g_depthwise1 g_pointwise1 g_odd1 g_depthwise2")
        + _fields(ctypes.c_void_p, "g_pointwise2 g_scale1 g_shift1 g_scale2 g_shift2")
    )


class _Pool(ctypes.Structure):
    _fields_ = _fields(ctypes.c_int64, "kind") + _fields(ctypes.c_void_p, "z taken mean rstd")


class _Edges(ctypes.Structure):
    _fields_ = (
        _fields(ctypes.c_int64, "edges in_channels out_channels height width batch stride ops pools skip training")
        + _fields(ctypes.c_int64, "threads weights")
        + _fields(ctypes.c_double, "epsilon")
        + _fields(ctypes.c_void_p, "op pool x mixing out add g_out g_x")
        + _fields(ctypes.c_int64, "add_g_x")
        + _fields(ctypes.c_void_p, "g_mixing")
    )


@dataclass
class Statistics:
    """Batch normalisation of one source: means and 1/deviations, a tensor for each norm.

    training: they are those of the batch, and written by ``forward``; else they are given.
    """

    means: list[Tensor]
    rstds: list[Tensor]
    training: bool
    epsilon: float


@dataclass
class Kept:
    """What ``forward`` keeps for ``backward``: the inputs of the normalisations, and which pixels were the largest."""

    z: list[tuple[Tensor, Tensor | None]]
    pooled: list[tuple[Tensor, Tensor | None]]

    def tensors(self) -> list[Tensor]:
        """All of them in a fixed order."""
        return [t for pair in (*self.z, *self.pooled) for t in pair if t is not None]


def output_size(size: int, stride: int) -> int:
    """Height or width after a stride."""
    return -(-size // stride)


def forward(
    source: Source,
    x: Tensor,
    mixing: Tensor,
    parameters: Sequence[Tensor],
    statistics: Statistics,
    outputs: Sequence[Tensor],
    add: Sequence[bool],
) -> Kept:
    """Write (or add) the mixed maps of all edges into ``outputs``.

    x: [C, H, W, N] contiguous; mixing: [E, columns]; outputs: E contiguous tensors [C', H', W', N].
    """
    _, height, width, batch = x.shape
    size = (source.out_channels, output_size(height, source.stride), output_size(width, source.stride), batch)
    z = [
        (x.new_empty(source.edges, *size), x.new_empty(source.edges, *size) if op.repeats == 2 else None)
        for op in source.convolutions
    ]
    pooled = [
        (x.new_empty(size), x.new_empty(size, dtype=torch.uint8) if pool == "max_pool" else None)
        for pool in source.pools
    ]
    kept = Kept(z, pooled)
    call = _call(source, x, mixing, parameters, statistics, kept, None)
    out = (ctypes.c_void_p * source.edges)(*(output.data_ptr() for output in outputs))
    adding = (ctypes.c_int64 * source.edges)(*add)
    call.out, call.add = ctypes.addressof(out), ctypes.addressof(adding)
    _run(call, x, 0)
    return kept


def backward(
    source: Source,
    x: Tensor,
    mixing: Tensor,
    parameters: Sequence[Tensor],
    statistics: Statistics,
    kept: Kept,
    g_outputs: Sequence[Tensor],
    g_x: Tensor | None,
    add_g_x: bool,
    g_mixing: Tensor | None,
    g_parameters: Sequence[Tensor] | None,
) -> None:
    """Write (or add) gradients: ``g_x`` as ``x``, ``g_mixing`` [E, columns] float64, ``g_parameters`` as parameters."""
    call = _call(source, x, mixing, parameters, statistics, kept, g_parameters)
    g_out = (ctypes.c_void_p * source.edges)(*(g.data_ptr() for g in g_outputs))
    call.g_out = ctypes.addressof(g_out)
    call.g_x = g_x.data_ptr() if g_x is not None else None
    call.add_g_x = add_g_x
    call.g_mixing = g_mixing.data_ptr() if g_mixing is not None else None
    call.weights = g_parameters is not None
    _run(call, x, 1)


def _call(
    source: Source,
    x: Tensor,
    mixing: Tensor,
    parameters: Sequence[Tensor],
    statistics: Statistics,
    kept: Kept,
    g_parameters: Sequence[Tensor] | None,
) -> _Edges:
    width = x.element_size()
    if source.columns > 32 or any(op.kernel > 7 for op in source.convolutions):
        raise ValueError("the native kernels take at most 32 candidates and kernels of at most 7x7")

    def at(tensors: Sequence[Tensor] | None, slot: Slot | None) -> int | None:
        if tensors is None or slot is None:
            return None
        return tensors[slot.index].data_ptr() + slot.offset * width

    ops = (_Op * max(len(source.convolutions), 1))()
    for index, (op, (z1, z2)) in enumerate(zip(source.convolutions, kept.z, strict=True)):
        weights = (op.depthwise1, op.pointwise1, op.odd1, op.depthwise2, op.pointwise2)
        affine = (op.scale1, op.shift1, op.scale2, op.shift2)
        ops[index] = _Op(
            op.kind,
            op.kernel,
            op.dilation,
            op.repeats,
            *(at(parameters, slot) for slot in weights),
            z1.data_ptr(),
            z2.data_ptr() if z2 is not None else None,
            at(statistics.means, op.norm1),
            at(statistics.rstds, op.norm1),
            at(statistics.means, op.norm2),
            at(statistics.rstds, op.norm2),
            *(at(parameters, slot) for slot in affine),
            *(at(g_parameters, slot) for slot in (*weights, *affine)),
        )
    pools = (_Pool * max(len(source.pools), 1))()
    for index, (pool, (z, taken)) in enumerate(zip(source.pools, kept.pooled, strict=True)):
        norm = source.pool_norms[index] if source.pool_norms else None
        pools[index] = _Pool(
            POOLS[pool],
            z.data_ptr(),
            taken.data_ptr() if taken is not None else None,
            statistics.means[norm].data_ptr() if norm is not None else None,
            statistics.rstds[norm].data_ptr() if norm is not None else None,
        )
    _, height, wide, batch = x.shape
    call = _Edges(
        source.edges,
        source.in_channels,
        source.out_channels,
        height,
        wide,
        batch,
        source.stride,
        len(source.convolutions),
        len(source.pools),
        source.skip,
        statistics.training,
        torch.get_num_threads(),
        0,
        statistics.epsilon,
        ctypes.addressof(ops),
        ctypes.addressof(pools),
        x.data_ptr(),
        mixing.data_ptr(),
    )
    # The structures live as long as the call that points to them.
    call.holds = (ops, pools)  # type: ignore[attr-defined]
    return call


def _run(call: _Edges, x: Tensor, backward_pass: int) -> None:
    loaded = library()
    if loaded is None:
        raise RuntimeError("the native kernels are not there")
    function = loaded.edges_float if x.dtype == torch.float32 else loaded.edges_double
    status = function(ctypes.c_void_p(ctypes.addressof(call)), ctypes.c_int(backward_pass))
    if status == 1:
        raise torch.OutOfMemoryError("the native kernels could not get memory for their intermediate maps")
    if status:
        raise ValueError(f"the native kernels need a batch that is a multiple of {LANES}, not {x.shape[3]}")
