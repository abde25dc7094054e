"""Published genotypes beside what a search finds: of equal size, trained and attacked alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny_runs import TINY, nas, settings

from nas.analysis.complexity import Complexity, complexity
from nas.errors import InputError
from nas.model_file import ModelSpec
from runs import tasks
from runs.context import Context, found_genotype
from runs.directory import open_run
from runs.recipe import build, override_key, read_table
from search_spaces.catalogue import load_genotype

NETWORKS = ["arnas-equal-parameters", "arnas-equal-macs"]
ASKED = ["baselines.published=['arnas']", "baselines.equal=['parameters', 'macs']"]


def sizes(spec: ModelSpec) -> list[Complexity]:
    return [complexity(dataclasses.replace(spec, channels=channels)) for channels in range(1, 6)]


def test_the_channels_are_those_of_the_nearest_size(run_copy: Path) -> None:
    before = open_run(run_copy)
    table = dict(before.table)
    for override in ASKED:
        override_key(table, override)
    context = Context(dataclasses.replace(before, table=table), build(table), lambda progress: None)
    arnas, found = load_genotype("arnas"), complexity(context.spec(found_genotype(before)))
    networks = tasks._analyse(context)["published"]
    assert list(networks) == NETWORKS
    for name, what in zip(NETWORKS, ("parameters", "macs"), strict=True):
        assert networks[name]["genotype"] == arnas.to_data()
        off = [abs(getattr(size, what) - getattr(found, what)) for size in sizes(context.spec(arnas))]
        assert networks[name]["channels"] == 1 + off.index(min(off))
    planned = [task.name for task in tasks.plan(context.recipe, "run")]
    for name in NETWORKS:
        assert {f"train/{name}", f"evaluate/{name}"} <= set(planned)
    assert not any("arnas" in task.name for task in tasks.plan(context.recipe, "train"))


@pytest.mark.slow
def test_they_are_trained_and_attacked_like_the_others(tmp_path: Path) -> None:
    alone = ["baselines.random=0", "baselines.plain_depths=[]", "baselines.plain_widths=[]"]
    results = nas("run", "digits", "--out", tmp_path / "run", "--json", *TINY, *settings(*ASKED, *alone)).json()
    models = {model["name"]: model for model in results["models"]}
    assert list(models) == ["searched", "compressed", *NETWORKS]
    for name in NETWORKS:
        assert models[name]["role"] == "published"
        assert models[name]["attacks"].keys() == models["searched"]["attacks"].keys()
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<td>published</td>" in page
    assert "baselines.published=[&#34;arnas&#34;]" in page


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("baselines.published=['arnass']", "'arnass' is not a published genotype: name genotypes of cells (arnas)"),
        ("baselines.published=['wrn-34-r']", "'wrn-34-r' has a size of its own"),
        ("baselines.published=['arnas', 'arnas']", "each genotype once"),
        ("baselines.equal=[]", "at least one of 'parameters' and 'macs'"),
        ("baselines.equal=['bytes']", "parameters"),
    ],
)
def test_refusals(override: str, words: str) -> None:
    with pytest.raises(InputError) as refusal:
        build(read_table("digits", [override]))
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)
