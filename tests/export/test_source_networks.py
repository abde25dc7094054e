"""Source files of every space, compression and activation: without the package, the same network, and attackable."""

import builtins
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nas.activations.gelu import Gelu
from nas.activations.lossy import KINDS as LOSSY
from nas.activations.lossy import Lossy, LossyMap
from nas.activations.prelu import Prelu
from nas.activations.silu import Silu
from nas.activations.softplus import Softplus
from nas.activations.sparta import KINDS as GATES
from nas.activations.sparta import Sparta
from nas.compression.arlst import Arlst
from nas.compression.channel_pruning import ChannelPruning
from nas.compression.cstar import Cstar
from nas.compression.fold_batchnorm import BatchNormFolding
from nas.compression.gdws import Gdws
from nas.compression.int8 import Int8Quantisation
from nas.compression.magnitude import MagnitudePruning
from nas.compression.plan import plan_for
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.defences.noise import ImageNoise
from nas.errors import InputError
from nas.export import source_layers, source_stages
from nas.export.source import deployed_state, network_source, why_no_source
from nas.export.source_layers import CLASSES
from nas.model_file import ModelSpec, with_plan
from nas.objective import Setting
from nas.prediction import MeanOfParticles, MeanOverNoise
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import StageGenotype
from search_spaces.network import parameter_count
from search_spaces.residual import SPACE as RESIDUAL

SHAPE, NAMES = (1, 8, 8), ("a", 'b"', "c")

GENOTYPES = {
    "cells": load_genotype("arnas"),
    "plain": StageGenotype("plain", (2, 1), (12, 16)),
    "resnet": StageGenotype("resnet", (1, 2), (8, 12)),
    "vgg": StageGenotype("vgg", (1, 2), (4, 6)),
    "mlp": StageGenotype("mlp", (2, 1), (24, 16)),
    "vit": StageGenotype("vit", (2,), (32,)),
    "wide": RESIDUAL.genotype((1, 2), (8, 12)),
    "bottleneck": RESIDUAL.genotype((1, 2), (8, 12), block="bottleneck", se="plain", activation="silu"),
    "robust": RESIDUAL.genotype((2, 1), (16, 32), block="robust", se="residual", scales=4, cardinality=2),
    "grouped": RESIDUAL.genotype((1,), (16,), block="robust", scales=1, cardinality=2),
}

INT8 = Int8Quantisation(images=16)
GDWS = Gdws(keep=0.5, step=1)
PLANS = {
    "folded": ("cells", BatchNormFolding()),
    "int8": ("cells", INT8),
    "channels": ("cells", ChannelPruning(0.6)),
    "tucker": ("cells", Cstar(0.6, epochs=0)),
    "masks-int8": ("resnet", MagnitudePruning(0.5), INT8),
    "channels-int8": ("wide", ChannelPruning(0.6), INT8),
    "gdws": ("robust", GDWS),
    "gdws-int8": ("plain", GDWS, INT8),
    "tucker-linear": ("vit", Cstar(0.6, epochs=0)),
    "kronecker": ("vit", Arlst(0.5)),
    "kronecker-int8": ("vgg", Arlst(0.5), INT8),
    "kronecker-pointwise": ("bottleneck", Arlst(0.9, convolutions=True)),
}

ACTIVATIONS = {
    "silu": ("cells", Silu()),
    "softplus": ("bottleneck", Softplus()),
    "gelu": ("robust", Gelu()),
    "prelu": ("cells", Prelu()),
    "prelu-tokens": ("vit", Prelu()),
    "sparta": ("cells", Sparta()),
    "sparta-places": ("resnet", Sparta(share="place", gate="relu")),
    **{f"sparta-{kind}": ("vit" if kind == "dw" else "resnet", Sparta(kind=kind)) for kind in GATES},
    **{f"lossy-{kind}": ("plain", Lossy(kind, threshold=0.1, bound=1.5)) for kind in LOSSY},
    "lossy-learned": ("mlp", Lossy("binary", learned=True)),
    "lossy-first": ("resnet", Lossy("topk", first=2)),
}


