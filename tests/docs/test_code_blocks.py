"""What the pages tell people to type: commands that exist, recipes that can be built, Python that runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from code_blocks import PAGES, ROOT, Block, blocks, commands, parsed

from nas import plugins
from runs.recipe import build, read_table, shipped
from search_spaces import catalogue

BLOCKS = [block for page in PAGES for block in blocks(page)]
LANGUAGES = {"console", "python", "toml", "json", ""}
OWN = ("mine", "mine.toml", "study/recommended/recipe.toml")
"""Recipes that the reader has made by then."""


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def test_blocks_are_of_known_languages() -> None:
    unknown = [f"{block} ({block.language})" for block in BLOCKS if block.language not in LANGUAGES]
    assert not unknown
    assert len(of("console")) >= 12 and len(of("python")) >= 5 and len(of("toml")) >= 8


@pytest.mark.parametrize("block", of("console"), ids=str)
def test_commands_exist_with_their_options(block: Block) -> None:
    own = {path.stem for page in PAGES for other in blocks(page) for path in [Path(other.title)] if other.title}
    for arguments in commands(block):
        name, given = parsed(arguments)
        line = " ".join(arguments)
        if not name:
            assert set(arguments) <= {"--help", "--version"}, line
            continue
        recipe = given.get("recipe")
        if recipe is not None and recipe not in OWN:
            assert recipe in shipped(), line
            if not own & set(" ".join(given.get("set_") or []).replace('"', " ").replace("=", " ").split()):
                foreign = any(item.startswith("train.method.") for item in given.get("set_") or [])
                build(read_table(recipe, [] if foreign else given.get("set_") or []))
        for option, folder in (("method", "training"), ("name", "attacks")):
            value = given.get(option)
            if name == "compress":
                folder = "compression"
            if isinstance(value, str) and name in ("train", "compress", "attack") and value != "recipe":
                for one in value.split(","):
                    assert one in plugins.available(folder) or one in own or one.isupper(), line
        if isinstance(given.get("genotype"), str) and "/" not in given["genotype"] and given["genotype"] != "RUN":
            catalogue.load_genotype(given["genotype"])


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_recipes_can_be_built(block: Block, tmp_path: Path) -> None:
    table = tomllib.loads(block.text)
    if {"data", "train", "evaluate"} <= set(table):
        assert build({"name": "page", **table}).general.name == table.get("name", "page")
        return
    # A part of a recipe stands in the place of the same part of a whole one.
    whole = read_table("study-digits" if "study" in table else "digits")
    for contender in table.get("compare", {}).get("contenders", []):
        if contender.get("method", {}).get("name") == "score":
            contender["method"] = {"name": "trades", "beta": contender["method"]["beta"]}
    for key, value in table.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict) and key not in ("compare", "study", "compress"):
            whole[key] = {**whole[key], **value}
        else:
            whole[key] = value
    assert build(whole).general.name == whole["name"]


SCRIPTS = {page: [b for b in blocks(page) if b.language == "python" and not b.title] for page in PAGES}
LONG = {"python-api.md"}
"""Pages whose Python takes minutes."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in LONG else [], id=page.name)
        for page, found in SCRIPTS.items()
        if found
    ],
)
def test_python_runs_from_the_top_of_a_page(page: Path, tmp_path: Path) -> None:
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(block.text for block in SCRIPTS[page]), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_of_the_reader_s_own_work_as_plug_ins_and_are_short(tmp_path: Path) -> None:
    files = [block for block in BLOCKS if block.title]
    assert {block.title.split("/")[1] for block in files} == {"training", "search_spaces"}
    for block in files:
        assert len(block.text.splitlines()) <= 40, block
        path = tmp_path / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
    script = tmp_path / "use.py"
    script.write_text(USE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), plugins.VARIABLE: "my_plugins"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


USE = """
import torch
from nas import plugins
from nas.data.digits import Digits
from nas.objective import Batch, State
from runs.recipe import build, read_table
from search_spaces.catalogue import space_of

plugins.use_named()
overrides = ["space={name='wide'}", "train.method={name='score', beta=4.0}"]
recipe = build(read_table("digits", overrides))
assert recipe.space.name == "wide" and recipe.train.objective.beta == 4.0
data = Digits()()
genotype = recipe.space.random(torch.Generator().manual_seed(0))
model = space_of(genotype).build(
    genotype, channels=4, cells=4, input_shape=(1, 8, 8), classes=10, mean=data.mean, std=data.std
)
supernet = recipe.space.supernet(channels=4, cells=4, input_shape=(1, 8, 8), classes=10, mean=data.mean, std=data.std)
x, y = data.x_train[:8].float() / 255, data.y_train[:8]
streams = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
for network in (model, supernet):
    loss, metrics = recipe.train.objective(network, Batch(x, y, torch.arange(8)), State(0, 0, 0.0, *streams))
    loss.backward()
    assert loss.isfinite() and 0 <= metrics["accuracy"] <= 1
"""
