"""A network as one readable Python file that needs nothing but torch, and the weights that belong to it."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nas.errors import InputError
from nas.export import plain_torch
from nas.export.source_cells import cell_body
from nas.export.source_plain import plain_body
from nas.export.source_text import LAYERS, TAKEN, Body, listed, quoted, words
from nas.model_file import ModelSpec
from search_spaces.catalogue import space_of
from search_spaces.cell_space import CellSpace
from search_spaces.genotype import Genotype, StageGenotype
from search_spaces.network import parameter_count
from search_spaces.plain import SPACE as PLAIN


def network_source(spec: ModelSpec, name: str = "Network") -> str:
    """The network of ``spec`` as a Python file: layers, cells edge by edge, a class ``name``, build() and load().

    The file is the deployed network, without auxiliary head; load() reads the weights of ``deployed_state``.
    Raises ``InputError`` for a network it cannot describe and for a ``name`` that cannot stand in the file.
    """
    if re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) is None or name in TAKEN:
        raise InputError(f"'{name[:60]}' cannot be the name of the exported class; choose a word such as 'Network'")
    if not all(math.isfinite(value) for value in spec.mean + spec.std):
        raise InputError("'mean' and 'std' must be finite numbers")
    blueprint = _blueprint(spec)
    body = _body(spec, blueprint, name)
    network = _network_class(name, body)
    code = "\n".join([*body.cells, network])
    layers = [inspect.getsource(layer).strip() for layer in LAYERS if re.search(rf"\b{layer.__name__}\(", code)]
    sections = [
        _docstring(spec, body, parameter_count(blueprint)) + "\n\n" + IMPORTS + "\n\n" + _constants(spec),
        *layers,
        *body.cells,
        network,
        FUNCTIONS.format(name=name).strip(),
        inspect.getsource(plain_torch.read_weights).strip(),
        MAIN.format(name=name).strip(),
    ]
    return "\n\n\n".join(sections) + "\n"


def why_no_source(spec: ModelSpec) -> str:
    """Why ``network_source`` would refuse the network of ``spec``; nothing where it would not."""
    try:
        _body(spec, _blueprint(spec), "Network")
    except InputError as error:
        return str(error)
    return ""


def deployed_state(spec: ModelSpec, model: nn.Module) -> dict[str, Tensor]:
    """The weights of ``model`` under the names of the exported file, as float32 on the CPU.

    Compression masks are multiplied into the weights and the auxiliary head is left out. Raises ``InputError``
    where ``model`` is not the network of ``spec``.
    """
    blueprint = _blueprint(spec)
    renamed = _body(spec, blueprint, "Network").renamed
    state = {}
    for name, like in blueprint.state_dict().items():
        layer, _, tensor_name = name.rpartition(".")
        try:
            # The attribute of a layer is the weight in effect, whatever parametrises it.
            tensor = getattr(model.get_submodule(layer), tensor_name)
        except AttributeError:
            tensor = None
        if not isinstance(tensor, Tensor) or tensor.shape != like.shape:
            found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}, not {list(like.shape)}"
            raise InputError(f"the model is not the network described: '{name}' {found}")
        state[f"{renamed(layer)}.{tensor_name}"] = tensor.detach().to("cpu", like.dtype, copy=True).contiguous()
    return state


def _blueprint(spec: ModelSpec) -> Any:
    """The deployed network of ``spec`` without storage for its weights."""
    if spec.prediction is not None:
        raise InputError(
            f"a network that predicts by the {spec.prediction} has no form as a source file; "
            "export it by --to json,safetensors instead"
        )
    if spec.activation is not None:
        raise InputError(
            f"a network with the activation {spec.activation} has no form as a source file; "
            "export it by --to safetensors or onnx instead"
        )
    for plan in spec.plans:
        if any(layer.action == "replaced" for layer in plan.layers):
            raise InputError(
                f"compression '{plan.method[:60]}' replaces layers, which the source file cannot describe; "
                "export format 'safetensors' instead"
            )
    with torch.device("meta"):
        return replace(spec, plans=(), auxiliary=False).build()


def _body(spec: ModelSpec, blueprint: Any, name: str) -> Body:
    space, genotype = space_of(spec.genotype), spec.genotype
    if isinstance(space, CellSpace) and isinstance(genotype, Genotype):
        return cell_body(spec, genotype, blueprint.stem, name)
    if space is PLAIN and isinstance(genotype, StageGenotype):
        return plain_body(spec, genotype)
    raise InputError(f"networks of space '{space.name}' have no form as a source file")


# The file around the network

IMPORTS = """\
from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn"""

FUNCTIONS = '''
def build() -> {name}:
    """The network with random weights."""
    return {name}()


def load(path: str | Path) -> {name}:
    """The network with the weights of a .safetensors file, in eval mode. Raises ValueError if they do not fit."""
    model = build()
    model.load_state_dict(read_weights(path, model.state_dict()))
    return model.eval()
'''

MAIN = """
if __name__ == "__main__":
    print(f"{name}: {{sum(weights.numel() for weights in build().parameters()):,}} parameters")
    if len(sys.argv) > 1:
        with torch.no_grad():
            logits = load(sys.argv[1])(torch.zeros(1, *INPUT_SHAPE))
        print(f"a black image is {{CLASSES[int(logits.argmax())]!r}}; logits {{logits[0].tolist()}}")
"""


def _docstring(spec: ModelSpec, body: Body, parameters: int) -> str:
    shape = ", ".join(map(str, spec.input_shape))
    lines = [
        f'"""A network of search space {words(spec.genotype.space)}, genotype {spec.genotype.digest}, in plain torch.',
        "",
        f"Input:   pixels [N, {shape}] in [0, 1]; normalisation is inside.",
        f"Output:  logits [N, {len(spec.classes)}], in the order of CLASSES.",
        f"Size:    {body.size}, {parameters:,} parameters.",
    ]
    if spec.plans:
        methods = ", ".join(words(plan.method) for plan in spec.plans)
        lines.append(f"Pruned:  by {methods}; the removed weights are zeros in the weights file.")
    return "\n".join(
        [
            *lines,
            "",
            "    import network                                  # this file",
            '    model = network.load("network.safetensors")     # in eval mode; its weights lie beside it',
            "    logits = model(images)",
            "",
            "As a program it prints its size and, given the weights file, its answer to a black image.",
            '"""',
        ]
    )


def _constants(spec: ModelSpec) -> str:
    closing = ")" if len(spec.classes) > 1 else ",)"
    lines = listed("CLASSES = (", [quoted(name) for name in spec.classes], closing, indent=0)
    lines += [
        f"INPUT_SHAPE = {tuple(spec.input_shape)}",
        f"MEAN = {tuple(float(value) for value in spec.mean)}",
        f"STD = {tuple(float(value) for value in spec.std)}",
    ]
    return "\n".join(lines)


def _network_class(name: str, body: Body) -> str:
    indent = " " * 8
    return "\n".join(
        [
            f"class {name}(nn.Module):",
            '    """Pixels [N, C, H, W] in [0, 1] to logits [N, classes]."""',
            "",
            "    mean: Tensor",
            "    std: Tensor",
            "",
            "    def __init__(self) -> None:",
            "        super().__init__()",
            '        self.register_buffer("mean", torch.tensor(MEAN).view(1, -1, 1, 1), persistent=False)',
            '        self.register_buffer("std", torch.tensor(STD).view(1, -1, 1, 1), persistent=False)',
            *(indent + line for line in body.init),
            "",
            "    def forward(self, x: Tensor) -> Tensor:",
            *(indent + line for line in body.forward),
        ]
    )
