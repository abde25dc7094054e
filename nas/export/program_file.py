"""A network as a torch.export program: pixels [N, C, H, W] in [0, 1] to logits [N, classes], any number of images N."""

from __future__ import annotations

import copy
import io
import json
import warnings
from pathlib import Path

import torch
from torch import nn

from nas.errors import InputError
from nas.model_file import ModelSpec
from nas.tensor_file import write_bytes

CLASSES = "classes.json"
"""Name of the extra file inside the archive that lists the classes."""


def program_bytes(model: nn.Module, input_shape: tuple[int, int, int], classes: tuple[str, ...] = ()) -> bytes:
    """The .pt2 archive of ``model`` in eval mode, for images of ``input_shape`` (C, H, W); ``model`` is left alone.

    Raises ``InputError`` where torch.export cannot follow the network.
    """
    network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    stream = io.BytesIO()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its interfaces
            example = torch.zeros(2, *input_shape)
            program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("images")},))
            torch.export.save(program, stream, extra_files={CLASSES: json.dumps(list(classes))})
    except (torch._dynamo.exc.TorchDynamoException, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"torch.export cannot follow this network: {reason[:160]}; export it by --to py or onnx instead"
        ) from None
    return stream.getvalue()


def write_program(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    """Write network.pt2 to ``folder``, whole or not at all."""
    write_bytes(program_bytes(model, spec.input_shape, spec.classes), folder / "network.pt2")
