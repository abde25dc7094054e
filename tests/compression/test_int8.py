"""int8: the twin computes what integers compute, its ranges are those of the data, and a real engine agrees with it."""

import copy
import json
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torchvision.models.vision_transformer import VisionTransformer

from nas.analysis.complexity import nonzero_parameters
from nas.attacks.pgd import Pgd
from nas.compression.fold_batchnorm import BatchNormFolding
from nas.compression.int8 import FakeQuantise, Int8Quantisation, QuantisedConv2d, QuantisedLinear, levels
from nas.compression.layers import deployed_layers
from nas.compression.magnitude import MagnitudePruning
from nas.compression.plan import LayerPlan, Plan
from nas.compression.size import stored_size
from nas.data.digits import PLUGIN as Digits
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError
from nas.export.onnx_file import INPUT, onnx_bytes
from nas.model_file import ModelSpec, load_model, save_model, with_plan
from nas.objective import Setting
from nas.threat_model import ThreatModel
from search_spaces.dsara import SPACE
from search_spaces.genotype import StageGenotype


@dataclass(frozen=True)
class Unchanged:
    """An attack that does nothing."""

    def __call__(self, model, x, y, *, generator):
        return x


CLEAN = Unchanged()


def _x(n=6, seed=0, channels=1, side=8):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def _quantised(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantisedConv2d | QuantisedLinear)}


def _taken(model, x):
    """What each layer takes, by name."""
    found = {}

    def keep(name, given):
        found[name] = given[0].detach()

    handles = [
        layer.register_forward_hook(lambda m, given, y, name=name: keep(name, given))
        for name, layer in deployed_layers(model).items()
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("ends", [(-1.0, 3.0), (0.0, 5.0), (-2.0, 0.0), (1.0, 2.0), (-1e-3, 1e3), (0.0, 0.0)])
def test_levels_hold_zero_and_reach_both_ends(ends):
    scale, zero = levels(ends)
    assert 0 <= zero <= 255
    assert isinstance(zero, int)
    low, high = (0 - zero) * scale, (255 - zero) * scale
    assert low <= min(ends[0], 0) + scale / 2
    assert high >= max(ends[1], 0) - scale / 2
    assert float(FakeQuantise(ends)(torch.zeros(1))) == 0, "padding and ReLU stay exact"


def test_rounding_is_to_the_nearest_level_and_its_gradient_goes_straight_through():
    quantise = FakeQuantise((-1.0, 3.0))
    scale, zero = levels((-1.0, 3.0))
    x = torch.linspace(-2, 4, 1001).requires_grad_()
    y = quantise(x)
    grid = (torch.arange(256) - zero) * torch.tensor(scale)
    nearest = (x.detach()[:, None] - grid).abs().min(1)
    torch.testing.assert_close((y.detach() - x.detach()).abs(), nearest.values, rtol=0, atol=2e-6)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    inside = (x.detach() >= float(grid[0]) - scale / 2) & (x.detach() <= float(grid[-1]) + scale / 2)
    assert torch.equal(gradient, inside.float())


LAYERS = {
    "conv": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 4, 5, padding=2, groups=4),
    "reflecting": lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    "linear": lambda: nn.Linear(7, 4),
}


