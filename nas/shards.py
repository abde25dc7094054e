"""A batch in equal parts ("shards"): taken one after another, or dealt out to the processes of a data-parallel run.

The gradient of a batch is the mean over its shards. Each shard has random streams of its own, and batch normalisation
sees one shard at a time, as in any data-parallel training; running statistics are the mean over the shards. So what
comes out depends on the number of shards, but not on how many processes they are dealt to: a run may go on with
another number. Sums are made pair by pair, halves of halves, so that 1, 2, 4, 8 and 16 processes give the same bits;
other numbers the same up to rounding. One shard is a batch as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nas import ranks
from nas.errors import InputError
from nas.objective import Batch, Metrics
from nas.randomness import generator
from nas.ranks import sum_of_halves

Step = tuple[Tensor, list[Tensor | None], Metrics]


@dataclass(frozen=True)
class Shards:
    """Into how many parts batches are cut, and which of them are this process's."""

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"shards must be at least 1, not {self.count}")
        if self.count % ranks.world():
            raise InputError(
                f"{self.count} shards cannot be dealt out evenly to {ranks.world()} processes: set shards to a "
                f"multiple of it (--set shards={ranks.world()}) when the run is begun, or start another number"
            )

    def check(self, batch_size: int, what: str) -> None:
        """Raise ``InputError`` unless batches of this size can be cut evenly, into shards of at least two images."""
        if self.count > 1 and (batch_size % self.count or batch_size < 2 * self.count):
            raise InputError(
                f"{what} = {batch_size} cannot be cut into {self.count} shards of equal size and at least 2 images: "
                f"choose a multiple of {self.count}"
            )

    @property
    def own(self) -> range:
        """Numbers of the shards that this process computes."""
        each = self.count // ranks.world()
        return range(ranks.rank() * each, (ranks.rank() + 1) * each)

    def generators(
        self, seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu"
    ) -> dict[int, torch.Generator]:
        """A random stream for each own shard."""
        return {number: self.generator(number, seed, purpose, *counters, device=device) for number in self.own}

    def generator(
        self, number: int, seed: int, purpose: str, *counters: int, device: torch.device | str = "cpu"
    ) -> torch.Generator:
        """The random stream of one shard; that of an uncut batch where there is one only."""
        more = () if self.count == 1 else (number,)
        return generator(seed, purpose, *counters, *more, device=device)

    def parts(self, batch: Batch) -> dict[int, Batch]:
        """The own shards of a batch."""
        if self.count == 1:
            return {0: batch}
        return {number: _rows(batch, self.rows(len(batch.y), number)) for number in self.own}

    def rows(self, n: int, number: int) -> slice:
        """Which of ``n`` rows are those of a shard. Shards of few rows may be empty."""
        return slice(n * number // self.count, n * (number + 1) // self.count)

    def mean(self, work: Callable[[int], Sequence[Tensor]]) -> list[Tensor]:
        """The mean over all shards of what ``work`` gives for each, tensors of the same shapes."""
        if self.count == 1:
            return [*work(0)]
        shapes: list[torch.Size] = []

        def of_shard(number: int) -> Tensor:
            found = work(number)
            shapes[:] = [tensor.shape for tensor in found]
            return torch.cat([tensor.detach().flatten() for tensor in found]) / self.count

        flat = ranks.total(sum_of_halves(of_shard, self.own))
        pieces = flat.split([shape.numel() for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def step(self, model: nn.Module, work: Callable[[int], Step]) -> Step:
        """Loss, gradients and metrics of a batch from those of its shards, each in train mode.

        Buffers of the model, the running statistics, become the mean of what each shard alone would have made them.
        """
        if self.count == 1:
            return work(0)
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        counters = [buffer for buffer in model.buffers() if not buffer.is_floating_point()]
        found = [tensor.clone() for tensor in buffers]
        counted = [tensor.clone() for tensor in counters]
        used: list[bool] = []
        names: list[str] = []

        def of_shard(number: int) -> list[Tensor]:
            with torch.no_grad():
                for buffer, before in zip([*buffers, *counters], [*found, *counted], strict=True):
                    buffer.copy_(before)
            loss, gradients, metrics = work(number)
            used[:] = [gradient is not None for gradient in gradients]
            names[:] = metrics
            given = [gradient for gradient in gradients if gradient is not None]
            return [loss, *(metrics[name].to(loss) for name in names), *given, *(buffer.to(loss) for buffer in buffers)]

        loss, *rest = self.mean(of_shard)
        metrics, rest = dict(zip(names, rest[: len(names)], strict=True)), rest[len(names) :]
        given, statistics = iter(rest[: sum(used)]), rest[sum(used) :]
        with torch.no_grad():
            for buffer, statistic in zip(buffers, statistics, strict=True):
                buffer.copy_(statistic)
        return loss, [next(given) if there else None for there in used], metrics

    def withstood(self, n: int, work: Callable[[int, slice], Tensor], device: torch.device) -> Tensor:
        """A mask [n] of rows, of which ``work`` gives each shard's part."""
        if self.count == 1:
            return work(0, slice(0, n))
        mask = torch.ones(n, dtype=torch.uint8, device=device)
        for number in self.own:
            rows = self.rows(n, number)
            if rows.start < rows.stop:
                mask[rows] = work(number, rows).to(torch.uint8)
        return ranks.combined(mask, "min").bool()


def _rows(batch: Batch, rows: slice) -> Batch:
    places = None if batch.places is None else batch.places[rows]
    return replace(batch, x=batch.x[rows], y=batch.y[rows], indices=batch.indices[rows], places=places)
