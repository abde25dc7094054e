"""A network as an ONNX file: pixels [N, C, H, W] in [0, 1] to logits [N, classes], for any number of images N."""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from nas.errors import InputError
from nas.export.qdq import with_integer_weights
from nas.model_file import ModelSpec
from nas.tensor_file import write_bytes

INPUT, OUTPUT, CLASSES = "pixels", "logits", "classes"
"""Names in the file: input, output, and the entry of its metadata that lists the classes as JSON."""


def check_onnx_can_be_written() -> None:
    """Raise ``InputError`` where the packages that write and run ONNX files are not installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"ONNX needs {', '.join(missing)}: pip install 'dsara-nas[onnx]'")


def onnx_bytes(model: nn.Module, input_shape: tuple[int, int, int], classes: tuple[str, ...] = ()) -> bytes:
    """The ONNX file of ``model`` in eval mode, for images of ``input_shape`` (C, H, W); ``model`` is left alone.

    Raises ``InputError`` where the packages are missing or the network has no form in ONNX.
    """
    check_onnx_can_be_written()
    network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    example = torch.zeros(2, *input_shape)
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # about operators the exporter could not make smaller
            program = torch.onnx.export(
                network,
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("images")},),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"this network has no form in ONNX: {reason[:200]}") from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    assert program is not None
    proto = with_integer_weights(program.model_proto)
    entry = proto.metadata_props.add()
    entry.key, entry.value = CLASSES, json.dumps(list(classes))
    content: bytes = proto.SerializeToString()
    return content


def write_onnx(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    """Write network.onnx to ``folder``, whole or not at all."""
    write_bytes(onnx_bytes(model, spec.input_shape, spec.classes), folder / "network.onnx")
