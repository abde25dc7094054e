"""The command in a report makes the recipe of the run again, to the last key."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from runs.directory import RunDirectory
from runs.recipe import read_table, shipped
from runs.reproduction import command_of, recipe_text
from search_spaces.catalogue import load_genotype


def again(command: str) -> dict[str, Any]:
    """The recipe that a command names."""
    words = shlex.split(command)
    assert words[:2] == ["nas", "run"]
    assert all(word == "--set" for word in words[3::2])
    return read_table(words[2], words[4::2])


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["search.channels=6", "seed=3"],
        # A key that is not there any more, a table in a list, a list of another length, a text of quotes and spaces.
        ["search.gradient={name='first_order'}", "search.stages.0.until=2", "baselines.plain_depths=[1, 1, 1]"],
        ['data={name=\'arrays\', path="it\'s \\"here\\".npz"}', "evaluate.trials=[{name='a', attack={name='fgsm'}}]"],
        ["train.method.name=trades", "train.activation.name=silu", "search.recompute_cells=true"],
    ],
)
def test_overrides_come_back(overrides: list[str]) -> None:
    table = read_table("digits", overrides)
    command = command_of(RunDirectory(Path("run"), "run", table, None))
    assert again(command) == table
    assert (command == "nas run digits") == (not overrides)


@pytest.mark.parametrize("command, recipe", [("study width-depth", "study-mnist"), ("compare", "compare-training")])
def test_studies_and_comparisons_with_what_was_overridden(command: str, recipe: str) -> None:
    table = read_table(recipe, ["train.epochs=3", "data={name='arrays', path='mine.npz'}"])
    genotype = load_genotype("arnas").to_data() if command == "compare" else None
    words = shlex.split(command_of(RunDirectory(Path("run"), command, table, genotype)))
    rest = words[1 + len(command.split()) :]
    assert words[0] == "nas" and " ".join(words[1 : -len(rest)]) == command and rest[0] == recipe
    assert read_table(recipe, rest[2::2]) == table and len(rest) == 5


def test_an_own_recipe_is_a_file_to_save(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("name = \"mine\"\n[data]\nname = 'digits'\n")
    run = RunDirectory(tmp_path, "run", read_table(str(path)), None)
    assert command_of(run) == "nas run recipe.toml"
    # What --set cannot say needs the file, too: a key of the recipe is not there.
    table = read_table("digits")
    del table["compress"]
    assert command_of(RunDirectory(tmp_path, "run", table, None)) == "nas run recipe.toml"


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_recipe_is_written_as_it_was_read(name: str) -> None:
    table = read_table(name)
    assert tomllib.loads(recipe_text(table)) == table


def test_genotypes_by_name_or_file() -> None:
    table, arnas = read_table("digits"), load_genotype("arnas").to_data()
    assert command_of(RunDirectory(Path("run"), "train", table, arnas)) == "nas train digits --genotype arnas"
    arnas["cells"]["accurate"] = arnas["cells"]["robust"]
    assert command_of(RunDirectory(Path("run"), "train", table, arnas)) == "nas train digits --genotype genotype.json"
