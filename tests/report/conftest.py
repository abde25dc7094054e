"""Made-up but realistic results of a run, as the pipeline hands them to the report."""

import copy
import math

import pytest
import torch

from nas.analysis.complexity import complexity
from nas.analysis.topology import topology
from nas.model_file import ModelSpec
from search_spaces import dsara
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import StageGenotype

CHECKS = (
    "more steps do not help the attack",
    "a larger epsilon lowers accuracy to chance",
    "black box is not stronger than white box",
    "transfer from another network",
    "loss surface is smooth",
)
SETTINGS = {
    "fgsm": "one step of size 0.1, cross-entropy",
    "pgd": "40 steps of size 0.0125, 5 random starts, cross-entropy",
    "apgd_dlr": "100 steps, momentum 0.75, 2 restarts, difference of logits ratio",
    "square": "1000 queries, p_init 0.8, 1 restart, margin loss",
}


def model(name, role, worst, natural, parameters, *, nonzero=None, genotype=None, shift=0.0):
    half = 1.96 * math.sqrt(worst * (1 - worst) / 360)
    found = {
        "name": name,
        "role": role,
        "parameters": parameters,
        "nonzero": nonzero if nonzero is not None else parameters,
        "macs": 61 * parameters,
        "bytes": {"dense": 4 * parameters, "sparse": 2 * parameters},
        "n": 360,
        "natural": natural,
        "attacks": {"fgsm": worst + 0.04, "pgd": worst + 0.011, "apgd_dlr": worst + 0.003, "square": worst + 0.028},
        "worst_case": worst,
        "interval": [worst - half, min(1.0, worst + half)],
        "checks": [
            {"name": check, "verdict": "pass", "detail": f"accuracy {worst - 0.01 * i:.3f} as expected"}
            for i, check in enumerate(CHECKS)
        ],
        "attack_settings": dict(SETTINGS),
        "digest": f"c0ffee{parameters:06x}",
        "training": [
            {
                "epoch": epoch,
                "loss": 2.3 * math.exp(-epoch / 12) + 0.35 + 0.02 * math.sin(epoch + shift),
                "validation_natural": natural * (1 - math.exp(-(epoch + 1) / 6)) + 0.004 * math.sin(3 * epoch + shift),
                "validation_robust": worst * (1 - math.exp(-(epoch + 1) / 9)) + 0.006 * math.cos(2 * epoch + shift),
            }
            for epoch in range(40)
        ],
    }
    if genotype is not None:
        found["genotype"] = genotype.to_data()
    return found


def mixing(epoch):
    """The weights of three operations on the five edges of a cell of two nodes."""
    more = 0.008 * epoch
    return {"skip_connect": [1 / 3 - more] * 5, "sep_conv_3x3": [1 / 3 + more] * 5, "max_pool_3x3": [1 / 3] * 5}


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def epoch_row(epoch):
    adversarial_only = epoch < 8
    return {
        "epoch": epoch,
        "stage": "adversarial" if adversarial_only else "natural, adversarial by min-norm",
        "natural_loss": 2.2 * math.exp(-epoch / 8) + 0.1,
        "adversarial_loss": 2.3 * math.exp(-epoch / 14) + 0.4,
        "weight_loss": 2.3 * math.exp(-epoch / 10) + 0.3,
        "natural_accuracy": 0.98 - 0.85 * math.exp(-epoch / 4),
        "robust_accuracy": 0.86 - 0.75 * math.exp(-epoch / 6) + 0.01 * math.sin(epoch),
        "gamma": None if adversarial_only else 0.35 + 0.15 * math.sin(epoch),
        "mixing_weights": {kind: mixing(epoch) for kind in ("accurate", "reduction", "robust")},
        "alpha_entropy": {"accurate": 1.945 - 0.01 * epoch, "reduction": 1.945 - 0.006 * epoch, "robust": 1.9},
        "parameter_free_edges": {"accurate": [6 + epoch // 7, 14], "reduction": [5, 14], "robust": [1, 14]},
    }


@pytest.fixture
def results(complete_results):
    """All parts present, the test's own to change."""
    return copy.deepcopy(complete_results)


@pytest.fixture(scope="session")
def complete_results():
    """A search, its compression, five random cells, a plain network."""
    genotype = load_genotype("arnas")
    spec = ModelSpec(genotype, 8, 6, (1, 8, 8), tuple("0123456789"), (0.3,), (0.3,))
    randoms = [dsara.SPACE.random(torch.Generator().manual_seed(seed)) for seed in range(5)]
    searched = model("searched", "searched", 0.903, 0.986, 50_418, genotype=genotype)
    searched["checks"][3].update(verdict="warn", detail="the transfer attack is 0.4 points stronger than PGD")
    compressed = model("compressed", "compressed", 0.897, 0.983, 50_418, nonzero=21_007, shift=1)
    plain = model("plain", "plain", 0.853, 0.978, 52_330, genotype=StageGenotype("plain", (2, 2), (32, 48)), shift=2)
    plain["checks"][1].update(verdict="fail", detail="at epsilon 0.5 accuracy is still 31%")
    return {
        "schema": 1,
        "name": "digits-robust",
        "command": "nas run digits-robust --seed 0 --out runs/digits-robust\nnas report runs/digits-robust",
        "seed": 0,
        "threat_model": {"norm": "linf", "epsilon": 0.1},
        "data": {
            "name": "digits",
            "input_shape": [1, 8, 8],
            "classes": list("0123456789"),
            "train": 1437,
            "test": 360,
            "digest": "5d41402abc4b",
        },
        "genotype": genotype.to_data(),
        "search": {
            "epochs": [epoch_row(epoch) for epoch in range(25)],
            "warnings": ["epoch 21: parameter-free operations lead on 9 of 14 edges of the accurate cell"],
        },
        "analysis": {
            "topology": [row.to_data() for row in topology(genotype)],
            "complexity": complexity(spec).to_data(),
        },
        "models": [
            searched,
            compressed,
            *(
                model(f"random {i}", "random", 0.871 + 0.009 * i, 0.979 + 0.002 * i, 49_000 + 700 * i, genotype=one)
                for i, one in enumerate(randoms)
            ),
            plain,
        ],
        "export": [{"file": "model.onnx", "difference": 1.2e-6}, {"file": "architecture.json", "difference": None}],
        "throughput": {
            "device": "cpu",
            "threads": 2,
            "engines": {
                "eager": {
                    "batches": {
                        "64": {
                            "searched": {"images_per_second": 5630.0, "speed": 1.0},
                            "compressed": {"images_per_second": 5660.0, "speed": 1.01},
                        }
                    }
                }
            },
        },
        "gallery": {
            "looked_at": 32,
            "fallen": 1,
            "pairs": [
                dict.fromkeys(("clean", "change", "adversarial"), PIXEL)
                | {"label": "3", "seen": "8", "broken": True, "scale": 0.1}
            ],
        },
        "environment": {"python": "3.11.7", "torch": "2.15.0", "processor": "2 cores", "platform": "Linux-6.1-x86_64"},
        "timing": {"search": 412.3, "train": 1803.0, "compress": 95.1, "evaluate": 7391.8},
    }
