"""bfloat16 for the passes of a network; everything around them stays in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nas.errors import InputError
from nas.prediction import networks_in

Precision = Literal["float32", "bfloat16"]


def in_bfloat16(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``forward`` under autocast: products and convolutions in bfloat16, logits [N, classes] in the type of the images.

    Backward passes run in the types of the forward pass. Weights, the architecture parameters, their gradients and that
    of the images are float32, and so are the loss, batch statistics and everything a step adds up outside of the
    network.
    """

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits = forward(x)
        return logits.to(x.dtype)

    return autocast


@contextmanager
def passes_in(precision: Precision, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, the passes of a training step of ``model`` are carried out in ``precision``.

    Products and convolutions in bfloat16, forwards and backwards; logits, losses, weights and all gradients that come
    out stay float32. No cast weight is kept for a second pass: a step may change weights between passes. Raises
    ``InputError`` where the device has no bfloat16 arithmetic.
    """
    if precision == "float32":
        yield
        return
    check_bfloat16(device)
    # What some devices compute of bfloat16 logits, such as a divergence at a high temperature, is mostly rounding.
    networks = {id(network): network for network in (model, *networks_in(model).values())}.values()
    for network in networks:
        network.forward = _in_the_type_of_its_input(network.forward)  # type: ignore[method-assign]
    try:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield
    finally:
        for network in networks:
            del network.forward


def _in_the_type_of_its_input(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def cast(x: Tensor, *others: Any) -> Tensor:
        return forward(x, *others).to(x.dtype)

    return cast


def check_bfloat16(device: torch.device) -> None:
    """Raise ``InputError`` where ``device`` has no bfloat16 arithmetic, which would then be emulated, slowly."""
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        supported = False
    if not supported:
        raise InputError(
            f"precision = 'bfloat16', but this {device.type} device has no bfloat16 arithmetic: "
            "use precision = 'float32'"
        )
