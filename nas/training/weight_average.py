"""Averages of a network's weights over its training; what is validated and kept is the average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from nas.prediction import begin


class MovingAverage:
    """Exponential moving average over steps, of weights and of running statistics alike.

    decay: of the average. Over the first ``warmup`` steps, if there are any, it is a copy, and s steps later decays by
    (1 + s) / (10 + s) as long as that is less: weights of the beginning are forgotten (as in the program of
    Rebuffi et al., arXiv 2103.01946).
    """

    def __init__(self, model: nn.Module, decay: float, warmup: int = 0) -> None:
        self.decay, self.warmup = decay, warmup
        self._average = AveragedModel(model, multi_avg_fn=self._move, use_buffers=True)

    @property
    def network(self) -> nn.Module:
        """The average, a network of its own."""
        return self._average.module

    def after_step(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self._average.update_parameters(model)

    def after_epoch(self, model: nn.Module, progress: float, images: Iterable[Tensor]) -> None:
        """Nothing is due: steps are averaged."""

    def decay_at(self, step: int) -> float:
        """The decay in force after so many steps."""
        if not self.warmup:
            return self.decay
        since = step - self.warmup
        return min(self.decay, (1 + since) / (10 + since)) if since >= 0 else 0.0

    def _move(self, averages: Any, weights: Any, steps: Tensor | int) -> None:
        # The counter of the average lies on the CPU, ``steps`` on the device, for which nothing shall wait.
        decay = self.decay_at(int(self._average.n_averaged))
        get_ema_multi_avg_fn(decay)(averages, weights, steps)  # type: ignore[no-untyped-call]

    def tree(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return dict(self._average.state_dict())

    def restore(self, tree: Mapping[str, Tensor]) -> None:
        """From the checkpoint."""
        self._average.load_state_dict(tree)


class EpochAverage:
    """Stochastic weight averaging: the mean of the weights at the ends of epochs, from a share of the training on.

    Izmailov et al., UAI 2018, arXiv 1803.05407, algorithm 1; against robust overfitting Chen et al., ICLR 2021 ("Robust
    overfitting may be mitigated by properly learned smoothening"). Running statistics belong to weights and cannot be
    averaged with them: they are those of one pass over the clean training images. Before ``begins`` the network is
    its own average.
    """

    def __init__(self, model: nn.Module, begins: float) -> None:
        self.begins = begins
        self._average = AveragedModel(model)

    @property
    def network(self) -> nn.Module | None:
        """The average, a network of its own; None where none has begun."""
        return self._average.module if self._average.n_averaged else None

    def after_step(self, model: nn.Module) -> None:
        """Nothing is due: epochs are averaged."""

    def after_epoch(self, model: nn.Module, progress: float, images: Iterable[Tensor]) -> None:
        """Take in the weights of an epoch that began at ``progress``; images: all of the training, in batches."""
        if progress >= self.begins:
            self._average.update_parameters(model)
            begin(self._average.module)
            update_bn(images, self._average.module)

    def tree(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return dict(self._average.state_dict())

    def restore(self, tree: Mapping[str, Tensor]) -> None:
        """From the checkpoint."""
        self._average.load_state_dict(tree)
