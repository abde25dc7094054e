"""Residual networks: sizes as published, blocks as described, and the way of any network through the system."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.activations.activation import with_activation
from nas.activations.softplus import Softplus
from nas.analysis.complexity import _counted, complexity
from nas.compression.channel_pruning import ChannelPruning
from nas.compression.gdws import Gdws
from nas.export.package import export_model
from nas.export.parity import check_exports
from nas.model_file import ModelSpec, with_plan
from search_spaces.catalogue import load_genotype, published, space_of
from search_spaces.genotype import GenotypeError, Option, StageGenotype, read_genotype
from search_spaces.network import parameter_count
from search_spaces.residual import SPACE, Block, Hierarchical, ResidualOptions, wide

ROBUST: dict[str, Option] = {"block": "robust", "se": "residual", "se_reduction": 64}

# Millions of parameters and billions of multiply-accumulates for 3x32x32 pixels and 10 classes, as stated by the papers
# and their releases; "counted" from depths and widths where a release is off by more than 1 %.
PUBLISHED = {
    "wrn-28-10": (36.48, 5.24),
    "wrn-34-10": (46.16, 6.66),
    "wrn-34-12": (66.46, 9.58),
    "wrn-34-r": (68.12, 19.13),
    "wrn-46-14": (128.0, 18.6),
    "wrn-70-16": (266.8, 38.76),
    "wrn-a1": (18.71, 5.08),  # counted; stated 17.7 M, 5.09 G
    "wrn-a2": (38.32, 10.84),  # counted; stated 39.3 M, 9.74 G
    "wrn-a3": (75.30, 20.22),  # stated 74.8 M, 20.3 G
    "wrn-a4": (147.29, 40.38),
    "robustresnet-a1": (19.2, 5.11),
    "robustresnet-a2": (39.0, 10.8),
    "robustresnet-a3": (75.9, 19.9),
    "robustresnet-a4": (147.0, 39.4),
    "rawrn-70-16": (267.0, 60.5),
}
FACTORS = {
    "wrn-28-10": wide((4, 4, 4), (10, 10, 10)),
    "wrn-34-r": wide((5, 5, 5), (20, 20, 8)),
    "wrn-a3": wide((22, 22, 11), (8, 11, 5)),
    "robustresnet-a4": wide((27, 28, 13), (10, 14, 6), **ROBUST),
}
# Uniform networks of the same block, and what the block was built up from (Huang et al., 2023): millions of parameters.
UNIFORM = [
    (wide((4, 4, 4), (10, 10, 10), **ROBUST), 39.6),
    (wide((7, 7, 7), (14, 14, 14), **ROBUST), 133.0),
    (wide((11, 11, 11), (16, 16, 16), **ROBUST), 270.0),
    (wide((11, 11, 11), (16, 16, 16), block="robust"), 262.0),
    (wide((11, 11, 11), (16, 16, 16), block="bottleneck"), 265.0),
]
SMALL = [
    wide((2, 1), (1, 1), (6, 8), stem=4),
    wide((1, 2), (1, 1), (6, 8), se="plain", se_reduction=2, activation="silu"),
    wide((2, 2), (1, 1), (4, 8), block="bottleneck", expansion=2, se="residual"),
    wide((2, 2), (2, 1), (8, 24), block="robust", base_width=40, cardinality=2, scales=3, se="residual"),
    wide((1, 1), (1, 1), (8, 16), block="robust", base_width=80, cardinality=2, scales=1),
]


def spec_of(genotype: object, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> ModelSpec:
    assert isinstance(genotype, StageGenotype)
    names = tuple(str(index) for index in range(classes))
    return ModelSpec(genotype, 1, 1, shape, names, (0.4,) * shape[0], (0.25,) * shape[0])


def seen(genotype: StageGenotype, seed: int = 0) -> nn.Module:
    """A network on 8x8 pixels that has seen images, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = spec_of(genotype, (1, 8, 8), 3).build()
        for _ in range(3):
            model.train()(torch.rand(16, 1, 8, 8))
    return model.eval()