def setting() -> Setting:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randint(256, (32, *SHAPE), generator=generator).to(torch.uint8), torch.arange(32) % 3
    data = ImageData("noise", x, y, x[:6], y[:6], NAMES)
    return Setting(nn.Identity(), data, split(y, architecture=0.0, validation=0.25, seed=0), 0, 1, 16)


@pytest.fixture
def made(randomised):
    """Specification and network: random weights and statistics, all that is learnt away from where it begins."""
    return partial(_made, randomised)


def _made(randomised, genotype, *methods, cells=4, activation=None, prediction=None):
    generator = torch.Generator().manual_seed(1)
    spec = ModelSpec(genotype, 2, cells, SHAPE, NAMES, (0.4,), (0.3,), activation=activation, prediction=prediction)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spec.build()
    randomised(model, generator)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LossyMap):
                module.level.fill_(0.8)
            if type(module).__module__.startswith("nas.activations"):
                for parameter in module.parameters(recurse=False):
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.eval()
    for method in methods:
        plan = plan_for(method, model, setting())
        spec, model = with_plan(spec, plan), plan.apply(model).eval()
    return spec, model


def run(source):
    """The names that a file defines where nothing of the project can be imported."""

    def alone(name, *arguments):
        assert name.partition(".")[0] not in ("nas", "search_spaces", "runs", "torchvision"), name
        return builtins.__import__(name, *arguments)

    names = {"__name__": "network", "__builtins__": {**vars(builtins), "__import__": alone}}
    exec(compile(source, "network.py", "exec"), names)
    return names


def written(spec, model, tmp_path):
    """The network of the file of ``spec`` with the weights of ``model``."""
    source = network_source(spec)
    names = run(source)
    save_file(deployed_state(spec, model), tmp_path / "network.safetensors")
    return source, names, names["load"](tmp_path / "network.safetensors")


def agree(model, other, *, tolerance=1e-5):
    """Same logits, and same gradients with respect to the pixels, as an attack takes them."""
    x = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, logits = model(x), other(x)
    size = expected.abs().max()
    # Inputs that give the same answer whatever they are would hide a mistake.
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * size
    assert (logits - expected).abs().max() <= tolerance * size
    gradients = []
    for network in (model, other):
        pixels = x.clone().requires_grad_()
        gradients += torch.autograd.grad(network(pixels).logsumexp(1).sum(), pixels)
    assert gradients[0].abs().max() > 0
    assert (gradients[1] - gradients[0]).abs().max() <= 10 * tolerance * gradients[0].abs().max()


@pytest.mark.parametrize("space", GENOTYPES)
def test_every_space_is_written(space, tmp_path, made):
    spec, model = made(GENOTYPES[space])
    source, names, other = written(spec, model, tmp_path)
    agree(model, other)
    assert sum(weights.numel() for weights in names["build"]().parameters()) == parameter_count(model)
    # What nobody exchanged stays whole: no block is given its layers one by one.
    assert "Layers" not in source
    shapes = {}
    for name, _ in re.findall(r"self\.(\w+) = .*# -> (\[.*\])$", source, re.MULTILINE):
        getattr(other, name).register_forward_hook(lambda _, __, y, name=name: shapes.update({name: list(y.shape[1:])}))
    other(torch.rand(1, *SHAPE))
    assert {name: str(shape) for name, shape in shapes.items()} == dict(
        re.findall(r"self\.(\w+) = .*# -> (\[.*\])$", source, re.MULTILINE)
    )


