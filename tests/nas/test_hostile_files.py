"""Attempts to make this program execute, overwrite or fill something by the files it is given."""

from __future__ import annotations

import ast
import json
import os
import pickle
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nas.compression.plan import LayerPlan, Plan
from nas.errors import InputError
from nas.export.source import network_source
from nas.model_file import ModelSpec, load_model, save_model
from nas.tensor_file import read_tensors, read_tree
from runs.directory import open_run
from runs.outside import network_from
from runs.recipe import build, read_table
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import GenotypeError, StageGenotype


class Bomb:
    """What a pickle of it executes leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def small(**changes: Any) -> ModelSpec:
    spec = ModelSpec(StageGenotype("plain", (1,), (2,)), 1, 1, (1, 8, 8), ("a", "b"), (0.5,), (0.25,))
    return replace(spec, **changes)


def saved(folder: Path, **changes: Any) -> Path:
    spec = small()
    folder.mkdir(exist_ok=True)
    save_model(spec, spec.build(), folder)
    data = {**spec.to_data(), **changes}
    (folder / "model.json").write_text(json.dumps(data))
    return folder


def test_the_bomb_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


def bombs(tmp_path: Path) -> dict[str, bytes]:
    """A pickle, alone and as torch saves it."""
    mark = Bomb(tmp_path / "mark")
    torch.save({"weight": mark}, tmp_path / "saved.pt")
    return {"pickle": pickle.dumps(mark), "torch": (tmp_path / "saved.pt").read_bytes()}


READERS: dict[str, Callable[[Path], Any]] = {
    "checkpoint": read_tree,
    "weights": read_tensors,
    "network": lambda path: load_model(path.parent),
    "network from outside": lambda path: network_from(str(path), None, torch.device("cpu")),
    "genotype": lambda path: load_genotype(str(path)),
    "recipe": lambda path: read_table(str(path)),
    "run": lambda path: open_run(path.parent),
}
NAMES = {"network": "model.safetensors", "run": "run.json", "network from outside": "network.pt2"}


@pytest.mark.parametrize("kind", ["pickle", "torch"])
@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_in_the_place_of_a_file(reader: str, kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "network")
    path = folder / NAMES.get(reader, "file.safetensors")
    path.write_bytes(bombs(tmp_path)[kind])
    with pytest.raises((InputError, GenotypeError)):
        READERS[reader](path)
    assert not (tmp_path / "mark").exists()


def test_images_that_are_objects(tmp_path: Path) -> None:
    objects = np.array([Bomb(tmp_path / "mark")] * 4, dtype=object)
    labels = np.array([0, 1, 0, 1])
    np.savez(tmp_path / "data.npz", x_train=objects, y_train=labels, x_test=objects, y_test=labels)
    table = read_table("digits", [f"data={{name='arrays', path='{tmp_path / 'data.npz'}'}}"])
    with pytest.raises(InputError, match=r"data\.npz"):
        build(table).data.source()
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 4096, "cells": 100, "genotype": "arnas"},
        {"genotype": {"schema": 1, "space": "plain", "depths": [64] * 8, "widths": [65536] * 8}},
        {"genotype": {"schema": 1, "space": "mlp", "depths": [8, 1], "widths": [65536, 65536]}},
    ],
)
def test_a_network_larger_than_any_memory(change: dict[str, Any], tmp_path: Path) -> None:
    if change["genotype"] == "arnas":
        change = {**change, "genotype": load_genotype("arnas").to_data()}
    folder = saved(tmp_path / "network", **change)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(InputError):
        load_model(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB: half a GiB
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("what", ["nodes", "depth", "sections", "stages", "digits"])
def test_a_genotype_without_end(what: str, tmp_path: Path) -> None:
    document = load_genotype("arnas").to_data()
    if what == "nodes":
        kind = next(iter(document["cells"]))
        document["cells"][kind] = document["cells"][kind] * 100_000
        text = json.dumps(document)
    elif what == "depth":
        text = '{"schema": 1, "space": ' + "[" * 1_000_000 + "]" * 1_000_000 + "}"
    elif what == "sections":
        document["layout"]["sections"] = ["accurate"] * 1_000_000
        text = json.dumps(document)
    elif what == "stages":
        text = json.dumps({"schema": 1, "space": "plain", "depths": [1] * 1_000_000, "widths": [1] * 1_000_000})
    else:
        text = '{"schema": 1' + "0" * 1_000_000 + "}"
    path = tmp_path / "genotype.json"
    path.write_text(text)
    begun = time.monotonic()
    with pytest.raises(GenotypeError) as caught:
        load_genotype(str(path))
    assert time.monotonic() - begun < 20
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["../outside", "a/b", "/etc/cron.d/x", "..", "", "a\x00b", "-rf", "~root", "a" * 5000])
def test_names_of_recipes_do_not_leave_the_folder(name: str) -> None:
    table = {**read_table("digits"), "name": name}
    if name == "-rf":  # harmless: it is never an argument by itself
        build(table)
        return
    with pytest.raises(InputError, match="name"):
        build(table)


def test_a_plan_that_names_a_method_by_a_path(tmp_path: Path) -> None:
    for method in ("../../evil", "os", "nas.compression.gdws", "__init__", "plan"):
        plan = Plan(method, (LayerPlan("stages.0", "masked", "because", {}),))
        folder = saved(tmp_path / "network", plans=[plan.to_data()])
        with pytest.raises(InputError):
            load_model(folder)


HOSTILE = (
    '"""\nimport os; os.mkdir("mark")\n"""',
    "'); __import__('os').mkdir('mark'); ('",
    "<script>alert(1)</script>",
    "]]>\n# a heading\n\\",
    "{{ 7*7 }}{% raise %}",
)


def test_class_names_stay_text_in_exported_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = small(classes=HOSTILE)
    source = network_source(spec)
    space: dict[str, Any] = {"__name__": "exported"}
    exec(compile(ast.parse(source), "network.py", "exec"), space)
    assert not Path("mark").exists()
