"""What a study's ledger costs: seconds to open a storage, and to claim and finish a trial, with thousands in it.

    python -m benchmarks.study_driver                        journal file and PostgreSQL, 10,000 trials
    python -m benchmarks.study_driver --trials 1000          fewer
    python -m benchmarks.study_driver --postgres URL         a server of yours instead of one started for this

The work of a trial is none, and its result as long as a real one. Each measurement is of a process that has just opened
the storage, as a worker of ``nas study`` does; claim and finish are what it does with the ledger for one trial: look
for the dead, find what is open, claim it, tell the result. (Signs of life are given once a minute.)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState, create_trial

from benchmarks.postgres_server import absent, server
from nas.tensor_file import write_text
from runs.study_ledger import Ledger
from runs.study_storage import close_storage, open_storage, open_study

RECIPE = {"name": "driver"}
CONFIGURATION = {
    "genotype": {"schema": 1, "space": "residual", "depths": [5, 5, 5], "widths": [160, 320, 640]}, "channels": 0,
}  # fmt: skip
RESULT = {
    "observation": {
        "configuration": "0" * 12, "space": "residual", "depths": [5, 5, 5], "widths": [160, 320, 640],
        "parameters": 46_160_474, "macs": 5_950_000_000, "stage_parameters": [2_000_000] * 3,
        "stage_macs": [2_000_000_000] * 3, "seed": 0, "epochs": 100, "natural": 0.8713, "robust": 0.5511, "n": 10_000,
        "options": [["block", "basic"]], "measures": {f"measure {i}": 0.123456 for i in range(8)}, "latency": None,
    },
    "attacks": {"pgd-20": 0.5533, "pgd-20 margin": 0.5541},
    "attack_settings": {"pgd-20": "x" * 150, "margin": "x" * 150},
    "interval": [0.54, 0.56], "checks": [{"name": f"check {i}", "verdict": "pass"} for i in range(8)],
    "digest": "0" * 12, "seconds": 12345.6,
}  # fmt: skip


def main() -> None:
    """Measure both storages and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=10_000, help="trials that are in the storage before")
    parser.add_argument("--measured", type=int, default=200, help="trials that are claimed and finished")
    parser.add_argument("--postgres", help="postgresql://... of an empty database")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "study_driver.json")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": {"platform": platform.platform(), "cores": os.cpu_count()}}
    found |= {"optuna": optuna.__version__, "trials": arguments.trials, "measured": arguments.measured}
    with tempfile.TemporaryDirectory() as folder:
        found["journal"] = measure(str(Path(folder) / "journal.jsonl"), arguments.trials, arguments.measured)
    reason = None if arguments.postgres else absent()
    if reason is not None:
        found["postgresql"] = {"absent": reason}
    else:
        where = contextlib.nullcontext(arguments.postgres) if arguments.postgres else server()
        with where as url:
            found["postgresql"] = measure(url, arguments.trials, arguments.measured)
    write_text(json.dumps(found, indent=1) + "\n", arguments.out)
    print(json.dumps(found, indent=1))


def measure(where: str, trials: int, measured: int) -> dict[str, Any]:
    """Fill a storage, open it anew, and do trials of nothing."""
    filled = _filled(where, trials)
    begin = time.perf_counter()
    ledger = Ledger(open_study(open_storage(where), where, "driver", RECIPE, ["maximize"]))
    assert len(ledger.trials()) == trials
    opened = time.perf_counter() - begin
    keys = [f"{number:012x}-s0" for number in range(trials + measured)]
    seconds, processor = [], []
    for _ in range(measured):
        begin, used = time.perf_counter(), time.process_time()
        trials = ledger.trials()
        ledger.reap(trials)
        claim = ledger.claim(ledger.open(keys, trials)[0], CONFIGURATION)
        assert claim is not None
        with claim:
            claim.finish([0.5], results=[RESULT])
        seconds.append(time.perf_counter() - begin)
        processor.append(time.process_time() - used)
    ledger.close()
    ordered = sorted(seconds)
    return {
        "fill_seconds": round(filled, 1),
        "open_seconds": round(opened, 2),
        "claim_and_finish_ms": {
            "p10": round(1e3 * ordered[len(ordered) // 10], 1),
            "median": round(1e3 * statistics.median(ordered), 1),
            "p95": round(1e3 * ordered[int(0.95 * len(ordered))], 1),
            "largest": round(1e3 * ordered[-1], 1),
            "processor_median": round(1e3 * statistics.median(processor), 1),
        },
    }


def _filled(where: str, trials: int) -> float:
    """Put finished trials into a storage; returns the seconds it took."""
    begin = time.perf_counter()
    study = open_study(open_storage(where), where, "driver", RECIPE, ["maximize"])
    database = "://" in where
    for number in range(1 if database else trials):
        task = {"key": f"{number:012x}-s0", "configuration": CONFIGURATION, "owner": {}}
        attributes = {"task": task, "beat": 7, "results": [RESULT]}
        done = create_trial(state=TrialState.COMPLETE, value=0.5, user_attrs=attributes)
        study._storage.create_new_trial(study._study_id, done)
    close_storage(study._storage)
    if database:
        _multiply(where, trials)
    return time.perf_counter() - begin


def _multiply(url: str, trials: int) -> None:
    """Copies of the one trial of a database, each under a key of its own."""
    import psycopg

    with psycopg.connect(url) as connection:
        connection.execute(
            "INSERT INTO trials (number, study_id, state, datetime_start, datetime_complete) "
            "SELECT g, study_id, state, datetime_start, datetime_complete FROM trials, generate_series(1, %s) g "
            "WHERE number = 0",
            [trials - 1],
        )
        connection.execute(
            "INSERT INTO trial_values (trial_id, objective, value, value_type) "
            "SELECT t.trial_id, v.objective, v.value, v.value_type FROM trials t, trial_values v WHERE t.number > 0"
        )
        connection.execute(
            "INSERT INTO trial_user_attributes (trial_id, key, value_json) SELECT t.trial_id, a.key, "
            "replace(a.value_json, '000000000000-s0', lpad(to_hex(t.number), 12, '0') || '-s0') "
            "FROM trials t, trial_user_attributes a WHERE t.number > 0"
        )
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ANALYZE")  # as the server does by itself when trials come one by one


if __name__ == "__main__":
    main()
