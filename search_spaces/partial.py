"""Partial channels: only 1/k of the channels of a node pass the candidate operations, the others go past them.

PC-DARTS (Xu et al., ICLR 2020, arXiv 1907.05737, section 3.2 and eq. 2, the channel mask fixed to the first C/k
channels): a k-th of the channels is mixed, the rest copied, and the channels are shuffled so that the next node mixes
others. At stride 2 what goes past is max-pooled 2x2, as in the authors' code. The edge normalisation of section 3.3 is
not part of it: nodes keep their edges by the mixing weights, as without partial channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_spaces.mixed import MixedEdges
from search_spaces.native.cells import Wiring, concatenate, run
from search_spaces.network import cell_input
from search_spaces.supernet import edge_row


class PartialCell(nn.Module):
    """``MixedCell`` with 1/``share`` of the channels mixed; at share 1 the same function.

    Edges are summed before channels are put together and shuffled. Both are linear and the same for every edge, so
    this is the sum of the shuffled edges at a fraction of the copies.
    """

    def __init__(
        self,
        operations: tuple[str, ...],
        nodes: int,
        in_channels: tuple[int, int],
        channels: int,
        *,
        reduces: bool,
        previous_reduces: bool,
        share: int,
    ) -> None:
        super().__init__()
        self.nodes, self.passing = nodes, passing_channels(channels, share)
        self.preprocess0 = cell_input(in_channels[0], channels, halve=previous_reduces, affine=False)
        self.preprocess1 = cell_input(in_channels[1], channels, halve=False, affine=False)
        self.sources = nn.ModuleList(
            MixedEdges(operations, nodes - max(source - 1, 0), self.passing, 2 if reduces and source < 2 else 1)
            for source in range(nodes + 1)
        )
        self.strides = [2 if reduces and source < 2 else 1 for source in range(nodes + 1)]
        for source in range(nodes + 1):
            rows = [edge_row(node, source) for node in range(max(source - 1, 0), nodes)]
            self.register_buffer(f"rows{source}", torch.tensor(rows), persistent=False)

    def forward(self, input0: Tensor, input1: Tensor, weights: Tensor) -> Tensor:
        values = [self.preprocess0(input0), self.preprocess1(input1)]
        mixed: list[Tensor | None] = [None] * self.nodes
        past = [bypass(value, self.passing, stride) for value, stride in zip(values, self.strides, strict=False)]
        for source, edges in enumerate(self.sources):
            if source >= 2:
                values.append(self._node(mixed[source - 2], past, source))
                past.append(bypass(values[source], self.passing, 1))
            own = weights.index_select(0, getattr(self, f"rows{source}"))
            maps = _mixed(edges, values[source][:, : self.passing], own)  # type: ignore[arg-type]
            for node, map_ in zip(range(max(source - 1, 0), self.nodes), maps, strict=True):
                total = mixed[node]
                mixed[node] = map_ if total is None else total + map_
        values.append(self._node(mixed[-1], past, self.nodes + 1))
        return concatenate(values[2:])

    def _node(self, mixed: Tensor | None, past: list[Tensor | None], sources: int) -> Tensor:
        """A node from the sum of its mixed edges and what went past on the edges from the first ``sources`` values."""
        assert mixed is not None
        return joined(mixed, added(past[:sources]))


def _mixed(edges: MixedEdges, x: Tensor, weights: Tensor) -> Sequence[Tensor]:
    """``edges(x, weights)``: one map [N, C, H', W'] an edge, on the native kernels where they take ``x``."""
    count = edges.edges
    targets = tuple(range(1, 1 + count))
    wiring = edges.__dict__.setdefault("_wiring", Wiring((0,), (targets,), targets))
    mixing = weights.index_select(1, edges.column_index).flatten()
    y = run(wiring, lambda: [edges.part()], [x], mixing, edges)
    return edges(x, weights).unbind(0) if y is None else y.split(edges.channels, dim=1)


def passing_channels(channels: int, share: int) -> int:
    """How many of ``channels`` pass the candidates. Raises ``ValueError`` where they cannot be shared out evenly."""
    if share < 1 or channels % share:
        raise ValueError(f"{channels} channels cannot be divided into {share} equal parts: change partial_channels")
    return channels // share


def bypass(x: Tensor, passing: int, stride: int) -> Tensor | None:
    """The channels of ``x`` [N, C, H, W] behind the first ``passing``, at the size an edge of ``stride`` gives."""
    if passing == x.shape[1]:
        return None
    rest = x[:, passing:]
    if stride == 1:
        return rest
    # Maps of odd size are rounded up, as by the candidates.
    return F.max_pool2d(rest, 2, ceil_mode=True)


def added(parts: list[Tensor | None]) -> Tensor | None:
    """The sum of what went past, None where nothing did."""
    total: Tensor | None = None
    for part in parts:
        total = part if total is None or part is None else total + part
    return total


def joined(mixed: Tensor, past: Tensor | None) -> Tensor:
    """``mixed`` [N, C/k, H, W] and ``past`` [N, C - C/k, H, W] concatenated, their channels shuffled.

    The shuffle of ShuffleNet (Zhang et al., CVPR 2018) with k groups: channel g C/k + i goes to place i k + g.
    """
    if past is None:
        return mixed
    passing = mixed.shape[1]
    groups = [mixed, *past.split(passing, dim=1)]
    if all(group.permute(1, 2, 3, 0).is_contiguous() for group in groups):
        # The memory order of the native kernels, batch last, is kept.
        rows = torch.stack([group.permute(1, 2, 3, 0) for group in groups], dim=1)
        return rows.flatten(0, 1).permute(3, 0, 1, 2)
    return torch.stack(groups, dim=2).flatten(1, 2)
