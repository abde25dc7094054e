"""Writers that race for trials and are killed lose none and double none, as the benchmark counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.study_writers import measure


@pytest.mark.slow
def test_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    found = measure(str(tmp_path / "journal"), writers=4, seconds=25, pause=5, folder=tmp_path)
    assert found["lost"] == found["doubled"] == 0 and found["failed"] == [] and found["other"] == {}
    assert found["kills"] >= 2 and found["complete"] >= found["told"] > 50
