"""Images and what an attack made of them, as a page shows them: PNG files inside the page itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from nas.evaluation.gallery import Pair

ENLARGED = 96
"""Pixels that an image is at least wide."""


def shown(pair: Pair, classes: Sequence[str], *, limited: bool = False) -> dict[str, Any]:
    """Images of a pair as data URIs: the image, the difference enlarged to the full range, the adversarial image.

    limited: wider images are made ``ENLARGED`` pixels wide, so that a page of eight pairs stays below 1.5 MB.
    """
    difference = pair.adversarial - pair.clean
    scale = float(difference.abs().max())
    change = 0.5 + 0.5 * difference / scale if scale > 0 else 0.5 + difference
    return {
        "clean": _data_uri(pair.clean, limited),
        "change": _data_uri(change, limited),
        "adversarial": _data_uri(pair.adversarial, limited),
        "label": classes[pair.label],
        "seen": classes[pair.seen_adversarial],
        "broken": pair.seen_adversarial != pair.label,
        "scale": scale,
    }


def _data_uri(image: Tensor, limited: bool) -> str:
    """[C, H, W] in [0, 1] as a PNG; of other than 1 or 3 channels, the first."""
    pixels = (image.clamp(0, 1) * 255).round().byte()
    picture = (
        Image.fromarray(pixels.permute(1, 2, 0).numpy()) if len(pixels) == 3 else Image.fromarray(pixels[0].numpy())
    )
    if picture.width < ENLARGED:
        enlargement = -(-ENLARGED // picture.width)
        size = (picture.width * enlargement, picture.height * enlargement)
        picture = picture.resize(size, Image.Resampling.NEAREST)
    elif limited and max(picture.size) > ENLARGED:
        picture.thumbnail((ENLARGED, ENLARGED), Image.Resampling.BOX)
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
