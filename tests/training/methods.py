"""A batch, a state, and loss with gradients of an objective: what tests of training methods start from."""

import torch

from nas.objective import Batch, State, gradients_of


def batch_of(seed=0, n=12):
    """Random images in float64 of three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(x, torch.arange(n) % 3, torch.arange(n))


def state_of(seed=0, progress=0.0):
    """The beginning of a training, with streams of its own."""
    generators = [torch.Generator().manual_seed(seed + offset) for offset in (0, 100)]
    return State(epoch=0, step=0, progress=progress, attack_generator=generators[0], method_generator=generators[1])


def loss_and_gradients(objective, model, batch, state=None):
    """Loss and gradients of all weights, zeros where one takes no part."""
    parameters = list(model.parameters())
    loss, gradients, _ = gradients_of(objective, model, batch, state or state_of(), parameters)
    zeros = [torch.zeros_like(parameter) for parameter in parameters]
    return loss, [g if g is not None else zero for g, zero in zip(gradients, zeros, strict=True)]