def _integers(layer, x, ends):
    """The layer in whole numbers, as an engine computes it: int8 times uint8, accumulated with an int32 bias."""
    scale, zero = levels(ends)
    weight, bias = layer.weight.detach().double(), layer.bias
    steps = weight.abs().flatten(1).amax(1).float().double() / 127
    steps[steps == 0] = 1
    shape = [-1] + [1] * (weight.dim() - 1)
    weight = (weight / steps.view(shape)).round().clamp(-127, 127)
    q = ((x.double() / scale).round() + zero).clamp(0, 255) - zero
    total = steps * scale
    whole = torch.zeros(len(weight)) if bias is None else (bias.detach().double() / total).round()
    if isinstance(layer, nn.Linear):
        return F.linear(q, weight, whole.double()) * total
    padding = layer.padding
    if layer.padding_mode != "zeros":
        q, padding = F.pad(q, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    y = F.conv2d(q, weight, whole.double(), layer.stride, padding, layer.dilation, layer.groups)
    assert torch.equal(y, y.round())
    assert float(y.abs().max()) < 2**31
    return y * total.view(1, -1, 1, 1)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_quantised_layer_computes_what_integers_compute(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    with torch.no_grad():
        layer.weight[0] = 0  # a channel without a step of its own
    x = torch.randn(5, 7) if kind == "linear" else torch.randn(5, layer.in_channels, 9, 9)
    ends = (float(x.min()), float(x.max()))
    given = (QuantisedLinear if kind == "linear" else QuantisedConv2d)(layer, ends, None)
    expected = _integers(layer, x, ends)
    torch.testing.assert_close(given(x).detach().double(), expected, rtol=1e-5, atol=1e-5)
    output = (-0.5, 0.7)
    rounded = type(given)(layer, ends, output)(x)
    torch.testing.assert_close(rounded, FakeQuantise(output)(given(x)))


def test_no_weight_moves_by_more_than_half_a_step(kind, make, setting):
    _, model = make(kind)
    folded = BatchNormFolding().plan(model).apply(model)
    compressed = Int8Quantisation(attack=CLEAN).plan(model, setting).apply(model)
    layers, quantised = deployed_layers(folded), _quantised(compressed)
    assert set(layers) == set(quantised)
    assert not deployed_layers(compressed)
    for name, layer in layers.items():
        part = quantised[name].weights
        weight, _ = part(quantised[name].input.scale)
        shape = [-1] + [1] * (weight.dim() - 1)
        step = layer.weight.detach().abs().flatten(1).amax(1) / 127
        assert bool(((weight - layer.weight).abs() <= step.view(shape) / 2 * (1 + 1e-4)).all())
        whole = weight / part.scale.view(shape)
        torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)
        assert float(whole.detach().abs().max()) <= 127.001


def test_the_extremes_are_those_of_clean_and_adversarial_images(kind, make, setting):
    _, model = make(kind)
    folded = BatchNormFolding().plan(model).apply(model)
    attack = Pgd(ThreatModel("linf", 0.3), steps=2)
    images = setting.data.x_train[setting.split.training].float() / 255
    clean = {layer.name: layer.data for layer in Int8Quantisation(attack=CLEAN).plan(model, setting).layers}
    attacked = {layer.name: layer.data for layer in Int8Quantisation(attack=attack).plan(model, setting).layers}
    for name, values in _taken(folded, images).items():
        low, high = clean[name]["input"]
        assert low == pytest.approx(min(0.0, float(values.min())), abs=1e-5)
        assert high == pytest.approx(max(0.0, float(values.max())), abs=1e-5)
        assert attacked[name]["input"][0] <= low + 1e-6
        assert attacked[name]["input"][1] >= high - 1e-6
    assert any(attacked[name]["input"][1] > 1.02 * clean[name]["input"][1] for name in clean)


def test_percentile_clips_the_share_asked_for(make, setting):
    _, model = make("plain")
    folded = BatchNormFolding().plan(model).apply(model)
    images = setting.data.x_train[setting.split.training].float() / 255
    plan = Int8Quantisation("percentile", percentile=95.0, attack=CLEAN).plan(model, setting)
    for layer in plan.layers:
        values = _taken(folded, images)[layer.name].double().flatten()
        width = float(values.max().clamp(min=0) - values.min().clamp(max=0)) / 2048
        low, high = layer.data["input"]
        assert float((values > high + 1e-6).double().mean()) <= 0.05
        assert float((values < low - 1e-6).double().mean()) <= 0.05
        # And no narrower than a bin.
        assert high == 0 or float((values > high - 1.1 * width).double().mean()) >= 0.05
        assert low == 0 or float((values < low + 1.1 * width).double().mean()) >= 0.05


def test_mse_finds_the_factor_of_the_least_error(make, setting):
    """Against every factor, on the values themselves."""
    _, model = make("plain")
    folded = BatchNormFolding().plan(model).apply(model)
    images = setting.data.x_train[setting.split.training].float() / 255
    plan = Int8Quantisation("mse", attack=CLEAN).plan(model, setting)

    def error(values, ends):
        scale, zero = levels(ends)
        rounded = (((values / scale).round() + zero).clamp(0, 255) - zero) * scale
        return float((rounded - values).square().mean())

    for layer in plan.layers:
        values = _taken(folded, images)[layer.name].double()
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        least = min(error(values, (low * k / 100, high * k / 100)) for k in range(1, 101))
        assert error(values, layer.data["input"]) <= least * 1.1 + 1e-12


def test_only_results_that_nothing_else_rounds_are_rounded(make, setting):
    _, model = make("plain")
    plan = {layer.name: layer.data for layer in Int8Quantisation(attack=CLEAN).plan(model, setting).layers}
    outputs = {name: data["output"] for name, data in plan.items()}
    last = [name for name in outputs if name.startswith("features.")][-1]
    assert {name for name, ends in outputs.items() if ends} == {last}, "the next convolution rounds what it takes"
    assert outputs[last][0] == 0, "only a ReLU takes it: nothing below 0 needs a level"
    _, cells = make("cells")
    plan = {layer.name: layer.data for layer in Int8Quantisation(attack=CLEAN).plan(cells, setting).layers}
    for name, layer in deployed_layers(cells).items():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            assert plan[name]["output"] is None, "the 1x1 convolution after it rounds what it takes"
    ends = [plan[name]["output"] for name in plan if plan[name]["output"]]
    assert any(low < 0 < high for low, high in ends), "before an addition"
    assert plan["stem.0"]["output"] is None, "cells begin with ReLU and a convolution"
    assert plan["classifier"]["output"] is None


def test_a_plan_survives_json_and_model_json(kind, make, setting, tmp_path):
    spec, model = make(kind)
    before, streams = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    method = Int8Quantisation(attack=Pgd(ThreatModel("linf", 0.1), steps=2), images=20)
    plan = method.plan(model, setting)
    assert torch.equal(torch.get_rng_state(), streams)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert plan == method.plan(model, setting), "the seed decides"
    assert [layer.name for layer in plan.layers] == list(deployed_layers(model))
    again = Plan.from_data(json.loads(json.dumps(plan.to_data())))
    compressed = again.apply(model)
    for name, value in plan.apply(model).state_dict().items():
        assert torch.equal(value, compressed.state_dict()[name])
    save_model(with_plan(spec, again), compressed, tmp_path)
    _, loaded = load_model(tmp_path)
    assert torch.equal(loaded(_x()), compressed(_x()))


def test_other_images_calibrate_with_another_seed(make, setting):
    from dataclasses import replace

    _, model = make("plain")
    method = Int8Quantisation(attack=CLEAN, images=8)
    assert method.plan(model, setting) != method.plan(model, replace(setting, seed=1))


def test_folding_first_makes_no_difference(kind, make, setting):
    _, model = make(kind)
    folded = BatchNormFolding().plan(model).apply(model)
    method = Int8Quantisation(attack=CLEAN)
    direct, after = method.plan(model, setting).apply(model), method.plan(folded, setting).apply(folded)
    # Calibrated by another sum over the same images: native kernels do not know a folded cell.
    torch.testing.assert_close(after(_x()), direct(_x()), rtol=1e-4, atol=1e-4)


def test_masked_weights_stay_zero(make, setting):
    _, model = make("plain")
    pruned = MagnitudePruning(0.3).plan(model).apply(model)
    compressed = Int8Quantisation(attack=CLEAN).plan(pruned, setting).apply(pruned)
    for name, layer in deployed_layers(pruned).items():
        part = _quantised(compressed)[name]
        weight, _ = part.weights(part.input.scale)
        assert not bool(weight[layer.weight == 0].any())
    # They are counted and stored as what masks leave.
    dense = Int8Quantisation(attack=CLEAN).plan(model, setting).apply(model)
    masked = nonzero_parameters(model) - nonzero_parameters(pruned)
    assert nonzero_parameters(dense) - nonzero_parameters(compressed) == masked > 0
    size, whole = stored_size(compressed), stored_size(dense)
    competing = sum(layer.weight.numel() for layer in deployed_layers(pruned).values() if is_parametrized(layer))
    assert size.dense == whole.dense == whole.sparse
    # A byte for each that is left, a bit for each place, in whole bytes of three layers at most.
    assert 0 <= size.sparse - (whole.sparse - masked + competing / 8) < 3
    # Training moves what is left and nothing else.
    step = torch.optim.SGD(compressed.parameters(), 0.5, momentum=0.9)
    for _ in range(2):
        step.zero_grad()
        F.cross_entropy(compressed(_x(12)), torch.arange(12) % 3).backward()
        step.step()
    for name, layer in deployed_layers(pruned).items():
        moved = _quantised(compressed)[name].weights.weight
        assert not bool(moved[layer.weight == 0].any()) and not torch.equal(moved, layer.weight)


def test_the_twin_is_differentiable_and_can_be_trained(kind, make, setting):
    _, model = make(kind)
    compressed = Int8Quantisation(attack=CLEAN).plan(model, setting).apply(model)
    x, y = _x(12).requires_grad_(), torch.arange(12) % 3
    parameters = [*compressed.parameters()]
    loss = F.cross_entropy(compressed(x), y)
    gradients = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
    dense = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(model(dense), y), dense)
    assert float(F.cosine_similarity(gradients[0].flatten(), expected.flatten(), dim=0)) > 0.9
    used = [g for (n, _), g in zip(compressed.named_parameters(), gradients[1:], strict=True) if "auxiliary" not in n]
    assert all(g is not None for g in used)
    assert sum(float(g.abs().sum()) > 0 for g in used) > 0.75 * len(used), "but for dead ReLUs"
    double = copy.deepcopy(compressed).double()
    torch.testing.assert_close(double(_x().double()).float(), compressed(_x()), rtol=0.05, atol=0.02)


