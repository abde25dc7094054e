"""A study whose trials take a second: two classes of 8x8 images, one epoch, an attack of one step."""

from __future__ import annotations

from pathlib import Path

from tiny_runs import save_arrays, toml

TINY_STUDY = """
name = "tiny"
device = "cpu"

[data]
name = "arrays"
path = {path}
validation = 0.5

[threat_model]
epsilon = 0.04

[train]
epochs = {epochs}
batch_size = 16
attack = {{ name = "pgd", steps = 1 }}
validation_attack = {{ name = "fgsm" }}

[study]
space = "plain"
depths = {depths}
widths = [[3, 4], [4]]
seeds = {seeds}
heartbeat = {heartbeat}
{more}

[evaluate]
trials = [{{ name = "fgsm", attack = {{ name = "fgsm" }} }}, {{ name = "pgd", attack = {{ name = "pgd", steps = 2 }} }}]
"""


def tiny_study(
    folder: Path,
    more: str = "",
    *,
    epochs: int = 1,
    depths: str = "[[1], [1]]",
    seeds: str = "[0, 1]",
    heartbeat: float = 1,
) -> Path:
    """The recipe, with its data beside it."""
    path = folder / "tiny.toml"
    data = toml(save_arrays(folder / "tiny.npz"))
    text = TINY_STUDY.format(path=data, epochs=epochs, depths=depths, seeds=seeds, heartbeat=heartbeat, more=more)
    path.write_text(text, encoding="utf-8")
    return path