def block(stride: int = 1, channels: int = 6, width: int = 6, **options: Option) -> Block:
    torch.manual_seed(0)
    return Block(channels, width, stride, ResidualOptions(**options)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_published_sizes(name) -> None:
    cost = complexity(spec_of(load_genotype(name)))
    parameters, macs = PUBLISHED[name]
    assert cost.parameters / 1e6 == pytest.approx(parameters, rel=0.01)
    assert cost.macs / 1e9 == pytest.approx(macs, rel=0.01)


def test_every_published_residual_network_is_compared() -> None:
    assert {name for name in published() if load_genotype(name).space == "residual"} == set(PUBLISHED)
    for name, genotype in FACTORS.items():
        assert load_genotype(name) == genotype


@pytest.mark.parametrize(("genotype", "parameters"), UNIFORM)
def test_blocks_have_the_sizes_of_their_paper(genotype, parameters) -> None:
    assert complexity(spec_of(genotype)).parameters / 1e6 == pytest.approx(parameters, rel=0.005)


def test_a_network_counted_by_hand() -> None:
    cost = complexity(spec_of(wide((2, 1), (1, 1), (6, 8), stem=4), (1, 8, 8), 3))
    assert [section.name for section in cost.sections] == ["stem", "stage 1", "stage 2", "final", "classifier"]
    stem, first, second, final, classifier = cost.sections
    assert (stem.parameters, stem.macs) == (9 * 4, 64 * 9 * 4)
    kernels = 9 * 4 * 6 + 9 * 6 * 6 + 4 * 6 + 2 * 9 * 6 * 6
    assert (first.parameters, first.macs) == (kernels + 2 * (4 + 6 + 6 + 6), 64 * kernels)
    kernels = 9 * 6 * 8 + 9 * 8 * 8 + 6 * 8
    assert (second.parameters, second.macs) == (kernels + 2 * (6 + 8), 16 * kernels)
    assert (final.parameters, classifier.parameters, classifier.macs) == (16, 8 * 3 + 3, 8 * 3)


@pytest.mark.parametrize("name", ["plain", "resnet", "vgg", "mlp", "vit"])
def test_deep_networks_are_counted_from_short_ones_exactly(name) -> None:
    widths = (16,) if name == "vit" else (8, 12)
    spec = spec_of(StageGenotype(name, (5, 3)[: len(widths)], widths), (1, 8, 8), 3)
    assert complexity(spec) == _counted(spec)


@pytest.mark.parametrize("genotype", SMALL, ids=str)
def test_deep_residual_networks_are_counted_from_short_ones_exactly(genotype) -> None:
    deep = StageGenotype("residual", (5, 4), genotype.widths, genotype.options)
    spec = spec_of(deep, (1, 8, 8), 3)
    assert complexity(spec) == _counted(spec)
    assert complexity(spec).parameters == parameter_count(spec.build())


def test_a_basic_block_is_what_its_paper_says() -> None:
    """Pre-activation: both branches of a block that changes the shape read the normalised and activated input."""
    for stride, channels in ((1, 6), (2, 6), (1, 4)):
        one = block(stride, channels)
        x = torch.randn(2, channels, 8, 8)
        first, conv1, norm, _, conv2 = one.first[0], *one.path
        before = F.relu(first(x))
        y = F.conv2d(F.relu(norm(F.conv2d(before, conv1.weight, None, stride, 1))), conv2.weight, None, 1, 1)
        kept = x if one.shortcut is None else F.conv2d(before, one.shortcut.weight, None, stride)
        assert (one.shortcut is None) == (stride == 1 and channels == 6)
        torch.testing.assert_close(one(x), kept + y)


@pytest.mark.parametrize("kind", ["bottleneck", "robust"])
def test_wide_blocks_put_out_a_multiple_of_their_width(kind) -> None:
    more: dict[str, Option] = {"base_width": 80} if kind == "robust" else {}
    one = block(2, 6, 4, block=kind, expansion=3, **more)
    assert one(torch.randn(2, 6, 7, 7)).shape == (2, 12, 4, 4)
    assert one.out_channels == 12
    if kind == "bottleneck":
        assert [tuple(m.weight.shape[:2]) for m in one.path.modules() if isinstance(m, nn.Conv2d)] == [
            (4, 6), (4, 4), (12, 4)
        ]  # fmt: skip


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "robust"])
def test_a_block_reads_its_input_through_its_first_normalisation_only(kind) -> None:
    more: dict[str, Option] = {"base_width": 80} if kind == "robust" else {}
    more |= {} if kind == "basic" else {"expansion": 1}
    one = block(1, 4, 4, block=kind, **more)
    x = torch.randn(2, 4, 8, 8)
    assert (one(x) - x).flatten(1).std(0).max() > 1e-3
    nn.init.zeros_(one.first[0].weight)  # type: ignore[arg-type]
    nn.init.constant_(one.first[0].bias, 1.0)  # type: ignore[arg-type]
    added = one(x) - x
    torch.testing.assert_close(added[0], added[1])


@pytest.mark.parametrize("stride", [1, 2])
def test_later_parts_see_farther(stride) -> None:
    """At stride 1 part i of the result hangs on parts 0 to i, at stride 2 on part i alone; the last on itself."""
    parts, width = 4, 3
    torch.manual_seed(0)
    middle = Hierarchical(parts, width, stride, 1, "softplus").eval()
    x = torch.randn(1, parts * width, 6, 6, requires_grad=True)
    for i, part in enumerate(middle(x).chunk(parts, dim=1)):
        (gradient,) = torch.autograd.grad(part.sum(), x, retain_graph=True)
        hangs = [bool(piece.abs().sum() > 0) for piece in gradient.chunk(parts, dim=1)]
        alone = i == parts - 1 or stride == 2
        assert hangs == [j == i if alone else j <= i for j in range(parts)]
    if stride == 1:
        assert torch.equal(middle(x)[:, -width:], x[:, -width:])


