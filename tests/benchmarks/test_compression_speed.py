"""The benchmark of compressed networks measures what it says, on the network named, and keeps it."""

import functools
import json
import sys

import pytest
import torch

from benchmarks import compression_speed


def test_every_variant_is_measured_beside_the_dense_network(monkeypatch, tmp_path, capsys):
    variants = {
        "channel_pruning 0.25": [("channel_pruning", {"keep": 0.25})],
        "fold_batchnorm": [("fold_batchnorm", {})],
    }
    monkeypatch.setattr(compression_speed, "VARIANTS", {"cells": variants})
    eager = functools.partial(compression_speed.throughput, engines=("eager",))
    monkeypatch.setattr(compression_speed, "throughput", eager)
    out, threads = tmp_path / "speed.json", str(torch.get_num_threads())
    monkeypatch.setattr(sys, "argv", ["speed", "--threads", threads, "--turn", "0.001", "--out", str(out)])
    compression_speed.main()
    found = json.loads(out.read_text())["cells"]
    names = ["dense", *variants, "silu", "sparta"]
    assert list(found["sizes"]) == names
    dense = found["sizes"]["dense"]
    assert found["sizes"]["channel_pruning 0.25"]["parameters"] <= 0.25 * dense["parameters"]
    assert found["sizes"]["fold_batchnorm"]["macs"] == dense["macs"]
    for batch in ("1", "64"):
        rows = found["engines"]["eager"]["batches"][batch]
        assert set(rows) == set(names) and rows["dense"]["speed"] == 1
    table = out.with_suffix(".md").read_text()
    assert all(f"| {name} | {found['sizes'][name]['parameters']:,} |" in table for name in names)
    assert table in capsys.readouterr().out


def test_an_unknown_network_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compression_speed", "resnet-1800"])
    with pytest.raises(SystemExit, match="2"):
        compression_speed.main()
    assert "choose from resnet-18, vgg-16, cells" in capsys.readouterr().err
