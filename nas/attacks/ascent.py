"""The steps of Auto-PGD, for many samples, targets and restarts in one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from nas.attacks.losses import right
from nas.attacks.worklist import Best, Rows, carry_out
from nas.threat_model import ThreatModel

RowLoss = Callable[[Tensor, Rows], Tensor]
"""(logits [R, K], rows) -> losses [R]."""


class Stepping(Protocol):
    """How an ascent steps and when it changes its step; rows as in ``Ascent``."""

    def start(self, x: Tensor, threat_model: ThreatModel, generator: torch.Generator) -> Tensor:
        """Random images to begin from."""
        ...

    def begin(self, rows: Rows, threat_model: ThreatModel, steps: int, given: bool) -> Rows:
        """What it keeps for each row; given: the start was not drawn but came from an earlier ascent."""
        ...

    def step(self, rows: Rows, threat_model: ThreatModel) -> Tensor:
        """The next iterate of each row."""
        ...

    def check(self, rows: Rows, threat_model: ThreatModel, steps: int) -> Tensor:
        """Rows [R] that go back to their best iterate; called after every step."""
        ...


class Momentum:
    """Steepest steps with momentum, halved at checkpoints where they no longer help (Auto-PGD, algorithm 1)."""

    def start(self, x: Tensor, threat_model: ThreatModel, generator: torch.Generator) -> Tensor:
        return threat_model.project(x + threat_model.geometry.edge(x, threat_model.epsilon, generator), x)

    def begin(self, rows: Rows, threat_model: ThreatModel, steps: int, given: bool) -> Rows:
        count = torch.zeros_like(rows["sample"])
        return {
            "x_old": rows["x_adv"].clone(),
            "step": torch.full_like(rows["loss"], 2 * threat_model.epsilon),
            # The reference compares the first loss with 0, not with that of the start.
            "last_loss": torch.zeros_like(rows["loss"]),
            "rises": count,
            "interval": torch.full_like(count, max(int(0.22 * steps), 1)),
            "since": count.clone(),
            "checked_loss": rows["loss"].clone(),
            "was_reduced": torch.ones_like(rows["broken"]),
        }

    def step(self, rows: Rows, threat_model: ThreatModel) -> Tensor:
        x, x_adv = rows["x"], rows["x_adv"]
        drift = x_adv - rows["x_old"]
        rows["x_old"] = x_adv
        share = _per_image(torch.where(rows["done"] == 0, 1.0, 0.75).to(x.dtype), x)
        moved = x_adv + _per_image(rows["step"], x) * threat_model.geometry.steepest(rows["gradient"])
        moved = threat_model.project(moved, x)
        return threat_model.project(x_adv + (moved - x_adv) * share + drift * (1 - share), x)

    def check(self, rows: Rows, threat_model: ThreatModel, steps: int) -> Tensor:
        rows["rises"] = rows["rises"] + (rows["loss"] > rows["last_loss"])
        rows["last_loss"] = rows["loss"]
        rows["since"] = rows["since"] + 1
        due = rows["since"] == rows["interval"]
        if not bool(due.any()):
            return due
        stuck = ~rows["was_reduced"] & (rows["checked_loss"] >= rows["best_loss"])
        reduce = due & ((rows["rises"] <= 0.75 * rows["interval"]) | stuck)
        rows["was_reduced"] = torch.where(due, reduce, rows["was_reduced"])
        rows["checked_loss"] = torch.where(due, rows["best_loss"], rows["checked_loss"])
        rows["step"] = torch.where(reduce, rows["step"] / 2, rows["step"])
        shorter = (rows["interval"] - max(int(0.03 * steps), 1)).clamp_min(max(int(0.06 * steps), 1))
        rows["interval"] = torch.where(due, shorter, rows["interval"])
        rows["rises"], rows["since"] = rows["rises"] * ~due, rows["since"] * ~due
        return reduce


class Sparse:
    """Steps on the few pixels of largest gradient, as many as the best iterate suggests (l_1).

    Croce and Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML 2021,
    arXiv 2103.01208, algorithm 1.
    """

    def start(self, x: Tensor, threat_model: ThreatModel, generator: torch.Generator) -> Tensor:
        return threat_model.project(x + _normal(x, generator), x)

    def begin(self, rows: Rows, threat_model: ThreatModel, steps: int, given: bool) -> Rows:
        pixels = rows["x"][0].numel()
        changed = self._changed(rows["x_adv"], rows)
        return {
            "step": torch.full_like(rows["loss"], threat_model.epsilon),
            "share": changed / pixels / 1.5 if given else torch.full_like(rows["loss"], 0.2),
            "changed": changed if given else torch.full_like(rows["loss"], pixels),
            "since": torch.zeros_like(rows["sample"]),
        }

    def step(self, rows: Rows, threat_model: ThreatModel) -> Tensor:
        gradient = rows["gradient"].flatten(1)
        pixels = gradient.shape[1]
        place = ((1 - rows["share"]) * pixels).clamp(0, pixels - 1).long().unsqueeze(1)
        least = gradient.abs().sort(1).values.gather(1, place)
        direction = gradient.sign() * (gradient.abs() >= least)
        direction = direction / (direction.abs().sum(1, keepdim=True) + 1e-10)
        moved = rows["x_adv"] + _per_image(rows["step"], rows["x"]) * direction.view_as(rows["x"])
        return threat_model.project(moved, rows["x"])

    def check(self, rows: Rows, threat_model: ThreatModel, steps: int) -> Tensor:
        rows["since"] = rows["since"] + 1
        due = rows["since"] == max(int(0.04 * steps), 1)
        if not bool(due.any()):
            return due
        epsilon, changed = threat_model.epsilon, self._changed(rows["best"], rows)
        sparser = due & (changed / rows["changed"] < 0.95)
        shorter = (rows["step"] / 1.5).clamp(epsilon / 10, epsilon)
        rows["share"] = torch.where(due, changed / rows["x"][0].numel() / 1.5, rows["share"])
        rows["step"] = torch.where(sparser, epsilon, torch.where(due, shorter, rows["step"]))
        rows["changed"] = torch.where(due, changed, rows["changed"])
        rows["since"] = rows["since"] * ~due
        return sparser

    def _changed(self, images: Tensor, rows: Rows) -> Tensor:
        """Number of pixels [R] that differ from the clean image."""
        return (images != rows["x"]).flatten(1).sum(1).to(rows["loss"].dtype)


STEPPINGS: dict[str, Stepping] = {"linf": Momentum(), "l2": Momentum(), "l1": Sparse()}


@dataclass(frozen=True)
class Ascent:
    """Auto-PGD from one start: Croce and Hein, ICML 2020, arXiv 2003.01690, algorithm 1; for l_1 arXiv 2103.01208.

    stop: a sample is left alone from its first misclassified iterate on.  batch_size: rows computed together,
    0: all.  eot: gradients averaged over that many answers of the model; loss and success are those of the last.
    widening: three ascents, from balls of 3 and 2 epsilon into the ball (for l_1, section 4.3 of arXiv 2103.01208).
    """

    threat_model: ThreatModel
    steps: int
    eot: int
    stop: bool
    batch_size: int
    widening: bool

    def climb(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        samples: Tensor,
        loss: RowLoss,
        more: Rows,
        generator: torch.Generator,
        best: Best,
    ) -> None:
        """Offer ``best`` what ascents for ``samples`` [J] find; ``more`` [J, ...] goes into the rows for ``loss``.

        x, y: [N, C, H, W], [N].  Call it inside ``model_state.crafting``.
        """
        if not self.widening:
            self._climb(model, x, y, samples, loss, more, generator, best, None)
            return
        epsilon = self.threat_model.epsilon
        first = -(-3 * self.steps // 10)  # 30, 30 and 40 % of the steps, the first two rounded up
        starts = x[samples] + _normal(x[samples], generator)
        for factor, steps in ((3, first), (2, first), (1, max(self.steps - 2 * first, 1))):
            threat_model = replace(self.threat_model, epsilon=factor * epsilon)
            starts = threat_model.project(starts, x[samples])
            stage = replace(
                self, threat_model=threat_model, steps=steps, widening=False, stop=self.stop and factor == 1
            )
            if factor == 1:
                stage._climb(model, x, y, samples, loss, more, generator, best, starts)
            else:  # what breaks a sample here is outside its ball: only where the loss was highest counts
                starts = stage._highest(model, x, y, samples, loss, more, generator, starts)

    def _highest(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        samples: Tensor,
        loss: RowLoss,
        more: Rows,
        generator: torch.Generator,
        starts: Tensor,
    ) -> Tensor:
        """The iterate of highest loss of each job [J, C, H, W], misclassified or not."""
        highest = starts.clone()

        def keep(rows: Rows, over: Tensor) -> None:
            highest[rows["job"][over]] = rows["best"][over]

        self._walk(model, x, y, samples, loss, more, generator, starts, keep, None)
        return highest

    def _climb(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        samples: Tensor,
        loss: RowLoss,
        more: Rows,
        generator: torch.Generator,
        best: Best,
        starts: Tensor | None,
    ) -> None:
        def keep(rows: Rows, over: Tensor) -> None:
            over = over | rows["broken"] if self.stop else over
            if not bool(over.any()):
                return
            images = torch.where(_per_image(rows["broken"], rows["x"]), rows["found"], rows["best"])
            best.offer(rows["sample"][over], images[over], rows["best_loss"][over], rows["broken"][over])

        self._walk(model, x, y, samples, loss, more, generator, starts, keep, best.broken if self.stop else None)

    def _walk(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        samples: Tensor,
        loss: RowLoss,
        more: Rows,
        generator: torch.Generator,
        starts: Tensor | None,
        keep: Callable[[Rows, Tensor], None],
        settled: Tensor | None,
    ) -> None:
        """All steps of all jobs; ``keep`` sees the rows after every evaluation and which of them [R] are over."""
        threat_model = self.threat_model
        stepping = STEPPINGS[threat_model.norm]

        def begin(jobs: Tensor) -> Rows:
            rows = {"job": jobs, "sample": samples[jobs], **{name: values[jobs] for name, values in more.items()}}
            rows["x"], rows["y"] = x[rows["sample"]], y[rows["sample"]]
            x_adv = stepping.start(rows["x"], threat_model, generator)  # drawn even where it is not needed
            rows["x_adv"] = x_adv if starts is None else starts[jobs]
            evaluate(rows)
            rows["best"], rows["best_gradient"], rows["best_loss"] = rows["x_adv"], rows["gradient"], rows["loss"]
            rows["found"], rows["broken"] = rows["x_adv"], ~rows["right"]
            rows["found_loss"] = torch.where(rows["broken"], rows["loss"], -torch.inf)
            rows["done"] = torch.zeros_like(jobs)
            keep(rows, torch.zeros_like(rows["broken"]))
            return rows | stepping.begin(rows, threat_model, self.steps, starts is not None)

        def evaluate(rows: Rows) -> None:
            gradient = torch.zeros_like(rows["x_adv"])
            with torch.enable_grad():
                for _ in range(self.eot):
                    point = rows["x_adv"].detach().requires_grad_(True)
                    logits = model(point)
                    losses = loss(logits, rows)
                    gradient += torch.autograd.grad(losses.sum(), point)[0]
            rows["gradient"], rows["loss"] = gradient / self.eot, losses.detach()
            rows["right"] = right(logits.detach(), rows["y"])

        def advance(rows: Rows) -> Tensor:
            rows["x_adv"] = stepping.step(rows, threat_model)
            evaluate(rows)
            found = ~rows["right"] & (~rows["broken"] | (rows["loss"] >= rows["found_loss"]))
            rows["broken"] = rows["broken"] | ~rows["right"]
            _take(rows, found, found="x_adv", found_loss="loss")
            _take(rows, rows["loss"] > rows["best_loss"], best="x_adv", best_gradient="gradient", best_loss="loss")
            rows["done"] = rows["done"] + 1
            _take(rows, stepping.check(rows, threat_model, self.steps), x_adv="best", gradient="best_gradient")
            over = rows["done"] == self.steps
            keep(rows, over)
            return over

        carry_out(samples, begin, advance, settled, self.batch_size)


def _take(rows: Rows, where: Tensor, **names: str) -> None:
    """In the rows ``where`` [R], give each name the value of another."""
    if bool(where.any()):
        for name, other in names.items():
            rows[name] = torch.where(_per_image(where, rows[other]), rows[other], rows[name])


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return drawn.to(like.device)