def test_a_robust_block_of_one_part_and_group_is_a_bottleneck() -> None:
    one = block(2, 6, 4, block="robust", scales=1, cardinality=1, base_width=160)
    other = block(2, 6, 4, block="bottleneck")
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 6, 8, 8)
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("se", ["plain", "residual"])
def test_what_a_gate_lets_through(se) -> None:
    """An open gate gives the block without a gate (and, beside it, the normalised map); a closed one takes it."""
    one, bare = block(se=se, se_reduction=2), block()
    bare.load_state_dict({name: value for name, value in one.state_dict().items() if not name.startswith("gate")})
    x = torch.randn(2, 6, 8, 8)
    y = bare(x) - x
    gate = one.gate[-1]  # type: ignore[index]
    nn.init.zeros_(gate.fc2.weight)
    nn.init.constant_(gate.fc2.bias, 50.0)
    norm = one.gate[0] if se == "residual" else None  # type: ignore[index]
    torch.testing.assert_close(one(x), bare(x) + (norm(y) if norm is not None else 0))
    nn.init.constant_(gate.fc2.bias, -50.0)
    torch.testing.assert_close(one(x), bare(x) if se == "residual" else x)
    assert gate.fc1.weight.shape[0] == 3
    narrow = block(se=se, se_reduction=1000)
    assert narrow.gate[-1].fc1.weight.shape[0] == 1  # type: ignore[index]


def test_the_activation_is_that_of_the_genotype_unless_a_recipe_states_another() -> None:
    model = seen(wide((1, 1), (1, 1), (6, 8), activation="silu", se="plain"))
    kinds = [type(module) for module in model.modules() if isinstance(module, nn.SiLU | nn.ReLU)]
    assert kinds.count(nn.SiLU) == 2 * 2 + 1 and kinds.count(nn.ReLU) == 2, "gates keep ReLU"
    changed = with_activation(model, Softplus(), (1, 8, 8))
    assert not [module for module in changed.modules() if isinstance(module, nn.SiLU | nn.ReLU)]


def test_weights_are_drawn_as_by_he() -> None:
    torch.manual_seed(0)
    model = SPACE.build(
        wide((1,), (1,), (256,), stem=64), channels=1, cells=1, input_shape=(3, 8, 8), classes=2, mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan = module.out_channels * module.weight[0, 0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"blok": "basic"}, "did you mean 'block'"),
        ({"block": "inverted"}, "one of basic, bottleneck, robust"),
        ({"activation": "tanh"}, "one of relu, silu"),
        ({"se": True}, "must be a text"),
        ({"stem": 0}, "from 1 to"),
        ({"se": "plain", "se_reduction": 10**9}, "from 1 to"),
        ({"se_reduction": 4}, "means nothing with se = 'none'"),
        ({"expansion": 2}, "means nothing with block 'basic'"),
        ({"block": "bottleneck", "scales": 2}, "means nothing with block 'bottleneck'"),
    ],
)
def test_wrong_options_are_refused(options, says) -> None:
    with pytest.raises(GenotypeError, match=says):
        space_of(StageGenotype("residual", (1,), (8,), tuple(options.items())))


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(GenotypeError, match="width of at least 16"):
        spec_of(wide((1,), (1,), (15,), block="robust")).build()
    assert spec_of(wide((1,), (1,), (16,), block="robust"), (1, 8, 8)).build() is not None
    with pytest.raises(GenotypeError, match="2 depths, 3 factors and 3 base widths"):
        wide((1, 1), (1, 1, 1))


@pytest.mark.parametrize("genotype", [SMALL[0], SMALL[3]], ids=["basic", "robust"])
def test_networks_are_compressed(genotype) -> None:
    spec, model = spec_of(genotype, (1, 8, 8), 3), seen(genotype)
    x = torch.rand(3, 1, 8, 8)
    pruned = ChannelPruning(keep=0.5).plan(model).apply(model)
    assert parameter_count(pruned) <= 0.5 * parameter_count(model) and pruned(x).shape == (3, 3)
    separable = Gdws(keep=0.6, step=1).plan(model)
    assert any(layer.action == "replaced" for layer in separable.layers)
    assert complexity(with_plan(spec, separable)).macs < complexity(spec).macs
    assert separable.apply(model)(x).shape == (3, 3)


@pytest.mark.slow
def test_networks_are_exported(tmp_path) -> None:
    spec, model = spec_of(SMALL[3], (1, 8, 8), 3), seen(SMALL[3])
    export_model(spec, model, tmp_path, ["json", "py", "safetensors", "onnx"])
    checked = check_exports(tmp_path, spec, model, torch.rand(3, 1, 8, 8), lambda model, x: 0.9 * x)
    assert {file.format for file in checked if file.difference is not None} == {"py", "safetensors", "onnx"}
    assert read_genotype(tmp_path / "genotype.json") == SMALL[3]
