"""Networks to compress: made by a specification, with weights no default could imitate."""

import pytest
import torch
from torch import nn

from nas.data.image_data import ImageData
from nas.data.split import split
from nas.model_file import ModelSpec
from nas.objective import Setting
from search_spaces.dsara import SPACE
from search_spaces.genotype import StageGenotype


def _spec(kind, seed=0):
    if kind == "cells":
        genotype = SPACE.random(torch.Generator().manual_seed(seed))
    else:
        genotype = StageGenotype("plain", (2, 1), (4, 6))
    return ModelSpec(genotype, 2, 4, (1, 8, 8), ("a", "b", "c"), (0.4,), (0.25,), auxiliary=kind == "cells")


def _build(spec, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = spec.build()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.2)
    return model.eval()


@pytest.fixture(params=["cells", "plain"])
def kind(request):
    return request.param


@pytest.fixture
def make():
    """(kind, seed) -> specification and network in eval mode."""

    def make(kind="cells", seed=0, weights_seed=0):
        spec = _spec(kind, seed)
        return spec, _build(spec, weights_seed)

    return make


@pytest.fixture
def setting():
    """What methods that need data get for the networks of ``make``: random images of three classes."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(256, (48, 1, 8, 8), generator=generator).to(torch.uint8)
    y = torch.arange(48) % 3
    data = ImageData("noise", x, y, x[:6], y[:6], ("a", "b", "c"))
    parts = split(y, architecture=0.0, validation=0.25, seed=0)
    return Setting(nn.Identity(), data, parts, seed=0, epochs=1, batch_size=16)
