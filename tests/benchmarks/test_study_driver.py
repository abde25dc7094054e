"""What a trial costs the driver of a study, in processor time, which other work on the machine disturbs little."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study_driver import measure


def test_a_trial_costs_less_than_50_ms(tmp_path: Path) -> None:
    found = measure(str(tmp_path / "journal"), 300, 20)
    assert 0 < found["claim_and_finish_ms"]["processor_median"] < 50
