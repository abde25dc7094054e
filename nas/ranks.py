"""The processes of one data-parallel run, as ``torchrun`` starts them: each does the same, and one of them writes.

Every process ("rank") goes through the same steps. What reduces over them, or writes, is called by all in the same
order; ``first`` is for what only one shall do. In a process of its own everything here is what it is without others.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nas.errors import Failure, InputError

Result = TypeVar("Result")


class Lost(Failure):
    """Another process of the run has ended."""


WAIT = timedelta(days=2)
"""How long a rank waits for what the first does alone. One that has died is noticed at once, however long this is."""

GATHERED = 16
"""Up to so many processes send each other their gradients, to be added in a fixed order; more reduce them in rings."""

_alone = 0


def begin() -> None:
    """Join the processes that ``torchrun`` started, if it did. Raises ``InputError`` where they cannot meet."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        if (local := local_rank()) >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU, which has {torch.cuda.device_count()}: lower "
                "--nproc-per-node, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU"
            )
        torch.cuda.set_device(local_rank())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=WAIT)


def end() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def beside() -> int:
    """How many processes of the run this machine carries."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def world() -> int:
    """How many processes share the work; 1 within ``first``."""
    return 1 if _alone or not dist.is_initialized() else dist.get_world_size()


def rank() -> int:
    """The number of this process, 0 for the one that writes."""
    return 0 if world() == 1 else dist.get_rank()


def leads() -> bool:
    """Whether this process is the one that writes, prints and asks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait() -> None:
    """Until all are here."""
    if world() > 1:
        _reduce(torch.zeros(1), "sum")


def first(work: Callable[[], Result]) -> Result:
    """What ``work`` gives in the first process, in all of them. It must be what JSON can hold.

    The others wait. An error is raised in all: ``InputError`` and ``Failure`` as what they are, others as ``Failure``.
    """
    if world() == 1:
        return work()
    wait()  # until then others may still read what is about to be written
    if not leads():
        kind, value = json.loads(bytes(_broadcast(None).tolist()))
        if kind == "done":
            return value  # type: ignore[no-any-return]
        raise InputError(value) if kind == "input error" else Failure(value)
    try:
        with _by_itself():
            result = work()
    except Exception as error:
        kind = "input error" if isinstance(error, InputError) else "failure"
        _broadcast(_bytes([kind, str(error)]))
        raise
    _broadcast(_bytes(["done", result]))
    return result


def sum_of_halves(term: Callable[[int], Tensor], numbers: Sequence[int]) -> Tensor:
    """The sum of ``term`` over ``numbers``, one after another, added up half by half.

    A half may be summed elsewhere, and its half too: the order of the additions stays the same.
    """
    if len(numbers) == 1:
        return term(numbers[0])
    middle = len(numbers) // 2
    return sum_of_halves(term, numbers[:middle]).add_(sum_of_halves(term, numbers[middle:]))


def total(tensor: Tensor) -> Tensor:
    """The sum of the ``tensor`` of each process, by halves, where there are few; the same bits in all."""
    if world() == 1:
        return tensor
    if world() > GATHERED:
        return _reduce(tensor.clone(), "sum")
    terms = [torch.empty_like(tensor) for _ in range(world())]
    with _told_of_deaths():
        dist.all_gather(terms, tensor)
    return sum_of_halves(terms.__getitem__, range(len(terms)))


def combined(tensor: Tensor, how: Literal["sum", "min"]) -> Tensor:
    """The sum or the minimum of the ``tensor`` of each process, the same bits in all."""
    return tensor if world() == 1 else _reduce(tensor.clone(), how)


def check_same(tensors: Sequence[Tensor], what: str) -> None:
    """Raise ``Failure`` unless ``tensors`` are the same, bit by bit, in all processes."""
    if world() == 1:
        return
    here = torch.cat([tensor.detach().flatten().to(torch.float64) for tensor in tensors])
    low, high = _reduce(here.clone(), "min"), -_reduce(-here, "min")
    # Not a number is not equal to itself, and is reported by whoever watches losses.
    if not torch.equal(low.nan_to_num(), high.nan_to_num()):
        raise Failure(
            f"{what} differ between the processes of this run, by up to {float((high - low).abs().max()):.2g}: they do "
            "not compute alike (other GPUs, drivers or libraries?); --resume continues from the last good epoch"
        )


@contextmanager
def _by_itself() -> Iterator[None]:
    global _alone
    _alone += 1
    try:
        yield
    finally:
        _alone -= 1


def _reduce(tensor: Tensor, how: Literal["sum", "min"]) -> Tensor:
    with _told_of_deaths():
        dist.all_reduce(tensor, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MIN)
    return tensor


def _broadcast(content: Tensor | None) -> Tensor:
    """Bytes from the first process to all."""
    with _told_of_deaths():
        length = torch.tensor([0 if content is None else len(content)])
        dist.broadcast(length, 0)
        if content is None:
            content = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, 0)
    return content


@contextmanager
def _told_of_deaths() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Lost(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost the others: one of them ended "
            f"({str(error).splitlines()[0]}); --resume continues the run"
        ) from None


def _bytes(value: Any) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
