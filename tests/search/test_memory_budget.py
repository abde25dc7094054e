"""Recomputation changes no bit and saves memory; the budget picks it, or names the batch size that fits."""

from dataclasses import replace

import pytest
import torch

from nas.attacks.pgd import Pgd
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError
from nas.search.architecture_gradient import FirstOrder, Unrolled
from nas.search.bilevel import Search, Stage, search
from nas.search.memory_budget import DryRun, fit
from nas.search.recomputation import recompute
from nas.search.relaxation import SampledPath
from nas.threat_model import ThreatModel
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from search_spaces.cell_space import CellSpace
from search_spaces.dsara import SPACE

SMALL = CellSpace("dsara", ("max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3"), SPACE.layout, nodes=2)
ATTACK = Pgd(ThreatModel("linf", 0.05), steps=1, statistics="batch")
OBJECTIVES = {"natural": Standard(), "adversarial": PgdAt(ATTACK)}
STAGES = (Stage(until=1), Stage(until=2, objectives=("natural", "adversarial"), combine="min_norm"))
SETTINGS = Search(channels=4, cells=4, batch_size=8, stages=STAGES, monitored=16)


def _data(side=8):
    x = torch.randint(0, 256, (64, 1, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    y = torch.arange(64) % 2
    return ImageData("tiny", x, y, x[:2], y[:2], ("a", "b"))


def _search(settings, tmp_path, name):
    data = _data()
    parts = split(data.y_train, architecture=0.5, validation=0.0, seed=0)
    path = tmp_path / f"{name}.safetensors"
    search(
        SMALL, data, parts, settings, weight_objective=PgdAt(ATTACK), objectives=OBJECTIVES, attack=ATTACK, seed=0,
        checkpoint=path,
    )  # fmt: skip
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{}, {"gradient": Unrolled("exact")}, {"gradient": FirstOrder(), "relaxation": SampledPath()}],
    ids=["finite differences", "exact product", "sampled path"],
)
@pytest.mark.parametrize("native", [True, False], ids=["kernels", "torch"])
def test_recomputing_cells_changes_no_bit_of_the_search(change, native, tmp_path, monkeypatch):
    """Weights, running statistics and their counts, alpha, optimisers and records are all in the checkpoint."""
    if not native:
        monkeypatch.setattr("search_spaces.native.cells.library", lambda: None)
    settings = replace(SETTINGS, **change)
    kept = _search(settings, tmp_path, "kept")
    assert _search(replace(settings, recompute_cells=True), tmp_path, "recomputed") == kept


def test_inner_maps_are_not_kept_between_the_passes():
    class Cell(torch.nn.Module):
        def forward(self, x):
            return (x.exp() * 2).exp()

    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    for recomputes in (False, True):
        cell, x = Cell(), torch.rand(100, requires_grad=True)
        if recomputes:
            recompute(cell)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = cell(x)
        assert len([size for size in kept if size == 100]) == (1 if recomputes else 2), "its input, or both inner maps"
        y.sum().backward()
        expected = 2 * x.detach().exp() * y.detach()
        assert torch.allclose(x.grad, expected)


class _Law:
    """Memory 1 GiB + 0.1 GiB an image, of which recomputation spares three quarters; remembers what was tried."""

    def __init__(self):
        self.tried = []

    def __call__(self, settings):
        self.tried.append((settings.batch_size, settings.recompute_cells))
        return 1 + (0.025 if settings.recompute_cells else 0.1) * settings.batch_size


def test_what_fits_stays_as_it_is():
    peak, lines = _Law(), []
    settings = replace(SETTINGS, batch_size=64)
    assert fit(settings, 8.0, peak, lines.append) == settings
    assert peak.tried == [(16, False), (32, False), (64, False)]
    assert lines == ["a step of the search needs 7.40 GiB of memory; the budget is 8 GiB"]


def test_cells_are_recomputed_where_that_is_needed_and_nothing_too_large_is_tried():
    peak = _Law()
    settings = replace(SETTINGS, batch_size=64)
    assert fit(settings, 4.0, peak) == replace(settings, recompute_cells=True)
    assert (64, False) not in peak.tried


def test_what_cannot_fit_is_refused_with_the_batch_size_that_would():
    peak = _Law()
    with pytest.raises(InputError, match=r"needs 2\.60 GiB even if cells are recomputed; search\.batch_size = 40 fits"):
        fit(replace(SETTINGS, batch_size=64), 2.0, peak)
    assert max(size for size, _ in peak.tried) == 32
    with pytest.raises(InputError, match=r"lower search\.channels"):
        fit(replace(SETTINGS, batch_size=64), 0.5, peak)
    with pytest.raises(InputError, match="above 0"):
        fit(SETTINGS, 0.0, peak)


@pytest.mark.slow
def test_a_dry_run_sees_what_recomputation_saves():
    data = _data(32)
    parts = split(data.y_train, architecture=0.5, validation=0.0, seed=0)
    run = DryRun(SPACE, data, parts, PgdAt(ATTACK), OBJECTIVES, ATTACK, "cpu", 1)
    settings = replace(SETTINGS, channels=8, cells=6, batch_size=32, stages=(Stage(until=1),), gradient=FirstOrder())
    kept, recomputed = (run.peak(replace(settings, recompute_cells=choice)) for choice in (False, True))
    assert recomputed < kept - 0.1
