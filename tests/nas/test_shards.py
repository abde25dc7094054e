"""Shards of a batch: together they are the batch, wherever each is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas import ranks
from nas.errors import InputError
from nas.objective import Batch
from nas.ranks import sum_of_halves
from nas.shards import Shards, Step

CLASSES = 3


def some_batch(n: int = 12) -> Batch:
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(n, 2, 4, 4, generator=draws, dtype=torch.float64)
    return Batch(x, torch.randint(CLASSES, (n,), generator=draws), torch.arange(n))


def network(*, normalised: bool) -> nn.Module:
    torch.manual_seed(0)
    norm = [nn.BatchNorm2d(5)] if normalised else []
    layers = [nn.Conv2d(2, 5, 3), *norm, nn.Softplus(), nn.Flatten(), nn.Linear(20, CLASSES)]
    return nn.Sequential(*layers).double().train()


def step_of(model: nn.Module, batch: Batch, shards: Shards) -> Step:
    parts, parameters = shards.parts(batch), [*model.parameters()]

    def of_shard(number: int) -> Step:
        logits = model(parts[number].x)
        loss = F.cross_entropy(logits, parts[number].y)
        accuracy = (logits.argmax(1) == parts[number].y).float().mean()
        return loss.detach(), [*torch.autograd.grad(loss, parameters)], {"accuracy": accuracy}

    return shards.step(model, of_shard)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_the_gradient_of_a_batch_is_the_mean_over_its_shards(count: int) -> None:
    model, batch = network(normalised=False), some_batch()
    loss, gradients, metrics = step_of(model, batch, Shards(count))
    whole = F.cross_entropy(model(batch.x), batch.y)
    torch.testing.assert_close(loss, whole.detach())
    for ours, theirs in zip(gradients, torch.autograd.grad(whole, [*model.parameters()]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    accuracy = (model(batch.x).argmax(1) == batch.y).double().mean()
    torch.testing.assert_close(metrics["accuracy"].double(), accuracy, rtol=1e-6, atol=0)


def test_running_statistics_are_the_mean_of_what_each_shard_alone_would_have_made_them() -> None:
    batch, count = some_batch(), 3
    alone = []
    for number in range(count):
        model = network(normalised=True)
        model(batch.x[4 * number : 4 * number + 4])
        alone.append(dict(model.named_buffers()))
    model = network(normalised=True)
    step_of(model, batch, Shards(count))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            torch.testing.assert_close(buffer, torch.stack([one[name] for one in alone]).mean(0))
        else:
            assert buffer == 1  # one step, however many shards


def test_normalisation_sees_one_shard_at_a_time() -> None:
    """Which is why the number of shards is part of a recipe: it changes results."""
    batch = some_batch()
    whole, _, _ = step_of(network(normalised=True), batch, Shards(1))
    cut, _, _ = step_of(network(normalised=True), batch, Shards(3))
    assert abs(float(whole - cut)) > 1e-6


def test_a_weight_without_a_gradient_has_none() -> None:
    model = network(normalised=False)
    parameters = [*model.parameters(), nn.Parameter(torch.ones(2))]

    def of_shard(number: int) -> Step:
        loss = model(some_batch().x).sum()
        return loss.detach(), [*torch.autograd.grad(loss, parameters, allow_unused=True)], {}

    _, gradients, metrics = Shards(2).step(model, of_shard)
    assert gradients[-1] is None and all(gradient is not None for gradient in gradients[:-1]) and not metrics


@pytest.mark.parametrize("n", [12, 13, 2])
def test_shards_cover_every_row_once(n: int) -> None:
    shards = Shards(4)
    covered = [row for number in shards.own for row in range(n)[shards.rows(n, number)]]
    assert covered == list(range(n))
    batch = some_batch(n)
    assert torch.equal(torch.cat([part.x for part in shards.parts(batch).values()]), batch.x)
    assert torch.equal(torch.cat([part.indices for part in shards.parts(batch).values()]), batch.indices)


def test_each_shard_has_a_stream_of_its_own_and_one_shard_that_of_the_batch() -> None:
    from nas.randomness import generator

    def drawn(stream: torch.Generator) -> Tensor:
        return torch.rand(4, generator=stream)

    draws = [drawn(stream) for stream in Shards(4).generators(7, "attack", 3).values()]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert torch.equal(drawn(Shards(1).generators(7, "attack", 3)[0]), drawn(generator(7, "attack", 3)))


def test_a_mask_is_put_together_from_its_shards() -> None:
    wanted = torch.arange(13) % 3 == 0
    mask = Shards(4).withstood(13, lambda number, rows: wanted[rows], torch.device("cpu"))
    assert torch.equal(mask, wanted)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_sums_by_halves_do_not_depend_on_who_adds(processes: int) -> None:
    terms = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    each = 8 // processes
    parts = [
        sum_of_halves(lambda number: terms[number].clone(), range(rank * each, (rank + 1) * each))
        for rank in range(processes)
    ]
    total = sum_of_halves(parts.__getitem__, range(processes))
    assert torch.equal(total, sum_of_halves(lambda number: terms[number].clone(), range(8)))
    torch.testing.assert_close(total, terms.sum(0))
    assert not torch.equal(total, sum(terms[number] for number in range(8)))  # the order matters, to the last bit


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="at least 1"):
        Shards(0)
    with pytest.raises(InputError, match="batch_size = 10 cannot be cut into 4 shards"):
        Shards(4).check(10, "batch_size")
    with pytest.raises(InputError, match="at least 2 images"):
        Shards(4).check(4, "batch_size")
    Shards(4).check(8, "batch_size")
    monkeypatch.setattr(ranks, "world", lambda: 3)
    with pytest.raises(InputError, match="4 shards cannot be dealt out evenly to 3 processes"):
        Shards(4)
