"""Our search step computes what the textbook step computes, of which the benchmark measures the time."""

import pytest
import torch

from benchmarks.search_step import Configuration, Ours, agreement, batches_of, measure, supernet_of, textbook_search

SMALL = Configuration(4, 4, 8, 8, 1, 0.1, 2, 1)


@pytest.mark.slow
def test_attack_directions_and_architecture_gradients_are_the_textbooks():
    found = agreement(SMALL, "cpu", None)
    for what in ("attack", "architecture"):
        assert found[f"ours float64 {what} relative error"] < 1e-9
        assert found[f"ours float32 {what} cosine"] > 0.999
    assert found["ours float32 attack relative error"] < 1e-4


def test_a_whole_step_moves_architecture_and_weights_as_the_textbook_does():
    """In float64, from one start of the attacks."""
    supernet = supernet_of(SMALL, "cpu").double()
    ours = Ours(SMALL, supernet)
    textbook = textbook_search(SMALL, supernet, ours.attack)
    batch, held_out = batches_of(SMALL, "cpu", None)
    batch, held_out = (type(b)(b.x.double(), b.y, b.indices) for b in (batch, held_out))
    generator = torch.Generator().manual_seed(3)
    stream = generator.clone_state()
    starts = tuple(ours.attack.threat_model.random_start(b.x, stream) for b in (batch, held_out))
    before = {kind: alpha.detach().clone() for kind, alpha in supernet.alpha.items()}
    ours.step(batch, held_out, generator)
    textbook.step(batch.x, batch.y, held_out.x, held_out.y, starts)
    for kind, alpha in supernet.alpha.items():
        assert not torch.equal(alpha, before[kind])
        torch.testing.assert_close(alpha.detach(), textbook.model.alpha[kind].detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(supernet.classifier.weight, textbook.model.classifier.weight, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(supernet.stem[0].weight, textbook.model.stem[0].weight, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_benchmark_runs():
    result = measure(SMALL, "cpu", None, 2)
    assert result["ratio"] > 0 and result["passes"] == {"textbook": 13, "ours": 12}
