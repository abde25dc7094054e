"""Latents of a network, boundaries between classes among them, and images back from them: the parts of LADDER."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.errors import Diverged, InputError, nearest
from nas.model_state import evaluating
from nas.optimisation import optimiser_tree, restore_optimiser, weight_step
from nas.randomness import derived_seed, generator
from nas.training.stage import Stage

LARGEST_ATTENTION = 1 << 29
"""Numbers in the attention matrices of all pairs of classes, 2 GiB of float32."""


@dataclass(frozen=True, eq=False)
class Latent:
    """Vectors z [N, d] inside ``model``, in eval mode: the mean over positions of what a layer computes.

    layer: a module's name; before: its input is meant rather than its output. Maps are [N, d, H, W], tokens [N, T, d].
    Make it with ``latent``.
    """

    model: nn.Module
    layer: str
    before: bool

    def __call__(self, x: Tensor, batch_size: int = 512) -> Tensor:
        """z [N, d] of images ``x``: [N, C, H, W] in [0, 1], or uint8."""
        return torch.cat([self._run(_pixels(images), None)[0] for images in x.split(batch_size)])

    def logits(self, x: Tensor, shift: Tensor) -> Tensor:
        """What the rest of the network makes of z + ``shift`` [N, d], the same at every position: logits [N, K]."""
        return self._run(_pixels(x), shift)[1]

    def _run(self, x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def see(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() not in (2, 3, 4) or len(value) != len(x):
                raise InputError(
                    f"layer '{self.layer}' computes neither a map, nor tokens, nor a vector of each image: name another"
                )
            positions = {2: (), 3: (1,), 4: (2, 3)}[value.dim()]
            seen.append(value.mean(positions) if positions else value)
            if shift is None:
                return value
            return value + {2: shift, 3: shift.unsqueeze(1), 4: shift[:, :, None, None]}[value.dim()]

        # Not within ``crafting``: folded into a convolution, a normalisation computes nothing any more.
        with evaluating(self.model), torch.no_grad(), _tapped(self.model, self.layer, self.before, see):
            logits = self.model(x)
        if not seen:
            raise InputError(f"layer '{self.layer}' is not used in a forward pass of the network: name another")
        return seen[-1], logits


def latent(model: nn.Module, layer: str, x: Tensor) -> Latent:
    """The output of the module ``layer`` or, without a name, the input of the layer that computes the logits.

    x: an image or two, to look for it. Raises ``InputError`` where there is no such layer.
    """
    if layer:
        names = [name for name, _ in model.named_modules() if name]
        if layer not in names:
            raise InputError(f"the network has no layer '{layer}': {nearest(layer, names)}")
        found = Latent(model, layer, before=False)
    else:
        found = Latent(model, _last_layer(model, _pixels(x[:2])), before=True)
    found(x[:2])
    return found


def _last_layer(model: nn.Module, x: Tensor) -> str:
    """The innermost module with parameters whose output is the logits."""
    outputs: dict[str, Any] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[name] = output

        return keep

    leaves = [(name, module) for name, module in model.named_modules() if name and not any(module.children())]
    handles = [module.register_forward_hook(keeper(name)) for name, module in leaves]
    try:
        with evaluating(model), torch.no_grad():
            logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, module in leaves if any(True for _ in module.parameters()) and outputs.get(name) is logits]
    if not names:
        raise InputError("no layer of the network computes its logits: name the latent layer in 'layer'")
    return names[-1]


@contextmanager
def _tapped(model: nn.Module, layer: str, before: bool, see: Callable[[Any], Any]) -> Iterator[None]:
    """Within it ``see`` gets the input or output of ``layer`` and returns what takes its place."""
    module = model.get_submodule(layer)
    if before:
        handle = module.register_forward_pre_hook(lambda _, inputs: (see(inputs[0]), *inputs[1:]))
    else:
        handle = module.register_forward_hook(lambda _, inputs, output: see(output))
    try:
        yield
    finally:
        handle.remove()


class Decoder(nn.Module):
    """Images [N, C, H, W] in [0, 1] from latents [N, d], of any size: maps of at most 7x7, doubled until they are large
    enough by transposed convolutions.

    mean, std: of the latents [d], which it normalises first.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, image: tuple[int, int, int], width: int) -> None:
        super().__init__()
        channels, self.height, self.width = image
        doublings = 0
        while max(self.height, self.width) > 7 << doublings:
            doublings += 1
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        filters = [width << min(doublings - index, 3) for index in range(doublings + 1)]
        self.start = (filters[0], -(-self.height >> doublings), -(-self.width >> doublings))
        self.enter = nn.Linear(len(mean), math.prod(self.start))
        layers: list[nn.Module] = [nn.BatchNorm2d(filters[0]), nn.ReLU()]
        for incoming, outgoing in pairwise(filters):
            layers += [
                nn.ConvTranspose2d(incoming, outgoing, 2, 2),
                nn.Conv2d(outgoing, outgoing, 3, padding=1, bias=False),
                nn.BatchNorm2d(outgoing),
                nn.ReLU(),
            ]
        self.maps = nn.Sequential(*layers, nn.Conv2d(filters[-1], channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        maps = self.maps(self.enter((z - self.mean) / self.std).unflatten(1, self.start))
        return maps[:, :, : self.height, : self.width].sigmoid()

    def images(self, z: Tensor, batch_size: int = 512) -> Tensor:
        """What it makes of latents [N, d] in eval mode, as images of 8 bit: [N, C, H, W] uint8."""
        with evaluating(self), torch.no_grad():
            decoded = [self(rows) for rows in z.split(batch_size)]
        return torch.cat([images.mul(255).round().to(torch.uint8) for images in decoded])


def fit_decoder(
    z: Tensor, x: Tensor, *, steps: int, batch_size: int, learning_rate: float, width: int, seed: int, stage: Stage
) -> Decoder:
    """The decoder with the smallest mean squared error found from latents ``z`` [N, d] to images ``x`` uint8.

    Adam on random batches, the learning rate falling to 0 as a cosine. What ``stage`` holds is gone on with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "decoder"))
        channels, height, width_ = x.shape[1:]
        decoder = Decoder(z.mean(0), z.std(0).clamp_min(1e-6), (channels, height, width_), width).to(z.device)
    parameters = list(decoder.parameters())
    optimiser = torch.optim.Adam(parameters, lr=learning_rate)
    done = 0
    if tree := stage.read():
        decoder.load_state_dict(tree["decoder"])
        restore_optimiser(optimiser, tree["optimiser"])
        done = tree["done"]
    decoder.train()
    for step in range(done, steps):
        randomness = generator(seed, "decoder rows", step)
        rows = torch.randint(len(z), (min(batch_size, len(z)),), generator=randomness).to(z.device)
        loss = F.mse_loss(decoder(z[rows]), _pixels(x[rows]))
        rate = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        weight_step(loss, parameters, optimiser, rate, 0.0)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            if not bool(loss.isfinite()):
                raise Diverged(f"the error of the decoder is {loss.item()} in step {step}: lower its learning rate")
            state = {"decoder": dict(decoder.state_dict()), "optimiser": optimiser_tree(optimiser), "done": step + 1}
            stage.write(state)
    return decoder.eval()


@dataclass(frozen=True, eq=False)
class Boundaries:
    """A support vector machine for each pair of classes a < b: positive on the side of b.

    weight: [P, d] w;  bias: [P];  attention: [P, d, d] W and [P, d] c of a(z) = exp(softmax(tanh(W z + c))), which
    lies in (1, e] and whose logarithms sum to 1, or None for a(z) = 1;  classes: how many;  accuracy: [P] on latents
    held out. Pairs in the order of ``itertools.combinations``.
    """

    weight: Tensor
    bias: Tensor
    attention: tuple[Tensor, Tensor] | None
    classes: int
    accuracy: Tensor

    def score(self, pair: int, z: Tensor) -> Tensor:
        """w . (a(z) * z) + bias of latents [N, d]: [N]."""
        return (self.attended(pair, z) * z) @ self.weight[pair] + self.bias[pair]

    def attended(self, pair: int, z: Tensor) -> Tensor:
        """a(z) [N, d]."""
        if self.attention is None:
            return torch.ones_like(z)
        matrix, offset = self.attention
        return (z @ matrix[pair].T + offset[pair]).tanh().softmax(1).exp()

    def towards(
        self, z: Tensor, source: Tensor, target: Tensor, unit: Literal["normal", "length", "distance"] = "normal"
    ) -> Tensor:
        """For latents [N, d] of classes ``source`` [N], a(z) * n, n the normal that points to ``target`` [N]: [N, d].

        unit: as it is, or scaled to length 1, or to where the score is 0 with a(z) as here (nowhere, if it is past).
        """
        low, high = torch.minimum(source, target), torch.maximum(source, target)
        pairs = low * (2 * self.classes - low - 1) // 2 + high - low - 1
        side = torch.where(target > source, 1.0, -1.0).to(z)
        direction = torch.empty_like(z)
        for pair in pairs.unique().tolist():
            rows = pairs == pair
            own = side[rows].unsqueeze(1) * self.attended(pair, z[rows]) * self.weight[pair]
            if unit == "length":
                own = F.normalize(own, dim=1)
            elif unit == "distance":
                left = (-side[rows] * self.score(pair, z[rows])).clamp_min(0)
                own = own * (left / own.square().sum(1).clamp_min(1e-30)).unsqueeze(1)
            direction[rows] = own
        return direction


def fit_boundaries(
    z: Tensor,
    y: Tensor,
    classes: int,
    *,
    attention: bool,
    hinge: float,
    per_class: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> Boundaries:
    """Boundaries of all pairs of classes, side by side, from latents ``z`` [N, d] with labels ``y`` [N].

    For each pair hinge * mean max(0, 1 - side * score) + mean(w^2), by stochastic gradient descent on the first
    ``per_class`` latents of each class, of which a random third is held out. w begins at 0; pairs see their samples in
    the same order.
    """
    counts = y.bincount(minlength=classes)
    count = min(per_class, int(counts.min()))
    if count < 3:
        raise InputError(f"boundaries need at least 3 images of every class, not {count}")
    pairs = torch.tensor([*combinations(range(classes), 2)], device=z.device)
    d = z.shape[1]
    if attention and len(pairs) * d * d > LARGEST_ATTENTION:
        raise InputError(
            f"the attention of {len(pairs)} pairs of classes over latents of length {d} needs "
            f"{len(pairs) * d * d * 4 / 2**30:.1f} GiB: set attention = false or name a layer of fewer channels"
        )
    own = torch.stack([(y == label).nonzero().squeeze(1)[:count] for label in range(classes)])
    randomness = generator(seed, "boundaries")
    own = own[:, torch.randperm(count, generator=randomness).to(z.device)]
    used = count - count // 3

    weight = nn.Parameter(torch.zeros(len(pairs), d, device=z.device, dtype=z.dtype))
    bias = nn.Parameter(torch.zeros(len(pairs), device=z.device, dtype=z.dtype))
    parameters = [weight, bias]
    if attention:
        span = 1 / math.sqrt(d)
        for shape in ((len(pairs), d, d), (len(pairs), d)):
            drawn = torch.empty(shape, dtype=z.dtype).uniform_(-span, span, generator=randomness)
            parameters.append(nn.Parameter(drawn.to(z.device)))
    optimiser = torch.optim.SGD(parameters, lr=learning_rate)

    def scores(latents: Tensor) -> Tensor:
        """[P, B] of latents [P, B, d]."""
        weighed = latents * weight.unsqueeze(1)
        if attention:
            matrix, offset = parameters[2:]
            weighed = weighed * (latents @ matrix.mT + offset.unsqueeze(1)).tanh().softmax(2).exp()
        return weighed.sum(2) + bias.unsqueeze(1)

    def samples(places: Tensor, count: int, first: int) -> tuple[Tensor, Tensor]:
        """Latents [P, B, d] and sides [B] of ``places`` [B] among twice ``count`` samples, those of class a first."""
        second = (places >= count).long()
        rows = own[pairs[:, second], (first + places % count).expand(len(pairs), -1)]
        return z[rows], 2.0 * second - 1

    for _ in range(epochs):
        order = torch.randperm(2 * used, generator=randomness).to(z.device)
        for places in order.split(batch_size):
            latents, side = samples(places, used, 0)
            losses = hinge * (1 - side * scores(latents)).clamp_min(0).mean(1) + weight.square().mean(1)
            weight_step(losses.sum(), parameters, optimiser, learning_rate, 0.0)
    with torch.no_grad():
        latents, side = samples(torch.arange(2 * (count - used), device=z.device), count - used, used)
        accuracy = (side * scores(latents) > 0).double().mean(1)
    kept = (parameters[2].detach(), parameters[3].detach()) if attention else None
    return Boundaries(weight.detach(), bias.detach(), kept, classes, accuracy)


def _pixels(x: Tensor) -> Tensor:
    return x.float().div(255) if x.dtype == torch.uint8 else x
