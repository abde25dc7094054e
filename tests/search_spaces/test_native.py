"""The native kernels compute what torch's own operations compute: values, gradients, statistics, second derivatives."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from nas.compression.magnitude import MagnitudePruning
from nas.model_state import crafting
from search_spaces.catalogue import load_genotype
from search_spaces.darts import SPACE as DARTS
from search_spaces.dsara import SPACE as DSARA
from search_spaces.genotype import Cell, Edge, Genotype
from search_spaces.layers import PointwiseConv2d
from search_spaces.native import library
from search_spaces.native.program import Program
from search_spaces.operations import ReluConvBn, SeparableConv
from search_spaces.supernet import MixedCell

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"no native kernels: {library.why_not()}")


@pytest.fixture
def by_torch(monkeypatch):
    """Runs a function with the kernels switched off."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setenv("DSARA_NATIVE", "0")
            return function()

    return run


@pytest.fixture
def calls(monkeypatch):
    """Counts the kernels' forward calls."""
    counted = []
    forward = Program.forward
    monkeypatch.setattr(Program, "forward", lambda *arguments: counted.append(1) or forward(*arguments))
    return counted


def _evaluate(module, tensors, parameters):
    """Output, gradients and buffers of a pass; buffers are put back."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    y = module(*tensors)
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    wanted = [t for t in (*tensors, *parameters) if t.requires_grad]
    gradients = torch.autograd.grad((y * direction).sum(), wanted, materialize_grads=True)
    after = {name: value.clone() for name, value in module.state_dict().items()}
    module.load_state_dict(before)
    return y.detach(), list(gradients), after


def _agree(ours, theirs, tolerance=1e-9):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


CELLS = {"normal": (False, False), "reduction": (True, False), "after a reduction": (False, True)}


@pytest.mark.parametrize("training", [True, False], ids=["batch statistics", "running statistics"])
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (4, 4), (2, 2), (12, 10)], ids=str)
@pytest.mark.parametrize("space", [DSARA, DARTS], ids=lambda space: space.name)
def test_cells_of_the_supernet(space, size, kind, training, by_torch, calls):
    torch.manual_seed(0)
    reduces, previous_reduces = CELLS[kind]
    cell = MixedCell(
        space.operations, 3, (6, 5), 4, reduces=reduces, previous_reduces=previous_reduces
    ).double().train(training)  # fmt: skip
    for module in cell.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
    first = tuple(2 * s for s in size) if previous_reduces else size
    inputs = [
        torch.randn(8, 6, *first, dtype=torch.float64, requires_grad=True),
        torch.randn(8, 5, *size, dtype=torch.float64, requires_grad=True),
        torch.softmax(torch.randn(9, len(space.operations), dtype=torch.float64), 1).requires_grad_(),
    ]
    ours = _evaluate(cell, inputs, [*cell.parameters()])
    assert calls, "the kernels were not used"
    theirs = by_torch(lambda: _evaluate(cell, inputs, [*cell.parameters()]))
    _agree([ours[0], *ours[1], *ours[2].values()], [theirs[0], *theirs[1], *theirs[2].values()])


@pytest.mark.parametrize("batch", [4, 8, 12, 16, 20, 32])
def test_every_width_of_vectors(batch, by_torch, calls):
    torch.manual_seed(batch)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        cell = MixedCell(DSARA.operations, 2, (3, 3), 3, reduces=True, previous_reduces=False).to(dtype)
        inputs = [torch.randn(batch, 3, 6, 6, dtype=dtype, requires_grad=True) for _ in range(2)]
        inputs.append(torch.softmax(torch.randn(5, 7, dtype=dtype), 1).requires_grad_())
        ours = _evaluate(cell, inputs, [*cell.parameters()])
        theirs = by_torch(lambda: _evaluate(cell, inputs, [*cell.parameters()]))  # noqa: B023
        _agree([ours[0], *ours[1]], [theirs[0], *theirs[1]], tolerance)
    assert calls


def _only(operation):
    """A genotype with one operation everywhere, wired so that nodes 2 to 5 all matter."""
    cell = Cell(tuple((Edge(operation, node), Edge(operation, node + 1)) for node in range(4)))
    return Genotype("dsara", DSARA.layout, tuple((kind, cell) for kind in DSARA.layout.kinds))


GENOTYPES = {name: _only(name) for name in DSARA.operations} | {"arnas": load_genotype("arnas")}
GENOTYPES |= {f"random {seed}": DSARA.random(torch.Generator().manual_seed(seed)) for seed in range(3)}


def _network(genotype, shape=(8, 8), channels=3, keep=()):
    """In float64, with statistics and affine parameters that no default could imitate."""
    torch.manual_seed(0)
    network = DSARA.build(
        genotype, channels=channels, cells=4, input_shape=(2, *shape), classes=4, mean=(0.5,) * 2, std=(0.25,) * 2
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 2.0)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    for share in keep:
        network = MagnitudePruning(share).plan(network).apply(network)
    return network.double()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("name", "keep"),
    [(name, ()) for name in GENOTYPES] + [("arnas", (0.4,)), ("random 0", (0.7, 0.5))],
    ids=lambda value: str(value),
)
def test_discrete_networks(name, keep, training, by_torch, calls):
    network = _network(GENOTYPES[name], keep=keep).train(training)
    x = torch.rand(8, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    ours = _evaluate(network, [x], [*network.parameters()])
    assert calls, "the kernels were not used"
    theirs = by_torch(lambda: _evaluate(network, [x], [*network.parameters()]))
    _agree([ours[0], *ours[1], *ours[2].values()], [theirs[0], *theirs[1], *theirs[2].values()])


@pytest.mark.parametrize("shape", [(16, 16), (13, 9), (7, 11)], ids=str)
def test_while_an_attack_is_crafted(shape, by_torch):
    network = _network(load_genotype("arnas"), shape=shape).eval()
    x = torch.rand(4, 2, *shape, dtype=torch.float64, requires_grad=True)
    theirs = by_torch(lambda: _evaluate(network, [x], []))
    with crafting(network):
        ours = _evaluate(network, [x], [])
    _agree([ours[0], *ours[1]], [theirs[0], *theirs[1]])


@pytest.mark.parametrize("kind", CELLS)
def test_second_derivatives_of_cells(kind, by_torch):
    torch.manual_seed(0)
    reduces, previous_reduces = CELLS[kind]
    cell = MixedCell(
        DSARA.operations, 2, (3, 3), 3, reduces=reduces, previous_reduces=previous_reduces
    ).double()  # fmt: skip
    x0 = torch.randn(4, 3, *((8, 8) if previous_reduces else (4, 4)), dtype=torch.float64, requires_grad=True)
    x1 = torch.randn(4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    alpha = torch.softmax(torch.randn(5, 7, dtype=torch.float64), 1).requires_grad_()

    def mixed_product():
        y = cell(x0, x1, alpha)
        parameters = [p for p in cell.parameters() if p.numel()]
        gradients = torch.autograd.grad((y**2).sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum((g**3).sum() for g in gradients), [alpha, x0, x1])

    before = {name: value.clone() for name, value in cell.state_dict().items()}
    ours = mixed_product()
    recorded = {name: value.clone() for name, value in cell.state_dict().items()}
    cell.load_state_dict(before)
    _agree(ours, by_torch(mixed_product), 1e-7)
    _agree(recorded.values(), cell.state_dict().values())


@pytest.mark.parametrize("name", GENOTYPES)
def test_second_derivatives_of_networks(name, by_torch):
    network = _network(GENOTYPES[name]).eval()
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64, requires_grad=True)

    def penalty():
        (gradient,) = torch.autograd.grad(network(x).logsumexp(1).sum(), x, create_graph=True)
        # materialised: torch answers None for what the second derivative of a ReLU network does not depend on
        return torch.autograd.grad((gradient**2).sum(), [*network.parameters()], materialize_grads=True)

    ours, theirs = penalty(), by_torch(penalty)
    scale = max(float(b.abs().max()) for b in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12 * scale)


def test_first_order_gradients_stay_native_when_a_second_order_is_not_asked_for(calls, monkeypatch):
    """retain_graph alone must not take the slow way; two passes over one graph agree."""
    network = _network(load_genotype("arnas"))
    backward = []
    original = Program.backward
    monkeypatch.setattr(Program, "backward", lambda *arguments: backward.append(1) or original(*arguments))
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    loss = network(x).sum()
    once = torch.autograd.grad(loss, x, retain_graph=True)
    twice = torch.autograd.grad(loss, x)
    assert len(backward) == 2 * len(calls)
    assert torch.equal(once[0], twice[0])


@pytest.mark.parametrize("kind", CELLS)
def test_results_do_not_depend_on_the_number_of_threads(kind):
    torch.manual_seed(0)
    reduces, previous_reduces = CELLS[kind]
    cell = MixedCell(DSARA.operations, 4, (4, 4), 8, reduces=reduces, previous_reduces=previous_reduces)
    inputs = [torch.randn(16, 4, *((18, 16) if previous_reduces else (9, 8)), requires_grad=True)]
    inputs += [torch.randn(16, 4, 9, 8, requires_grad=True)]
    inputs.append(torch.softmax(torch.randn(14, 7), 1).requires_grad_())
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y, gradients, _ = _evaluate(cell, inputs, [*cell.parameters()])
            found.append([y, *gradients])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_running_statistics_follow_torch(by_torch):
    """Over several steps, with momentum and the unbiased variance."""
    torch.manual_seed(0)
    ours = SeparableConv(6, 3, 1, 1, 2).double()
    theirs = SeparableConv(6, 3, 1, 1, 2).double()
    theirs.load_state_dict(ours.state_dict())
    for _ in range(4):
        x = torch.randn(8, 6, 5, 5, dtype=torch.float64)
        ours(x)
        by_torch(lambda: theirs(x))  # noqa: B023
    _agree(ours.state_dict().values(), theirs.state_dict().values())
    assert int(ours[3].num_batches_tracked) == 4


def test_gradients_of_weights_are_not_computed_for_an_attack(monkeypatch):
    wanted = []
    original = Program.backward
    monkeypatch.setattr(Program, "backward", lambda *a: wanted.append(a[-1] is not None) or original(*a))
    network = _network(load_genotype("arnas"))
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    with crafting(network):
        torch.autograd.grad(network(x).sum(), x)
    assert wanted and not any(wanted)


@pytest.mark.parametrize("batch", [1, 3, 5, 9, 13, 17])
def test_any_batch_in_eval_mode(batch, calls, by_torch):
    network = _network(load_genotype("arnas")).eval()
    x = torch.rand(batch, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    ours = _evaluate(network, [x], [*network.parameters()])
    assert calls
    theirs = by_torch(lambda: _evaluate(network, [x], [*network.parameters()]))
    _agree([ours[0], *ours[1]], [theirs[0], *theirs[1]])


def test_batch_statistics_of_a_batch_that_is_not_a_multiple_of_four(by_torch):
    network = _network(load_genotype("arnas")).train()
    x = torch.rand(6, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    ours = _evaluate(network, [x], [*network.parameters()])
    theirs = by_torch(lambda: _evaluate(network, [x], [*network.parameters()]))
    _agree([ours[0], *ours[1]], [theirs[0], *theirs[1]])


@pytest.mark.parametrize("state", ["eval", "batch statistics", "hook on a cell", "train mode"])
def test_large_batches_go_through_in_pieces_where_images_stand_alone(state, by_torch, calls, monkeypatch):
    monkeypatch.setattr("search_spaces.native.cells.FAST_PIXELS", 16 * 8 * 8)
    network = _network(load_genotype("arnas")).train(state == "train mode")
    if state == "batch statistics":
        for module in network.cells[1].modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = True
    seen = []
    if state == "hook on a cell":
        network.cells[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    x = torch.rand(44, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    ours = _evaluate(network, [x], [])
    theirs = by_torch(lambda: _evaluate(network, [x], []))
    assert ours[0].shape == (44, 4)
    _agree([ours[0], *ours[1]], [theirs[0], *theirs[1]])
    assert len(calls) == len(network.cells) * (3 if state == "eval" else 1)
    assert set(seen) <= {44}


def test_copies_of_a_network_outlive_the_original(by_torch):
    """What was prepared for a shape belongs to each copy."""
    network = _network(load_genotype("arnas")).eval()
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    expected = network(x)
    copied = copy.deepcopy(network)
    del network
    gc.collect()
    assert torch.equal(copied(x), expected)


def test_other_operations_in_the_same_place_are_noticed(by_torch):
    cell = _network(_only("sep_conv_3x3")).cells[0].eval()
    inputs = [torch.rand(4, 9, 8, 8, dtype=torch.float64) for _ in range(2)]
    cell(*inputs)
    cell.operations[0] = SeparableConv(3, 5, 1, 1, 2).double().eval()
    torch.testing.assert_close(cell(*inputs), by_torch(lambda: cell(*inputs)))


def _exchange_activation(cell):
    cell.operations[0][4] = nn.SiLU()


def _exchange_parameter(cell):
    cell.preprocess1[1].weight = nn.Parameter(2 * cell.preprocess1[1].weight.detach())


def _parametrise(cell):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(cell.operations[0][1], "weight", Doubled())


def _exchange_norm(cell):
    cell.preprocess0[2] = nn.BatchNorm2d(3).double().eval()
    nn.init.normal_(cell.preprocess0[2].running_mean)


CHANGES = [_exchange_activation, _exchange_parameter, _parametrise, _exchange_norm]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.removeprefix("_"))
def test_what_changes_inside_between_two_passes_is_noticed(change, by_torch):
    cell = _network(_only("sep_conv_3x3")).cells[0].eval()
    inputs = [torch.rand(4, 9, 8, 8, dtype=torch.float64) for _ in range(2)]
    before = cell(*inputs)
    change(cell)
    after = cell(*inputs)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, by_torch(lambda: cell(*inputs)))


def test_momentum_is_read_anew():
    module = SeparableConv(3, 3, 1, 1, 1).double()
    module(torch.randn(4, 3, 5, 5, dtype=torch.float64))
    module[3].momentum = None  # the mean over all batches from here on
    module[3].reset_running_stats()
    x = [torch.randn(8, 3, 5, 5, dtype=torch.float64) for _ in range(3)]
    means = []
    for images in x:
        z = module[2](module[1](torch.relu(images)))
        means.append(z.mean((0, 2, 3)))
        module(images)
    torch.testing.assert_close(module[3].running_mean, torch.stack(means).mean(0).detach())


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_hooks_inside_still_fire(kind, by_torch):
    """On every layer of a network, once per pass, with the tensors the layer really sees."""
    network = _network(load_genotype("arnas")).eval()
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    heard = {}

    def listen(name):
        if kind == "forward":
            return lambda module, given, result: heard.setdefault(name, []).append(result.detach())
        return lambda module, given: heard.setdefault(name, []).append(given[0].detach())

    for name, module in network.named_modules():
        if not list(module.children()):
            hook = module.register_forward_hook if kind == "forward" else module.register_forward_pre_hook
            hook(listen(name))
    by_torch(lambda: network(x))
    expected, heard = heard, {}
    with crafting(network):
        network(x)
    assert heard.keys() == expected.keys()
    for name in expected:
        assert len(heard[name]) == len(expected[name])
        torch.testing.assert_close(heard[name], expected[name], rtol=1e-10, atol=1e-10)


def test_a_hook_on_one_layer_leaves_the_others_native(calls):
    """The other cells whole, and of its own cell every other operation."""
    network = _network(load_genotype("arnas")).eval()
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    network(x)
    cells = len(calls)
    layer = [module for module in network.modules() if isinstance(module, PointwiseConv2d)][-1]
    heard = []
    layer.register_forward_hook(lambda *arguments: heard.append(1))
    calls.clear()
    network(x)
    assert heard == [1]
    assert len(calls) > cells - 1 + 4


def test_backward_hooks_inside_still_fire():
    network = _network(load_genotype("arnas")).eval()
    layer = next(module for module in network.cells[1].operations.modules() if isinstance(module, PointwiseConv2d))
    heard = []
    layer.register_full_backward_hook(lambda *arguments: heard.append(1))
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    with crafting(network):
        torch.autograd.grad(network(x).sum(), x)
    assert heard == [1]


def test_counters_see_torchs_operations(calls):
    network = _network(load_genotype("arnas")).eval()
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        network(x)
    assert not calls and counter.get_total_flops() > 0


def test_an_exchanged_activation_is_respected(calls):
    """A separable convolution whose ReLU was replaced is not computed with a ReLU."""
    module = SeparableConv(3, 3, 1, 1, 1).double().eval()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    with_relu = module(x)
    module[0] = nn.SiLU()
    calls.clear()
    assert not torch.allclose(module(x), with_relu)
    assert not calls


def test_not_a_number_is_not_lost():
    for name in ("max_pool_3x3", "avg_pool_3x3", "sep_conv_3x3", "dil_conv_5x5"):
        network = _network(_only(name)).eval()
        x = torch.rand(4, 2, 8, 8, dtype=torch.float64)
        x[1, 0, 4, 4] = torch.nan
        logits = network(x)
        assert logits[1].isnan().any(), name
        assert not logits[[0, 2, 3]].isnan().any(), name


def test_frozen_weights_and_inputs_get_no_gradient():
    module = ReluConvBn(4, 6).double()
    x = torch.randn(4, 4, 3, 3, dtype=torch.float64)
    module[1].weight.requires_grad_(False)
    y = module(x)
    y.sum().backward()
    assert x.grad is None and module[1].weight.grad is None and module[2].bias.grad is not None


def test_a_missing_compiler_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    library._built.cache_clear()
    try:
        assert library.library() is None
        assert "no-such-compiler" in library.why_not() and "g++" in library.why_not()
        broken = tmp_path / "broken"
        broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho the reason >&2\nexit 1\n")
        broken.chmod(0o755)
        monkeypatch.setenv("CXX", str(broken))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        library._built.cache_clear()
        assert library.library() is None and "the reason" in library.why_not()
        assert not list((tmp_path / "dsara-nas").glob("*.so"))
    finally:
        library._built.cache_clear()
    monkeypatch.setenv("DSARA_NATIVE", "0")
    assert library.library() is None and "DSARA_NATIVE" in library.why_not()
