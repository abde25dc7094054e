"""AI-GAN: a network that has learnt to make targeted adversarial images in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from nas.attacks.losses import margin
from nas.attacks.targeted import TargetedPgd
from nas.data.image_data import SMALLEST_SIDE
from nas.errors import InputError, check_schema
from nas.model_file import weights_digest
from nas.model_state import crafting
from nas.optimisation import weight_step
from nas.tensor_file import read_tree, write_tree
from nas.threat_model import ThreatModel

SCHEMA = 1


@dataclass(frozen=True)
class AiGan:
    """AI-GAN: a conditional generator, trained against the model beforehand, makes targeted images in one pass.

    After Bai et al., arXiv 2002.02196 (first version). A reconstruction from second-hand descriptions, which promises
    no published number. From there: a generator that is told the target class, a discriminator, and two stages of
    training. In the first, a share ``first_stage`` of the epochs, the discriminator takes images of a targeted PGD
    attacker for real, so that the generator first imitates it; in the second the clean ones. The generator minimises
    the cross-entropy of the target class under the frozen model plus ``gan_weight`` times -log D. Inferred: the
    architectures, how the class is told (by scaling and shifting maps), the weights, and that the image is kept in
    the ball by construction (as the extended version, arXiv 2111.10055, is said to do), which leaves nothing for a
    penalty of its size.

    It is a fast attack, not a strong one: a model is not robust because this attack fails. Train it with ``fit``,
    keep it with ``save`` and name that file here as ``file``. targets: how many classes an image is sent to, the
    likeliest wrong one first, when it is used as an untargeted attack; a sample that is broken costs nothing from
    there on.
    """

    threat_model: ThreatModel = field(default_factory=ThreatModel)
    file: str = ""
    targets: int = 9
    epochs: int = 20
    first_stage: float = 0.15
    attacker_steps: int = 10
    gan_weight: float = 0.1
    learning_rate: float = 5e-3
    batch_size: int = 128
    width: int = 16

    def __post_init__(self) -> None:
        if min(self.targets, self.epochs, self.attacker_steps, self.batch_size, self.width) < 1:
            raise InputError("targets, epochs, attacker_steps, batch_size and width of AI-GAN must be at least 1")
        if not 0 <= self.first_stage <= 1:
            raise InputError(f"first_stage of AI-GAN is a share of the epochs from 0 to 1, not {self.first_stage}")
        if not self.gan_weight >= 0 or not self.learning_rate > 0:
            raise InputError("gan_weight of AI-GAN must be at least 0 and its learning_rate above 0")

    def fit(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        generator: torch.Generator,
        log: Callable[[dict[str, float]], None] = lambda record: None,
    ) -> FittedAiGan:
        """The attack, trained against ``model`` in eval mode on images ``x`` [N, C, H, W] with labels ``y`` [N].

        ``log`` gets a record of each epoch: mean losses and the share of images that reached their random target.
        """
        if len(x) == 0 or len(x) != len(y) or x.dim() != 4 or min(x.shape[2:]) < SMALLEST_SIDE:
            raise InputError(
                f"AI-GAN learns from images [N, C, H, W] of at least {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels and as "
                f"many labels, not from {tuple(x.shape)} and {len(y)}"
            )
        with crafting(model), torch.no_grad():
            classes = model(x[:1]).shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            network = Generator(x.shape[1], classes, self.width).to(x)
            discriminator = Discriminator(x.shape[1], self.width).to(x)
        settings = {
            name: value for name, value in asdict(self).items() if name not in ("threat_model", "file", "targets")
        }
        fitted = FittedAiGan(
            self.threat_model, network, tuple(x.shape[1:]), classes, self.threat_model, settings, self.targets
        )
        with crafting(model):
            self._train(model, fitted, discriminator, x, y, generator, log)
        return replace(fitted, network=network.eval().requires_grad_(False))

    def _train(
        self,
        model: nn.Module,
        fitted: FittedAiGan,
        discriminator: nn.Module,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator,
        log: Callable[[dict[str, float]], None],
    ) -> None:
        attacker = TargetedPgd(self.threat_model, self.attacker_steps)
        parameters = [list(network.parameters()) for network in (fitted.network, discriminator)]
        optimisers = [torch.optim.Adam(group, lr=self.learning_rate, betas=(0.5, 0.999)) for group in parameters]
        for epoch in range(self.epochs):
            order = torch.randperm(len(x), generator=generator, device=generator.device).to(x.device)
            imitating = epoch < self.first_stage * self.epochs
            sums = torch.zeros(3, device=x.device)
            for number, rows in enumerate(order.split(self.batch_size)):
                progress = (epoch + number * self.batch_size / len(x)) / self.epochs
                rate = self.learning_rate * min(1.0, 2 * (1 - progress))  # constant, then linearly to nothing
                images, labels = x[rows], y[rows]
                shift = torch.randint(1, fitted.classes, labels.shape, generator=generator, device=generator.device)
                target = (labels + shift.to(labels.device)) % fitted.classes
                real = attacker.towards(model, images, target, generator=generator) if imitating else images
                with torch.enable_grad():
                    fake = fitted.generate(images, target)
                    judged = F.softplus(-discriminator(real)) + F.softplus(discriminator(fake.detach()))
                    weight_step(judged.mean(), parameters[1], optimisers[1], rate, 0.0)
                    logits = model(fake)
                    fooling = F.cross_entropy(logits, target)
                    loss = fooling + self.gan_weight * F.softplus(-discriminator(fake)).mean()
                    weight_step(loss, parameters[0], optimisers[0], rate, 0.0)
                hits = (logits.detach().argmax(1) == target).sum()
                sums += torch.stack([fooling.detach() * len(rows), judged.detach().sum(), hits]).float()
            means = (sums / len(x)).tolist()
            names = ("cross_entropy", "discriminator_loss", "success")
            log({"epoch": epoch, **dict(zip(names, means, strict=True))})

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Adversarial images [N, C, H, W] by the generator in ``file``; raises ``InputError`` where there is none."""
        return self._fitted(x.device)(model, x, y, generator=generator)

    def _fitted(self, device: torch.device | str = "cpu") -> FittedAiGan:
        if not self.file:
            raise InputError(
                "AI-GAN learns before it attacks: AiGan(...).fit(model, x, y, generator=g).save(path); then set file"
            )
        return replace(load(Path(self.file), device), threat_model=self.threat_model, targets=self.targets)

    def __str__(self) -> str:
        return str(self._fitted()) if self.file else f"AI-GAN, {self.threat_model}, not trained"


