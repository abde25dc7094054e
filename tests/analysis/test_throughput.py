"""Speed that was measured: in turns, deployed as a user would, and in words where there is no gain."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from nas.analysis.throughput import speed_lines, throughput
from nas.compression.magnitude import MagnitudePruning


class Slow(nn.Module):
    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.milliseconds = milliseconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        if not torch.compiler.is_exporting():
            time.sleep(self.milliseconds / 1000)
        return x.flatten(1)[:, :3]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3)
    )


def test_ratios_and_rates_are_those_of_the_networks() -> None:
    result = throughput({"slow": Slow(20), "quick": Slow(5)}, torch.rand(6, 1, 8, 8), batches=(1, 10), turn=0.05)
    for batch in ("1", "10"):
        rows = result["engines"]["eager"]["batches"][batch]
        assert rows["slow"]["speed"] == 1 and 2 < rows["quick"]["speed"] < 6
        assert 0.02 <= rows["slow"]["p50"] <= rows["slow"]["p90"]
        assert rows["slow"]["images_per_second"] == pytest.approx(int(batch) / rows["slow"]["p50"])
        assert rows["slow"]["calls"] >= 15
    lines = speed_lines(result)
    assert any("quick, batch 1, eager: " in line and "times as fast as slow" in line for line in lines)
    turned = throughput({"quick": Slow(5), "slow": Slow(20)}, torch.rand(2, 1, 8, 8), batches=(1,), turn=0.05)
    assert any("slow, batch 1, eager: no speed-up (0." in line for line in speed_lines(turned))


def test_masked_weights_are_measured_as_plain_ones_and_left_as_they_are() -> None:
    model = network()
    masked = MagnitudePruning(0.5).plan(model).apply(model).train()
    state = {name: tensor.clone() for name, tensor in masked.state_dict().items()}
    result = throughput({"dense": model, "masked": masked}, torch.rand(4, 1, 8, 8), batches=(2,), turn=0.02)
    assert masked.training and all(torch.equal(state[name], tensor) for name, tensor in masked.state_dict().items())
    for engine in ("eager", "onnxruntime"):
        assert set(result["engines"][engine]["batches"]["2"]) == {"dense", "masked"}
        assert "absent" not in result["engines"][engine]


def test_what_has_no_form_in_onnx_is_said() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :3] if x.sum() > 0 else x.flatten(1)[:, 3:6]

    result = throughput({"plain": network(), "own": Own()}, torch.rand(2, 1, 8, 8), batches=(1,), turn=0.02)
    assert "own" in result["engines"]["eager"]["batches"]["1"]
    assert "no form in ONNX" in result["engines"]["onnxruntime"]["absent"]["own"]
    assert any("own, onnxruntime: not measured" in line for line in speed_lines(result))
