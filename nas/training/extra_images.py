"""Images beside the data set to train on: generated ones, or collected ones without labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nas.data.arrays import images_of, labels_of, read_npz
from nas.data.batches import batch_count, batches
from nas.data.image_data import ImageData
from nas.data.split import Split
from nas.errors import InputError
from nas.model_state import constant
from nas.randomness import generator
from nas.training.teacher import finished_network


@dataclass(frozen=True)
class ExtraImages:
    """Images of an .npz file that make up ``share`` of every training batch.

    Carmon et al., NeurIPS 2019, arXiv 1905.13736 (unlabelled images); Wang et al., ICML 2023, arXiv 2302.04638
    (generated ones, share 0.7). An epoch has as many steps as without them. path: arrays x and y, or image and label,
    in the layouts of data 'arrays'. labelled_by: folder of a finished network whose answers are the labels; without it
    they are those of the file. Images of the test set are refused; copies of validation images, which depend on the
    seed, are left out.
    """

    path: str
    share: float = 0.7
    labelled_by: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"the share of extra images in a batch is above 0 and below 1, not {self.share}")

    def __call__(self, data: ImageData, split: Split) -> tuple[Tensor, Tensor]:
        """The images [M, C, H, W] uint8 and their labels [M] int64, on the device of ``data``.

        Raises ``InputError`` for a file or a network that does not fit the data.
        """
        path = Path(self.path).expanduser()
        keys = [("x",), ("image",)] if self.labelled_by else [("x", "y"), ("image", "label")]
        (name, pictures), *labels = read_npz(path, *keys).items()
        x = images_of(pictures, f"{path}: {name}")
        if tuple(x.shape[1:]) != data.input_shape:
            raise InputError(
                f"{path}: {name} has images of (channels, height, width) {tuple(x.shape[1:])}, data '{data.name}' has "
                f"{data.input_shape}; bring them to one shape"
            )
        tested, validated = _contents(data.x_test), _contents(data.x_train[split.validation.to(data.x_train.device)])
        contents = [image.tobytes() for image in x.numpy()]
        leaked = [row for row, content in enumerate(contents) if content in tested]
        if leaked:
            raise InputError(
                f"{path}: {len(leaked)} of the images of {name} are in the test set of data '{data.name}' (row "
                f"{leaked[0]} is the first): nothing would be known about the network after it; take them out"
            )
        kept = torch.tensor([content not in validated for content in contents], dtype=torch.bool)
        x = x[kept].to(data.x_train.device)
        if len(x) == 0:
            raise InputError(f"{path}: {name} holds no image that may be trained on")
        if not labels:
            return x, self._answers(x, data)
        ((label_name, given),) = labels
        y = labels_of(given, f"{path}: {label_name}")
        if len(y) != len(kept):
            raise InputError(f"{path}: {len(kept)} images in {name} but {len(y)} labels in {label_name}; give one each")
        if int(y.max()) >= len(data.classes):
            raise InputError(
                f"{path}: {label_name} has labels up to {int(y.max())}, data '{data.name}' has the {len(data.classes)} "
                f"classes 0..{len(data.classes) - 1}: number them alike"
            )
        return x, y[kept].to(data.x_train.device)

    def rows(self, real: Tensor, extra: Tensor, batch_size: int, seed: int, epoch: int) -> Tensor:
        """Rows of the batches of an epoch, one after the other: [steps * batch_size], ``share`` of each from ``extra``.

        Real rows are in random order, none twice; all extra ones are seen before one is seen again.
        """
        added = self._of_each(batch_size, len(real))
        steps = batch_count(len(real), batch_size, True)
        order = torch.randperm(len(real), generator=generator(seed, "order", epoch))
        draws = generator(seed, "extra order", epoch)
        rounds = -(-steps * added // len(extra))
        others = torch.cat([torch.randperm(len(extra), generator=draws) for _ in range(rounds)])
        ours = real[order[: steps * (batch_size - added)].to(real.device)].view(steps, -1)
        theirs = extra[others[: steps * added].to(extra.device)].view(steps, -1)
        return torch.cat([ours, theirs], 1).flatten()

    def _of_each(self, batch_size: int, real: int) -> int:
        """How many images of a batch are extra."""
        added = round(self.share * batch_size)
        if not 0 < added < batch_size:
            raise InputError(
                f"extra images that are {self.share:g} of a batch of {batch_size} leave none of one kind: take larger "
                "batches or another share"
            )
        if real < batch_size - added:
            raise InputError(f"a batch holds {batch_size - added} images of the data set, but it has {real} only")
        return added

    def _answers(self, x: Tensor, data: ImageData) -> Tensor:
        """The classes [M] that the network named gives images ``x``."""
        network = finished_network(self.labelled_by, data, "network that labels extra images")
        nothing = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        with torch.no_grad(), constant(network):
            all_of_them = batches(x, nothing, torch.arange(len(x)), batch_size=512)
            return torch.cat([network(batch.x).argmax(1) for batch in all_of_them])


def _contents(images: Tensor) -> set[bytes]:
    return {image.tobytes() for image in images.cpu().numpy()}
