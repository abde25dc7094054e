"""Networks to export: every kind of structure, with weights and statistics that make a difference visible."""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.compression.magnitude import MagnitudePruning
from nas.model_file import ModelSpec, with_plan
from search_spaces.catalogue import load_genotype
from search_spaces.darts import SPACE as DARTS
from search_spaces.dsara import SPACE as DSARA
from search_spaces.genotype import AnyGenotype, Cell, Edge, Genotype, StageGenotype
from search_spaces.layout import Layout

HOSTILE = 'x"""\nimport nas\n\\'
CLASSES = ("cat", "it's", 'a "b"', "both ' and \"", "new\nline \\", "größe", "\ud800", "tench, " * 20, "{name}", "%s")


def nudged(model: nn.Module, x: Tensor) -> Tensor:
    """One step against what the network says of images [N, C, H, W] in [0, 1], from a random start."""
    x = (x + 0.02 * torch.rand(x.shape, generator=torch.Generator().manual_seed(7))).requires_grad_()
    logits = model(x)
    F.cross_entropy(logits, logits.argmax(1)).backward()
    assert x.grad is not None
    return (x + 0.05 * x.grad.sign()).detach().clamp(0, 1)


@dataclass(frozen=True)
class Case:
    """A network in eval mode, its specification and inputs [2, C, H, W]."""

    spec: ModelSpec
    model: nn.Module
    inputs: Tensor


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Weights, batch statistics and affine parameters that no default could imitate."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(0.2 * torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(0.1 + torch.rand(module.num_features, generator=generator))
                module.weight.copy_(0.5 + torch.rand(module.num_features, generator=generator))
                module.bias.copy_(0.2 * torch.randn(module.num_features, generator=generator))
            elif isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) / fan_in**0.5)
            elif isinstance(module, nn.Linear):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
                module.bias.copy_(torch.randn(module.bias.shape, generator=generator))


def make(genotype, shape, *, channels=4, cells=5, classes=CLASSES, auxiliary=False, keep=None) -> Case:
    generator = torch.Generator().manual_seed(1)
    mean = tuple(0.3 + 0.1 * channel for channel in range(shape[0]))
    spec = ModelSpec(genotype, channels, cells, shape, classes, mean, tuple(value / 2 for value in mean), auxiliary)
    model = spec.build()
    randomise(model, generator)
    if keep is not None:
        plan = MagnitudePruning(keep).plan(model)
        spec, model = with_plan(spec, plan), plan.apply(model)
    model, inputs = model.eval(), torch.rand(2, *shape, generator=generator)
    with torch.no_grad():
        # Logits of some 5: absolute differences mean the same for all networks.
        model.classifier.weight *= 5 / model(inputs).abs().max()
    return Case(spec, model, inputs)


def every_operation() -> Genotype:
    """A random genotype of DSARA in which each operation stands somewhere, and each at stride 2 too."""
    for seed in itertools.count():
        genotype = DSARA.random(torch.Generator().manual_seed(seed))
        inside = {edge.operation for _, cell in genotype.cells for node in cell.nodes for edge in node}
        halving = {edge.operation for node in genotype.cell["reduction"].nodes for edge in node if edge.source < 2}
        if inside == set(DSARA.operations) and halving >= {"skip_connect", "max_pool_3x3", "sep_conv_3x3"}:
            return genotype
    raise AssertionError


def awkward() -> Genotype:
    """Kinds with names of no use to a class, one kind at both strides, edges given twice, a node of many edges."""
    many = tuple(Edge("sep_conv_3x3" if index % 2 else "skip_connect", index % 3) for index in range(12))
    cell = Cell(((Edge("skip_connect", 0), Edge("skip_connect", 0)), many, (Edge("dil_conv_3x3", 1),) * 3))
    small = Cell(((Edge("max_pool_3x3", 1),),))
    layout = Layout(sections=(HOSTILE, "x import nas", "both", "1" * 64), ratio=(1, 1, 2, 1), reduction="both")
    return Genotype("dsara", layout, tuple((kind, small if kind[0] == "1" else cell) for kind in layout.kinds))


def with_depths(genotype: AnyGenotype, depths: tuple[int, ...]) -> Genotype:
    """``genotype`` with so many cells in each section."""
    assert isinstance(genotype, Genotype)
    return replace(genotype, layout=replace(genotype.layout, depths=depths))


CASES: dict[str, Callable[[], Case]] = {
    "arnas-8x8": lambda: make(load_genotype("arnas"), (1, 8, 8)),
    "arnas-32x32": lambda: make(load_genotype("arnas"), (3, 32, 32), auxiliary=True),
    "strided-stem": lambda: make(load_genotype("arnas"), (3, 96, 70), channels=2),
    "two-strided-convolutions": lambda: make(load_genotype("arnas"), (1, 130, 131), channels=1),
    "every-operation": lambda: make(every_operation(), (1, 11, 7), channels=3, cells=7),
    "darts": lambda: make(DARTS.random(torch.Generator().manual_seed(0)), (3, 16, 16), cells=6),
    "depths": lambda: make(with_depths(load_genotype("arnas"), (1, 3, 2)), (1, 8, 8), cells=20),
    "no-reduction": lambda: make(
        Genotype("dsara", Layout(("accurate",), (1,)), (("accurate", load_genotype("arnas").cell["accurate"]),)),
        (1, 8, 8),
        cells=2,
    ),
    "awkward": lambda: make(awkward(), (2, 9, 8), channels=3, cells=8),
    "plain": lambda: make(StageGenotype("plain", (2, 1, 3), (6, 7, 5)), (3, 15, 16)),
    "pruned": lambda: make(load_genotype("arnas"), (1, 8, 8), auxiliary=True, keep=0.5),
    "pruned-plain": lambda: make(StageGenotype("plain", (1, 2), (6, 8)), (1, 8, 8), keep=0.3),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    """Each of the networks in turn."""
    return CASES[request.param]()


@pytest.fixture
def cases() -> dict[str, Callable[[], Case]]:
    """All the networks."""
    return CASES


@pytest.fixture
def arnas() -> Case:
    return CASES["arnas-8x8"]()


@pytest.fixture
def pruned() -> Case:
    return CASES["pruned"]()


@pytest.fixture
def randomised() -> Callable[[nn.Module, torch.Generator], None]:
    """What gives a network random weights and statistics."""
    return randomise


@pytest.fixture
def imported() -> Callable[[Path], ModuleType]:
    """Import of an exported source file."""

    def run(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location("exported_network", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return run


@pytest.fixture
def attack() -> Callable[[nn.Module, Tensor], Tensor]:
    return nudged
