"""How many bytes a network takes where it is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn.utils import parametrize

from nas.compression.masks import left_by


@runtime_checkable
class Quantised(Protocol):
    """A module whose tensors are stored in fewer bytes than they are computed with: those bytes, as in ``Size``."""

    def stored_bytes(self, *, sparse: bool = False) -> int: ...


@dataclass(frozen=True)
class Size:
    """Bytes of a deployed network.

    dense: all parameters and running statistics, masked weights as zeros;  sparse: masked tensors as their non-zeros
    and one bit for each place, which is what an unstructured mask can save without a format of its own.
    """

    dense: int
    sparse: int


def stored_size(model: nn.Module) -> Size:
    """The size of ``model`` without its auxiliary head; masks and what derives from constants are not stored."""
    dense = sparse = 0
    counted: set[int] = set()
    for name, module in model.named_modules():
        if name.startswith("auxiliary") or id(module) in counted:
            continue
        inside = {id(part) for part in module.modules()}
        if isinstance(module, Quantised):
            dense, sparse = dense + module.stored_bytes(), sparse + module.stored_bytes(sparse=True)
            counted |= inside
            continue
        if isinstance(module, parametrize.ParametrizationList):
            counted |= inside
            original = [*module.parameters(recurse=False)]
            size = sum(_bytes(tensor) for tensor in original)
            dense += size
            alive = left_by(module)
            if alive is not None and len(original) == 1:
                size = min(size, int(alive.sum()) * original[0].element_size() + -(-alive.numel() // 8))
            sparse += size
            continue
        own = [*module.parameters(recurse=False), *_statistics(module)]
        size = sum(_bytes(tensor) for tensor in own if id(tensor) not in counted)
        counted |= {id(tensor) for tensor in own}
        dense, sparse = dense + size, sparse + size
    return Size(dense, sparse)


def _statistics(module: nn.Module) -> list[Tensor]:
    """Buffers that are stored and computed with; a count of batches is not."""
    skipped = module._non_persistent_buffers_set
    return [
        buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name not in skipped and name != "num_batches_tracked"
    ]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
