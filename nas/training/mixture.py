"""Images or hidden features mixed in pairs: mixup at the input or at any place that cuts a network in two."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.attacks.gradient import per_image
from nas.attacks.hidden_features import blocks_of, hidden_layers
from nas.errors import InputError, nearest
from nas.model_state import crafting

INPUT = "input"
AUTO = "auto"


@dataclass(frozen=True, eq=False)
class Mixture:
    """Image n becomes ``weights[n]`` times itself plus the rest times image ``partners[n]``; labels alike.

    weights: [N] in [0, 1];  partners: [N] int64.
    """

    weights: Tensor
    partners: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """``images`` (or features) [N, ...] mixed."""
        weights = per_image(self.weights, images).to(images.dtype)
        return weights * images + (1 - weights) * images[self.partners]

    def expected(self, of_label: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """The mixture [N] of ``of_label(y)`` and ``of_label(labels of the partners)``."""
        mine, theirs = of_label(y), of_label(y[self.partners])
        weights = self.weights.to(mine.dtype)
        return weights * mine + (1 - weights) * theirs

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy with the mixed labels."""
        return self.expected(lambda labels: F.cross_entropy(logits, labels, reduction="none"), y).mean()

    def accuracy(self, logits: Tensor, y: Tensor) -> Tensor:
        """The mean weight of the labels that are answered."""
        answers = logits.detach().argmax(1)
        return self.expected(lambda labels: (answers == labels).float(), y).mean()


def drawn(
    alpha: float, y: Tensor, choices: int, generator: torch.Generator, *, per_sample: bool
) -> tuple[Mixture, int]:
    """A mixture of images labelled ``y``, and a number below ``choices``.

    Weights max(l, 1 - l) with l ~ Beta(alpha, alpha), one for all or one each; 1 for alpha = 0. The larger share goes
    to the image itself: mixing with 1 - l and the inverse permutation gives the same pairs, and whoever knows only the
    labels of the batch, such as an auxiliary head, then hears the label that weighs more.
    """
    # One number leaves the device; numpy draws Beta variables from a generator of its own, torch only from the global.
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    stream = np.random.default_rng(seed)
    share = stream.beta(alpha, alpha, len(y) if per_sample else 1) if alpha else np.ones(1)
    weights = torch.from_numpy(np.maximum(share, 1 - share)).expand(len(y)).to(y.device)
    partners = torch.from_numpy(stream.permutation(len(y))).to(y.device)
    return Mixture(weights, partners), int(stream.integers(choices))


def joined(first: Mixture, second: Mixture) -> Mixture:
    """The mixture of two batches one after the other, each within itself."""
    partners = torch.cat([first.partners, second.partners + len(first.partners)])
    return Mixture(torch.cat([first.weights, second.weights]), partners)


def mixed_pass(model: nn.Module, x: Tensor, mixture: Mixture, layer: str) -> Tensor:
    """Logits of ``x`` mixed at ``layer``: INPUT, or the name of a module whose output is mixed."""
    if layer == INPUT:
        return model(mixture(x))
    with _mixing(model, layer, mixture):
        logits: Tensor = model(x)
    return logits


@contextmanager
def _mixing(model: nn.Module, layer: str, mixture: Mixture) -> Iterator[None]:
    """Within it a forward pass mixes the output of ``layer``, and what passes it by on its way to later blocks.

    A cell takes the outputs of the two cells before it: mixing one of them alone would leave half of what it sees.
    """
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        raise InputError(f"the network has no layer '{layer}': {nearest(layer, [INPUT, *filter(None, modules)])}")
    earlier: list[Tensor] = []
    bypassing: dict[int, Tensor] = {}
    reached = False

    def remember(module: nn.Module, inputs: Any, output: Any) -> None:
        if not reached and isinstance(output, Tensor):
            earlier.append(output)

    def mix(module: nn.Module, inputs: Any, output: Any) -> Any:
        nonlocal reached
        if reached:  # a module that is used again; ``cuts`` tells whether that does harm
            return output
        if not isinstance(output, Tensor):
            raise InputError(f"layer '{layer}' gives a {type(output).__name__}, not a tensor: it cannot be mixed")
        reached = True
        return mixture(output)

    def mix_bypassing(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not reached:
            return None
        return tuple(mixed(value) if any(value is output for output in earlier) else value for value in inputs)

    def mixed(value: Tensor) -> Tensor:
        if id(value) not in bypassing:
            bypassing[id(value)] = mixture(value)
        return bypassing[id(value)]

    handles = [modules[layer].register_forward_hook(mix)]
    for name, block in blocks_of(model):
        if name != layer:
            handles.append(block.register_forward_hook(remember))
        handles.append(block.register_forward_pre_hook(mix_bypassing))
    try:
        yield
        if not reached:
            raise InputError(f"layer '{layer}' takes no part in the forward pass: name another one to mix at")
    finally:
        for handle in handles:
            handle.remove()


def cuts(model: nn.Module, x: Tensor, layer: str) -> bool:
    """Whether all of a prediction goes through ``layer``; tried on a few images of ``x`` [N, C, H, W], N at least 2.

    Features replaced by those of another image must give its logits. Where something passes the layer by, such as a
    shortcut around a convolution, they do not.
    """
    x = x[:4]
    partners = torch.arange(len(x), device=x.device).roll(1)
    exchange = Mixture(torch.zeros(len(x), device=x.device), partners)
    with crafting(model), torch.no_grad():
        logits = model(x)
        wanted = logits[partners]
        error = (mixed_pass(model, x, exchange, layer) - wanted).abs().amax()
    spread = (wanted - logits).abs().amax()
    if spread == 0 and any(not bool(parameter.any()) for parameter in model.parameters()):
        return cuts(_outspoken(model), x, layer)
    return bool(error <= 1e-2 * spread + 1e-6 * logits.abs().amax())


def _outspoken(model: nn.Module) -> nn.Module:
    """A copy that tells images apart: a classifier that begins with zeros, as those of transformers, does not."""
    copied = copy.deepcopy(model)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            if not bool(parameter.any()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=stream))
    return copied


def mixable(model: nn.Module, layers: Sequence[str], x: Tensor) -> tuple[str, ...]:
    """``layers`` with AUTO replaced by INPUT and the last block of every stage but the last one, where they cut.

    x: some images. Raises ``InputError`` for a layer that does not exist or that something passes by.
    """
    found: list[str] = []
    for layer in layers:
        if layer == AUTO:
            with crafting(model):
                stages = hidden_layers(model, x)[:-1]
            found += [INPUT, *(stage for stage in stages if cuts(model, x, stage))]
            continue
        if layer != INPUT and not cuts(model, x, layer):
            whole = [name for name, _ in blocks_of(model)]
            raise InputError(
                f"features cannot be mixed at layer '{layer}': others pass it by on their way to the logits; name a "
                f"whole block ({', '.join(whole)}) or '{AUTO}'"
            )
        found.append(layer)
    return tuple(dict.fromkeys(found))
