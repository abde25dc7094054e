"""A network as one readable Python file that needs nothing but torch, and the weights that belong to it."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nas.errors import InputError
from nas.export import plain_torch
from nas.export.source_cells import CellForm, cell_body, cell_form
from nas.export.source_layers import CLASSES, Form, class_text, forms_of, resolved
from nas.export.source_stages import stage_body
from nas.export.source_text import TAKEN, Body, Shapes, Written, expression, listed, quoted, words
from nas.model_file import ModelSpec
from nas.prediction import MeanOverNoise, networks_in
from search_spaces.catalogue import space_of
from search_spaces.genotype import Genotype, StageGenotype
from search_spaces.network import CellNetwork, parameter_count


def network_source(spec: ModelSpec, name: str = "Network") -> str:
    """The network of ``spec`` as a Python file: layers, cells edge by edge, a class ``name``, build() and load().

    The file is the deployed network, compressed as planned, without auxiliary head; load() reads the weights of
    ``deployed_state``. Raises ``InputError`` for a network it cannot describe and for a ``name`` that cannot stand in
    the file.
    """
    if re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) is None or name in TAKEN or name in CLASSES:
        raise InputError(f"'{name[:60]}' cannot be the name of the exported class; choose a word such as 'Network'")
    if not all(math.isfinite(value) for value in spec.mean + spec.std):
        raise InputError("'mean' and 'std' must be finite numbers")
    blueprint = _blueprint(spec)
    described = _described(spec, blueprint, name, _shapes(spec, blueprint))
    own = [*described.cells, *_network_classes(spec, described.bodies, name)]
    plain = _plain_classes(own, described.forms)
    rest = [
        FUNCTIONS.format(name=name).strip(),
        inspect.getsource(plain_torch.read_weights).strip(),
        MAIN.format(name=name).strip(),
    ]
    opening = [
        _docstring(spec, described.bodies, parameter_count(blueprint)),
        _imports([*plain, *own]),
        _constants(spec),
    ]
    return "\n\n\n".join(["\n\n".join(opening), *plain, *own, *rest]) + "\n"


def why_no_source(spec: ModelSpec) -> str:
    """Why ``network_source`` would refuse the network of ``spec``; nothing where it would not."""
    try:
        _described(spec, _blueprint(spec))
    except InputError as error:
        return str(error)
    return ""


def deployed_state(spec: ModelSpec, model: nn.Module) -> dict[str, Tensor]:
    """The weights of ``model`` under the names of the exported file, on the CPU, as float32 or as integers.

    Compression masks are multiplied into the weights, int8 layers hold their integers, and the auxiliary head is left
    out. Raises ``InputError`` where ``model`` is not the network of ``spec``.
    """
    blueprint = _blueprint(spec)
    expected, found = _deployed(blueprint), _deployed(model)
    for name in [*expected, *found]:
        if name not in found or found[name].shape != expected.get(name, found[name]).shape:
            shapes = [list(state[name].shape) if name in state else None for state in (found, expected)]
            what = "is missing" if shapes[0] is None else f"has shape {shapes[0]}, not {shapes[1]}"
            raise InputError(f"the model is not the network described: '{name}' {what}")
    state = {}
    for name, tensor in _tensors(_described(spec, model).bodies, ensemble=spec.prediction is not None):
        kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
        state[name] = tensor.detach().to("cpu", kind, copy=True).contiguous()
    return state


def _deployed(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("auxiliary.")}


def _blueprint(spec: ModelSpec) -> nn.Module:
    """The network of ``spec``, in eval mode, without storage for its weights: they are all the same number."""
    if isinstance(spec.prediction, MeanOverNoise):
        raise InputError(
            f"a network that predicts by the {spec.prediction} has no form as a source file, which would not draw the "
            "same noise; export it by --to json,safetensors instead"
        )
    with torch.device("meta"):
        model = replace(spec, plans=()).build()
    for plan in spec.plans:
        model = plan.apply(model, fit=False)

    def hollow(tensor: Tensor) -> Tensor:
        one = torch.ones if tensor.is_floating_point() else torch.zeros
        return one((), dtype=tensor.dtype).expand(tensor.shape)

    # Not left without any, on the device "meta": most operations take ten times as long there.
    return model._apply(hollow).eval()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Described:
    """What a file says: of each network, then the texts of the classes of cells and the forms of other blocks."""

    bodies: Sequence[Body]
    cells: Sequence[str]
    forms: Mapping[str, Form]


def _described(
    spec: ModelSpec, model: nn.Module, name: str = "Network", shapes: Mapping[str, Shapes] | None = None
) -> Described:
    """What the file of ``model`` says, whose class is to be ``name``; shapes: by the prefix of each network in it."""
    known = shapes or {}
    bodies = [_body(spec, network, name, known.get(prefix, {})) for prefix, network in networks_in(model).items()]
    forms = forms_of(part for body in bodies for part in body.parts.values())
    bodies = [replace(body, parts={key: resolved(part, forms) for key, part in body.parts.items()}) for body in bodies]
    kinds = {kind.name: kind for body in bodies for kind in body.kinds}
    placed = [part for body in bodies for root in body.parts.values() for part in root.all()]
    found = {key: cell_form([part for part in placed if part.call == key]) for key in kinds}
    bodies = [replace(body, parts={key: _with(part, found) for key, part in body.parts.items()}) for body in bodies]
    return Described(bodies, [kind.text(found[key]) for key, kind in kinds.items()], forms)


def _with(written: Written, cells: Mapping[str, CellForm]) -> Written:
    """``written`` with its cells in their forms."""
    if written.call in cells:
        return cells[written.call].of(written)
    if written.call != "nn.ModuleList":
        return written
    return replace(written, parts={key: part and _with(part, cells) for key, part in written.parts.items()})


def _body(spec: ModelSpec, network: nn.Module, name: str, shapes: Shapes) -> Body:
    space, genotype = space_of(spec.genotype), spec.genotype
    if isinstance(network, CellNetwork) and isinstance(genotype, Genotype):
        return cell_body(spec, genotype, network, shapes, name)
    if isinstance(genotype, StageGenotype):
        body = stage_body(space.name, genotype, network, shapes)
        if body is not None:
            return body
    raise InputError(
        f"networks of space '{space.name[:60]}' have no form as a source file; "
        "export it by --to safetensors or onnx instead"
    )


def _shapes(spec: ModelSpec, blueprint: nn.Module) -> dict[str, Shapes]:
    """What each module of each network gives for one image."""
    return {prefix: _shapes_of(network, spec.input_shape) for prefix, network in networks_in(blueprint).items()}


def _shapes_of(network: nn.Module, input_shape: tuple[int, int, int]) -> Shapes:
    shapes: dict[str, Sequence[int]] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], object], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
            if isinstance(output, Tensor):
                shapes[name] = output.shape[1:]

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in network.named_modules() if name]
    with torch.no_grad():
        network(torch.zeros(1, *input_shape))
    for handle in handles:
        handle.remove()
    return shapes


def _tensors(bodies: Sequence[Body], *, ensemble: bool) -> Iterator[tuple[str, Tensor]]:
    """All tensors by their names in the file."""
    for index, body in enumerate(bodies):
        prefix = f"members.{index}." if ensemble else ""
        yield from ((prefix + name, tensor) for name, tensor in body.named_tensors())


def _plain_classes(code: Sequence[str], forms: Mapping[str, Form]) -> list[str]:
    """The classes of plain_torch.py that ``code`` needs, and those that these need."""
    texts: dict[str, str] = {}
    named = _names("\n".join(code))
    while more := (named & CLASSES.keys()) - texts.keys():
        texts |= {name: class_text(name, forms.get(name)) for name in more}
        named = set().union(*(_names(texts[name]) for name in more))
    return [texts[name] for name in CLASSES if name in texts]


def _names(code: str) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


# The file around the network

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


def _docstring(spec: ModelSpec, bodies: Sequence[Body], parameters: int) -> str:
    shape = ", ".join(map(str, spec.input_shape))
    several = spec.prediction is not None
    lines = [
        f'"""A network of search space {words(spec.genotype.space)}, genotype {spec.genotype.digest}, in plain torch.',
        "",
        f"Input:   pixels [N, {shape}] in [0, 1]; normalisation is inside.",
        f"Output:  {'log-probabilities' if several else 'logits'} [N, {len(spec.classes)}], in the order of CLASSES.",
        f"Size:    {f'{len(bodies)} networks of ' if several else ''}{bodies[0].size}, {parameters:,} parameters.",
    ]
    if spec.plans:
        methods = ", ".join(words(plan.method) for plan in spec.plans)
        masked = any(layer.action == "masked" for plan in spec.plans for layer in plan.layers)
        lines.append(f"Smaller: by {methods}" + ("; pruned weights are zeros in the weights file." if masked else "."))
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


