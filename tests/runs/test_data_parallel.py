"""One run on several processes: the same bytes as on one, and told when one of them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import TINY, differences, nas, settings

SHARDED = settings("shards=4", "search.reuse_perturbations=true")
LONGER = settings("search.stages.1.until=12")


def torchrun(processes: int, *arguments: object) -> list[str]:
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", "runs"]
    return [sys.executable, *starter, *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def on(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = torchrun(processes, *arguments)
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)


def test_a_search_on_two_processes_is_that_on_one(tmp_path: Path) -> None:
    outcome = nas("search", "digits", "--out", tmp_path / "one", *TINY, *SHARDED)
    assert outcome.status == 0, outcome.err
    done = on(2, "search", "digits", "--out", tmp_path / "two", *TINY, *SHARDED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("search: done") == 1  # one of them speaks
    for file in (
        "search/checkpoint.safetensors",
        "search/genotype.json",
        "search/metrics.jsonl",
        "analyse/result.json",
    ):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.slow
def test_what_torchrun_does_not_share_out(tmp_path: Path) -> None:
    for arguments, says in (
        (("analyse", "arnas"), "start nas analyse by itself"),
        (("run", "digits", "--set", "shards=3", "--out", tmp_path / "run"), "3 shards cannot be dealt out evenly"),
        (("run", "digitz"), "no recipe 'digitz'"),
    ):
        done = on(2, *arguments)
        assert done.returncode != 0
        assert [line for line in done.stderr.splitlines() if line.startswith("nas: ") and says in line], done.stderr
        assert done.stderr.count("nas: ") == 1
        assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "says"), [("free", "carries a state from batch to batch"), ("self_ensemble", "answers at random")]
)
def test_methods_that_do_not_take_shards(method: str, says: str, tmp_path: Path) -> None:
    alone = settings("shards=2", f"train.method={{name='{method}'}}", "baselines={random=0}")
    outcome = nas("train", "digits", "--genotype", "arnas", "--out", tmp_path / "run", *TINY, *alone)
    assert says in outcome.refusal


def test_batches_that_cannot_be_cut(tmp_path: Path) -> None:
    outcome = nas("search", "digits", "--out", tmp_path / "run", *TINY, *settings("shards=3"))
    assert "search.batch_size = 128 cannot be cut into 3 shards" in outcome.refusal


@pytest.mark.slow
def test_a_run_on_one_two_and_four_processes(tmp_path: Path) -> None:
    assert nas("run", "digits", "--out", tmp_path / "1", *TINY, *SHARDED).status == 0
    for processes in (2, 4):
        done = on(processes, "run", "digits", "--out", tmp_path / str(processes), *TINY, *SHARDED)
        assert done.returncode == 0, done.stderr
        assert differences(tmp_path / str(processes), tmp_path / "1") == []


@pytest.mark.slow
def test_a_comparison_on_two_processes(tmp_path: Path) -> None:
    few = settings(
        "shards=2", "compare.seeds=[0]", "train.epochs=2",
        "evaluate.trials=[{name='pgd', attack={name='pgd', steps=3}}]",
        "compare.contenders=[{name='pgd_at', method={name='pgd_at'}}, {name='trades', method={name='trades'}}]",
    )  # fmt: skip
    assert nas("compare", "compare-training", "--out", tmp_path / "1", *few).status == 0
    done = on(2, "compare", "compare-training", "--out", tmp_path / "2", *few)
    assert done.returncode == 0, done.stderr
    for name in ("pgd_at", "trades"):
        for file in (f"train/{name}-0/model.safetensors", f"evaluate/{name}-0/progress.safetensors"):
            assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_killed_ends_the_others_and_the_run_goes_on_with_another_number(victim: int, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    started = subprocess.Popen(
        torchrun(2, "search", "digits", "--out", run, *TINY, *SHARDED, *LONGER),
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    wait_for(run / "search/checkpoint.safetensors", started)
    ranks = {rank: pid for pid in children(started.pid) if (rank := rank_of(pid)) is not None}
    os.kill(ranks[victim], signal.SIGKILL)
    _, said = started.communicate(timeout=30)
    assert started.returncode != 0
    assert f"rank      : {victim} (local_rank: {victim})" in said and "SIGKILL" in said
    assert "--resume continues the run" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    assert nas("search", "--resume", run).status == 0  # on one process
    assert nas("search", "digits", "--out", whole, *TINY, *SHARDED, *LONGER).status == 0
    same_search(run, whole)


def wait_for(path: Path, started: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline and started.poll() is None
        time.sleep(0.1)


def same_search(run: Path, other: Path) -> None:
    for file in (
        "search/checkpoint.safetensors",
        "search/genotype.json",
        "search/metrics.jsonl",
        "analyse/result.json",
    ):
        assert (run / file).read_bytes() == (other / file).read_bytes(), file


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def rank_of(pid: int) -> int | None:
    for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
        if entry.startswith(b"RANK="):
            return int(entry.removeprefix(b"RANK="))
    return None


@pytest.mark.parametrize(
    ("number", "status", "says"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_run_at_once_and_it_goes_on(
    number: signal.Signals, status: int, says: str, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    started = subprocess.Popen(
        [sys.executable, "-m", "runs", "search", "digits", "--out", str(run), *TINY, *LONGER],
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    wait_for(run / "search/checkpoint.safetensors", started)
    started.send_signal(number)
    _, said = started.communicate(timeout=10)
    assert started.returncode == status and said == f"nas: {says}; --resume continues the run\n"
    if number == signal.SIGTERM:
        assert nas("search", "digits", "--out", whole, *TINY, *LONGER).status == 0
        assert nas("search", "--resume", run).status == 0
        same_search(run, whole)
