"""Every shipped recipe, cut down: the same recipe and seed give the same bits, whatever the processes that work."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, nas, save_arrays, settings, toml

from nas.errors import of_the_machine
from runs.context import use_machine
from runs.recipe import General, read_table, shipped

MEASURED = ("seconds", "memory", "measured", "per_second", "latency", "throughput", "speed", "time")
"""Parts of the names of figures that are measured, and differ."""
ASKED = ("command", "recipe")
"""What was asked for, the number of workers with it."""

TRAINING = settings("train.epochs=2", "train.batch_size=8", "train.attack.steps=1", "threads=1")
TRIALS = (
    "evaluate.trials=[{name='pgd', attack={name='pgd', steps=2}}, {name='square', attack={name='square', queries=9}}]"
)


def command(recipe: str, data: Path) -> tuple[list[str], list[str]]:
    """The command of ``recipe`` on small data and its settings."""
    table = read_table(recipe)
    own = settings(f"data={{name='arrays', path={toml(data)}, validation=0.5, test_limit=24}}", "device=cpu")
    if "study" in table:
        small = settings("study.depths=[[1], [1], [1, 2]]", "study.widths=[[4], [4], [4, 8]]", "study.draw=3")
        small += settings("study.seeds=[0]", TRIALS)
        return ["study", "width-depth", recipe], own + TRAINING + small
    if "compare" not in table:
        # TINY's share of validation is of larger data.
        small = settings("data.validation=0.5", "train.epochs=2", "search.batch_size=16")
        if len(table["search"]["stages"]) == 1:
            absent = TINY.index("search.stages.1.until=2")
            return ["run", recipe], own + TINY[: absent - 1] + TINY[absent + 1 :] + small
        return ["run", recipe], own + TINY + small
    more = settings("compare.seeds=[0]")
    for number, contender in enumerate(table["compare"]["contenders"]):
        place = f"compare.contenders.{number}"
        for part in ("compress.fine_tune.epochs", "compress.epochs"):
            inner: Any = contender
            for key in part.split("."):
                inner = inner.get(key, {}) if isinstance(inner, dict) else {}
            if inner:
                more += settings(f"{place}.{part}=1")
        if "protected" in contender.get("method", {}):
            more += settings(f"{place}.method.protected=['1']")
        method = contender.get("method", {}).get("name")
        if method == "ladder":
            more += settings(f"{place}.method.decoder_steps=5")
        if method == "adv_kip":
            more += settings(f"{place}.method.steps=2")
    if not recipe.startswith("survey"):
        more += settings(TRIALS)
    return ["compare", recipe], own + TRAINING + more


def unmeasured(value: Any) -> Any:
    """``value`` without what was measured of time and memory."""
    if isinstance(value, dict):
        return {
            key: unmeasured(inner)
            for key, inner in value.items()
            if key not in ASKED and not any(part in key.lower() for part in MEASURED)
        }
    return [unmeasured(inner) for inner in value] if isinstance(value, list) else value


def results(folder: Path) -> dict[str, Any]:
    """All weights of a run, to the bit, and all figures that are not measured."""
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
    figures = {
        str(path.relative_to(folder)): unmeasured(json.loads(path.read_text()))
        for path in sorted(folder.rglob("result*.json"))
    }
    assert weights and figures
    return weights | figures


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let nothing of ``deterministic`` stay after a test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("as_before")
def test_deterministic_asks_torch_and_cublas_for_it() -> None:
    use_machine(General("any", threads=1))
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    use_machine(General("any", threads=1, deterministic=True))
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_an_algorithm_that_cannot_is_told_in_a_line() -> None:
    error = RuntimeError(
        "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism ..."
    )
    known = str(of_the_machine(error))
    assert known.startswith("adaptive_avg_pool2d_backward_cuda does not have") and "leave it out" in known


@pytest.mark.slow
@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("recipe", sorted(shipped()))
def test_the_same_recipe_and_seed_give_the_same_bits(recipe: str, tmp_path: Path) -> None:
    words, more = command(recipe, save_arrays(tmp_path / "data.npz"))
    found = []
    for workers, flags in ((1, []), (2, ["--deterministic"])):
        folder = tmp_path / f"run{workers}"
        outcome = nas(*words, *more, *settings(f"workers={workers}"), *flags, "--out", folder)
        assert outcome.status == 0, outcome.err
        found.append(results(folder))
    one, other = found
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []
