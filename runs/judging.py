"""A network judged: attacks, the checks that doubt them, and what a suite asks for beyond."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nas import ranks
from nas.evaluation.corruptions import corruption_accuracy
from nas.evaluation.curves import epsilon_curve, step_curve, transfer
from nas.evaluation.robustness import Trial, evaluate
from nas.evaluation.suspicion import suspicions
from nas.model_file import weights_digest
from nas.shards import Shards
from nas.threat_model import ThreatModel

Tick = Callable[[float], None]


@dataclass(frozen=True)
class Bench:
    """What networks are judged on.  x: [N, C, H, W] in [0, 1];  y: [N]."""

    x: Tensor
    y: Tensor
    threat_model: ThreatModel
    seed: int
    batch_size: int = 512
    tick: Tick = field(default=lambda progress: None)
    shards: Shards = field(default_factory=Shards)


def judge(
    bench: Bench,
    model: nn.Module,
    trials: Mapping[str, Trial],
    folder: Path,
    *,
    curves: bool = False,
    corruptions: bool = False,
    surrogates: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """Attack ``model``, suspect the result, and keep the masks in ``folder``. JSON-ready.

    curves: accuracy over epsilon and over steps, too. corruptions: accuracy on common corruptions. surrogates: networks
    whose adversarial examples are tried.
    """
    x, y, surrogates = bench.x, bench.y, dict(surrogates or {})
    attacks = 0.95 if not curves else 0.7
    evaluation = evaluate(
        model,
        x,
        y,
        trials,
        seed=bench.seed,
        batch_size=bench.batch_size,
        shards=bench.shards,
        progress_file=folder / "progress.safetensors",
        tick=lambda progress: bench.tick(attacks * progress),
    )
    checks: list[dict[str, Any]] = ranks.first(
        lambda: [
            dataclasses.asdict(check)
            for check in suspicions(model, x, y, evaluation, bench.threat_model, seed=bench.seed, surrogates=surrogates)
        ]
    )
    result = {
        **evaluation.to_data(),
        "seed": bench.seed,
        "digest": weights_digest(model),
        "checks": checks,
    }
    if surrogates:
        result["transfer"] = transfer(
            model, surrogates, x, y, bench.threat_model, seed=bench.seed, batch_size=bench.batch_size
        )
    if corruptions:
        result["corruptions"] = corruption_accuracy(model, x, y, seed=bench.seed, batch_size=bench.batch_size)
    if curves:
        common: dict[str, Any] = {"seed": bench.seed, "batch_size": bench.batch_size}
        result["curves"] = {
            "epsilon": epsilon_curve(
                model, x, y, bench.threat_model, **common, tick=lambda p: bench.tick(0.7 + 0.15 * p)
            ),
            "steps": step_curve(model, x, y, bench.threat_model, **common, tick=lambda p: bench.tick(0.85 + 0.15 * p)),
        }
    return result
