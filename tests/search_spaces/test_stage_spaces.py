"""Networks of stages: their sizes as published, pixels in and logits out, kept in model files like any other."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from nas.analysis.complexity import complexity
from nas.model_file import ModelSpec, load_model, save_model
from search_spaces.catalogue import space_of, spaces
from search_spaces.genotype import Genotype, GenotypeError, StageGenotype
from search_spaces.stage_space import StageSpace

SMALL = {
    "plain": StageGenotype("plain", (1, 2), (4, 6)),
    "resnet": StageGenotype("resnet", (1, 2), (4, 6)),
    "vgg": StageGenotype("vgg", (1, 2), (4, 6)),
    "mlp": StageGenotype("mlp", (2, 1), (12, 5)),
    "vit": StageGenotype("vit", (2,), (16,)),
    "residual": StageGenotype("residual", (1, 2), (4, 6), (("se", "residual"), ("stem", 4))),
}


def spec_of(genotype: StageGenotype, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 3) -> ModelSpec:
    names = tuple(str(index) for index in range(classes))
    return ModelSpec(genotype, 1, 1, shape, names, (0.4,) * shape[0], (0.25,) * shape[0])


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_there_is_a_case_for_every_space() -> None:
    assert {name for name, space in spaces().items() if isinstance(space, StageSpace)} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_pixels_to_logits_through_a_model_file(name, tmp_path) -> None:
    torch.manual_seed(0)  # a network this narrow can be born with no live path for an image
    spec = spec_of(SMALL[name])
    model = spec.build().eval()
    x = torch.rand(5, 1, 8, 8, requires_grad=True)
    logits = model(x)
    assert logits.shape == (5, 3)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    assert bool((gradient.flatten(1).abs().sum(1) > 0).all())
    save_model(spec, model, tmp_path)
    again, loaded = load_model(tmp_path)
    assert again == spec and torch.equal(loaded(x), logits)
    size = complexity(spec)
    assert size.parameters == count(model) and size.macs > 0


@pytest.mark.parametrize(
    ("genotype", "reference"),
    [
        (StageGenotype("vgg", (2, 2, 3, 3, 3), (64, 128, 256, 512, 512)), "vgg16_bn"),
        (StageGenotype("resnet", (2, 2, 2, 2), (64, 128, 256, 512)), "resnet18"),
    ],
)
def test_as_many_parameters_as_published(genotype, reference) -> None:
    with torch.device("meta"):
        ours = spec_of(genotype, (3, 32, 32), 10).build()
        theirs = getattr(torchvision.models, reference)(num_classes=10)
    stem = 64 * 3 * (7 * 7 - 3 * 3) if reference == "resnet18" else 0
    assert count(ours) == count(theirs) - stem


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(GenotypeError, match="too small"):
        spec_of(StageGenotype("vgg", (1,) * 4, (4,) * 4)).build()
    with pytest.raises(GenotypeError, match="multiple of 16"):
        spec_of(StageGenotype("vit", (1,), (12,))).build()
    with pytest.raises(GenotypeError, match="not 8x16"):
        spec_of(StageGenotype("vit", (1,), (16,)), (1, 8, 16)).build()
    with pytest.raises(GenotypeError, match="at most 1 stages"):
        space_of(StageGenotype("vit", (1, 1), (16, 16)))
    cells = spaces()["dsara"].random(torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    assert isinstance(cells, Genotype)
    for name in SMALL:
        with pytest.raises(GenotypeError, match="depths"):
            spaces()[name].check(cells)


def test_the_products_of_attention_are_counted() -> None:
    width, tokens = 16, 8 * 8 + 1
    spec = spec_of(StageGenotype("vit", (2,), (width,)))
    # Queries, keys, values and their mixture; scores and sums; two hidden layers twice as wide. Patches, classifier.
    layer = tokens * (4 * width**2 + 2 * tokens * width + 2 * width * 2 * width)
    assert complexity(spec).macs == 2 * layer + 64 * width + width * 3
