"""Published genotypes beside what a search finds: of equal size, trained and attacked alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_runs import TINY, nas, settings

from nas.analysis.complexity import complexity, with_macs
from nas.errors import InputError
from nas.model_file import ModelSpec
from runs.recipe import build, read_table
from search_spaces.catalogue import load_genotype


def test_the_channels_are_those_of_the_nearest_size(tmp_path: Path) -> None:
    found = settings("baselines.published=['arnas']", "baselines.equal=['parameters', 'macs']", "baselines.random=0")
    alone = settings("baselines.plain_depths=[]", "baselines.plain_widths=[]", "compress.fine_tune.epochs=0")
    results = nas("run", "digits", "--out", tmp_path / "run", "--json", *TINY, *found, *alone).json()
    models = {model["name"]: model for model in results["models"]}
    assert list(models) == ["searched", "compressed", "arnas-equal-parameters", "arnas-equal-macs"]
    assert [model["role"] for model in models.values()][2:] == ["published", "published"]
    arnas, searched = load_genotype("arnas"), models["searched"]
    sizes = [
        complexity(ModelSpec(arnas, channels, 4, (1, 8, 8), tuple("0123456789"), (0.5,), (0.5,)))
        for channels in range(1, 9)
    ]
    for what in ("parameters", "macs"):
        one = models[f"arnas-equal-{what}"]
        assert one["genotype"] == arnas.to_data()
        nearest = min((getattr(size, what) for size in sizes), key=lambda size: abs(size - searched[what]))
        assert one[what] == nearest
        assert one["worst_case"] is not None
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<td>published</td>" in page
    # The run as it is today: heat maps, images, and the command with what was set.
    assert page.count('class="heat"') == 6
    assert page.count("<img ") % 3 == 0
    assert "baselines.published=[&#34;arnas&#34;]" in page
    assert len(page) < 1_500_000
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_the_nearest_macs() -> None:
    spec = ModelSpec(load_genotype("arnas"), 1, 4, (1, 8, 8), ("a", "b"), (0.5,), (0.5,))
    macs = [complexity(ModelSpec(spec.genotype, n, 4, (1, 8, 8), ("a", "b"), (0.5,), (0.5,))).macs for n in (3, 4)]
    assert with_macs(spec, macs[0] + 1).channels == 3
    assert with_macs(spec, macs[1] - 1).channels == 4


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