@dataclass(frozen=True, eq=False)
class FittedAiGan:
    """AI-GAN after its training: an attack, and one that can aim.

    input_shape: (C, H, W) and ``classes`` as trained;  trained_for: the threat model of the training;  settings: of the
    training, for the record. Under another ``threat_model`` the same perturbation is scaled to that ball.
    """

    threat_model: ThreatModel
    network: nn.Module
    input_shape: tuple[int, ...]
    classes: int
    trained_for: ThreatModel
    settings: dict[str, Any]
    targets: int = 9

    def generate(self, x: Tensor, target: Tensor) -> Tensor:
        """One pass: images [N, C, H, W] in the ball around ``x`` that should be classified as ``target`` [N]."""
        if tuple(x.shape[1:]) != self.input_shape:
            raise InputError(f"this AI-GAN was trained on images of shape {self.input_shape}, not {tuple(x.shape[1:])}")
        weights = {name: tensor.to(x) for name, tensor in self.network.named_parameters()}
        direction = functional_call(self.network, weights, (x, target))
        threat_model = self.threat_model
        # Spread over the pixels' own range in the ball, whatever its norm: cut off at black and white instead, dark
        # images leave the generator no gradient and it never learns.
        low = (x - threat_model.epsilon).clamp_min(threat_model.lower)
        high = (x + threat_model.epsilon).clamp_max(threat_model.upper)
        return threat_model.project((low + high) / 2 + (high - low) / 2 * direction, x)

    def towards(self, model: nn.Module, x: Tensor, target: Tensor, *, generator: torch.Generator) -> Tensor:
        """``generate``; neither the model nor chance is asked."""
        del model, generator
        with torch.no_grad():
            return self.generate(x, target)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        """Untargeted: for each sample the first target that breaks it, or the one that came nearest to that."""
        del generator
        with crafting(model), torch.no_grad():
            logits = model(x)
            if logits.shape[1] != self.classes:
                raise InputError(f"this AI-GAN was trained for {self.classes} classes, the model has {logits.shape[1]}")
            likeliest = logits.scatter(1, y.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True, stable=True)
            x_adv, best = x.clone(), torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
            rows = torch.arange(len(x), device=x.device)
            for target in likeliest[:, : min(self.targets, self.classes - 1)].unbind(1):
                images = self.generate(x[rows], target[rows])
                margins = margin(model(images), y[rows], None)
                better = ~(margins <= best[rows])
                x_adv[rows[better]], best[rows[better]] = images[better], margins[better]
                rows = rows[margins <= 0]
                if len(rows) == 0:
                    break
        return x_adv

    def save(self, path: Path) -> None:
        """Write the generator and all that ``load`` needs; safetensors with a JSON header, nothing pickled."""
        about = {
            "schema": SCHEMA,
            "threat_model": asdict(self.trained_for),
            "input_shape": list(self.input_shape),
            "classes": self.classes,
            "settings": self.settings,
        }
        write_tree({"ai_gan": {"value": about}, "network": dict(self.network.state_dict())}, path)

    def __str__(self) -> str:
        trained = f", trained for {self.trained_for}" if self.trained_for != self.threat_model else ""
        attempts = min(self.targets, self.classes - 1)
        return f"AI-GAN {weights_digest(self.network)}, {self.threat_model}{trained}, {attempts} targets"


