"""0/1 masks as short texts in a plan."""

from __future__ import annotations

import base64
import zlib

import numpy as np
import torch
from torch import Tensor

from nas.errors import InputError


def pack(mask: Tensor) -> str:
    """The bits of ``mask``, compressed."""
    bits = np.packbits(mask.flatten().cpu().numpy())
    return base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode()


def unpack(text: object, shape: torch.Size, layer: str) -> Tensor:
    """The mask of ``shape``, bool, in a text that ``pack`` made. Raises ``InputError`` that names the layer."""
    try:
        count = shape.numel()
        # The size is known from the network: a bomb cannot unfold beyond it. A stream of another length is damaged.
        stream = zlib.decompressobj()
        unfolded = stream.decompress(base64.b64decode(text, validate=True), count // 8 + 2)  # type: ignore[arg-type]
        if not stream.eof or len(unfolded) != (count + 7) // 8:
            raise ValueError("not the length of the mask")
        bits = np.unpackbits(np.frombuffer(unfolded, np.uint8), count=count)
        return torch.from_numpy(bits.astype(bool)).view(shape)
    except (TypeError, ValueError, RuntimeError, zlib.error):
        raise InputError(f"the plan's mask of layer '{layer}' is damaged") from None
