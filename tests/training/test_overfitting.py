"""What records say of overfitting, slow and sudden."""

import pytest
import torch

from nas.attacks.fgsm import Fgsm
from nas.data.augmentation import Augmentation
from nas.errors import Diverged
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training import loop
from nas.training.loop import Training, Validation, train
from nas.training.overfitting import collapse_warning, robust_overfitting
from nas.training.standard import Standard


def _record(epoch, accuracy, robust=None):
    return {"epoch": epoch, "accuracy": accuracy} | ({} if robust is None else {"validation_robust": robust})


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([_record(0, 0.5, 0.5), _record(1, 0.9, 0.1)], True),
        ([_record(0, 0.5, 0.5), _record(1, 0.7), _record(2, 0.9, 0.1)], True),  # validated every other epoch
        ([_record(0, 0.5, 0.5), _record(1, 0.5, 0.1)], False),  # both fall: another trouble
        ([_record(0, 0.5, 0.5), _record(1, 0.9, 0.35)], False),  # not by enough
        ([_record(0, 0.5, 0.1), _record(1, 0.9, 0.5)], False),
        ([_record(0, 0.5, 0.5), _record(1, 0.9, 0.1), _record(2, 0.95)], False),  # told once
        ([_record(0, 0.5, 0.5), _record(1, 0.9, 0.1), _record(2, 0.95, 0.1)], False),
        ([_record(0, 0.9, 0.1)], False),
        ([{"epoch": 0, "validation_robust": 0.5}, {"epoch": 1, "validation_robust": 0.1}], False),
    ],
)
def test_a_collapse_is_told_when_it_happens(records, told):
    warning = collapse_warning(records)
    assert (warning is not None) == told
    if told:
        assert "50.0%" in warning and "10.0%" in warning and "90.0%" in warning and "n_fgsm" in warning


def test_the_gap_to_the_best():
    assert robust_overfitting([], 0.3) == 0
    assert robust_overfitting([_record(0, 0.5, 0.4), _record(1, 0.5)], 0.5) == 0
    assert robust_overfitting([_record(0, 0.5, 0.4), _record(1, 0.5, 0.7)], 0.5) == pytest.approx(0.2)


def test_records_of_a_training_show_both(data, parts, network, monkeypatch, tmp_path):
    script = [Validation(0.5, 0.4), Validation(0.6, 0.7), Validation(0.9, 0.1), Validation(0.9, 0.2)]
    monkeypatch.setattr(loop, "validate", lambda *arguments: script[len(seen)])
    seen, accuracies = [], iter([0.4, 0.6, 0.9, 0.95])

    class Scripted(Standard):
        def __call__(self, model, batch, state):
            loss, _ = Standard()(model, batch, state)
            return loss, {"accuracy": torch.tensor(current[0])}

    current = [next(accuracies)]

    def log(record):
        seen.append(record)
        current[0] = next(accuracies, 1.0)

    training = Training(epochs=4, batch_size=20, optimiser=Sgd(0.05), augmentation=Augmentation())
    records = train(network(), data, parts, Scripted(), training, validation_attack=None, seed=0, log=log)
    assert [record["robust_overfitting"] for record in records] == pytest.approx([0, 0, 0.6, 0.5])
    assert [bool(record.get("warnings")) for record in records] == [False, False, True, False]
    assert records == seen


class _Fails(Standard):
    def __call__(self, model, batch, state):
        loss, metrics = Standard()(model, batch, state)
        return (loss * float("nan") if (state.epoch, state.step % 2) == (1, 1) else loss), metrics


def test_a_loss_that_is_no_number_is_told_with_its_step(data, parts, network, tmp_path):
    training = Training(epochs=3, batch_size=20, optimiser=Sgd(0.05), augmentation=Augmentation())
    checkpoint = tmp_path / "checkpoint.safetensors"
    settings = {"validation_attack": Fgsm(ThreatModel("linf", 0.1)), "seed": 0}
    with pytest.raises(Diverged, match=r"nan at step 2 of 2 of epoch 1.*learning rate.*holds epoch 0, the last good"):
        train(network(), data, parts, _Fails(), training, checkpoint=checkpoint, **settings)
    with pytest.raises(Diverged, match="no epoch before it was kept"):
        train(network(), data, parts, _Fails(), training, **settings)
