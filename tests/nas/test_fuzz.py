"""Whatever a file or a flag holds, it is read, or refused in one line: no traceback, no hang, no growing memory.

A valid document is taken and some of its values are replaced, moved or removed; or a text is made of nothing. As many
are tried as the profile says: ``pytest tests/nas/test_fuzz.py --hypothesis-profile long`` tries 25,000 a test.
"""

from __future__ import annotations

import copy
import json
import resource
import tomllib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.compression.plan import LayerPlan, Plan
from nas.errors import InputError
from nas.model_file import ModelSpec
from nas.prediction import MeanOfParticles
from runs.recipe import build, read_table, shipped
from search_spaces.catalogue import load_genotype, published, space_of
from search_spaces.genotype import GenotypeError, genotype_from_data

WORDS = [
    "sep_conv_3x3",
    "pgd",
    "linf",
    "",
    "../../etc/passwd",
    "\x00",
    "<script>alert(1)</script>",
    "é" * 300,
    "name",
    "1e999",
]
NUMBERS = [0, -1, 1, 2, 2**31, 2**63, -(2**70), 10**400, 0.0, -0.5, 1e308, float("nan"), float("inf"), -float("inf")]
leaves = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.sampled_from(WORDS)
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value within nested lists and dictionaries."""
    children = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@st.composite
def damaged(draw: Any, documents: list[Any]) -> Any:
    """One of ``documents``, changed in one to four places."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 4))):
        *way, last = draw(st.sampled_from(places(document)[1:] or [("",)]))
        parent = document
        for key in way:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "remove", "repeat", "add", "deepen"]))
        if kind == "remove" or last == "":
            parent.pop(last, None) if isinstance(parent, dict) else parent.pop(last)
        elif kind == "repeat" and isinstance(parent, list):
            parent.extend(copy.deepcopy(parent[:4]) * draw(st.integers(1, 50)))
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.sampled_from([*WORDS, "space", "schema", "method", "attack"]))] = draw(values)
        elif kind == "deepen":
            for _ in range(draw(st.integers(1, 60))):
                parent[last] = [parent[last]]
        else:
            parent[last] = draw(values)
        if not isinstance(document, dict) or len(places(document)) < 2:
            break
    return document


def some_genotypes() -> list[Any]:
    return [json.loads(path.read_text()) for path in published().values()]


def a_plan() -> Plan:
    layers = (
        LayerPlan("cells.0.a", "masked", "smallest weights", {"keep": 0.5}),
        LayerPlan("stem.0", "skipped", "the first convolution", {}),
        LayerPlan("cells.1.b", "replaced", "low rank", {"rank": 3, "shape": [4, 4, 3, 3]}),
    )
    return Plan("magnitude", layers)


def a_model() -> ModelSpec:
    return ModelSpec(
        load_genotype("arnas"),
        4,
        4,
        (1, 8, 8),
        ("a", "b"),
        (0.5,),
        (0.25,),
        plans=(a_plan(),),
        prediction=MeanOfParticles(2),
    )


@pytest.fixture(autouse=True)
def memory_is_bounded() -> Any:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 1.0, f"{grown:.1f} GiB more than before"


def read_or_refused(read: Callable[[], object]) -> None:
    """Whatever else ``read`` raises fails the test; a refusal is a line for people: not empty, not endless."""
    try:
        read()
    except (InputError, GenotypeError) as error:
        assert 0 < len(str(error)) < 3000, str(error)[:300]


@given(damaged(some_genotypes()))
def test_genotypes(document: Any) -> None:
    read_or_refused(lambda: space_of(genotype_from_data(document)))


@given(damaged([a_model().to_data()]))
def test_descriptions_of_networks(document: Any) -> None:
    read_or_refused(lambda: ModelSpec.from_data(document))


@given(damaged([a_plan().to_data()]))
def test_plans(document: Any) -> None:
    read_or_refused(lambda: Plan.from_data(document))


@given(damaged([tomllib.loads(path.read_text()) | {"name": name} for name, path in shipped().items()]))
def test_recipes(document: Any) -> None:
    read_or_refused(lambda: build(document))


@given(
    st.text(max_size=60)
    | st.builds(
        "{}={}".format,
        st.sampled_from(
            ["search.channels", "train.method", "data.name", "evaluate.trials.0.attack.steps", "a..b", "study"]
        ),
        st.text(max_size=30) | values.map(json.dumps),
    )
)
def test_overrides(text: str) -> None:
    read_or_refused(lambda: build(read_table("digits", [text])))


@given(st.binary(max_size=200) | damaged(some_genotypes()).map(lambda one: json.dumps(one).encode()[:-3]))
def test_files_that_are_no_json_or_toml(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(content)
    with pytest.raises(GenotypeError):
        load_genotype(str(path))
    read_or_refused(lambda: load_genotype(str(path)))
    read_or_refused(lambda: build(read_table(str(path))))


def test_what_a_refusal_repeats_is_cut() -> None:
    with pytest.raises(InputError) as caught:
        build(read_table("digits", [f"data.name={'x' * 10_000}"]))
    text = str(caught.value)
    assert len(text) < 2000 and text.endswith("name the folder of your own by nas --plugins FOLDER")
