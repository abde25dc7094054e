"""Square attack: random search by small windows, from the model's answers alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from nas.attacks.losses import margin, right
from nas.attacks.queries import Attempt
from nas.attacks.worklist import Rows, carry_out
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Of 10,000 windows, those after which their area halves (section 5 of the paper)."""


@dataclass(frozen=True)
class Draws:
    """Random numbers of a search, drawn on the generator's device in single precision.

    shared: positions are one draw for the whole batch, and none touches the far border, as in AutoAttack's reference.
    """

    generator: torch.Generator
    shared: bool

    def uniform(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator, device=self.generator.device).to(like.device)

    def signs(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """-1 and 1 in the type of ``like``."""
        return torch.where(2 * self.uniform(shape, like) - 1 < 0, -1.0, 1.0).to(like.dtype)

    def places(self, sides: Tensor, length: int) -> Tensor:
        """Where windows of ``sides`` [R] begin on an edge of ``length`` pixels: [R]."""
        if self.shared:
            return ((length - sides) * self.uniform((1,), sides)).long()
        return ((length - sides + 1) * self.uniform((len(sides),), sides)).long().minimum(length - sides)


class Search(Protocol):
    """What is tried; ``sides`` is [R], or [1] where all rows share their windows."""

    @property
    def smallest(self) -> int:
        """Least side of a window."""
        ...

    @property
    def odd(self) -> bool:
        """Whether sides are odd."""
        ...

    def begin(self, x: Tensor, threat_model: ThreatModel, draws: Draws) -> Rows:
        """The first image to try, "best" [R, C, H, W], and what else the search keeps for each row."""
        ...

    def propose(self, rows: Rows, sides: Tensor, threat_model: ThreatModel, draws: Draws) -> Tensor:
        """Images [R, C, H, W] to try, with windows ``sides`` wide."""
        ...


class Corners:
    """l_inf: every pixel at one of its two ends. Begins with vertical stripes; windows are of one colour."""

    smallest = 1
    odd = False

    def begin(self, x: Tensor, threat_model: ThreatModel, draws: Draws) -> Rows:
        low = threat_model.project(x - threat_model.epsilon, x)
        high = threat_model.project(x + threat_model.epsilon, x)
        stripes = draws.signs((len(x), x.shape[1], 1, x.shape[3]), x)
        return {"low": low, "high": high, "best": torch.where(stripes > 0, high, low)}

    def propose(self, rows: Rows, sides: Tensor, threat_model: ThreatModel, draws: Draws) -> Tensor:
        best = rows["best"]
        window = _window(draws.places(sides, best.shape[2]), draws.places(sides, best.shape[3]), sides, best)
        colours = draws.signs((len(sides), best.shape[1], 1, 1), best)
        return torch.where(window, torch.where(colours > 0, rows["high"], rows["low"]), best)


@dataclass(frozen=True)
class Bumps:
    """l_2 and l_1: perturbation moves from one window into another, as two pyramids of opposite sign side by side.

    exponent: of the norm;  fall: how steeply the pyramids fall;  stretched: perturbations are scaled to epsilon, else
    projected. For l_1 as AutoAttack's reference does it: it was not in the paper.
    """

    exponent: int
    fall: int
    stretched: bool
    smallest: int = 3
    odd: bool = True

    def begin(self, x: Tensor, threat_model: ThreatModel, draws: Draws) -> Rows:
        channels, height, width = x.shape[1:]
        delta = torch.zeros_like(x)
        side = max(height // 5, 1)
        first = max((height - 5 * side) // 2, 0)
        for row in range(height // side):
            for column in range(width // side):
                upright = float(draws.uniform((1,), x)) <= 0.5
                shape = bump(side, self.fall, self.exponent)
                tile = (shape if upright else shape.T).to(x) * draws.signs((len(x), channels, 1, 1), x)
                top, left = first + row * side, first + column * side
                part = delta[:, :, top : top + side, left : left + side]
                part += tile[:, :, : part.shape[2], : part.shape[3]]
        return {"best": self._fitted(delta, x, threat_model)}

    def propose(self, rows: Rows, sides: Tensor, threat_model: ThreatModel, draws: Draws) -> Tensor:
        x = rows["x"]
        channels, height, width = x.shape[1:]
        delta = rows["best"] - x
        top, left = draws.places(sides, height), draws.places(sides, width)
        window = _window(top, left, sides, x)
        emptied = _window(draws.places(sides, height), draws.places(sides, width), sides, x)
        shapes = self._shapes(sides, draws.uniform((len(sides),), x) > 0.5, top, left, x)

        whole = self._sum(delta, (1, 2, 3))
        inside = delta * window
        new = shapes * draws.signs((len(x), channels, 1, 1), x) + inside / (1e-12 + self._size(inside))
        new = new * window
        # The bump takes over what both windows hold, and a channel's share of what the image has not used.
        unused = (threat_model.epsilon**self.exponent - whole).clamp_min(0)
        held = unused / channels + self._sum(delta * (window | emptied), (2, 3))
        new = new / (1e-12 + self._size(new)) * held ** (1 / self.exponent)
        if not self.stretched:
            new = new * channels
        delta = torch.where(window, new, torch.where(emptied, 0.0, delta))
        return self._fitted(delta, x, threat_model)

    def _fitted(self, delta: Tensor, x: Tensor, threat_model: ThreatModel) -> Tensor:
        if self.stretched:
            size = self._sum(delta, (1, 2, 3)) ** (1 / self.exponent)
            delta = delta * (threat_model.epsilon / (size + 1e-12))
        return threat_model.project(x + delta, x)

    def _sum(self, delta: Tensor, dims: tuple[int, ...]) -> Tensor:
        return (delta.abs() ** self.exponent).sum(dims, keepdim=True)

    def _size(self, delta: Tensor) -> Tensor:
        """Of each channel."""
        return self._sum(delta, (2, 3)) ** (1 / self.exponent)

    def _shapes(self, sides: Tensor, turned: Tensor, top: Tensor, left: Tensor, x: Tensor) -> Tensor:
        """Bumps of ``sides`` at their places: [R, 1, H, W], to be masked by the windows."""
        distinct, which = sides.unique(return_inverse=True)
        largest = int(distinct.max())
        table = torch.zeros(len(distinct), 2, largest, largest)
        for number, side in enumerate(distinct.tolist()):
            shape = bump(side, self.fall, self.exponent)
            table[number, 0, :side, :side], table[number, 1, :side, :side] = shape, shape.T
        rows = (torch.arange(x.shape[2], device=x.device) - top.unsqueeze(1)).clamp(0, largest - 1)
        columns = (torch.arange(x.shape[3], device=x.device) - left.unsqueeze(1)).clamp(0, largest - 1)
        which, turned = which.view(-1, 1, 1), turned.long().view(-1, 1, 1)
        return table.to(x)[which, turned, rows.unsqueeze(2), columns.unsqueeze(1)].unsqueeze(1)


SEARCHES: dict[str, Search] = {"linf": Corners(), "l2": Bumps(2, 2, True), "l1": Bumps(1, 4, False)}


@dataclass(frozen=True)
class Square:
    """Square attack: random search that changes one square window at a time and keeps what lowers the margin.

    Andriushchenko et al., ECCV 2020, arXiv 1912.00049, algorithms 1 to 3. queries: answers of the model that a sample
    may cost, those for the clean image and the start included. area: share of the image that the first windows cover;
    it halves after fixed numbers of windows out of 10,000, scaled to the queries at hand if ``rescaled``. shared: the
    positions of windows are one draw for the whole batch, and never touch the far border, as in AutoAttack's
    reference. batch_size: samples computed together, where those that are done make room for others; 0: all.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    queries: int = 5000
    area: float = 0.8
    rescaled: bool = True
    shared: bool = False
    batch_size: int = 0

    def __post_init__(self) -> None:
        if self.threat_model.norm not in SEARCHES:
            raise InputError(f"the square attack knows {', '.join(SEARCHES)}, not '{self.threat_model.norm}'")
        if self.queries < 3:
            raise InputError(f"attack queries must be at least 3 (clean image, start, a window), not {self.queries}")
        if not 0 < self.area <= 1:
            raise InputError(f"attack area must lie in (0, 1], not {self.area}")
        if self.shared and self.batch_size:
            raise InputError("shared draws need all samples at the same query: leave batch_size at 0")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] for images ``x`` and labels ``y`` [N]."""
        return self.attempt(model, x, y, generator=generator).x_adv

    def attempt(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Attempt:
        """The same, with the queries spent; of samples that are not broken, the image of least margin."""
        threat_model, search, draws = self.threat_model, SEARCHES[self.threat_model.norm], Draws(generator, self.shared)
        sides = self._sides(x, search)
        x_adv = x.clone()
        queries = torch.ones_like(y)
        broken_at = torch.full_like(y, -1)

        def try_(images: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
            """Margins of the wrong classes [R], and which are misclassified; counted."""
            logits = model(images)
            wrong = ~right(logits, rows["y"])
            queries[rows["sample"]] += 1
            if bool(wrong.any()):
                found = rows["sample"][wrong]
                x_adv[found], broken_at[found], broken[found] = images[wrong], queries[found], True
            return margin(logits, rows["y"], None), wrong

        def begin(jobs: Tensor) -> Rows:
            samples = held[jobs]
            rows = {"sample": samples, "x": x[samples], "y": y[samples], "done": torch.zeros_like(jobs)}
            rows |= search.begin(rows["x"], threat_model, draws)
            rows["margin"], _ = try_(rows["best"], rows)
            return rows

        def advance(rows: Rows) -> Tensor:
            now = sides[rows["done"][:1] if self.shared else rows["done"]]
            images = search.propose(rows, now, threat_model, draws)
            margins, _ = try_(images, rows)
            better = margins > rows["margin"]
            rows["margin"] = torch.where(better, margins, rows["margin"])
            rows["best"] = torch.where(better.view(-1, 1, 1, 1), images, rows["best"])
            rows["done"] = rows["done"] + 1
            over = rows["done"] == len(sides)
            if bool(over.any()):
                over = over & ~broken[rows["sample"]]
                x_adv[rows["sample"][over]] = rows["best"][over]
            return over

        with crafting(model), torch.no_grad():
            broken = ~right(model(x), y)
            broken_at[broken] = 1
            held = (~broken).nonzero().squeeze(1)
            carry_out(held, begin, advance, broken, self.batch_size)
        return Attempt(x_adv, queries, broken_at, self.queries)

    def _sides(self, x: Tensor, search: Search) -> Tensor:
        """Side of the window at each proposal: [queries - 2]."""
        height, width = x.shape[2:]
        count, sides = self.queries - 2, []
        for number in range(count):
            place = int(number / count * 10000) if self.rescaled else number
            area = self.area / 2 ** sum(place > halving for halving in HALVINGS)
            side = max(round(math.sqrt(area * height * width)), search.smallest)
            sides.append(min(side + (search.odd and side % 2 == 0), height, width))
        return torch.tensor(sides, device=x.device)

    def __str__(self) -> str:
        schedule = "" if self.rescaled else " of 10000"
        shared = ", shared windows" if self.shared else ""
        return f"Square, {self.threat_model}, {self.queries} queries{schedule}, area {self.area:g}{shared}"


@cache
def bump(side: int, fall: int, exponent: int) -> Tensor:
    """Two pyramids side by side, one upside down: [side, side], of size 1."""
    half = torch.cat([_pyramid(side // 2, side, fall, exponent), -_pyramid(side - side // 2, side, fall, exponent)])
    return half / (half.abs() ** exponent).sum() ** (1 / exponent)


def _pyramid(height: int, width: int, fall: int, exponent: int) -> Tensor:
    """At the square ring k around the middle, the sum of 1 / k^fall from there outwards; [height, width], of size 1."""
    rings = max(height // 2, width // 2) + 1
    steps = torch.tensor([1 / (ring + 1) ** fall for ring in range(rings)])
    heights = steps.flip(0).cumsum(0).flip(0)
    row = (torch.arange(height) - height // 2).abs().unsqueeze(1)
    column = (torch.arange(width) - width // 2).abs().unsqueeze(0)
    pyramid = heights[torch.maximum(row, column)]
    return pyramid / (pyramid.abs() ** exponent).sum() ** (1 / exponent)


def _window(top: Tensor, left: Tensor, sides: Tensor, like: Tensor) -> Tensor:
    """Masks [R, 1, H, W] of windows ``sides`` wide from ``top``, ``left`` on, all [R]."""
    rows = torch.arange(like.shape[2], device=like.device) - top.unsqueeze(1)
    columns = torch.arange(like.shape[3], device=like.device) - left.unsqueeze(1)
    inside_rows = (rows >= 0) & (rows < sides.unsqueeze(1))
    inside_columns = (columns >= 0) & (columns < sides.unsqueeze(1))
    return (inside_rows.unsqueeze(2) & inside_columns.unsqueeze(1)).unsqueeze(1)


PLUGIN = Square
