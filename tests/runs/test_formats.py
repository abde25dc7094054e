"""Files of every version that was ever written still load, and those of a newer program are refused in one line.

``tests/formats/N`` holds what a program of format version N wrote: a comparison and a study, whole, a genotype, and
logits of the trained network. They are never written again; a new version gets a folder of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_runs import nas

from nas.errors import InputError
from nas.model_file import load_model
from nas.tensor_file import read_tree
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import GenotypeError

VERSIONS = sorted((Path(__file__).parents[1] / "formats").iterdir())
NEWER = "written by a newer program"


@pytest.fixture(params=VERSIONS, ids=lambda path: path.name)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What an old program wrote, to be written on."""
    return Path(shutil.copytree(request.param, tmp_path / "old"))


def test_a_network(old: Path) -> None:
    _, model = load_model(old / "run/train/pgd_at-0")
    x = torch.linspace(0, 1, 128).reshape(2, 1, 8, 8)
    torch.testing.assert_close(
        model(x), torch.tensor(json.loads((old / "logits.json").read_text())), rtol=1e-5, atol=1e-6
    )


def test_a_genotype(old: Path) -> None:
    assert load_genotype(str(old / "genotype.json")) == load_genotype("arnas")


def test_a_run_that_is_resumed_in_each_of_its_tasks(old: Path) -> None:
    """Training goes on from the old checkpoint, the evaluation from the old masks, to the old weights and results."""
    before = json.loads((old / "run/results.json").read_text())
    for name in ("train/pgd_at-0/result.json", "evaluate/pgd_at-0/result.json", "report/result.json", "results.json"):
        (old / "run" / name).unlink()
    outcome = nas("compare", "--resume", old / "run")
    assert outcome.status == 0, outcome.err
    after = json.loads((old / "run/results.json").read_text())
    for results in (before, after):
        del results["measured"], results["command"]  # seconds; and what is said of how to do it again
    assert before == after
    assert nas("report", old / "run").status == 0


def test_an_attack_on_a_network_of_a_run(old: Path) -> None:
    outcome = nas("attack", old / "run", "--model", "pgd_at-0", "--attack", "fgsm", "--samples", "50")
    assert outcome.status == 0, outcome.err


def test_a_study(old: Path) -> None:
    before = json.loads((old / "study/results.json").read_text())
    outcome = nas("study", "width-depth", "--resume", old / "study", "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.json()["observations"] == before["observations"]
    assert nas("study", "recommend", old / "study").status == 0


def changed(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_files_of_a_newer_program(tmp_path: Path) -> None:
    new = Path(shutil.copytree(VERSIONS[-1], tmp_path / "new"))
    changed(new / "genotype.json", schema=99)
    with pytest.raises(GenotypeError, match="newer"):
        load_genotype(str(new / "genotype.json"))
    changed(new / "run/train/pgd_at-0/model.json", schema=99)
    with pytest.raises(InputError, match=NEWER):
        load_model(new / "run/train/pgd_at-0")
    checkpoint = new / "run/train/pgd_at-0/checkpoint.safetensors"
    with safe_open(checkpoint, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    save_file(tensors, checkpoint, {"tree": json.dumps({**json.loads(metadata["tree"]), "schema": 99})})
    with pytest.raises(InputError, match=NEWER):
        read_tree(checkpoint)
    changed(new / "run/results.json", schema=99)
    assert NEWER in nas("report", new / "run").refusal
    changed(new / "run/run.json", schema=99)
    assert NEWER in nas("compare", "--resume", new / "run").refusal
    journal = new / "study/journal.jsonl"
    text = journal.read_text()
    assert '"schema": 1' in text or '"schema":1' in text
    journal.write_text(text.replace('"schema": 1', '"schema": 99').replace('"schema":1', '"schema":99'))
    assert NEWER in nas("study", "width-depth", "--resume", new / "study").refusal
