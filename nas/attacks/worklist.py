"""Jobs that share batches: one that is done makes room for one that waits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rows = dict[str, Tensor]
"""What is known of each job in the batch: tensors [R, ...]; "sample" [R] is the sample that each is about."""


def carry_out(
    samples: Tensor,
    begin: Callable[[Tensor], Rows],
    advance: Callable[[Rows], Tensor],
    settled: Tensor | None,
    batch_size: int,
) -> None:
    """Advance every job until it is done, at most ``batch_size`` at a time (0: all at once), in their order.

    samples: [J], the sample that each job is about.  begin: jobs [R] -> their rows.  advance: takes rows one step,
    in place, and tells which [R] are done.  settled: [N] bool, which ``advance`` may set: jobs of these samples are
    dropped, begun or not; None where each job goes its whole way.
    """
    batch_size = batch_size or len(samples)
    waiting = torch.arange(len(samples), device=samples.device)
    rows: Rows = {}
    running = 0
    while running or len(waiting):
        # Refilled by quarters: appending costs a copy of all rows.
        if len(waiting) and 4 * running <= 3 * batch_size:
            if settled is not None:
                waiting = waiting[~settled[samples[waiting]]]
            jobs, waiting = waiting[: batch_size - running], waiting[batch_size - running :]
            if len(jobs):
                new = begin(jobs)
                rows = {name: torch.cat([rows[name], new[name]]) for name in new} if running else new
                rows = _without(settled[rows["sample"]], rows) if settled is not None else rows
        else:
            done = advance(rows)
            rows = _without(done if settled is None else done | settled[rows["sample"]], rows)
        running = len(rows["sample"]) if rows else 0


def _without(gone: Tensor, rows: Rows) -> Rows:
    return {name: values[~gone] for name, values in rows.items()} if bool(gone.any()) else rows


class Best:
    """The best image found for each sample: a misclassified one, else that of the highest score.

    x: the clean images [N, C, H, W], kept until something is found.
    """

    def __init__(self, x: Tensor) -> None:
        self.images = x.clone()
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._scores = torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)

    def offer(self, samples: Tensor, images: Tensor, scores: Tensor, broken: Tensor) -> None:
        """Images [R, C, H, W] of ``samples`` [R], which may repeat; the first that broke a sample stays."""
        scores = torch.where(broken, torch.inf, scores.nan_to_num(-torch.inf))
        open_ = ~self.broken[samples]
        samples, images, scores, broken = samples[open_], images[open_], scores[open_], broken[open_]
        highest = self._scores.scatter_reduce(0, samples, scores, "amax")
        better = ((scores == highest[samples]) & (scores > self._scores[samples])).nonzero().squeeze(1)
        # Of several equally good ones for the same sample the first is taken.
        first = torch.full_like(self.broken, len(scores), dtype=torch.int64)
        first = first.scatter_reduce(0, samples[better], better, "amin")
        better = better[first[samples[better]] == better]
        self.images[samples[better]] = images[better]
        self._scores = highest
        self.broken[samples[better]] = broken[better]
