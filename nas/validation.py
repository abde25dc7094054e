"""Natural and robust accuracy on some images: what a search and a training watch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nas import ranks
from nas.data.batches import batches
from nas.data.image_data import ImageData
from nas.model_state import evaluating
from nas.objective import Attack
from nas.shards import Shards


def accuracies(
    model: nn.Module,
    data: ImageData,
    rows: Tensor,
    attack: Attack,
    stream: Callable[[int], torch.Generator],
    batch_size: int,
    shards: Shards,
) -> tuple[float, float]:
    """Shares of the training images ``rows`` that are right, and that stay right under ``attack``, in eval mode.

    stream: the randomness of the attack on each shard.
    """
    counts = torch.zeros(2, device=data.x_train.device)
    with evaluating(model):
        for number in shards.own:
            own, randomness = rows[shards.rows(len(rows), number)], stream(number)
            for batch in batches(data.x_train, data.y_train, own, batch_size=batch_size):
                x_adv = attack(model, batch.x, batch.y, generator=randomness)
                with torch.no_grad():
                    right = model(batch.x).argmax(1) == batch.y
                    withstood = right & (model(x_adv).argmax(1) == batch.y)
                    counts += torch.stack([right.sum(), withstood.sum()])
    natural, robust = ranks.combined(counts, "sum").tolist()
    return natural / len(rows), robust / len(rows)
