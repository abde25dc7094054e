"""A finished network that another one learns from."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.data.image_data import ImageData
from nas.errors import InputError
from nas.model_file import load_model
from nas.model_state import constant
from nas.objective import Setting


class Teacher:
    """The answers of a finished network: logits [N, K] for images [N, C, H, W], in eval mode and without gradients.

    The last batch is remembered, as attack and loss both ask about it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model.eval().requires_grad_(False)
        self._x: Tensor | None = None
        self._logits: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The logits; the same tensor where the last call was for this very batch."""
        if self._logits is None or self._x is not x:
            with torch.no_grad(), constant(self._model):
                self._x, self._logits = x, self._model(x).to(x.dtype)  # under autocast, too
        assert self._logits is not None
        return self._logits


def load_teacher(folder: str, setting: Setting) -> Teacher:
    """The network in ``folder`` (model.json, model.safetensors) as a teacher of the one that ``setting`` describes.

    Raises ``InputError`` where there is none, or where it sees other images or knows other classes.
    """
    like = next(setting.model.parameters())
    return Teacher(finished_network(folder, setting.data, "teacher").to(like))


def finished_network(folder: str, data: ImageData, role: str) -> nn.Module:
    """The network in ``folder`` (model.json, model.safetensors), for the images and classes of ``data``, in eval mode.

    role: what it is needed as. Raises ``InputError`` where there is none, or where it sees other images or knows other
    classes.
    """
    path = Path(folder)
    if not (path / "model.json").exists():
        inside = sorted(found.parent for found in path.glob("*/*/model.json")) or sorted(
            found.parent for found in path.glob("*/model.json")
        )
        hint = (
            f"did you mean '{inside[-1]}'?" if inside else "it takes one that training left, such as RUN/train/searched"
        )
        raise InputError(f"{role}: '{folder}' holds no model.json; {hint}")
    spec, model = load_model(path, data.x_train.device)
    if spec.input_shape != data.input_shape:
        raise InputError(
            f"{role}: '{folder}' sees images of (channels, height, width) {spec.input_shape}, data '{data.name}' has "
            f"{data.input_shape}: take a {role} that was trained on images like these"
        )
    if spec.classes != data.classes:
        other = next((pair for pair in zip(spec.classes, data.classes, strict=False) if pair[0] != pair[1]), None)
        what = f"for example '{other[0]}' for '{other[1]}'" if other else f"{len(spec.classes)} of them"
        raise InputError(
            f"{role}: '{folder}' knows other classes than the {len(data.classes)} of data '{data.name}', {what}: take "
            f"a {role} that was trained on these, in this order"
        )
    return model


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(p_teacher || p_student) of the softmax of logits [N, K] over ``temperature``, times its square.

    The square keeps the size of the gradient (Hinton, Vinyals & Dean, arXiv 1503.02531, section 2).
    """
    wanted, found = (F.log_softmax(logits / temperature, 1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(found, wanted, reduction="batchmean", log_target=True)
