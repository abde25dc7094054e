"""The JSON form of genotypes: round trips, names that stay, and every malformed input told as such."""

import copy
import dataclasses
import json

import pytest
import torch

from runs.directory import write_json
from search_spaces.catalogue import load_genotype
from search_spaces.darts import SPACE as DARTS
from search_spaces.dsara import SPACE as DSARA
from search_spaces.genotype import (
    Cell,
    Edge,
    Genotype,
    GenotypeError,
    StageGenotype,
    genotype_from_data,
    read_genotype,
)
from search_spaces.layout import Layout


def _random(space=DSARA, seed=0):
    return space.random(torch.Generator().manual_seed(seed))


STAGES = StageGenotype("plain", (2, 3, 1), (16, 32, 8))
OPTIONS = StageGenotype("plain", (2, 1), (16, 8), (("b", 2), ("a", "x"), ("c", 0.5), ("d", True)))
DEPTHS = dataclasses.replace(_random(), layout=dataclasses.replace(DSARA.layout, depths=(1, 4, 2)))


@pytest.mark.parametrize("space", [DSARA, DARTS], ids=lambda space: space.name)
def test_random_genotypes_survive_json(space, tmp_path):
    for seed in range(30):
        genotype = _random(space, seed)
        again = genotype_from_data(json.loads(json.dumps(genotype.to_data())))
        assert again == genotype
        assert hash(again) == hash(genotype)
        assert again.digest == genotype.digest
    write_json(genotype.to_data(), tmp_path / "g.json")
    assert read_genotype(tmp_path / "g.json") == genotype


@pytest.mark.parametrize("genotype", [STAGES, OPTIONS, DEPTHS], ids=["stages", "options", "depths"])
def test_other_genotypes_survive_json(genotype, tmp_path):
    assert genotype_from_data(json.loads(json.dumps(genotype.to_data()))) == genotype
    write_json(genotype.to_data(), tmp_path / "s.json")
    assert read_genotype(tmp_path / "s.json") == genotype


def test_what_is_not_stated_is_not_written_so_that_names_given_before_stay():
    """Digests as they were before genotypes had options and layouts had depths."""
    assert STAGES.digest == "5d8edd59b7b6"
    assert load_genotype("arnas").digest == "3af1ead88100"


def test_options_are_in_the_name_and_their_order_is_not():
    reordered = dataclasses.replace(OPTIONS, options=OPTIONS.options[::-1])
    assert reordered == OPTIONS and reordered.digest == OPTIONS.digest
    assert OPTIONS.to_data()["options"] == {"a": "x", "b": 2, "c": 0.5, "d": True}
    assert [name for name, _ in OPTIONS.options] == ["a", "b", "c", "d"]
    for options in ((), OPTIONS.options[:3], (*OPTIONS.options[:3], ("d", False))):
        assert dataclasses.replace(OPTIONS, options=options).digest != OPTIONS.digest
    assert DEPTHS.digest != _random().digest
    with pytest.raises(GenotypeError, match="twice"):
        StageGenotype("plain", (1,), (1,), (("a", 1), ("a", 2)))


def test_the_digest_names_the_architecture():
    genotypes = [_random(seed=seed) for seed in range(20)] + [STAGES, StageGenotype("plain", (2, 3, 1), (16, 32, 9))]
    assert len({genotype.digest for genotype in genotypes}) == len(set(genotypes)) == 22
    data = _random().to_data()
    reordered = {key: data[key] for key in reversed(data)}
    reordered["cells"] = {kind: data["cells"][kind] for kind in reversed(data["cells"])}
    assert genotype_from_data(reordered) == _random(), "the order of keys in a file means nothing"
    assert genotype_from_data(reordered).digest == _random().digest
    assert all(len(genotype.digest) == 12 for genotype in genotypes)
    swapped = copy.deepcopy(data)
    swapped["cells"]["robust"][0].reverse()
    assert genotype_from_data(swapped).digest != _random().digest
    for key, value in (("ratio", [1, 2, 4]), ("stem", 32)):
        other = copy.deepcopy(data)
        other["layout"][key] = value
        assert genotype_from_data(other).digest != _random().digest
    del data["layout"]["stem"]
    assert genotype_from_data(data) == _random(), "files may leave out the stem: it has a default"


