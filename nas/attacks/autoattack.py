"""AutoAttack: four attacks without parameters, one after the other on what still stands."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nas.attacks.apgd import Apgd
from nas.attacks.apgd_t import ApgdT
from nas.attacks.fab import Fab
from nas.attacks.losses import right
from nas.attacks.square import Square
from nas.errors import InputError
from nas.model_state import crafting
from nas.randomness import generator as stream
from nas.tensor_file import read_tree, write_tree
from nas.threat_model import ThreatModel

SECONDS_BETWEEN_WRITES = 10.0
"""Work that is lost at most when a run is killed; all images are written each time."""

Part = Apgd | ApgdT | Fab | Square


@dataclass(frozen=True, eq=False)
class Verdicts:
    """What became of each sample.

    attacks: names in the order in which they ran.  x_adv: [N, C, H, W], adversarial images of what was broken; of what
    stands the image where the first attack's loss was highest; what was misclassified from the start as it was.
    natural: [N] bool, right on the clean image.  broken_by: [N] int64, place in ``attacks``, -1 for none.
    seconds: [A], time each attack took.
    """

    attacks: tuple[str, ...]
    x_adv: Tensor
    natural: Tensor
    broken_by: Tensor
    seconds: Tensor

    @property
    def robust(self) -> Tensor:
        """Samples [N] that no attack broke."""
        return self.natural & (self.broken_by < 0)

    def accuracies(self) -> dict[str, float]:
        """The share that is right on clean images ("natural"), and after each attack on top of those before it."""
        shares = {"natural": float(self.natural.double().mean())}
        for place, name in enumerate(self.attacks):
            standing = self.natural & ((self.broken_by < 0) | (self.broken_by > place))
            shares[name] = float(standing.double().mean())
        return shares

    def to_data(self) -> dict[str, Any]:
        """The same for JSON, with how many samples each attack broke."""
        broke = {name: int((self.broken_by == place).sum()) for place, name in enumerate(self.attacks)}
        seconds = dict(zip(self.attacks, self.seconds.tolist(), strict=True))
        return {"n": len(self.natural), "accuracy_after": self.accuracies(), "broke": broke, "seconds": seconds}


@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack: APGD on cross-entropy, targeted APGD, targeted FAB and Square, each on what the others left.

    Croce and Hein, ICML 2020, arXiv 2003.01690; version and settings of github fra31/auto-attack: "standard"; "plus"
    (APGD on cross-entropy and DLR and FAB with 5 restarts, Square, both targeted ones); "rand" for random models (APGD
    on cross-entropy and DLR, gradients averaged over 20 answers). mode "exact" repeats the reference: its order, its
    batches, its draws of random numbers, every step for every sample of a batch. "fast" runs the same attacks to the
    same verdicts up to chance: samples stop when they are broken, pairs of sample and target share batches that are
    kept full, windows of Square are each sample's own; and with "rand", what broke a sample must also do so for the
    mean of 20 more answers. With two and three classes losses fall back to differences of logits. batch_size: samples
    computed together.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    version: Literal["standard", "plus", "rand"] = "standard"
    mode: Literal["exact", "fast"] = "fast"
    steps: int = 100
    queries: int = 5000
    batch_size: int = 250

    def __post_init__(self) -> None:
        for name, known in (("version", ("standard", "plus", "rand")), ("mode", ("exact", "fast"))):
            if getattr(self, name) not in known:
                raise InputError(f"AutoAttack's {name} must be one of {', '.join(known)}, not '{getattr(self, name)}'")
        if self.batch_size < 1:
            raise InputError(f"attack batch_size must be at least 1, not {self.batch_size}")
        _ = self.attacks  # they check the rest

    @property
    def attacks(self) -> dict[str, Part]:
        """The attacks of this version by the names of the reference, in its order."""
        threat_model, fast, steps = self.threat_model, self.mode == "fast", self.steps
        sparse = threat_model.norm == "l1" and self.version == "standard"
        restarts = {"standard": 5 if sparse else 1, "plus": 5, "rand": 1}[self.version]
        common: dict[str, Any] = {"stop_when_broken": fast, "batch_size": self.batch_size if fast else 0}
        ascent: dict[str, Any] = {**common, "steps": steps, "widening": sparse}
        square = Square(
            threat_model,
            self.queries + 2,  # the reference counts windows, not the clean image and the start
            rescaled=False,
            shared=not fast,
            batch_size=common["batch_size"],
        )
        if self.version == "rand":
            ascent |= {"eot": 20, "stop_when_broken": False}
        apgd_ce = Apgd(threat_model, "cross_entropy", restarts=restarts, **ascent)
        apgd_dlr = Apgd(threat_model, "dlr", restarts=restarts, **ascent)
        if self.version == "rand":
            return {"apgd-ce": apgd_ce, "apgd-dlr": apgd_dlr}
        apgd_t = ApgdT(threat_model, 5 if sparse else 9, **ascent)
        fab_t = Fab(threat_model, 9, steps, **common)
        if self.version == "standard":
            return {"apgd-ce": apgd_ce, "apgd-t": apgd_t, "fab-t": fab_t, "square": square}
        fab = Fab(threat_model, 0, steps, restarts, **common)
        return {
            "apgd-ce": apgd_ce,
            "apgd-dlr": apgd_dlr,
            "fab": fab,
            "square": square,
            "apgd-t": apgd_t,
            "fab-t": fab_t,
        }

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """``run`` with a seed drawn from ``generator``; its images [N, C, H, W]."""
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        return self.run(model, x, y, seed=seed).x_adv

    def run(self, model: nn.Module, x: Tensor, y: Tensor, *, seed: int, progress_file: Path | None = None) -> Verdicts:
        """Attack ``model`` on images ``x`` [N, C, H, W] with labels ``y`` [N].

        What is done is written to ``progress_file``; a call that was interrupted at any moment is made again with the
        same arguments, goes on from there and ends with the same result. Raises ``InputError`` where the file belongs
        to other arguments.
        """
        with crafting(model), torch.no_grad():
            arguments = f"{self}, seed {seed}, {_digest(model, x, y)}" if progress_file is not None else ""
            progress = _Progress(progress_file, arguments)
            state = progress.read(x.device) or {
                "natural": torch.cat([self._right(model, *part, answers=1) for part in self._parts(x, y)]),
                "broken_by": torch.full_like(y, -1),
                "x_adv": x.clone(),
                "seconds": torch.zeros(len(self.attacks), dtype=torch.float64),
                "attack": 0,
                "done": 0,
            }
            natural, broken_by, x_adv = state["natural"], state["broken_by"], state["x_adv"]
            attacks = self.attacks
            for place, (name, attack) in enumerate(attacks.items()):
                if place < state["attack"]:
                    continue
                if place > state["attack"]:
                    state["attack"], state["done"] = place, 0
                standing = (natural & ((broken_by < 0) | (broken_by == place))).nonzero().squeeze(1)
                chunk = self.batch_size * (4 if self.mode == "fast" else 1)
                for number, rows in enumerate(standing.split(chunk)):
                    if number < state["done"]:
                        continue
                    start = time.perf_counter()
                    images, broken = _found(attack, model, x[rows], y[rows], self._draws(seed, name, number, x.device))
                    answers = 20 if self.mode == "fast" and self.version == "rand" else 1
                    broken &= ~self._right(model, images, y[rows], answers=answers)
                    x_adv[rows[broken]] = images[broken]
                    if place == 0:
                        x_adv[rows] = images
                    broken_by[rows[broken]] = place
                    x_adv.flatten()[:1].tolist()  # waits for the device before the clock is read
                    state["seconds"][place] += time.perf_counter() - start
                    state["done"] = number + 1
                    progress.write(state)
            state["attack"] = len(attacks)
            progress.write(state, now=True)
        return Verdicts(tuple(attacks), x_adv, natural, broken_by, state["seconds"].cpu())

    def _draws(self, seed: int, name: str, number: int, device: torch.device) -> torch.Generator:
        """Random numbers of one attack on one part of the samples."""
        if self.mode == "exact":  # the reference seeds anew for every batch, and draws on the CPU
            return torch.Generator().manual_seed(seed)
        return stream(seed, f"AutoAttack {name}", number, device=device)

    def _parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)

    def _right(self, model: nn.Module, x: Tensor, y: Tensor, *, answers: int) -> Tensor:
        """Which samples [N] are right, by the mean probability of ``answers`` answers if they are several."""
        verdicts = []
        for images, labels in self._parts(x, y):
            logits = model(images)
            if answers > 1:
                logits = sum((model(images).softmax(1) for _ in range(answers - 1)), logits.softmax(1))
            verdicts.append(right(logits, labels))
        return torch.cat(verdicts) if verdicts else torch.zeros_like(y, dtype=torch.bool)

    def __str__(self) -> str:
        text = f"AutoAttack {self.version}, {self.mode}, {self.threat_model}"
        return f"{text}, {self.steps} steps, {self.queries} queries, batches of {self.batch_size}"


def _found(attack: Part, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images of one attack, and which samples they break within the threat model."""
    if isinstance(attack, Square):
        attempt = attack.attempt(model, x, y, generator=generator)
        return attempt.x_adv, attempt.broken_at >= 0
    best = attack.found(model, x, y, generator=generator)
    return best.images, best.broken


class _Progress:
    """The file of an interrupted run, if there is to be one."""

    def __init__(self, path: Path | None, arguments: str) -> None:
        self.path, self.arguments, self.written = path, arguments, time.monotonic()

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """What an earlier call had done."""
        if self.path is None or not self.path.exists():
            return None
        state = read_tree(self.path, device)
        if state.pop("arguments", None) != self.arguments:
            raise InputError(f"{self.path} is of another AutoAttack (model, images or settings differ): remove it")
        return state

    def write(self, state: dict[str, Any], now: bool = False) -> None:
        """Keep what is done, if the last time was long enough ago."""
        if self.path is None or not (now or time.monotonic() - self.written >= SECONDS_BETWEEN_WRITES):
            return
        write_tree({**state, "arguments": self.arguments}, self.path)
        self.written = time.monotonic()


def _digest(model: nn.Module, x: Tensor, y: Tensor) -> str:
    """Of the weights, buffers, images and labels."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (*model.state_dict().values(), x, y):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


PLUGIN = AutoAttack
