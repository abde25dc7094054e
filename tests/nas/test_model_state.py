"""Temporary states of a model end as they began, and change what they promise meanwhile."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from nas.model_state import crafting, evaluating, frozen_statistics


class _Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _model(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), norm(3), nn.Dropout(0.5), nn.Conv2d(3, 3, 3), norm(3), nn.Flatten())
    parametrize.register_parametrization(model[3], "weight", _Double())
    model[0].bias.requires_grad_(False)
    model(torch.rand(8, 1, 8, 8))
    model[4].eval()
    return model


def _state(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()]
    return tensors, flags, [parameter.requires_grad for parameter in model.parameters()]


def _assert_same(state, model):
    tensors, flags, trainable = _state(model)
    assert (flags, trainable) == state[1:]
    assert all(torch.equal(tensors[name], value) for name, value in state[0].items())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize(
    "context",
    [
        crafting,
        lambda model: crafting(model, batch_statistics=True),
        frozen_statistics,
        lambda model: evaluating(model),
    ],
    ids=["crafting", "crafting on batch statistics", "frozen statistics", "evaluating"],
)
def test_everything_is_restored_also_after_an_error(context, norm):
    model = _model(norm)
    before = _state(model)
    with context(model):
        model(torch.rand(4, 1, 8, 8))
    _assert_same(before, model)
    with pytest.raises(RuntimeError), context(model):
        model(torch.rand(4, 7, 8, 8))  # the wrong number of channels
    _assert_same(before, model)
    with context(model), context(model):  # nested
        model(torch.rand(4, 1, 8, 8))
    _assert_same(before, model)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_crafting_uses_the_statistics_asked_for(norm):
    model, x = _model(norm).train(), 3 + torch.rand(6, 1, 8, 8)
    inputs = []
    model[1].register_forward_hook(lambda module, given, result: inputs.append((given[0].detach(), result.detach())))
    for batch_statistics in (False, True):
        inputs.clear()
        with crafting(model, batch_statistics=batch_statistics):
            first = model(x)
            assert torch.equal(first, model(x)), "dropout must be off"
            assert not first.requires_grad
        given, result = inputs[0]
        if batch_statistics:
            mean, variance = given.mean((0, 2, 3)), given.var((0, 2, 3), unbiased=False)
        else:
            mean, variance = model[1].running_mean, model[1].running_var
        expected = (given - mean.view(1, -1, 1, 1)) / (variance.view(1, -1, 1, 1) + 1e-5).sqrt()
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_frozen_statistics_normalises_by_the_batch_without_recording(norm):
    model, x = _model(norm).train(), 3 + torch.rand(6, 1, 8, 8)
    model[2].eval()  # dropout
    before = _state(model)
    with frozen_statistics(model):
        frozen = model(x)
    _assert_same(before, model)
    free = model(x)
    assert torch.equal(free, frozen)
    assert not torch.equal(model[1].running_mean, before[0]["1.running_mean"]), "outside, the statistics move"
    model.eval()
    expected = model(x)
    with frozen_statistics(model):
        assert torch.equal(model(x), expected), "in eval mode the running statistics stay in use"


def test_evaluating_is_eval_mode():
    model = _model()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