def test_a_genotype_cannot_be_changed():
    genotype = _random()
    with pytest.raises(AttributeError):
        genotype.space = "other"
    assert genotype.cell["robust"] == dict(genotype.cells)["robust"]
    assert {genotype: 1}[_random()] == 1


def _with(path, value):
    """The data of a genotype with one entry replaced (or, for ``...``, left out)."""
    data = _random().to_data()
    *parents, last = path
    place = data
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


def _stages(options):
    return {"schema": 1, "space": "plain", "depths": [1], "widths": [4], "options": options}


def _nested(depth):
    data = []
    for _ in range(depth):
        data = [data]
    return data


WRONG = {
    "cycle": _with(["cells", "robust", 0, 0, 1], 2),
    "source from later on": _with(["cells", "robust", 1, 0, 1], 5),
    "negative source": _with(["cells", "robust", 0, 0, 1], -1),
    "bool as source": _with(["cells", "robust", 0, 0, 1], True),
    "fraction as source": _with(["cells", "robust", 0, 0, 1], 1.0),
    "text as source": _with(["cells", "robust", 0, 0, 1], "1"),
    "huge source": _with(["cells", "robust", 0, 0, 1], 10**40),
    "endless source": _with(["cells", "robust", 0, 0, 1], 10**5000),
    "number as operation": _with(["cells", "robust", 0, 0, 0], 3),
    "edge of three": _with(["cells", "robust", 0, 0], ["skip_connect", 0, 1]),
    "edge of one": _with(["cells", "robust", 0, 0], ["skip_connect"]),
    "edge as object": _with(["cells", "robust", 0, 0], {"skip_connect": 0}),
    "no edges": _with(["cells", "robust", 0], []),
    "no nodes": _with(["cells", "robust"], []),
    "too many nodes": _with(["cells", "robust"], [[["skip_connect", 0]]] * 65),
    "huge list of nodes": _with(["cells", "robust"], [[["skip_connect", 0]]] * 100_000),
    "too many edges": _with(["cells", "robust", 0], [["skip_connect", 0]] * 65),
    "missing kind": _with(["cells", "robust"], ...),
    "extra kind": _with(["cells", "another"], [[["skip_connect", 0]]]),
    "cells as list": _with(["cells"], []),
    "extra key": _with(["comment"], "hello"),
    "extra key in the layout": _with(["layout", "cells"], 8),
    "very long key": _with(["k" * 100_000], 1),
    "no layout": _with(["layout"], ...),
    "no cells": _with(["cells"], ...),
    "no space": _with(["space"], ...),
    "no schema": _with(["schema"], ...),
    "newer schema": _with(["schema"], 2),
    "schema as text": _with(["schema"], "1"),
    "schema as bool": _with(["schema"], True),
    "schema null": _with(["schema"], None),
    "bottomless schema": _with(["schema"], _nested(100_000)),
    "bottomless edge": _with(["cells", "robust", 0, 0], _nested(100_000)),
    "endless schema": _with(["schema"], 10**5000),
    "empty space": _with(["space"], ""),
    "long space": _with(["space"], "x" * 65),
    "space as number": _with(["space"], 5),
    "empty ratio": _with(["layout", "ratio"], []),
    "short ratio": _with(["layout", "ratio"], [1, 2]),
    "bool in ratio": _with(["layout", "ratio"], [True, 2, 2]),
    "zero in ratio": _with(["layout", "ratio"], [0, 2, 2]),
    "huge ratio": _with(["layout", "ratio"], [1, 2, 10**9]),
    "huge list as ratio": _with(["layout", "ratio"], [1] * 100_000),
    "empty sections": _with(["layout", "sections"], []),
    "huge list of sections": _with(["layout", "sections"], ["a"] * 100_000),
    "section as number": _with(["layout", "sections"], [1, 2, 3]),
    "reduction null": _with(["layout", "reduction"], None),
    "stem as text": _with(["layout", "stem"], "64"),
    "bool as stem": _with(["layout", "stem"], True),
    "tiny stem": _with(["layout", "stem"], 3),
    "endless stem": _with(["layout", "stem"], 10**5000),
    "depths for two of three sections": _with(["layout", "depths"], [3, 4]),
    "no cell of a kind": _with(["layout", "depths"], [3, 3, 1]),
    "zero cells": _with(["layout", "depths"], [0, 3, 3]),
    "text as depths": _with(["layout", "depths"], "3,3,3"),
    "endless depths": _with(["layout", "depths"], [1, 1, 10**5000]),
    "options as list": _stages([["a", 1]]),
    "options null": _stages(None),
    "option null": _stages({"a": None}),
    "option of a list": _stages({"a": [1]}),
    "bottomless option": _stages({"a": _nested(100_000)}),
    "option not a number": _stages({"a": float("nan")}),
    "infinite option": _stages({"a": float("-inf")}),
    "endless option": _stages({"a": 10**5000}),
    "long option": _stages({"a": "x" * 65}),
    "option without a name": _stages({"": 1}),
    "option of a long name": _stages({"x" * 65: 1}),
    "too many options": _stages({str(i): i for i in range(33)}),
    "huge number of options": _stages({str(i): i for i in range(100_000)}),
    "a list": [],
    "null": None,
    "a text": "genotype",
    "empty": {},
    "stages without widths": {"schema": 1, "space": "plain", "depths": [1]},
    "stages of different length": {"schema": 1, "space": "plain", "depths": [1], "widths": [1, 2]},
    "no stages": {"schema": 1, "space": "plain", "depths": [], "widths": []},
    "zero depth": {"schema": 1, "space": "plain", "depths": [0], "widths": [4]},
    "negative width": {"schema": 1, "space": "plain", "depths": [1], "widths": [-4]},
    "bool depth": {"schema": 1, "space": "plain", "depths": [True], "widths": [4]},
    "huge list of stages": {"schema": 1, "space": "plain", "depths": [1] * 100_000, "widths": [1] * 100_000},
    "endless depth": {"schema": 1, "space": "plain", "depths": [10**9], "widths": [4]},
    "endless width": {"schema": 1, "space": "plain", "depths": [1], "widths": [10**12]},
    "extra key of stages": {"schema": 1, "space": "plain", "depths": [1], "widths": [4], "cells": {}},
}


