"""The same from Python, in a script or a notebook: runs begun, opened, and what they found as objects."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from nas.analysis.drawing import draw_cell
from nas.errors import InputError
from runs.context import found_genotype, model_folder
from runs.directory import RunDirectory, open_run, read_json
from runs.exporting import export_network
from runs.finished import opened
from runs.launch import begin
from runs.pipeline import carry_out
from runs.progress import observer
from runs.recipe import read_table, set_key
from runs.show import error_console, out_console
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import AnyGenotype, Genotype

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory and what is in it. In a notebook it shows its cells and what it found."""

    path: Path

    @property
    def results(self) -> dict[str, Any]:
        """Everything a finished run found: the contents of results.json. A search has none."""
        found: dict[str, Any] = read_json(self.path / "results.json")
        return found

    @property
    def genotype(self) -> AnyGenotype:
        """The architecture it found, or was given."""
        return found_genotype(self._directory)

    def network(self, name: str = "searched") -> nn.Module:
        """A trained network by name (searched, compressed, random-1, plain, ...), in eval mode on the CPU.

        Pixels [N, C, H, W] in [0, 1] to logits [N, classes].
        """
        from nas.model_file import load_model

        if not (self._folder(name) / "model.json").is_file():
            raise InputError(f"{self.path} has no trained network '{name}'")
        _, network = load_model(self._folder(name))
        return network.eval()

    def export(self, *formats: str, network: str = "searched", out: Path | str | None = None) -> Path:
        """Write a trained network in ``formats``, each reloaded and compared, with its model card: ``nas export``.

        Returns the folder, by default RUN/export-<network>.
        """
        with opened(self.path) as context:
            folder = Path(out) if out is not None else self.path / f"export-{network}"
            export_network(context, network, folder, formats or ("json", "safetensors", "py"))
        return folder

    def resume(self) -> Run:
        """Carry out what is left of it, to the result it would have had without the interruption."""
        with self._directory.locked(), observer(out_console) as watching:
            carry_out(self._directory, watching)
        return self

    @property
    def _directory(self) -> RunDirectory:
        return open_run(self.path)

    def _folder(self, network: str) -> Path:
        return model_folder(self._directory, network)

    def _repr_html_(self) -> str:
        lines = [f"<p><code>{escape(str(self.path))}</code></p>"]
        if (self.path / "results.json").is_file():
            lines += [f"<p>{escape(line)}</p>" for line in self.results["verdict"]]
        genotype = self.genotype
        if isinstance(genotype, Genotype):
            for kind, cell in genotype.cells:
                lines.append(
                    f"<figure>{draw_cell(cell, f'{kind} cell')}<figcaption>{escape(kind)}</figcaption></figure>"
                )
        return "\n".join(lines)


def search(recipe: str | Path, *, out: Path | str | None = None, settings: Settings | None = None) -> Run:
    """Search by ``recipe``, a shipped name or a TOML file: ``nas search``.

    out: the folder of the run, by default runs/<name>-<time>. settings: keys of the recipe that are set differently,
    such as {"search.epochs": 5, "seed": 1}. Raises ``InputError`` for what is wrong with any of it.
    """
    return _carry_out("search", recipe, None, out, settings)


def run(recipe: str | Path, *, out: Path | str | None = None, settings: Settings | None = None) -> Run:
    """Search, analyse, train, compress, attack and export by ``recipe``: ``nas run``. Arguments as of ``search``."""
    return _carry_out("run", recipe, None, out, settings)


def train(
    recipe: str | Path,
    genotype: Run | AnyGenotype | str | Path,
    *,
    out: Path | str | None = None,
    settings: Settings | None = None,
) -> Run:
    """Train, attack and export one architecture: ``nas train``.

    genotype: a run that found it, a genotype, a file or a published name. Other arguments as of ``search``.
    """
    if isinstance(genotype, Run):
        genotype = genotype.genotype
    elif isinstance(genotype, str | Path):
        genotype = load_genotype(str(genotype))
    return _carry_out("train", recipe, genotype, out, settings)


def open(path: str | Path) -> Run:
    """A run directory that is there already."""
    return Run(open_run(Path(path)).path)


def _carry_out(
    command: str,
    recipe: str | Path,
    genotype: AnyGenotype | None,
    out: Path | str | None,
    settings: Settings | None,
) -> Run:
    table = read_table(str(recipe))
    for key, value in (settings or {}).items():
        try:
            plain = json.loads(json.dumps(value, default=str))
        except (TypeError, ValueError) as error:
            raise InputError(f"settings: {key} cannot be written into a recipe: {error}") from None
        set_key(table, key, plain)
    directory = begin(
        command, table, genotype, None if out is None else Path(out),
        say=lambda line: error_console.print(line, markup=False, highlight=False),
    )  # fmt: skip
    return Run(directory.path).resume()
