"""The joint evaluation of a node's edges is the textbook sum over separate candidate operations."""

import pytest
import torch
import torch.nn.functional as F

from search_spaces.darts import SPACE as DARTS
from search_spaces.dsara import SPACE as DSARA
from search_spaces.mixed import MixedEdges
from search_spaces.operations import OPERATIONS


def _norm(x):
    return F.batch_norm(x, None, None, None, None, True, 0.1, 1e-5)


def _textbook(module, names, x, weights):
    """One candidate operation of one edge at a time, from the same parameters."""
    order = [i for i, name in enumerate(names) if OPERATIONS[name].kind == "conv"]
    order.sort(key=lambda i: -OPERATIONS[names[i]].repeats)
    channels, edges, stride = module.channels, module.edges, module.stride
    outputs = []
    for edge in range(edges):
        total = 0
        for column, name in enumerate(names):
            operation = OPERATIONS[name]
            if operation.kind == "none":
                continue
            if operation.kind == "max_pool":
                y = _norm(F.max_pool2d(x, 3, stride, 1))
            elif operation.kind == "avg_pool":
                y = _norm(F.avg_pool2d(x, 3, stride, 1, count_include_pad=False))
            elif operation.kind == "skip":
                y = x
                if stride == 2:
                    padded = F.pad(torch.relu(x), (0, x.shape[3] % 2, 0, x.shape[2] % 2))
                    halves = [F.conv2d(padded[:, :, ::2, ::2], module.halves_even[edge][:, :, None, None])]
                    halves.append(F.conv2d(padded[:, :, 1::2, 1::2], module.halves_odd[edge][:, :, None, None]))
                    y = _norm(torch.cat(halves, 1))
            else:
                y, place = x, order.index(column)
                for stage in range(operation.repeats):
                    depthwise = (module.depthwise1, module.depthwise2)[stage][place].view(
                        edges, channels, 1, operation.kernel, -1
                    )
                    pointwise = (module.pointwise1, module.pointwise2)[stage][place * edges + edge]
                    padding = operation.dilation * (operation.kernel - 1) // 2
                    y = F.conv2d(
                        torch.relu(y),
                        depthwise[edge],
                        None,
                        stride if stage == 0 else 1,
                        padding,
                        operation.dilation,
                        channels,
                    )
                    y = _norm(F.conv2d(y, pointwise[:, :, None, None]))
            total = total + weights[edge, column] * y
        outputs.append(total)
    return torch.stack(outputs)


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (7, 5), (11, 10)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("space", [DSARA, DARTS], ids=lambda space: space.name)
def test_joint_evaluation_equals_the_textbook_sum(size, stride, space):
    torch.manual_seed(0)
    module = MixedEdges(space.operations, 3, 4, stride).double()
    x = torch.randn(6, 4, *size, dtype=torch.float64, requires_grad=True)
    weights = torch.softmax(torch.randn(3, len(space.operations), dtype=torch.float64), 1).requires_grad_()
    parameters = [x, weights, *module.parameters()]
    ours, reference = module(x, weights), _textbook(module, space.operations, x, weights)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(reference)
    mine = torch.autograd.grad((ours * direction).sum(), parameters)
    theirs = torch.autograd.grad((reference * direction).sum(), parameters)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_each_candidate_changes_the_output():
    """With all weight on one candidate, no two candidates give the same map."""
    torch.manual_seed(0)
    module = MixedEdges(DSARA.operations, 1, 4, 1)
    x = torch.randn(2, 4, 8, 8)
    outputs = [module(x, torch.eye(7)[i : i + 1]) for i in range(7)]
    for i in range(7):
        for j in range(i):
            assert not torch.allclose(outputs[i], outputs[j])