@pytest.mark.parametrize("kind", WRONG)
def test_malformed_data_is_a_genotype_error_of_one_line(kind):
    with pytest.raises(GenotypeError) as caught:
        genotype_from_data(WRONG[kind])
    assert type(caught.value) is GenotypeError
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


NASTY = (None, True, False, -1, 0, 1.5, 10**30, "", "x", [], {}, [[]], [[[]]], {"a": 1}, [1, 2], ["skip_connect", 0])


def _places(data, path=()):
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from _places(value, (*path, key))


@pytest.mark.parametrize(
    "original", [_random(seed=3), STAGES, OPTIONS, DEPTHS], ids=["cells", "stages", "options", "depths"]
)
def test_any_entry_replaced_by_anything_is_read_or_refused(original):
    """Thousands of wrong files: each is a genotype that round-trips, or a GenotypeError."""
    refused = read = 0
    for path in list(_places(original.to_data()))[1:]:
        for value in NASTY:
            data = original.to_data()
            place = data
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            try:
                genotype = genotype_from_data(data)
            except GenotypeError:
                refused += 1
            else:
                read += 1
                assert genotype_from_data(genotype.to_data()) == genotype
    assert refused > read > 0


FILES = {
    "nothing": b"",
    "half": b'{"schema": 1, "space": "dsara"',
    "no text": b"\xff\xfe\x00\x00",
    "endless number": b'{"schema": ' + b"1" * 5000 + b"}",
    "bottomless": b"[" * 200_000 + b"]" * 200_000,
    "bottomless object": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "not a number": b'{"schema": NaN}',
    "infinity": b'{"schema": 1, "space": "plain", "depths": [1e999], "widths": [4]}',
}


@pytest.mark.parametrize("kind", FILES)
def test_malformed_files_are_genotype_errors_naming_the_file(kind, tmp_path):
    path = tmp_path / "some.json"
    path.write_bytes(FILES[kind])
    with pytest.raises(GenotypeError, match=r"some\.json"):
        read_genotype(path)


def test_absent_files_and_folders_are_genotype_errors(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(GenotypeError):
            read_genotype(path)


def test_cells_must_fit_the_layout():
    cell = Cell(((Edge("skip_connect", 0),),))
    layout = Layout(("a", "b"), (1, 2))
    Genotype("dsara", layout, (("a", cell), ("reduction", cell), ("b", cell)))
    for kinds in (("a", "b"), ("a", "b", "reduction"), (), ("a", "reduction", "b", "c")):
        with pytest.raises(GenotypeError):
            Genotype("dsara", layout, tuple((kind, cell) for kind in kinds))
