"""Networks of every kind, with an activation and weights no default could imitate."""

import pytest
import torch
from torch import nn

from nas.model_file import ModelSpec
from search_spaces.dsara import SPACE
from search_spaces.genotype import StageGenotype

GENOTYPES = {
    "cells": SPACE.random(torch.Generator().manual_seed(0)),
    "plain": StageGenotype("plain", (2, 2), (4, 6)),
    "resnet": StageGenotype("resnet", (2, 1), (4, 6)),
    "vgg": StageGenotype("vgg", (1, 1), (4, 6)),
    "mlp": StageGenotype("mlp", (2,), (16,)),
    "vit": StageGenotype("vit", (1,), (16,)),
}


def _spec(kind="plain", activation=None, genotype=None, auxiliary=False):
    shape = (1, 8, 8)
    chosen = genotype or GENOTYPES[kind]
    return ModelSpec(chosen, 2, 5, shape, ("a", "b", "c"), (0.4,), (0.25,), auxiliary, activation=activation)


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


def _stir(model, seed=1):
    """Parameters of the activations away from where they begin; the last levels."""
    from nas.activations.annealing import anneal
    from nas.activations.transfer import activation_parameters

    generator = torch.Generator().manual_seed(seed)
    anneal(model, 0, 1)
    with torch.no_grad():
        for parameter in activation_parameters(model):
            if parameter.dim():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def spec_of():
    return _spec


@pytest.fixture
def build():
    return _build


@pytest.fixture
def stir():
    return _stir
