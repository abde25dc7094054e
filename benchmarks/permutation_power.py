"""How many searches does `nas analyse --compare` need? The chance that its paired test finds a planted difference.

Differences of ten statistics within a search are drawn from normal distributions of standard deviation 1; the mean of
one of them is planted. Found is what the command calls different: a corrected p-value of at most 0.05.

    python -m benchmarks.permutation_power
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nas.analysis.topology_comparison import holm, p_values, sign_flips

RESULTS = Path(__file__).with_name("results")
SEARCHES, PLANTED, STATISTICS, REPETITIONS = (8, 9, 12, 16, 20), (1.0, 1.5), 10, 1000


def power(searches: int, planted: float, rng: np.random.Generator) -> float:
    """The share of repetitions in which the planted difference is found."""
    flips, _ = sign_flips(searches, rng)
    hits = 0
    for _ in range(REPETITIONS):
        values = rng.normal(size=(searches, STATISTICS))
        values[:, 0] += planted
        hits += bool(holm(p_values(flips @ values))[0] <= 0.05)
    return hits / REPETITIONS


def main() -> None:
    """Simulate all, print the table, and keep it."""
    found = {
        searches: {planted: power(searches, planted, np.random.default_rng(searches)) for planted in PLANTED}
        for searches in SEARCHES
    }
    lines = ["| searches | of 1 standard deviation | of 1.5 |", "|---:|---:|---:|"]
    lines += [f"| {n} | " + " | ".join(f"{row[planted]:.0%}" for planted in PLANTED) + " |" for n, row in found.items()]
    about = f"Chance to find a planted difference, {REPETITIONS} repetitions each.\n"
    (RESULTS / "permutation_power.md").write_text("\n".join([about, *lines]) + "\n", encoding="utf-8")
    record = {"statistics": STATISTICS, "repetitions": REPETITIONS, "found": found}
    (RESULTS / "permutation_power.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
