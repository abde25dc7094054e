"""Networks of stages as source text: plain, resnet, residual, vgg, mlp and vit, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from nas.export.source_layers import Writer, conv_block, sequence
from nas.export.source_text import Body, Shapes, Written, noted
from search_spaces.genotype import StageGenotype

POOLED = "return self.classifier(x.mean((2, 3)))"


def stage_body(space: str, genotype: StageGenotype, network: nn.Module, shapes: Shapes) -> Body | None:
    """A network of ``space``; None where this space has no form."""
    made = BODIES.get(space)
    return None if made is None else made(genotype, network, shapes)


def _plain(genotype: StageGenotype, network: Any, shapes: Shapes) -> Body:
    writer, layers, stages = Writer(network), [*network.features], {}
    for stage, (start, stop) in enumerate(_spans(genotype.depths)):
        blocks = [conv_block(writer, *layers[3 * index : 3 * index + 3]) for index in range(start, stop)]
        stages[f"stage{stage}"] = _stage(blocks, noted(shapes, f"features.{3 * stop - 1}"))
    return _body(f"{sum(genotype.depths)} convolutions", writer, stages, network.classifier, [POOLED])


def _resnet(genotype: StageGenotype, network: Any, shapes: Shapes) -> Body:
    writer = Writer(network)
    parts = {"stem": replace(conv_block(writer, *network.stem), comment=noted(shapes, "stem"))}
    for stage, blocks in enumerate(network.stages):
        parts[f"stage{stage}"] = _stage(map(writer, blocks), noted(shapes, f"stages.{stage}"))
    return _body(f"{sum(genotype.depths)} blocks", writer, parts, network.classifier, [POOLED])


def _residual(genotype: StageGenotype, network: Any, shapes: Shapes) -> Body:
    writer = Writer(network)
    parts = {"stem": replace(writer(network.stem), comment=noted(shapes, "stem"))}
    for stage, blocks in enumerate(network.stages):
        parts[f"stage{stage}"] = _stage(map(writer, blocks), noted(shapes, f"stages.{stage}"))
    parts["final"] = writer(network.final)
    return _body(f"{sum(genotype.depths)} blocks", writer, parts, network.classifier, [POOLED])


def _vgg(genotype: StageGenotype, network: Any, shapes: Shapes) -> Body:
    writer, layers, parts = Writer(network), [*network.features], {}
    for stage, (start, stop) in enumerate(_spans(genotype.depths)):
        blocks = [
            conv_block(writer, *layers[3 * index + stage : 3 * index + stage + 3]) for index in range(start, stop)
        ]
        pool = 3 * stop + stage
        parts[f"stage{stage}"] = _stage([*blocks, writer(layers[pool])], noted(shapes, f"features.{pool}"))
    parts["resize"] = replace(writer(network.avgpool), comment=noted(shapes, "avgpool"))
    classify = ["return self.classifier(self.resize(x).flatten(1))"]
    body = _body(f"{sum(genotype.depths)} convolutions", writer, parts, network.classifier, classify)
    return replace(body, forward=[line for line in body.forward if line != "x = self.resize(x)"])


def _mlp(genotype: StageGenotype, network: Any, shapes: Shapes) -> Body:
    writer, layers, stages = Writer(network), [*network.features], {}
    for stage, (start, stop) in enumerate(_spans(genotype.depths)):
        comment = noted(shapes, f"features.{2 * stop - 1}")
        stages[f"stage{stage}"] = _stage(map(writer, layers[2 * start : 2 * stop]), comment)
    body = _body(f"{sum(genotype.depths)} hidden layers", writer, stages, network.classifier, [])
    first, *others = body.forward
    return replace(
        body, forward=[f"{first.replace('x = ', 'x = (', 1)}).flatten(1)", *others, "return self.classifier(x)"]
    )


def _vit(genotype: StageGenotype, network: Any, shapes: Shapes) -> Body:
    writer, network = Writer(network), network.network
    tensors = {"class_token": network.class_token, "positions": network.encoder.pos_embedding}
    init = [
        f"self.class_token = nn.Parameter(torch.zeros{(*network.class_token.shape,)})",
        f"self.positions = nn.Parameter(torch.zeros{(*network.encoder.pos_embedding.shape,)})",
    ]
    parts = {
        "patches": replace(writer(network.conv_proj), comment=noted(shapes, "network.conv_proj")),
        "layers": _stage(map(writer, network.encoder.layers), noted(shapes, "network.encoder.layers")),
        "norm": writer(network.encoder.ln),
    }
    forward = [
        "x = (x - self.mean) / self.std",
        "tokens = self.patches(x).flatten(2).transpose(1, 2)  # [N, patches, features]",
        "tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1) + self.positions",
        "return self.classifier(self.norm(self.layers(tokens))[:, 0])",
    ]
    body = _body(f"{genotype.depths[0]} layers", writer, parts, network.heads.head, [])
    return replace(body, size=f"{genotype.depths[0]} layers", forward=forward, tensors=tensors, init=init)


BODIES: dict[str, Callable[[StageGenotype, Any, Shapes], Body]] = {
    "plain": _plain,
    "resnet": _resnet,
    "residual": _residual,
    "vgg": _vgg,
    "mlp": _mlp,
    "vit": _vit,
}
"""What writes the networks of a space."""


def _body(size: str, writer: Writer, parts: dict[str, Written], classifier: nn.Module, end: list[str]) -> Body:
    """A network that passes ``parts`` one after the other, then ``end``."""
    stages = sum(name.startswith("stage") for name in parts)
    forward = ["x = (x - self.mean) / self.std", *(f"x = self.{name}(x)" for name in parts), *end]
    parts = {**parts, "classifier": writer(classifier)}
    return Body(f"{size} in {stages} stages", {**writer.borrowed, **parts}, forward)


def _stage(blocks: Iterable[Written | None], comment: str) -> Written:
    return replace(sequence(blocks), comment=comment)


def _spans(depths: Iterable[int]) -> list[tuple[int, int]]:
    """First layer of each stage, and the first behind it."""
    spans, start = [], 0
    for depth in depths:
        spans.append((start, start + depth))
        start += depth
    return spans
