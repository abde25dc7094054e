"""Modules of a network as expressions of an exported file: one writer for each type, and which blocks stay whole."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torchvision.models.resnet import BasicBlock
from torchvision.models.vision_transformer import EncoderBlock, MLPBlock
from torchvision.ops.misc import SqueezeExcitation

from nas.activations.activation import Shared
from nas.activations.lossy import LossyMap
from nas.activations.prelu import Slopes
from nas.activations.sparta import Gate
from nas.compression.generalised_separable import GeneralisedSeparableConv2d
from nas.compression.int8 import FakeQuantise, QuantisedConv2d, QuantisedLinear
from nas.compression.separable_linear import SeparableLinear, SeparablePointwise
from nas.errors import InputError
from nas.export import plain_torch
from nas.export.source_text import Plain, Written, words
from search_spaces import operations, residual
from search_spaces.layers import DepthwiseConv2d, PointwiseConv2d
from search_spaces.network import Stem

CLASSES: dict[str, type[nn.Module]] = {
    name: value
    for name, value in vars(plain_torch).items()
    if isinstance(value, type) and value.__module__ == plain_torch.__name__
}
"""All that plain_torch.py defines for files, in the order in which a file defines it."""

CHAINS = (
    *("Preprocess", "SeparableConv", "ConvBlock", "BiasedConvBlock", "GroupedConv"),
    *("BasicPath", "BottleneckPath", "RobustPath"),
)
"""Blocks that pass their layers one after the other: an nn.Sequential where a layer was exchanged."""

BLOCKS = (*CHAINS, "FactorisedReduce", "BasicBlock", "Hierarchical", "SqueezeExcitation", "EncoderLayer")
"""Blocks whose class makes their layers by itself, where none was exchanged."""

IDENTITY = "nn.Identity"

ACTIVATIONS = ("nn.ReLU", "nn.SiLU", "nn.GELU", "nn.Softplus")
"""Activations without weights, which may stand for one another in the text of a block."""


class Writer:
    """Writes the modules of ``network``.

    borrowed: activations that several places share, by the attribute of the network that holds them.
    """

    def __init__(self, network: nn.Module) -> None:
        self.borrowed: dict[str, Written] = {}
        self._attributes: dict[str, str] = {}
        self._names = {module: name for name, module in network.named_modules()}

    def __call__(self, module: nn.Module) -> Written:
        """The expression of ``module``. Raises ``InputError`` for one that has none."""
        kind = type(module)
        if parametrize.is_parametrized(module):
            # By masks, which are in the weight that the layer has.
            kind = kind.__bases__[0]
        if kind.__module__ == plain_torch.__name__:
            return Written(kind.__name__, parts=self.parts(**dict(module.named_children())))
        if kind not in WRITERS:
            raise self.refusal(module, f"of type {kind.__name__}")
        return WRITERS[kind](self, module)

    def parts(self, **modules: nn.Module | None) -> dict[str, Written | None]:
        """Several at once."""
        return {name: None if module is None else self(module) for name, module in modules.items()}

    def refusal(self, module: nn.Module, what: str) -> InputError:
        """That ``module`` cannot be written."""
        name = self._names.get(module, "")
        return InputError(
            f"layer '{name[:80]}' {what} has no form as a source file; export it by --to safetensors or onnx instead"
        )

    def lend(self, key: str, module: nn.Module) -> str:
        """The attribute under which the network holds the activation that ``key`` names."""
        if key not in self._attributes:
            stem = "activation_" + "_".join(words(key).lower().split())[:40]
            number, attribute = 1, stem
            while attribute in self.borrowed:
                number += 1
                attribute = f"{stem}_{number}"
            self._attributes[key] = attribute
            self.borrowed[attribute] = self(module)
        return self._attributes[key]


def sequence(parts: Iterable[Written | None]) -> Written:
    """An nn.Sequential of what is more than an identity."""
    kept = [part for part in parts if part is not None and part.call != IDENTITY]
    if not kept:
        return Written(IDENTITY)
    return Written("nn.Sequential", parts={str(index): part for index, part in enumerate(kept)})


def block(name: str, parts: Mapping[str, Written | None], *numbers: int | None, **options: int) -> Written:
    """A block of plain_torch.py, by its parts; numbers, options: with which its class makes them, as far as known."""
    defaults = {key: parameter.default for key, parameter in inspect.signature(CLASSES[name]).parameters.items()}
    known = {key: value for key, value in options.items() if value != defaults[key]}
    if None in numbers:
        return Written(name, parts=parts)
    return Written(name, parts=parts, plain=Plain(name, tuple(n for n in numbers if n is not None), known))


# Whole blocks


@dataclass(frozen=True)
class Form:
    """How the instances of a block stand in a file.

    whole: whether its class makes their layers;  swap: an activation in the text of its class, and the one they have.
    """

    whole: bool
    swap: tuple[str, str] | None = None


def forms_of(roots: Iterable[Written]) -> dict[str, Form]:
    """The form of each block in ``roots``: whole where the class makes just the layers that all its instances have."""
    instances: dict[str, list[Written]] = {}
    for root in roots:
        for written in root.all():
            if written.call in BLOCKS:
                instances.setdefault(written.call, []).append(written)
    forms = {}
    for name, found in instances.items():
        swaps: set[tuple[str, str]] = set()
        whole = all(written.plain is not None and _alike(_made(written.plain), written, swaps) for written in found)
        forms[name] = Form(whole and len(swaps) <= 1, next(iter(swaps), None))
    return forms


def _made(plain: Plain) -> Written:
    """What the class of ``plain`` makes."""
    with torch.device("meta"):
        example = CLASSES[plain.name](*plain.numbers, **plain.options)
    return Writer(example)(example)


def _alike(made: Written | None, given: Written | None, swaps: set[tuple[str, str]]) -> bool:
    """Whether both are the same but for activations without weights, which are noted."""
    if made is None or given is None:
        return made is given
    if made.call in ACTIVATIONS and given.call in ACTIVATIONS:
        texts = (f"{w.call}({', '.join(w.arguments)})" for w in (made, given))
        swaps.add((next(texts), next(texts)))
        return True
    same = (made.call, [*made.arguments]) == (given.call, [*given.arguments])
    names = made.parts.keys() | given.parts.keys()
    return same and all(_alike(made.parts.get(name), given.parts.get(name), swaps) for name in names)


def resolved(written: Written, forms: Mapping[str, Form]) -> Written:
    """``written`` with its blocks in their forms."""
    parts = {name: None if part is None else resolved(part, forms) for name, part in written.parts.items()}
    written = replace(written, parts=parts)
    if written.plain is not None and forms[written.call].whole:
        return replace(written, arguments=written.plain.arguments, makes_parts=True)
    if written.call in CHAINS:
        return replace(sequence(parts.values()), comment=written.comment)
    return written


def class_text(name: str, form: Form | None) -> str:
    """The text of a class of plain_torch.py; without its constructor, where its instances are given their layers."""
    lines, node = _definitions()[name]
    source = "\n".join(lines)
    if form is None:
        return source
    if form.whole:
        return source if form.swap is None else source.replace(*form.swap)
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            assert part.end_lineno is not None
            # With the empty line behind it.
            lines = [*lines[: part.lineno - node.lineno], *lines[part.end_lineno - node.lineno + 2 :]]
    return "\n".join(lines).replace("(nn.Module)", "(Layers)", 1)


@lru_cache(maxsize=1)
def _definitions() -> dict[str, tuple[list[str], ast.ClassDef]]:
    """Lines and tree of each class of plain_torch.py."""
    source = inspect.getsource(plain_torch)
    lines = source.splitlines()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    return {node.name: (lines[node.lineno - 1 : node.end_lineno], node) for node in classes}


# Layers of torch


def _tensors(module: nn.Module, *names: str) -> dict[str, Tensor]:
    """Those of ``names`` that ``module`` has: of a masked weight what is left of it."""
    found = {name: getattr(module, name, None) for name in names}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _pair(values: Any) -> str:
    """A size or a pair of sizes, of which equal ones are one."""
    if isinstance(values, tuple) and len(set(values)) == 1:
        return str(values[0])
    return repr(values)


def _named(**options: tuple[object, object]) -> list[str]:
    """Options as text but for those at their default: value, default."""
    return [f"{name}={_pair(value)}" for name, (value, default) in options.items() if _pair(value) != _pair(default)]


def _convolution(writer: Writer, module: nn.Conv2d) -> Written:
    arguments = [str(module.in_channels), str(module.out_channels), _pair(module.kernel_size)]
    arguments += _named(
        stride=(module.stride, 1),
        padding=(module.padding, 0),
        dilation=(module.dilation, 1),
        groups=(module.groups, 1),
        bias=(module.bias is not None, True),
        padding_mode=(module.padding_mode, "zeros"),
    )
    return Written("nn.Conv2d", arguments, tensors=_tensors(module, "weight", "bias"))


def _linear(writer: Writer, module: nn.Linear) -> Written:
    arguments = [str(module.in_features), str(module.out_features), *_named(bias=(module.bias is not None, True))]
    return Written("nn.Linear", arguments, tensors=_tensors(module, "weight", "bias"))


def _batch_norm(writer: Writer, module: nn.BatchNorm2d) -> Written:
    if not (module.affine and module.track_running_stats):
        raise writer.refusal(module, "without weights or statistics of its own")
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    arguments = [str(module.num_features), *_named(eps=(module.eps, 1e-5), momentum=(module.momentum, 0.1))]
    return Written("nn.BatchNorm2d", arguments, tensors=_tensors(module, *names))


def _layer_norm(writer: Writer, module: nn.LayerNorm) -> Written:
    arguments = [_pair(module.normalized_shape), *_named(eps=(module.eps, 1e-5))]
    return Written("nn.LayerNorm", arguments, tensors=_tensors(module, "weight", "bias"))


def _attention(writer: Writer, module: nn.MultiheadAttention) -> Written:
    if type(module.out_proj) is not NonDynamicallyQuantizableLinear and not parametrize.is_parametrized(
        module.out_proj
    ):
        raise writer.refusal(module.out_proj, "within an attention")
    arguments = [str(module.embed_dim), str(module.num_heads), *_named(batch_first=(module.batch_first, False))]
    out = Written("nn.Linear", tensors=_tensors(module.out_proj, "weight", "bias"))
    tensors = _tensors(module, "in_proj_weight", "in_proj_bias")
    return Written("nn.MultiheadAttention", arguments, {"out_proj": out}, tensors, makes_parts=True)


def _pool(writer: Writer, module: nn.MaxPool2d | nn.AvgPool2d) -> Written:
    arguments = [_pair(module.kernel_size), *_named(stride=(module.stride, module.kernel_size))]
    arguments += _named(padding=(module.padding, 0))
    if isinstance(module, nn.AvgPool2d):
        arguments += _named(count_include_pad=(module.count_include_pad, True))
    return Written(f"nn.{type(module).__name__}", arguments)


def _dropout(writer: Writer, module: nn.Dropout) -> Written:
    return Written("nn.Dropout", [f"{module.p:g}"]) if module.p else Written(IDENTITY)


def _nothing_to_say(writer: Writer, module: nn.Module) -> Written:
    return Written(f"nn.{type(module).__name__}")


def _list(writer: Writer, module: nn.ModuleList) -> Written:
    return Written("nn.ModuleList", parts=writer.parts(**dict(module.named_children())))


def _sequential(writer: Writer, module: nn.Sequential) -> Written:
    return sequence(writer(part) for part in module)


# Blocks of the search spaces


def _of(layer: nn.Module, attribute: str) -> int | None:
    """A number of an ordinary convolution; of another layer none is known."""
    value = getattr(layer, attribute) if isinstance(layer, nn.Conv2d) else None
    return value[0] if isinstance(value, tuple) else value


def _cell_pool(writer: Writer, module: operations.MaxPool | operations.AvgPool) -> Written:
    arguments = ["3", f"stride={module.stride}", "padding=1"]
    if isinstance(module, operations.AvgPool):
        return Written("nn.AvgPool2d", [*arguments, "count_include_pad=False"])
    return Written("nn.MaxPool2d", arguments)


def _separable(writer: Writer, module: operations.SeparableConv) -> Written:
    layers, stages = [*module], []
    for index in range(0, len(layers), 4):
        activation, depthwise, pointwise, bn = layers[index : index + 4]
        parts = writer.parts(activation=activation, depthwise=depthwise, pointwise=pointwise, bn=bn)
        numbers = _of(depthwise, "in_channels"), _of(depthwise, "kernel_size")
        options = {"stride": _of(depthwise, "stride") or 1, "dilation": _of(depthwise, "dilation") or 1}
        stages.append(block("SeparableConv", parts, *numbers, **options))
    return stages[0] if len(stages) == 1 else sequence(stages)


def _factorised_reduce(writer: Writer, module: operations.FactorisedReduce) -> Written:
    parts = writer.parts(activation=module.activation, even=module.even, odd=module.odd, bn=module.bn)
    halves = [_of(half, "out_channels") for half in (module.even, module.odd) if half is not None]
    channels = None if None in halves else sum(half for half in halves if half is not None)
    return block("FactorisedReduce", parts, _of(module.even, "in_channels"), channels)


def _relu_conv_bn(writer: Writer, module: operations.ReluConvBn) -> Written:
    activation, conv, bn = module
    parts = writer.parts(activation=activation, conv=conv, bn=bn)
    return block("Preprocess", parts, _of(conv, "in_channels"), _of(conv, "out_channels"))


def conv_block(writer: Writer, conv: nn.Module, bn: nn.Module, activation: nn.Module) -> Written:
    """3x3 convolution, batch norm and activation."""
    parts = writer.parts(conv=conv, bn=bn, activation=activation)
    numbers = _of(conv, "in_channels"), _of(conv, "out_channels")
    if isinstance(conv, nn.Conv2d) and conv.bias is not None:
        return block("BiasedConvBlock", parts, *numbers)
    return block("ConvBlock", parts, *numbers, stride=_of(conv, "stride") or 1)


def _basic_block(writer: Writer, module: BasicBlock) -> Written:
    parts = writer.parts(
        conv1=module.conv1, bn1=module.bn1, conv2=module.conv2, bn2=module.bn2, activation=module.relu,
        shortcut=module.downsample or nn.Identity(),
    )  # fmt: skip
    numbers = _of(module.conv1, "in_channels"), _of(module.conv1, "out_channels")
    return block("BasicBlock", parts, *numbers, stride=_of(module.conv1, "stride") or 1)


def _residual_block(writer: Writer, module: residual.Block) -> Written:
    path = _residual_path(writer, module.path)
    parts = {**writer.parts(first=module.first), "path": path}
    if module.keeps_ungated:
        parts |= writer.parts(gate=module.gate)
    elif module.gate is not None:
        parts["path"] = sequence([path, *writer(module.gate).parts.values()])
    if module.shortcut is not None:
        parts |= writer.parts(shortcut=module.shortcut)
    return Written("GatedResidualBlock" if module.keeps_ungated else "ResidualBlock", parts=parts)


def _residual_path(writer: Writer, module: nn.Module) -> Written:
    assert isinstance(module, nn.Sequential)
    layers: list[Any] = [*module]
    first = layers[0]
    outer = _of(first, "in_channels"), _of(first, "out_channels")
    if len(layers) == 4:
        parts = writer.parts(**dict(zip(("conv1", "bn", "activation", "conv2"), layers, strict=True)))
        return block("BasicPath", parts, *outer, stride=_of(first, "stride") or 1)
    conv1, bn, activation, middle, last = layers
    if isinstance(middle, residual.Hierarchical):
        parts = writer.parts(conv1=conv1, bn=bn, activation=activation, parts=middle, conv2=last)
        grouped = middle.convolutions[0][0]  # type: ignore[index]
        numbers = outer[0], middle.parts, _of(grouped, "out_channels"), _of(last, "out_channels")
        return block("RobustPath", parts, *numbers, stride=middle.stride, groups=_of(grouped, "groups") or 1)
    parts = writer.parts(
        conv1=conv1, bn1=bn, activation1=activation, conv2=middle[0], bn2=middle[1], activation2=middle[2], conv3=last
    )
    options = {"stride": _of(middle[0], "stride") or 1, "groups": _of(middle[0], "groups") or 1}
    return block("BottleneckPath", parts, *outer, _of(last, "out_channels"), **options)


def _hierarchical(writer: Writer, module: residual.Hierarchical) -> Written:
    convolutions: list[Written | None] = []
    conv: Any = None
    for convolution in module.convolutions:
        conv, bn, activation = convolution.children()
        options = {"stride": _of(conv, "stride") or 1, "groups": _of(conv, "groups") or 1}
        parts = writer.parts(conv=conv, bn=bn, activation=activation)
        convolutions.append(block("GroupedConv", parts, _of(conv, "out_channels"), **options))
    listing = Written("nn.ModuleList", parts={str(index): part for index, part in enumerate(convolutions)})
    parts = {"convolutions": listing, "pool": writer(module.pool)}
    groups = _of(conv, "groups") or 1
    return block("Hierarchical", parts, module.parts, _of(conv, "out_channels"), stride=module.stride, groups=groups)


def _squeeze_excitation(writer: Writer, module: SqueezeExcitation) -> Written:
    parts = writer.parts(
        pool=module.avgpool, squeeze=module.fc1, activation=module.activation, excite=module.fc2,
        gate=module.scale_activation,
    )  # fmt: skip
    return block("SqueezeExcitation", parts, _of(module.fc1, "in_channels"), _of(module.fc1, "out_channels"))


def _encoder_layer(writer: Writer, module: EncoderBlock) -> Written:
    parts = writer.parts(norm1=module.ln_1, attention=module.self_attention, norm2=module.ln_2, mlp=module.mlp)
    hidden = module.mlp[0].out_features if isinstance(module.mlp[0], nn.Linear) else None
    return block("EncoderLayer", parts, module.self_attention.embed_dim, module.num_heads, hidden)


# What compression puts in the place of a layer


def _generalised_separable(writer: Writer, module: GeneralisedSeparableConv2d) -> Written:
    parts = writer.parts(depthwise=module.depthwise, pointwise=module.pointwise)
    if module.index is None:  # the depthwise convolution itself repeats the channels
        return sequence(parts.values())
    return Written("GeneralisedSeparable", [f"kernels={module.kernels}"], parts)


def _separable_linear(writer: Writer, module: SeparableLinear) -> Written:
    terms: dict[str, Written | None] = {
        str(number): Written("nn.ModuleList", parts={str(k): writer(factor) for k, factor in enumerate(factors)})
        for number, factors in enumerate(module.factors())
    }
    arguments = [
        f"modes={module.separation.in_modes}", f"order={module.separation.order}",
        f"out_features={module.out_features}", f"bias={module.bias is not None}",
    ]  # fmt: skip
    return Written(
        "KroneckerLinear", arguments, {"terms": Written("nn.ModuleList", parts=terms)}, _tensors(module, "bias")
    )


def _separable_pointwise(writer: Writer, module: SeparablePointwise) -> Written:
    return Written("KroneckerPointwise", [f"stride={module.stride}"], writer.parts(linear=module.linear))


def _rounding(writer: Writer, module: FakeQuantise) -> Written:
    tensors = {"scale": module.scale.float(), "zero_point": module.zero_point}
    return Written("Rounding", tensors=tensors)


@torch.no_grad()
def _integers(writer: Writer, module: QuantisedConv2d | QuantisedLinear) -> dict[str, Written | None]:
    """Input, weights and output of an int8 layer, its weights as the integers that it computes with."""
    scale = module.weights.scale.float()
    weight, bias = module.weights(module.input.scale)
    step = scale.view(-1, *[1] * (weight.dim() - 1))
    steps = torch.round(weight / step).to(torch.int8)
    if not weight.is_meta and not torch.equal(steps * step, weight.float()):
        raise writer.refusal(module, "whose weights are no multiples of their steps")
    tensors = {"weight": steps, "scale": scale, **({} if bias is None else {"bias": bias})}
    parts: dict[str, Written | None] = {
        "input": writer(module.input),
        "weights": Written("Int8Weight", tensors=tensors),
    }
    return parts if module.output is None else {**parts, "output": writer(module.output)}


def _int8_convolution(writer: Writer, module: QuantisedConv2d) -> Written:
    outputs, inputs, *kernel = module.weights.weight.shape
    geometry = module.stride, module.padding, module.dilation
    square = all(isinstance(pair, tuple) and len(set(pair)) == 1 for pair in (tuple(kernel), *geometry))
    if not square or module.padding_mode != "zeros":
        raise writer.refusal(module, "of such a geometry in int8")
    arguments = [str(inputs * module.groups), str(outputs), str(kernel[0])]
    arguments += _named(stride=(module.stride, 1), padding=(module.padding, 0), dilation=(module.dilation, 1))
    arguments += _named(groups=(module.groups, 1), bias=(module.weights.bias is not None, True))
    arguments += _named(rounds_output=(module.output is not None, False))
    return Written("Int8Conv2d", arguments, _integers(writer, module), makes_parts=True)


def _int8_linear(writer: Writer, module: QuantisedLinear) -> Written:
    outputs, inputs = module.weights.weight.shape
    arguments = [str(inputs), str(outputs), *_named(bias=(module.weights.bias is not None, True))]
    arguments += _named(rounds_output=(module.output is not None, False))
    return Written("Int8Linear", arguments, _integers(writer, module), makes_parts=True)


# Activations


def _gelu(writer: Writer, module: nn.GELU) -> Written:
    return Written("nn.GELU", [] if module.approximate == "none" else [f"approximate={module.approximate!r}"])


def _softplus(writer: Writer, module: nn.Softplus) -> Written:
    return Written("nn.Softplus", _named(beta=(float(module.beta), 1.0), threshold=(float(module.threshold), 20.0)))


def _slopes(writer: Writer, module: Slopes) -> Written:
    return Written("ChannelPrelu", [str(len(module.weight))], tensors={"weight": module.weight})


def _shared(writer: Writer, module: Shared) -> Written:
    if len(module.by_width) != 1:
        raise writer.refusal(module, "which is used for maps of several widths")
    ((width, activation),) = module.by_width.items()
    return Written("Borrowed", [f"self.{writer.lend(module.keys[width], activation)}"])


def _gate(writer: Writer, module: Gate) -> Written:
    own, rectified = str(len(module.beta)), _named(rectified=(module.rectified, False))
    tensors = _tensors(module, "beta", "bias", "weight", "narrow", "wide")
    if module.kind == "dw-pw":
        return Written("SqueezedSparta", [own, str(module.size), str(len(module.narrow)), *rectified], tensors=tensors)
    if module.kind == "pool":
        return Written("PooledSparta", [own, *rectified], tensors=tensors)
    if module.kind == "pointwise":
        return Written("PointwiseSparta", [own, str(module.size**2), *rectified], tensors=tensors)
    return Written("DepthwiseSparta", [own, str(module.size), *rectified], tensors=tensors)


def _lossy(writer: Writer, module: LossyMap) -> Written:
    settings = module.settings
    call, arguments = {
        "clip-quant": ("ClipQuant", [str(settings.levels)]),
        "dead-zone": ("DeadZone", [repr(settings.threshold)]),
        "binary": ("Binary", [repr(settings.threshold)]),
        "sigmoid-steep": ("SteepSigmoid", [repr(settings.steepness), repr(settings.threshold)]),
        "topk": ("TopK", [repr(settings.keep)]),
    }[settings.kind]
    arguments += _named(learned=(settings.learned, False))
    return Written(call, arguments, tensors={"level": module.level, "bound": module.bound})


WRITERS: dict[type[nn.Module], Callable[[Writer, Any], Written]] = {
    nn.Conv2d: _convolution,
    DepthwiseConv2d: _convolution,
    PointwiseConv2d: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.MultiheadAttention: _attention,
    nn.MaxPool2d: _pool,
    nn.AvgPool2d: _pool,
    nn.AdaptiveAvgPool2d: lambda writer, module: Written("nn.AdaptiveAvgPool2d", [_pair(module.output_size)]),
    nn.Dropout: _dropout,
    nn.Identity: _nothing_to_say,
    nn.ReLU: _nothing_to_say,
    nn.SiLU: _nothing_to_say,
    nn.Sigmoid: _nothing_to_say,
    nn.GELU: _gelu,
    nn.Softplus: _softplus,
    nn.ModuleList: _list,
    nn.Sequential: _sequential,
    MLPBlock: _sequential,
    Stem: _sequential,
    operations.MaxPool: _cell_pool,
    operations.AvgPool: _cell_pool,
    operations.SeparableConv: _separable,
    operations.FactorisedReduce: _factorised_reduce,
    operations.ReluConvBn: _relu_conv_bn,
    BasicBlock: _basic_block,
    residual.Activated: _sequential,
    residual.Block: _residual_block,
    residual.Hierarchical: _hierarchical,
    SqueezeExcitation: _squeeze_excitation,
    EncoderBlock: _encoder_layer,
    GeneralisedSeparableConv2d: _generalised_separable,
    SeparableLinear: _separable_linear,
    SeparablePointwise: _separable_pointwise,
    FakeQuantise: _rounding,
    QuantisedConv2d: _int8_convolution,
    QuantisedLinear: _int8_linear,
    Slopes: _slopes,
    Shared: _shared,
    Gate: _gate,
    LossyMap: _lossy,
}
"""What writes a module, by its very type: a subclass may compute something else."""
