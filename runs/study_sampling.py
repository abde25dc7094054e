"""Configurations drawn by Optuna's samplers, one trial each.

A sampler is made anew for each trial from the recipe's seed and the trial's number, and knows what the storage tells
it: one worker that is interrupted goes on as it would have, and several do not draw alike.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from nas.errors import InputError
from nas.randomness import derived_seed
from runs.study_ledger import Claim, Ledger, configuration_of, key_of, stands
from runs.study_part import Sampling, StudyPart
from runs.study_space import Axes, Axis, Costs, fits, refusal

REFUSED_IN_A_ROW = 1000
"""Draws beyond the limits after which the search for one within them is given up."""


@dataclass
class Drawing:
    """Draws configurations for the trials of one study."""

    part: StudyPart
    axes: Axes
    costs: Costs
    seed: int
    _refused: int = 0

    @property
    def sampling(self) -> Sampling:
        """The sampler and how many trials it has."""
        assert self.part.sampler is not None
        return self.part.sampler

    def check(self) -> None:
        """Raise ``InputError`` where even the smallest configuration is beyond the limits."""
        if not (self.part.limits.parameters or self.part.limits.macs):
            return
        least = [axis.choices if not _numeric(axis) else (min(axis.choices),) for axis in self.axes.axes]
        names = [axis.name for axis in self.axes.axes]
        smallest = [self.axes.configuration(dict(zip(names, c, strict=True))) for c in itertools.product(*least)]
        counted = [(one, *self.costs(one)) for one in smallest]
        if not any(fits(None, self.part.limits, p, m) for _, p, m in counted):
            raise InputError(refusal(None, self.part.limits, counted))

    def enough(self, trials: list[FrozenTrial]) -> bool:
        """Whether as many trials are settled as the sampler has."""
        return sum(stands(t) and t.state != TrialState.RUNNING for t in trials) >= self.sampling.trials

    def claim(self, ledger: Ledger, trials: list[FrozenTrial]) -> Claim | None:
        """A trial of a configuration that nobody has, one that was lost first; None where there is none now."""
        standing = ledger.standing(trials)
        for trial in trials:
            key = key_of(trial)
            if trial.state == TrialState.FAIL and key is not None and key not in standing and _was_lost(trial):
                claim = ledger.claim(key, configuration_of(trial), trial.params, trial.distributions)
                if claim is not None and self._surplus(ledger, claim.trial):
                    ledger.end(claim.trial, "enough")
                    return None
                return claim
        if sum(map(stands, trials)) >= self.sampling.trials:
            return None
        number = ledger.begin()
        if self._surplus(ledger, number):
            ledger.end(number, "enough")
            return None
        return self._draw(ledger, number)

    def _surplus(self, ledger: Ledger, trial: int) -> bool:
        """Whether as many trials as there may be stand before this one."""
        before = itertools.takewhile(lambda other: other._trial_id != trial, ledger.trials())
        return sum(map(stands, before)) >= self.sampling.trials

    def _draw(self, ledger: Ledger, trial: int) -> Claim | None:
        study = ledger.study
        number = ledger.storage.get_trial(trial).number
        study.sampler = sampler(self.sampling, derived_seed(self.seed, "sampler", number) % 2**32, self.seed)
        drawing = optuna.trial.Trial(study, trial)
        configuration = self.axes.configuration({axis.name: _suggest(drawing, axis) for axis in self.axes.axes})
        parameters, macs = self.costs(configuration)
        if not fits(None, self.part.limits, parameters, macs):
            ledger.end(trial, "beyond the limits")
            self._refused += 1
            if self._refused >= REFUSED_IN_A_ROW:
                raise InputError(
                    f"study.limits: {self._refused} draws in a row are beyond them: raise them, or give smaller choices"
                )
            return None
        self._refused = 0
        named = ledger.name(trial, configuration.digest, configuration.to_data())
        if isinstance(named, Claim):
            return named
        if named is not None:
            # Drawn before: the same recipe would find the same, so this is what the sampler is told.
            told(study, trial, named.values)
            ledger.storage.set_trial_user_attr(trial, "repeats", named.number)
            ledger.storage.set_trial_state_values(trial, TrialState.COMPLETE, named.values)
        else:
            ledger.end(trial, "taken")
        return None


def told(study: optuna.Study, trial: int, values: list[float]) -> None:
    """Let the sampler of a trial take note of its end, as ``Study.tell`` does."""
    study.sampler.after_trial(study, study._storage.get_trial(trial), TrialState.COMPLETE, values)


def sampler(sampling: Sampling, seed: int, common: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial. seed: its own; common: of the study, for sequences that all trials share."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if sampling.name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if sampling.name == "qmc":
            independent = optuna.samplers.RandomSampler(seed=seed)
            return optuna.samplers.QMCSampler(
                scramble=True, seed=common % 2**32, independent_sampler=independent,
                warn_independent_sampling=False, warn_asynchronous_seeding=False,
            )  # fmt: skip
        if sampling.name == "nsga2":
            population = max(4, min(50, sampling.trials // 5))
            return optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        # Trials that run count as bad ones meanwhile, so that several workers do not draw the same.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _numeric(axis: Axis) -> bool:
    return all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in axis.choices)


def _suggest(trial: optuna.Trial, axis: Axis) -> Any:
    """A choice. Of numbers the sampler sees the rank, so that it knows which are near each other."""
    if len(axis.choices) == 1:
        return axis.choices[0]
    if _numeric(axis):
        return sorted(axis.choices)[trial.suggest_int(f"{axis.name} rank", 0, len(axis.choices) - 1)]
    texts = [_text(choice) for choice in axis.choices]
    return axis.choices[texts.index(trial.suggest_categorical(axis.name, texts))]


def _text(choice: Any) -> Any:
    return ":".join(map(str, choice)) if isinstance(choice, tuple) else choice


def _was_lost(trial: FrozenTrial) -> bool:
    return str(trial.user_attrs.get("reason", "")).startswith(("lost", "stopped"))
