"""What a study says for itself: the best shapes, published claims, rank correlations, the page and the pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nas.studies.claims import claims
from nas.studies.laws import laws
from nas.studies.observation import Observation
from nas.studies.ranking import rankings
from nas.studies.verdict import study_verdict
from nas.tensor_file import write_text
from runs.directory import RunDirectory, make_folder, read_json, write_json
from runs.reproduction import recipe_text
from runs.study_record import candidates, csv_of

SEED = 0
"""Of the bootstrap and the permutations: the same data give the same findings."""


def findings(observations: Sequence[Observation]) -> dict[str, Any]:
    """What observations say, as written to results.json."""
    configurations = [one.to_data() for one in candidates(observations)] if observations else []
    tested, ranked = claims(observations, seed=SEED), rankings(observations, seed=SEED)
    return {
        "configurations": configurations,
        "claims": [one.to_data() for one in tested],
        "laws": [one.to_data() for one in laws(observations, seed=SEED)],
        "rankings": [one.to_data() for one in ranked],
        "verdict": study_verdict(configurations, tested, ranked),
    }


def write_results(run: RunDirectory, results: Mapping[str, Any]) -> None:
    """results.json and observations.csv of a study."""
    write_json(results, run.path / "results.json")
    write_text(csv_of(results), run.path / "observations.csv")


def write_page(run: RunDirectory, results: Mapping[str, Any], observations: Sequence[Observation]) -> Path:
    """report.html of a study, and its pictures as figures/*.svg and *.png."""
    # Pictures need matplotlib, which takes half a second to import.
    from nas.report.study_page import write_study
    from nas.report.study_pictures import FORMATS, PICTURES, Studied, save

    path, machine = run.path / "report.html", run.path / "environment.json"
    # A study may be told from its storage alone, elsewhere than where it was begun.
    environment = {"environment": read_json(machine)} if machine.exists() else {}
    write_study({**results, **environment, "recipe_text": recipe_text(run.table)}, observations, path)
    if observations:
        make_folder(run.path / "figures")
        studied = Studied(observations)
        for name, draw in PICTURES.items():
            for form in FORMATS:
                save(draw, studied, run.path / "figures" / f"{name}.{form}")
    return path
