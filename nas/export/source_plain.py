"""Plain convolutional networks as source text: stages of 3x3 convolutions."""

from __future__ import annotations

from nas.export.source_text import Body, listed
from nas.model_file import ModelSpec
from search_spaces.genotype import StageGenotype


def plain_body(spec: ModelSpec, genotype: StageGenotype) -> Body:
    """The text of a plain network."""
    names: list[str] = []
    init: list[str] = []
    in_channels = spec.input_shape[0]
    for stage, (depth, width) in enumerate(zip(genotype.depths, genotype.widths, strict=True)):
        layers = []
        for index in range(depth):
            stride = ", stride=2" if stage > 0 and index == 0 else ""
            layers.append(f"ConvBnRelu({in_channels}, {width}{stride})")
            names.append(f"stage{stage}.{index}")
            in_channels = width
        init += listed(f"self.stage{stage} = nn.Sequential(", layers, ")", indent=0)
    init.append(f"self.classifier = nn.Linear({in_channels}, len(CLASSES))")
    forward = [
        "x = (x - self.mean) / self.std",
        *(f"x = self.stage{stage}(x)" for stage in range(len(genotype.depths))),
        "return self.classifier(x.mean((2, 3)))",
    ]

    def renamed(layer: str) -> str:
        if not layer.startswith("features."):
            return layer
        # The package's Sequential is [convolution, BN, ReLU] repeated.
        index, role = divmod(int(layer.removeprefix("features.")), 3)
        return f"{names[index]}.{('conv', 'bn', 'relu')[role]}"

    return Body(f"{sum(genotype.depths)} convolutions in {len(genotype.depths)} stages", [], init, forward, renamed)
