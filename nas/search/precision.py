"""bfloat16 for the passes of a network; everything around them stays in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nas.errors import InputError


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
