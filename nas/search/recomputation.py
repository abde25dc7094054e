"""Less memory for more time: inner maps of a module are computed again when its backward pass needs them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module) -> None:
    """From now on ``module`` keeps only its inputs for the backward pass, which computes the rest again.

    Exact: the same values to the bit, for one more forward pass in every backward pass. Running statistics are recorded
    by the first of the two passes only.
    """
    forward = module.forward
    contexts = nullcontext(), _BuffersSetAside(module)

    def recomputed(*inputs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        y: Tensor = checkpoint(
            forward, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: contexts
        )
        return y

    module.forward = recomputed  # type: ignore[method-assign]


class _BuffersSetAside(AbstractContextManager[None]):
    """Within it, copies stand in for the buffers of ``module``, so that what is recorded twice counts once.

    Can be entered again: a second derivative computes a module several times.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.originals: list[list[tuple[nn.Module, str, Tensor]]] = []

    def __enter__(self) -> None:
        owned = [
            (part, name, buffer) for part in self.module.modules() for name, buffer in part.named_buffers("", False)
        ]
        self.originals.append(owned)
        for part, name, buffer in owned:
            setattr(part, name, buffer.clone())

    def __exit__(self, *error: Any) -> None:
        for part, name, buffer in self.originals.pop():
            setattr(part, name, buffer)