def load(path: Path, device: torch.device | str = "cpu") -> FittedAiGan:
    """What ``FittedAiGan.save`` wrote. Raises ``InputError`` for anything else."""
    tree = read_tree(path, device)
    try:
        about = tree["ai_gan"]["value"]
        check_schema(about["schema"], SCHEMA, path)
        network = Generator(int(about["input_shape"][0]), int(about["classes"]), int(about["settings"]["width"]))
        network.load_state_dict(tree["network"], assign=True)
        threat_model = ThreatModel(**about["threat_model"])
        shape = tuple(int(size) for size in about["input_shape"])
        network.eval().requires_grad_(False)
        return FittedAiGan(threat_model, network, shape, int(about["classes"]), threat_model, about["settings"])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} holds no AI-GAN ({type(error).__name__}): make one with AiGan.fit and save") from None


class Generator(nn.Module):
    """Directions of shape (N, C, H, W), in -1 to 1, for images and target classes [N].

    Encoder, residual blocks at a quarter of the resolution, decoder with the encoder's maps beside its own; any size of
    image. Every stage is told the class.
    """

    def __init__(self, channels: int, classes: int, width: int, blocks: int = 2) -> None:
        super().__init__()
        self.enter = Stage(channels, width, classes)
        self.coarser = Stage(width, 2 * width, classes, stride=2)
        self.coarsest = Stage(2 * width, 4 * width, classes, stride=2)
        self.blocks = nn.ModuleList(Stage(4 * width, 4 * width, classes) for _ in range(2 * blocks))
        self.finer = Stage(6 * width, 2 * width, classes)
        self.finest = Stage(3 * width, width, classes)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)
        with torch.no_grad():
            self.leave.weight.mul_(0.1)  # begins where tanh is not flat

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        whole = self.enter(x - 0.5, target)
        half = self.coarser(whole, target)
        maps = self.coarsest(half, target)
        for first, second in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            maps = maps + second(first(maps, target), target)
        maps = self.finer(torch.cat([F.interpolate(maps, half.shape[2:]), half], 1), target)
        maps = self.finest(torch.cat([F.interpolate(maps, whole.shape[2:]), whole], 1), target)
        return self.leave(maps).tanh()


class Stage(nn.Module):
    """Convolution, instance normalisation, scale and shift of the target class, ReLU.

    Normalised image by image: what is made of an image does not depend on the others of its batch. The class comes
    after the normalisation, which would take away whatever is the same all over a map.
    """

    def __init__(self, incoming: int, outgoing: int, classes: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(incoming, outgoing, 3, stride, 1, bias=False)
        self.scale = nn.Embedding(classes, outgoing)
        self.shift = nn.Embedding(classes, outgoing)
        nn.init.normal_(self.scale.weight, 1.0, 0.5)  # the classes differ from the start
        nn.init.normal_(self.shift.weight, 0.0, 0.5)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        maps = F.instance_norm(self.convolution(x))
        return F.relu(maps * self.scale(target)[:, :, None, None] + self.shift(target)[:, :, None, None])


class Discriminator(nn.Module):
    """How real each image looks, as a logit [N]: the mean over patches."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for outgoing in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(channels, outgoing, 4, 2, 1), nn.LeakyReLU(0.2)]
            channels = outgoing
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x - 0.5).mean((1, 2, 3))


PLUGIN = AiGan
