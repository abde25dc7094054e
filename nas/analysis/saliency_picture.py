"""A picture of what networks look at: a few images beside their saliency maps, network by network."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nas.analysis.saliency import PerturbationSaliency, gradient_saliency
from nas.errors import InputError
from nas.model_state import evaluating
from nas.tensor_file import write_bytes

FORMATS = ("svg", "png")


def draw_saliency(
    networks: Mapping[str, nn.Module],
    x: Tensor,
    y: Tensor,
    path: Path,
    *,
    classes: tuple[str, ...] | None = None,
    perturbation: PerturbationSaliency | None = None,
) -> None:
    """Write images ``x`` [N, C, H, W] in rows, with two maps for each of ``networks`` (by title), to ``path``.

    The maps are the size of the gradient of the cross-entropy at labels ``y`` [N] and the perturbation saliency, each
    scaled to its own largest value, dark for none. classes: names, to say what each network sees. The ending of path
    says whether it is an SVG or a PNG; equal networks and images give an equal file. Raises ``InputError`` for another
    ending, or nothing to draw.
    """
    form = path.suffix.removeprefix(".").lower()
    if form not in FORMATS:
        raise InputError(f"a picture of saliency is written as .svg or .png, not '{path.name}'")
    if not networks or len(x) == 0:
        raise InputError("a picture of saliency needs at least one network and one image")
    # Here, as most users of this package never draw.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    perturbation = PerturbationSaliency() if perturbation is None else perturbation
    titles, columns = ["image"], [[_shown(image) for image in x]]
    answers: dict[int, Tensor] = {}
    for title, model in networks.items():
        for kind, maps in (("gradient", gradient_saliency(model, x, y)), ("perturbation", perturbation(model, x))):
            titles.append(f"{title}\n{kind}")
            columns.append([*maps.cpu().double().numpy()])
        answers[len(columns) - 2] = _answers(model, x)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "saliency"
        figure = Figure(figsize=(1.3 * len(columns), 1.3 * len(x) + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(x), len(columns), squeeze=False)
        for column, (title, pictures) in enumerate(zip(titles, columns, strict=True)):
            for row, picture in enumerate(pictures):
                place = axes[row, column]
                limits = {"vmin": 0.0, "vmax": 1.0 if column == 0 else max(float(picture.max()), 1e-30)}
                place.imshow(picture, cmap="gray" if column == 0 else "magma", interpolation="nearest", **limits)
                place.set_xticks([])
                place.set_yticks([])
                if row == 0:
                    place.set_title(title, fontsize=8)
                if classes is not None and column in answers:
                    place.set_xlabel(f"sees {_plain(classes[int(answers[column][row])])}", fontsize=7)
                elif classes is not None and column == 0:
                    place.set_xlabel(_plain(classes[int(y[row])]), fontsize=7)
        stream = io.BytesIO()
        without = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(stream, format=form, dpi=150, metadata=without)
    write_bytes(stream.getvalue(), path)


def _shown(image: Tensor) -> NDArray[np.float64]:
    """An image [C, H, W] as matplotlib draws it: grey unless it has three channels."""
    pixels = image.detach().cpu().double()
    shown: NDArray[np.float64] = (pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels.mean(0)).numpy()
    return shown


def _answers(model: nn.Module, x: Tensor) -> Tensor:
    with evaluating(model), torch.no_grad():
        return model(x).argmax(1).cpu()


def _plain(name: str) -> str:
    """A class name that starts no mathematics and fits under its picture."""
    return name.replace("$", r"\$")[:16]
