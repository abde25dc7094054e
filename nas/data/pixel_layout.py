"""Where the channels of an image array stand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nas.errors import InputError

_CHANNELS = range(1, 5)


def channels_first(images: np.ndarray, what: str) -> Tensor:
    """[N, C, H, W] uint8 of ``images``, which are uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 to 4 channels.

    ``what`` names the array in messages. Raises InputError for another number of dimensions and where the channel
    axis cannot be told.
    """
    shape = images.shape
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim != 4:
        raise InputError(
            f"{what} has shape {shape}; give images as [N, H, W, C] or [N, C, H, W], grey ones also as [N, H, W]"
        )
    else:
        first, last = shape[1] in _CHANNELS, shape[3] in _CHANNELS
        if first == last:
            problem = "both axis 1 and axis 3 could be" if first else "neither axis 1 nor axis 3 is"
            raise InputError(
                f"{what} has shape {shape}: {problem} the 1 to 4 channels; "
                "save the images as [N, H, W, C] or [N, C, H, W] with height and width above 4 pixels"
            )
        if last:
            images = images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.array(images, order="C"))
