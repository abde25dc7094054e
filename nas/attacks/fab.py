"""Fast adaptive boundary attack: the nearest misclassified image, by projections on linearised boundaries."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.attacks.losses import likeliest_wrong, right
from nas.attacks.worklist import Best, Rows, carry_out
from nas.errors import InputError
from nas.model_state import crafting
from nas.threat_model import ThreatModel


@dataclass(frozen=True)
class Fab:
    """Fast adaptive boundary attack: projects on the linearised boundary and pulls back to the clean image.

    Croce and Hein, ICML 2020, arXiv 1907.02044, algorithm 1, without its final search on the line to the clean image,
    as in AutoAttack. targets: 0 looks for the nearest boundary to any class, which costs a gradient for each class a
    step; otherwise that many of the likeliest wrong classes are tried one after the other (FAB-T, arXiv 2003.01690).
    pull: most that the clean image weighs in a step (alpha_max); overshoot: how far beyond the boundary a projection
    goes (eta); retreat: what remains of a perturbation once it succeeded (beta). Restarts after the first begin
    at random images half of epsilon away. stop_when_broken: a sample stays at its first misclassified image within the
    threat model, which then need not be the nearest. batch_size: samples (times targets and restarts, with
    stop_when_broken) computed together, where those that are done make room for others; 0: all.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    targets: int = 0
    steps: int = 100
    restarts: int = 1
    pull: float = 0.1
    overshoot: float = 1.05
    retreat: float = 0.9
    stop_when_broken: bool = False
    batch_size: int = 0

    def __post_init__(self) -> None:
        for name, least in (("targets", 0), ("steps", 1), ("restarts", 1)):
            if getattr(self, name) < least:
                raise InputError(f"attack {name} must be at least {least}, not {getattr(self, name)}")
        if not (0 <= self.pull <= 1 and self.overshoot >= 1 and 0 <= self.retreat < 1):
            raise InputError(
                "attack pull must lie in [0, 1], overshoot be at least 1 and retreat lie in [0, 1), not "
                f"{self.pull}, {self.overshoot} and {self.retreat}"
            )

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """The nearest misclassified images found [N, C, H, W], brought into the ball around ``x``."""
        return self.threat_model.project(self.nearest(model, x, y, generator=generator), x)

    def nearest(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """The nearest misclassified images found [N, C, H, W] for ``x`` and labels ``y`` [N], at whatever distance.

        What is misclassified already, or for which nothing is found, comes back as it was.
        """
        return self._search(model, x, y, generator, skip_broken=self.stop_when_broken).images

    def found(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Best:
        """Images as by ``nearest``, but what is broken within the threat model is not attacked again."""
        return self._search(model, x, y, generator, skip_broken=True)

    def _search(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator, skip_broken: bool) -> Best:
        best = Best(x)
        with crafting(model), torch.no_grad():
            logits = model(x)
            held = right(logits, y)
            targets = likeliest_wrong(logits, y, self.targets) if self.targets else y.unsqueeze(1)
            everyone = held.nonzero().squeeze(1)
            runs = [(rank, restart) for rank in range(targets.shape[1]) for restart in range(self.restarts)]
            jobs = [torch.tensor(run, device=x.device).expand(len(everyone), 2) for run in runs]
            rounds = (
                [(everyone.repeat(len(runs)), torch.cat(jobs))]
                if self.stop_when_broken
                else [(everyone, job) for job in jobs]
            )
            for samples, job in rounds:
                if skip_broken:
                    samples, job = samples[~best.broken[samples]], job[~best.broken[samples]]
                self._walk(
                    model, x, y, samples, targets[samples, job[:, 0]], job[:, 1] > 0, generator, best, skip_broken
                )
        return best

    def _walk(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        samples: Tensor,
        targets: Tensor,
        random: Tensor,
        generator: torch.Generator,
        best: Best,
        skip_broken: bool,
    ) -> None:
        """All steps for ``samples`` [J], each towards its target or, without targets, to whichever class is nearest."""
        threat_model = self.threat_model
        geometry, bounds = threat_model.geometry, (threat_model.lower, threat_model.upper)

        def begin(jobs: Tensor) -> Rows:
            rows = {"sample": samples[jobs], "target": targets[jobs], "done": torch.zeros_like(jobs)}
            rows["x"], rows["y"] = x[rows["sample"]], y[rows["sample"]]
            rows["x_adv"] = rows["nearest"] = rows["x"]
            at_random = random[jobs]
            if bool(at_random.any()):
                start = rows["x"] + geometry.edge(rows["x"], threat_model.epsilon, generator) / 2
                rows["x_adv"] = torch.where(_per_image(at_random, start), start.clamp(*bounds), rows["x"])
            rows["distance"] = torch.full_like(rows["x"].flatten(1)[:, 0], torch.inf)
            return rows

        def advance(rows: Rows) -> Tensor:
            x_adv, clean, count = rows["x_adv"], rows["x"], len(rows["x"])
            gap, normal = self._boundary(model, rows)
            # The same plane seen from both images: it lies where gap + <normal, . - x_adv> is 0.
            clean_gap = gap + (normal * (clean - x_adv)).flatten(1).sum(1)
            both = torch.cat([x_adv, clean])
            moves = geometry.onto_plane(both, torch.cat([normal, normal]), torch.cat([gap, clean_gap]), *bounds)
            sizes = geometry.size(moves).clamp_min(1e-8)
            share = (sizes[:count] / (sizes[:count] + sizes[count:])).clamp_max(self.pull)
            ends = both + self.overshoot * moves
            x_adv = torch.lerp(ends[:count], ends[count:], _per_image(share, clean)).clamp(*bounds)

            found = ~right(model(x_adv), rows["y"])
            distance = geometry.size(x_adv - clean)
            nearer = found & (distance < rows["distance"])
            rows["nearest"] = torch.where(_per_image(nearer, clean), x_adv, rows["nearest"])
            rows["distance"] = torch.where(nearer, distance, rows["distance"])
            retreated = clean + (x_adv - clean) * self.retreat
            rows["x_adv"] = torch.where(_per_image(found, clean), retreated, x_adv)
            rows["done"] = rows["done"] + 1

            within = rows["distance"] <= threat_model.epsilon
            over = rows["done"] == self.steps
            over = over | within if self.stop_when_broken else over
            if bool(over.any()):
                broken = within[over] & skip_broken
                best.offer(rows["sample"][over], rows["nearest"][over], -rows["distance"][over], broken)
            return over

        carry_out(samples, begin, advance, best.broken if self.stop_when_broken else None, self.batch_size)

    def _boundary(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        """Logit of a wrong class less that of the right one [R], and its gradient [R, C, H, W].

        The class is the target or, without, the one whose linearised boundary is nearest.
        """
        y, dual = rows["y"], self.threat_model.geometry.dual
        with torch.enable_grad():
            point = rows["x_adv"].detach().requires_grad_(True)
            logits = model(point)
            here = logits.gather(1, y.unsqueeze(1))
            if self.targets:
                gap = (logits.gather(1, rows["target"].unsqueeze(1)) - here).squeeze(1)
                return gap.detach(), torch.autograd.grad(gap.sum(), point)[0]
            gaps = logits - here
            chosen_gap, chosen = torch.zeros_like(gaps[:, 0]).detach(), torch.zeros_like(point)
            least = torch.full_like(chosen_gap, torch.inf)
            last = gaps.shape[1] - 1
            for wrong in range(last + 1):
                (gradient,) = torch.autograd.grad(gaps[:, wrong].sum(), point, retain_graph=wrong < last)
                gap = gaps[:, wrong].detach()
                distance = gap.abs() / (1e-12 + dual(gradient))
                nearer = (distance < least) & (y != wrong)
                least, chosen_gap = torch.where(nearer, distance, least), torch.where(nearer, gap, chosen_gap)
                chosen = torch.where(_per_image(nearer, chosen), gradient, chosen)
            return chosen_gap, chosen.detach()

    def __str__(self) -> str:
        name = (
            f"FAB-T-{self.steps}, {self.threat_model}, {self.targets} targets"
            if self.targets
            else (f"FAB-{self.steps}, {self.threat_model}")
        )
        text = f"{name}, pull {self.pull:g}, overshoot {self.overshoot:g}, retreat {self.retreat:g}"
        text += f", restarts {self.restarts}" if self.restarts > 1 else ""
        return text + (", stops when broken" if self.stop_when_broken else "")


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


PLUGIN = Fab
