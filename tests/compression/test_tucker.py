"""Tucker-2 and singular value factors against linear algebra; the rank choice against brute force."""

import copy
import itertools
import math
import time

import pytest
import torch
from torch import nn

from nas.compression.tucker import (
    allocate,
    condition_numbers,
    factorised,
    full_ranks,
    low_rank,
    matrix_factors,
    parameters_of,
    spectra,
    tucker2,
)
from nas.errors import InputError


def _random(*shape, seed=0):
    """A tensor with spectra that fall, so that leading singular vectors are worth something."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(*shape, generator=generator, dtype=torch.float64)
    for mode in (0, 1):
        falling = torch.linspace(0, 3, shape[mode], dtype=torch.float64).neg().exp()
        q, _ = torch.linalg.qr(torch.randn(shape[mode], shape[mode], generator=generator, dtype=torch.float64))
        tensor = torch.tensordot((q * falling) @ q.T, tensor.movedim(mode, 0), 1).movedim(0, mode)
    return tensor


def _unfold(tensor, mode):
    return tensor.movedim(mode, 0).flatten(1)


def _truncated(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def _error(weight, ranks, sweeps=10):
    p, core, q = tucker2(weight, ranks, sweeps)
    return float((weight - torch.einsum("pqhw,op,iq->oihw", core, p, q)).square().sum())


GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": 5, "padding": "same", "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 1, "padding": 1, "bias": False},
    {"kernel_size": 1, "stride": 2, "padding": 1, "padding_mode": "replicate"},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("channels", [(5, 7), (7, 5), (1, 20)], ids=str)
def test_full_ranks_give_the_same_convolution(geometry, channels):
    torch.manual_seed(0)
    layer = nn.Conv2d(*channels, dtype=torch.float64, **geometry)
    x = torch.randn(2, channels[0], 9, 8, dtype=torch.float64)
    replacement = factorised(layer, full_ranks(layer.weight.shape))
    torch.testing.assert_close(replacement(x), layer(x), rtol=0, atol=1e-12)
    assert len(replacement) == (2 if layer.weight[0, 0].numel() == 1 else 3)
    assert all(part.bias is None for part in replacement[:-1])


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (4, 4)])
def test_full_rank_gives_the_same_linear_layer(shape):
    torch.manual_seed(0)
    layer = nn.Linear(*shape, dtype=torch.float64)
    x = torch.randn(3, 2, shape[0], dtype=torch.float64)
    torch.testing.assert_close(factorised(layer, (min(shape),))(x), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [(2, 3), (5, 2), (4, 4)])
def test_a_layer_computes_with_the_projection_of_its_weight(ranks):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, 2, 1, dtype=torch.float64)
    projected = copy.deepcopy(layer)
    with torch.no_grad():
        projected.weight.copy_(low_rank(layer.weight, ranks))
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    replacement = factorised(layer, ranks)
    torch.testing.assert_close(replacement(x), projected(x), rtol=0, atol=1e-12)
    assert sum(part.weight.numel() for part in replacement) == parameters_of(layer.weight.shape, ranks)
    assert parameters_of(layer.weight.shape, ranks) == 8 * ranks[0] + 6 * ranks[1] + 9 * ranks[0] * ranks[1]
    for mode, rank in enumerate(ranks):
        assert torch.linalg.matrix_rank(_unfold(projected.weight, mode)) == rank


def test_spectra_are_the_squared_singular_values():
    weight = _random(6, 4, 3, 3)
    found = spectra(weight)
    assert len(found) == 2
    for mode in (0, 1):
        expected = torch.linalg.svdvals(_unfold(weight, mode)).square()
        torch.testing.assert_close(torch.tensor(found[mode], dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)
    for matrix in (weight[:, :, 0, 0], weight[:, :, :1, :1]):
        (values,) = spectra(matrix)
        expected = torch.linalg.svdvals(matrix.flatten(1)).square()
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ranks", [(3, 2), (5, 5), (2, 6), (1, 1)])
def test_errors_lie_between_the_removed_singular_values_and_fall_from_sweep_to_sweep(ranks):
    weight = _random(8, 7, 3, 3, seed=3)
    tails = [
        float(torch.linalg.svdvals(_unfold(weight, mode))[rank:].square().sum()) for mode, rank in enumerate(ranks)
    ]
    errors = [_error(weight, ranks, sweeps) for sweeps in range(6)]
    assert max(tails) <= errors[0] * (1 + 1e-12) and errors[0] <= sum(tails) * (1 + 1e-12)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert max(tails) <= errors[-1] * (1 + 1e-12)
    if ranks == (3, 2):
        assert errors[1] < 0.999 * errors[0] and errors[2] < (1 - 1e-6) * errors[1], "the sweeps gain something"
        assert _error(weight, ranks) == pytest.approx(errors[-1], rel=1e-8), "and are carried out until they do not"


def test_a_full_input_mode_is_the_matrix_svd_of_the_output_mode():
    weight = _random(8, 5, 3, 3)
    torch.testing.assert_close(
        low_rank(weight, (3, 5)), _truncated(_unfold(weight, 0), 3).reshape(8, 5, 3, 3), rtol=0, atol=1e-12
    )
    p, core, q = tucker2(weight[:, :, :1, :1], (3, 3))  # a 1x1 kernel: both modes of one matrix
    torch.testing.assert_close(p @ core[:, :, 0, 0] @ q.T, _truncated(weight[:, :, 0, 0], 3), rtol=0, atol=1e-12)
    assert float((p.T @ p - torch.eye(3)).abs().max()) < 1e-12


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_matrices_are_cut_as_by_eckart_and_young_in_two_factors_of_one_size(shape):
    matrix = _random(*shape)
    a, b = matrix_factors(matrix, 2)
    torch.testing.assert_close(a @ b, _truncated(matrix, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(a.norm(dim=0), b.norm(dim=1), rtol=1e-9, atol=0)
    a, b = matrix_factors(torch.zeros(shape), 2)
    assert not bool((a @ b).any()) and bool(a.isfinite().all()) and bool(b.isfinite().all())


@pytest.mark.parametrize("shape, ranks", [((8, 7, 3, 3), (3, 4)), ((8, 7), (3,)), ((6, 9, 1, 1), (2,))])
def test_projecting_twice_is_projecting_once(shape, ranks):
    once = low_rank(_random(*shape), ranks)
    torch.testing.assert_close(low_rank(once, ranks), once, rtol=0, atol=1e-12)
    assert low_rank(once.float(), ranks).dtype == torch.float32


# --- the choice of ranks

SHAPES = [(6, 4, 3, 3), (8, 6, 3, 3), (5, 9), (10, 4, 1, 1), (12, 1, 3, 3)]


def _problem(seed=0):
    weights = [_random(*shape, seed=seed + index) for index, shape in enumerate(SHAPES)]
    return weights, [spectra(weight) for weight in weights], sum(weight.numel() for weight in weights)


def _greedy(shapes, squares, budget, floor, step):
    """The rule of ``allocate`` in words of its own: all moves looked at each time. Totals after each move."""
    ranks = [list(full_ranks(shape)) for shape in shapes]

    def total():
        sizes = [
            (torch.Size(shape).numel(), parameters_of(shape, tuple(r))) for shape, r in zip(shapes, ranks, strict=True)
        ]
        return sum(min(pair) for pair in sizes)

    totals = [total()]
    while totals[-1] > budget:
        moves = []
        for index, (shape, modes) in enumerate(zip(shapes, squares, strict=True)):
            for mode, values in enumerate(modes):
                old = ranks[index][mode]
                new = max(min(floor, old), ((old - 1) // step) * step)
                if new < old:
                    after = [*ranks[index]]
                    after[mode] = new
                    saved = parameters_of(shape, tuple(ranks[index])) - parameters_of(shape, tuple(after))
                    moves.append((math.log(sum(values[:old]) / sum(values[:new])) / saved, index, after))
        _, index, after = min(moves)
        if len(after) == 2:
            pixels = torch.Size(shapes[index][2:]).numel()
            after = [min(after[0], after[1] * pixels), min(after[1], after[0] * pixels)]
        ranks[index] = after
        totals.append(total())
    dense = [torch.Size(shape).numel() for shape in shapes]
    found = [tuple(r) if parameters_of(s, tuple(r)) < d else None for s, r, d in zip(shapes, ranks, dense, strict=True)]
    return found, totals


@pytest.mark.parametrize("floor, step", [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_ranks_are_those_of_the_rule_spelt_out_and_meet_the_budget_by_less_than_a_move(floor, step):
    for seed in range(3):
        _, squares, dense = _problem(seed)
        for keep in (0.9, 0.6, 0.4, 0.3):
            budget = int(keep * dense)
            found = allocate(SHAPES, squares, budget, floor=floor, step=step)
            expected, totals = _greedy(SHAPES, squares, budget, floor, step)
            assert found == expected
            sizes = [
                torch.Size(shape).numel() if ranks is None else parameters_of(shape, ranks)
                for shape, ranks in zip(SHAPES, found, strict=True)
            ]
            assert sum(sizes) == totals[-1] <= budget
            assert len(totals) == 1 or totals[-2] > budget, "one move fewer is not enough"
            for ranks, shape in zip(found, SHAPES, strict=True):
                for rank, full in zip(ranks or (), full_ranks(shape) if ranks else (), strict=True):
                    assert rank >= min(floor, full)


def test_the_whole_budget_changes_nothing():
    _, squares, dense = _problem()
    assert allocate(SHAPES, squares, dense) == [None] * len(SHAPES)
    assert allocate(SHAPES, squares, dense - 1) != [None] * len(SHAPES)


def test_an_impossible_budget_is_an_input_error():
    _, squares, _ = _problem()
    least = sum(parameters_of(shape, (2,) * len(modes)) for shape, modes in zip(SHAPES[:4], squares, strict=False))
    assert all(allocate(SHAPES[:4], squares[:4], least, floor=2))
    with pytest.raises(InputError, match=f"leave {least} numbers"):
        allocate(SHAPES[:4], squares[:4], least - 1, floor=2)


def test_a_smaller_budget_never_gives_a_rank_back():
    """Hence neither more numbers nor a smaller error of the weights."""
    weights, squares, dense = _problem(5)
    before, errors = [full_ranks(shape) for shape in SHAPES], [0.0] * len(SHAPES)
    for keep in (0.9, 0.7, 0.5, 0.4, 0.3):
        ranks = allocate(SHAPES, squares, int(keep * dense))
        for index, found in enumerate(ranks):
            if found is None:
                continue
            assert all(rank <= known for rank, known in zip(found, before[index], strict=True))
            before[index] = found
            error = float((weights[index] - low_rank(weights[index], found)).square().sum())
            assert error >= errors[index] * (1 - 1e-6)
            errors[index] = error
    assert min(errors) > 0


def test_the_choice_depends_neither_on_the_order_of_layers_nor_on_that_of_channels():
    weights, squares, dense = _problem(7)
    order, generator = [3, 0, 4, 2, 1], torch.Generator().manual_seed(0)
    for keep in (0.7, 0.4):
        budget = int(keep * dense)
        found = allocate(SHAPES, squares, budget)
        moved = allocate([SHAPES[i] for i in order], [squares[i] for i in order], budget)
        assert moved == [found[i] for i in order]
        shuffles = [[torch.randperm(n, generator=generator) for n in shape[:2]] for shape in SHAPES]
        shuffled = [weight[rows][:, columns] for weight, (rows, columns) in zip(weights, shuffles, strict=True)]
        assert allocate(SHAPES, [spectra(weight) for weight in shuffled], budget) == found
        for weight, other, (rows, columns), ranks in zip(weights, shuffled, shuffles, found, strict=True):
            if ranks is not None:
                torch.testing.assert_close(
                    low_rank(other, ranks), low_rank(weight, ranks)[rows][:, columns], rtol=0, atol=1e-10
                )


def test_no_other_ranks_of_matrices_keep_a_larger_product_of_energies():
    """Brute force over all ranks that cost no more: the greedy choice is optimal where each weight has one mode."""
    shapes = [(7, 6), (5, 9), (8, 8, 1, 1)]
    for seed in range(4):
        squares = [spectra(_random(*shape, seed=seed + index)) for index, shape in enumerate(shapes)]

        def energy(ranks, squares=squares):
            return sum(math.log(sum(values[:r])) for (values,), r in zip(squares, ranks, strict=True))

        def cost(ranks):
            return sum(parameters_of(shape, (r,)) for shape, r in zip(shapes, ranks, strict=True))

        for budget in (45, 60, 75, 90):
            found = [ranks[0] for ranks in allocate(shapes, squares, budget)]
            every = itertools.product(*(range(1, full_ranks(shape)[0] + 1) for shape in shapes))
            best = max(energy(ranks) for ranks in every if cost(ranks) <= cost(found))
            assert energy(found) == pytest.approx(best, abs=1e-12)


def test_no_layer_is_given_up_for_the_others():
    """Errors of a layer end where nothing of it is left: their sum would leave the largest one a rank of 1."""
    shapes = [(16, 16, 3, 3), (16, 16, 3, 3), (24, 16, 3, 3), (24, 24, 3, 3)]
    generator = torch.Generator().manual_seed(0)
    squares = [spectra(torch.randn(shape, generator=generator)) for shape in shapes]
    found = allocate(shapes, squares, sum(torch.Size(shape).numel() for shape in shapes) // 4)
    assert min(rank for ranks in found for rank in ranks) >= 4


def test_a_rank_that_the_other_mode_makes_impossible_costs_nothing():
    """With two input directions and four pixels, no more than eight output directions are left."""
    squares = [([1.0] * 16, [1.0, 1e-9, 1e-9, 1e-9])]
    assert allocate([(16, 4, 2, 2)], squares, 200) == [(8, 2)]


def test_layers_of_exactly_low_rank_are_cut_first_and_lose_nothing():
    exact = low_rank(_random(16, 12, 3, 3), (4, 3))
    full = torch.randn(16, 12, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shapes, squares = [exact.shape, full.shape], [spectra(exact), spectra(full)]
    found = allocate(shapes, squares, full.numel() + parameters_of(exact.shape, (4, 3)))
    assert found == [(4, 3), None]
    torch.testing.assert_close(low_rank(exact, found[0]), exact, rtol=0, atol=1e-12)


def test_the_size_of_weights_does_not_matter_only_their_shape_of_spectrum():
    weights, squares, dense = _problem(2)
    larger = [spectra(weight * 10.0**index) for index, weight in enumerate(weights)]
    assert allocate(SHAPES, larger, dense // 2) == allocate(SHAPES, squares, dense // 2)


def test_ranks_of_a_large_network_are_chosen_within_seconds():
    """Of the size of VGG-16, linear layers and all: every move looked at anew would take minutes."""
    shapes = [(512, 512, 3, 3)] * 12 + [(4096, 25088), (4096, 4096)]
    squares = [tuple([float(0.99**i) for i in range(full)] for full in full_ranks(shape)) for shape in shapes]
    dense, began = sum(torch.Size(shape).numel() for shape in shapes), time.process_time()
    found = allocate(shapes, squares, dense // 8)
    assert time.process_time() - began < 5
    assert sum(parameters_of(shape, ranks) for shape, ranks in zip(shapes, found, strict=True)) <= dense // 8


# --- the layers as modules


@pytest.mark.parametrize("fit", [True, False])
@pytest.mark.parametrize("kind", ["convolution", "1x1", "linear"])
def test_replacements_are_ordinary_modules_like_the_layer(kind, fit):
    layer = {
        "convolution": lambda: nn.Conv2d(6, 8, 3, padding=1, dtype=torch.float64),
        "1x1": lambda: nn.Conv2d(6, 8, 1, dtype=torch.float64),
        "linear": lambda: nn.Linear(6, 8, dtype=torch.float64),
    }[kind]().eval()
    layer.weight.requires_grad_(False)
    ranks = (4, 3) if kind == "convolution" else (3,)
    streams = torch.get_rng_state()
    replacement = factorised(layer, ranks, fit=fit)
    assert fit == torch.equal(torch.get_rng_state(), streams), "only fresh weights are drawn"
    assert not replacement.training and not replacement[0].training
    assert {p.dtype for p in replacement.parameters()} == {torch.float64}
    wanted = [name for name, p in replacement.named_parameters() if p.requires_grad]
    assert wanted == [f"{len(replacement) - 1}.bias"]
    assert all(bool(p.isfinite().all()) and bool(p.any()) for p in replacement.parameters())
    if fit:
        assert torch.equal(replacement[-1].bias, layer.bias)
        again = factorised(layer, ranks)
        assert all(torch.equal(a, b) for a, b in zip(replacement.parameters(), again.parameters(), strict=True))


def test_the_memory_format_is_kept():
    layer = nn.Conv2d(16, 16, 3).to(memory_format=torch.channels_last)
    core = factorised(layer, (8, 8))[1].weight
    assert core.is_contiguous(memory_format=torch.channels_last) and not core.is_contiguous()


def test_condition_numbers_are_those_of_the_factors():
    layer = nn.Conv2d(8, 8, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(_random(8, 8, 3, 3))
    into, core, out = condition_numbers(factorised(layer, (4, 4)))
    assert into == pytest.approx(1) and out == pytest.approx(1)
    assert core == pytest.approx(float(torch.linalg.cond(tucker2(layer.weight, (4, 4))[1].flatten(1))))
    assert core > 1.5


def test_weights_that_are_no_numbers_are_an_input_error():
    with pytest.raises(InputError, match="finite"):
        spectra(torch.full((4, 4), float("nan")))