@pytest.mark.parametrize("name", PLANS)
def test_compressed_networks_are_written_as_what_they_compute(name, tmp_path, made):
    space, *methods = PLANS[name]
    spec, model = made(GENOTYPES[space], *methods)
    _, names, other = written(spec, model, tmp_path)
    agree(model, other, tolerance=1e-6 if "int8" in name else 1e-5)
    assert sum(weights.numel() for weights in names["build"]().parameters()) == parameter_count(model)
    if "int8" in name:
        state = deployed_state(spec, model)
        integers = sum(tensor.numel() for tensor in state.values() if tensor.dtype == torch.int8)
        assert integers > 0.7 * parameter_count(model)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_written(name, tmp_path, made):
    space, activation = ACTIVATIONS[name]
    spec, model = made(GENOTYPES[space], activation=activation)
    source, names, other = written(spec, model, tmp_path)
    agree(model, other, tolerance=1e-4)
    assert sum(weights.numel() for weights in names["build"]().parameters()) == parameter_count(model)
    if name in ("silu", "softplus", "gelu"):
        assert "Layers" not in source


def test_a_block_is_whole_only_where_its_class_makes_what_every_instance_has(tmp_path, made):
    # Of two blocks of a class one has a layer of other numbers: then both are given theirs.
    spec, model = made(GENOTYPES["resnet"])
    plan = plan_for(Cstar(0.6, epochs=0), model, setting())
    kept = "stages.1.1.conv1"
    layers = tuple(layer if layer.name == kept else replace(layer, action="skipped") for layer in plan.layers)
    assert any(layer.action == "replaced" for layer in layers)
    plan = replace(plan, layers=layers)
    spec, model = with_plan(spec, plan), plan.apply(model).eval()
    source, _, other = written(spec, model, tmp_path)
    assert "class BasicBlock(Layers)" in source
    agree(model, other)


@pytest.mark.parametrize("methods", [(), (ChannelPruning(0.6),)], ids=["alike", "pruned each by itself"])
def test_ensembles_are_written(methods, tmp_path, made):
    spec, model = made(GENOTYPES["plain"], *methods, prediction=MeanOfParticles(2))
    source, _, other = written(spec, model, tmp_path)
    agree(model, other)
    assert len(re.findall(r"class NetworkMember\d?\(", source)) == 1
    assert other(torch.rand(2, *SHAPE)).exp().sum(1).allclose(torch.ones(2))


def test_hostile_names_stay_words(tmp_path, made, cases):
    # Kinds of cells give classes their names and, shared by kind, activations theirs.
    spec, model = made(cases["awkward"]().spec.genotype, cells=7, activation=Sparta())
    spec = replace(spec, classes=('x"""\nimport nas\n\\', '"""', "\\"))
    source, names, other = written(spec, model, tmp_path)
    assert names["CLASSES"] == spec.classes
    assert not [line for line in source.splitlines() if line.strip().startswith("import nas")]
    agree(model, other, tolerance=1e-4)


def test_what_has_no_form_is_refused_in_one_line(monkeypatch, made):
    spec, _ = made(GENOTYPES["mlp"])
    assert why_no_source(spec) == ""
    noisy = replace(spec, prediction=MeanOverNoise(ImageNoise()))
    monkeypatch.setitem(source_layers.WRITERS, nn.Softplus, None)
    monkeypatch.delitem(source_layers.WRITERS, nn.Softplus)
    unknown = replace(spec, activation=Softplus())
    for refused, reason in [(noisy, "noise 0.25 on the image"), (unknown, "layer 'features.1' of type Softplus")]:
        with pytest.raises(InputError, match=reason) as caught:
            network_source(refused)
        assert why_no_source(refused) == str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.delitem(source_stages.BODIES, "mlp")
    assert "networks of space 'mlp' have no form" in why_no_source(spec)


def test_int8_weights_that_are_no_integers_are_refused(made):
    spec, model = made(GENOTYPES["mlp"], INT8)
    layer = model.classifier.weights
    # Between levels after all: the scale was changed behind its back.
    layer.forward = lambda scale: (layer.weight * 1.01, layer.bias)
    with pytest.raises(InputError, match="'classifier' whose weights are no multiples of their steps"):
        deployed_state(spec, model)


def test_names_of_its_layers_are_no_names_for_the_network(made):
    spec, _ = made(GENOTYPES["mlp"])
    for name in CLASSES:
        with pytest.raises(InputError, match="name of the exported class"):
            network_source(spec, name)
