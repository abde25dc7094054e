"""Suites hold attacks for every norm, and say what a norm leaves out."""

import pytest

from nas.errors import InputError
from nas.evaluation.suites import SUITES, suite
from nas.threat_model import NORMS, ThreatModel


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", SUITES)
def test_every_attack_of_a_suite_is_there_or_left_out_with_a_reason(name, norm):
    chosen = suite(name, ThreatModel(norm, 0.5))
    assert {*chosen.trials, *chosen.left_out} == set(SUITES[name])
    assert not {*chosen.trials} & {*chosen.left_out}
    assert all(trial.attack.threat_model.norm == norm for trial in chosen.trials.values())
    assert all(reason for reason in chosen.left_out.values())
    if name != "full":
        assert not chosen.left_out


def test_the_suites_grow():
    assert set(SUITES["quick"]) | set(SUITES["standard"]) < set(SUITES["full"])


def test_a_misspelt_suite_is_answered():
    with pytest.raises(InputError, match="standard"):
        suite("standart", ThreatModel())
