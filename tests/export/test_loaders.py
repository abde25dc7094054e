"""Loaders beside network.py, run where this project is not: by RobustBench's calls, by timm, without either."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nas.export.loaders import entry_name
from nas.export.model_info import model_info, write_model_info
from nas.export.package import export_model
from nas.export.parity import export_architecture

INSTALLED = importlib.util.find_spec("timm")
TIMM = os.environ.get("TIMM_PATH") or (str(Path(INSTALLED.origin).parents[1]) if INSTALLED else "")
needs_timm = pytest.mark.skipif(not TIMM, reason="timm is not installed, and TIMM_PATH names no folder it lies in")

ABOUT = {
    "data": "cifar10",
    "threat_model": {"norm": "linf", "epsilon": 8 / 255},
    "extra": False,
    "forward_passes": 1,
    "evaluations": [],
}
EVALUATION = {
    "threat_model": {"norm": "linf", "epsilon": 8 / 255},
    "n": 1000,
    "natural": 0.8571,
    "attacks": {"pgd-20": 0.53, "autoattack": 0.4911},
    "attack_settings": {"pgd-20": "PGD-20", "autoattack": "AutoAttack standard"},
    "worst_case": 0.49,
    "checks": [],
}


@pytest.fixture
def folder(arnas, tmp_path):
    """Both loaders of a network, its answers to images beside them, and its name."""
    export_model(arnas.spec, arnas.model, tmp_path, ["robustbench", "timm"])
    with torch.no_grad():
        save_file({"x": arnas.inputs, "expected": arnas.model(arnas.inputs)}, tmp_path / "case")
    return tmp_path, entry_name(arnas.spec)


def alone(folder: Path, code: str, *paths: str) -> str:
    """What ``code`` prints in a process that finds torch, ``folder`` and ``paths`` alone, nothing of this project."""
    begin = f"""
import sys
sys.path[:0] = {[str(folder), *paths]!r}
import torch
from safetensors.torch import load_file
x, expected = map(load_file({str(folder / "case")!r}).get, ("x", "expected"))
def same(model): return (not model.training) and bool((model(x) - expected).abs().max() < 1e-5)
"""
    end = "\nassert not {'nas', 'search_spaces', 'runs'} & {name.partition('.')[0] for name in sys.modules}\n"
    command = [sys.executable, "-I", "-B", "-c", begin + code + end]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd="/")
    assert not done.returncode, done.stderr
    return done.stdout


def test_both_loaders_give_the_network_without_robustbench_and_timm(folder):
    path, name = folder
    code = f"""
sys.modules["timm"] = None
import robustbench_model, timm_model
model = robustbench_model.load_model(torch.device("cpu"))
print(same(model), same(timm_model.{name}(pretrained=True)))
"""
    assert alone(path, code) == "True True\n"


@needs_timm
def test_timm_makes_the_network_and_refuses_what_it_is_not(folder):
    path, name = folder
    code = f"""
import warnings; warnings.simplefilter("ignore")
import timm, timm_model
model = timm.create_model("{name}", pretrained=True, num_classes=10, in_chans=1)
config = timm.data.resolve_model_data_config(model)
listed = timm.list_models("nas_*", pretrained=True) == ["{name}"]
print(same(model), listed, *(config[key] for key in ("input_size", "mean", "std")))
print(same(timm.create_model("{name}").eval()))
for wish in ({{"num_classes": 7}}, {{"in_chans": 3}}, {{"features_only": True}}):
    try:
        timm.create_model("{name}", **wish)
    except (ValueError, TypeError) as error:
        print(next(iter(wish)) in str(error))
"""
    assert alone(path, code, TIMM) == "True True (1, 8, 8) (0.0,) (1.0,)\nFalse\nTrue\nTrue\nTrue\n"


def test_timm_without_weights_builds_and_says_that_there_are_none(folder, arnas, attack):
    (path, name), bare = folder, folder[0] / "bare"
    kept = export_architecture(arnas.spec, bare, ["timm"], attack)
    assert {file.file for file in kept} == {"network.py", "timm_model.py"} == {file.name for file in bare.iterdir()}
    (bare / "case").write_bytes((path / "case").read_bytes())
    code = f"""
sys.modules["timm"] = None
import timm_model
print(timm_model.{name}()(x).shape == expected.shape)
try:
    timm_model.{name}(pretrained=True)
except FileNotFoundError as error:
    print(error)
"""
    assert alone(bare, code).startswith("True\nno weights: network.safetensors does not lie beside")


def test_networks_of_one_genotype_have_names_of_their_own(arnas, pruned):
    assert arnas.spec.genotype == pruned.spec.genotype and entry_name(arnas.spec) != entry_name(pruned.spec)
    assert entry_name(pruned.spec).isidentifier()


def test_model_info_holds_what_was_measured_in_the_words_of_robustbench(arnas, tmp_path):
    info = model_info(arnas.spec, **{**ABOUT, "evaluations": [EVALUATION]})
    assert info["clean_acc"] == "85.71" and info["autoattack_acc"] == "49.11" and info["reported"] == "49.00"
    assert (info["eps"], info["dataset"], info["additional_data"], info["unreliable"]) == (
        "8/255",
        "cifar10",
        False,
        False,
    )
    assert info["number_forward_passes"] == 1 and "1,000 test images" in info["footnote"]
    path = write_model_info(arnas.spec, info, "linf", tmp_path)
    assert path == tmp_path / "model_info" / "cifar10" / "Linf" / f"{entry_name(arnas.spec)}.json"
    assert json.loads(path.read_text()) == info


def test_model_info_claims_nothing_that_was_not_measured(arnas):
    assert not {"clean_acc", "reported", "autoattack_acc"} & set(model_info(arnas.spec, **ABOUT))
    # Attacks within another threat model than the one it is filed under say nothing of this one.
    other = {**EVALUATION, "threat_model": {"norm": "l2", "epsilon": 0.5}}
    assert "reported" not in model_info(arnas.spec, **{**ABOUT, "evaluations": [other]})
    without = {**EVALUATION, "attacks": {"pgd-20": 0.53}, "attack_settings": {"pgd-20": "PGD-20"}}
    found = model_info(arnas.spec, **{**ABOUT, "evaluations": [without]})
    assert "autoattack_acc" not in found and found["reported"] == "49.00"
    failed = {**EVALUATION, "checks": [{"name": "gradients are true", "verdict": "fail", "detail": ""}]}
    assert model_info(arnas.spec, **{**ABOUT, "evaluations": [failed]})["unreliable"] is True


def test_a_data_set_s_name_cannot_leave_the_folder(arnas, tmp_path):
    path = write_model_info(
        arnas.spec, model_info(arnas.spec, **{**ABOUT, "data": "../../etc/x\n\ud800"}), "linf", tmp_path
    )
    assert path.resolve().is_relative_to(tmp_path / "model_info") and path.is_file()
