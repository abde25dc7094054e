"""Streams split by purpose."""

import itertools

import torch

from nas.randomness import derived_seed, generator


def test_equal_arguments_equal_streams_and_any_other_argument_another_one():
    calls = [
        (0, "attack"), (1, "attack"), (0, "order"), (0, "attack", 0), (0, "attack", 1), (0, "attack", 0, 1),
        (0, "attack", 1, 0), (0, "attack", 10), (0, "attack", 12, 3), (0, "attack", 1, 23), (10, "attack"),
        (-1, "attack"),
    ]  # fmt: skip
    for first, second in itertools.combinations(calls, 2):
        assert derived_seed(*first) != derived_seed(*second)
        # A CPU generator keeps 32 bits of its seed: the draws have to differ too.
        assert not torch.equal(torch.rand(4, generator=generator(*first)), torch.rand(4, generator=generator(*second)))
    for call in calls:
        assert torch.equal(torch.rand(4, generator=generator(*call)), torch.rand(4, generator=generator(*call)))
        assert 0 <= derived_seed(*call) < 2**63


def test_the_global_stream_is_not_touched():
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(0, "x"))
    assert torch.equal(torch.get_rng_state(), before)