def _imports(code: Sequence[str]) -> str:
    lines = ["from __future__ import annotations", "", "import json"]
    lines += ["import math"] if "math" in _names("\n".join(code)) else []
    return "\n".join(
        [*lines, "import sys", "from pathlib import Path", "", "import torch", "from torch import Tensor, nn"]
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


def _network_classes(spec: ModelSpec, bodies: Sequence[Body], name: str) -> list[str]:
    """The class ``name``; for an ensemble, its members before it: one class for all that are alike."""
    if spec.prediction is None:
        return [_network_class(name, bodies[0])]
    kinds = list(dict.fromkeys(_network_class("", body) for body in bodies))
    names = [f"{name}Member{number if len(kinds) > 1 else ''}" for number in range(1, len(kinds) + 1)]
    classes = [
        _network_class(names[number], next(body for body in bodies if _network_class("", body) == kind))
        for number, kind in enumerate(kinds)
    ]
    if len(kinds) == 1:
        members = [f"self.members = nn.ModuleList([{names[0]}() for _ in range({len(bodies)})])"]
    else:
        calls = [f"{names[kinds.index(_network_class('', body))]}()" for body in bodies]
        members = listed("self.members = nn.ModuleList([", calls, "])", indent=0)
    lines = [
        f"class {name}(nn.Module):",
        '    """Pixels [N, C, H, W] in [0, 1] to log mean probabilities of its members [N, classes]."""',
        "",
        "    def __init__(self) -> None:",
        "        super().__init__()",
        *(" " * 8 + line for line in members),
        "",
        "    def forward(self, x: Tensor) -> Tensor:",
        "        votes = torch.stack([member(x).log_softmax(1) for member in self.members])",
        "        return votes.logsumexp(0) - math.log(len(self.members))",
    ]
    return [*classes, "\n".join(lines)]


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
            *(line for part, written in body.parts.items() for line in expression(written, f"self.{part} = ", "", 8)),
            "",
            "    def forward(self, x: Tensor) -> Tensor:",
            *(indent + line for line in body.forward),
        ]
    )