def test_a_vision_transformer_says_what_it_keeps(setting):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10).eval()
        nn.init.normal_(model.heads.head.weight)
    x = torch.randint(256, (32, 3, 32, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    y = torch.arange(32) % 10
    data = ImageData("noise", x, y, x[:10], y[:10], tuple("abcdefghij"))
    own = Setting(nn.Identity(), data, split(y, architecture=0, validation=0, seed=0), 0, 1, 16)
    plan = Int8Quantisation(attack=CLEAN).plan(model, own)
    skipped = {layer.name for layer in plan.layers if layer.action == "skipped"}
    assert skipped == {f"encoder.layers.encoder_layer_{i}.self_attention.out_proj" for i in range(2)}
    compressed = plan.apply(model)
    images = x.float() / 255
    torch.testing.assert_close(compressed(images), model(images), rtol=0.2, atol=0.3)


def test_what_cannot_be_quantised_is_refused(make, setting):
    _, model = make("plain")
    with pytest.raises(InputError, match="data"):
        Int8Quantisation().plan(model)
    with pytest.raises(InputError, match="no convolution or linear layer left"):
        Int8Quantisation().plan(nn.Sequential(nn.Flatten()), setting)
    compressed = Int8Quantisation(attack=CLEAN).plan(model, setting).apply(model)
    for method in (Int8Quantisation(), BatchNormFolding(), MagnitudePruning(0.5)):
        with pytest.raises(InputError, match="no "):
            method.plan(compressed, setting)
    for wrong in ({"ranges": "max"}, {"percentile": 50}, {"percentile": 101}, {"images": 0}):
        with pytest.raises(InputError):
            Int8Quantisation(**wrong)
    with torch.no_grad():
        model.features[0].weight.fill_(float("nan"))
    with pytest.raises(InputError, match="finite"):
        Int8Quantisation(attack=CLEAN).plan(model, setting)


def test_a_damaged_plan_is_refused(make, setting):
    _, model = make("plain")
    plan = Int8Quantisation(attack=CLEAN).plan(model, setting)
    index = len(plan.layers) - 1
    nan = float("nan")
    for data in (
        {}, {"input": None}, {"input": [1.0, 2.0]}, {"input": [nan, 1.0]}, {"input": [0.0, nan]}, {"input": "01"},
        {"input": [0.0, float("inf")]}, {"input": [-1.0, 1.0], "output": [3.0, 4.0]}, {"input": [-1.0]},
        {"input": [-1.0, 1.0], "output": "no"}, {"input": ["a", "b"]},
    ):  # fmt: skip
        wrong = LayerPlan(plan.layers[index].name, "replaced", "wrong", data)
        with pytest.raises(InputError, match="damaged"):
            Plan("int8", (*plan.layers[:index], wrong)).apply(model)
    with pytest.raises(InputError, match="another network"):
        plan.apply(make("cells")[1])
    unknown = LayerPlan("nothing", "replaced", "wrong", {"input": [0.0, 1.0]})
    with pytest.raises(InputError, match="another network"):
        Plan("int8", (unknown,)).apply(model)


def _trained(genotype, epochs):
    """A network that knows digits, its data, and what it was calibrated with."""
    data = Digits()()
    parts = split(data.y_train, architecture=0.0, validation=0.1, seed=0)
    spec = ModelSpec(genotype, 4, 4, (1, 8, 8), data.classes, data.mean, data.std)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = spec.build()
        optimiser = torch.optim.Adam(model.parameters(), 0.01)
        x, y = data.x_train[parts.training].float() / 255, data.y_train[parts.training]
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                optimiser.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimiser.step()
    return model.eval(), data, Setting(model, data, parts, 0, 1, 128)


def _engine(model, x):
    """Logits by ONNX Runtime, the graph it got and the operations it carried out."""
    import onnx
    import onnxruntime

    raw = torch.onnx.export(model, (x[:60],), dynamo=True, input_names=[INPUT], verbose=False).model_proto
    graph = onnx.load_from_string(onnx_bytes(model, (1, 8, 8)))
    onnx.checker.check_model(graph)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [
        onnxruntime.InferenceSession(g.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for g in (raw, graph)
    ]
    logits = [
        torch.cat([torch.from_numpy(s.run(None, {INPUT: part.numpy()})[0]) for part in x.split(60)]) for s in sessions
    ]
    return *logits, raw, graph


def _check_engine(genotype, epochs, tmp_path):
    import onnx
    import onnxruntime

    model, data, setting = _trained(genotype, epochs)
    plan = Int8Quantisation(attack=Pgd(ThreatModel("linf", 0.1), steps=3), images=256).plan(model, setting)
    twin = plan.apply(model).eval()
    x = data.x_test[: len(data.x_test) // 60 * 60].float() / 255
    y = data.y_test[: len(x)]
    with torch.no_grad():
        expected, dense = twin(x), model(x)
    assert float((dense.argmax(1) == y).float().mean()) > 0.9
    assert float((expected.argmax(1) == dense.argmax(1)).float().mean()) >= 0.98
    adversarial = Pgd(ThreatModel("linf", 0.1), steps=5)(twin, x, y, generator=torch.Generator().manual_seed(0))
    both = torch.cat([x, adversarial])
    with torch.no_grad():
        expected = twin(both)
    unchanged, logits, raw, graph = _engine(twin, both)
    for found in (unchanged, logits):
        assert float((found.argmax(1) == expected.argmax(1)).float().mean()) >= 0.995
    # In int8: every convolution and every linear layer.
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    used = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert used["QLinearConv"] + used["QGemm"] == len(_quantised(twin))
    assert used["Conv"] == used["Gemm"] == used["MatMul"] == 0
    return raw, graph


def test_onnx_runtime_in_int8_agrees_with_the_twin(tmp_path):
    pytest.importorskip("onnxruntime")
    raw, graph = _check_engine(StageGenotype("plain", (2, 2), (16, 32)), 6, tmp_path)
    assert graph.ByteSize() < raw.ByteSize()
    sizes = Counter()
    for tensor in graph.graph.initializer:
        sizes[tensor.data_type] = max(sizes[tensor.data_type], math.prod(tensor.dims))
    assert sizes[3] == 32 * 32 * 9, "the largest weight is stored as int8"
    assert sizes[1] <= 32, "in floating point only steps, one for each channel"


@pytest.mark.slow
def test_onnx_runtime_in_int8_agrees_with_the_twin_of_cells(tmp_path):
    pytest.importorskip("onnxruntime")
    _check_engine(SPACE.random(torch.Generator().manual_seed(1)), 8, tmp_path)


@pytest.mark.slow
def test_exported_files_of_an_int8_network_pass_their_check(make, setting, tmp_path):
    pytest.importorskip("onnxruntime")
    from nas.export.package import export_model
    from nas.export.parity import ExportMismatch, check_exports

    spec, model = make("plain")
    plan = Int8Quantisation(attack=CLEAN).plan(model, setting)
    compressed, spec = plan.apply(model), with_plan(spec, plan)
    export_model(spec, compressed, tmp_path, ["onnx", "safetensors"])
    files = check_exports(tmp_path, spec, compressed, _x(20), lambda model, x: 0.9 * x)
    differences = {file.file: file.difference for file in files}
    assert differences["model.safetensors"] == 0
    assert differences["network.onnx"] < 0.05
    with torch.no_grad():
        compressed.classifier.weights.weight.mul_(1.2)
    with pytest.raises(ExportMismatch):
        check_exports(tmp_path, spec, compressed, _x(20), lambda model, x: 0.9 * x)
