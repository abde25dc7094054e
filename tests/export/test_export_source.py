"""The exported source file: the same network, in plain torch, safe to write and to load."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nas.errors import InputError
from nas.export.package import export_model
from nas.export.source import deployed_state, network_source
from nas.model_file import weights_digest
from search_spaces.network import parameter_count

RUFF = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def _exported(case, folder):
    export_model(case.spec, case.model, folder, ["py"])
    return folder / "network.py", folder / "network.safetensors"


def test_reloaded_network_gives_the_same_logits(case, tmp_path, imported):
    source, weights = _exported(case, tmp_path)
    module = imported(source)
    model = module.load(weights)
    assert not model.training
    with torch.no_grad():
        expected, logits = case.model(case.inputs), model(case.inputs)
    # Inputs that give the same answer whatever they are would hide a mistake.
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    assert (logits - expected).abs().max() <= 1e-5
    assert case.spec.classes == module.CLASSES
    assert sum(weight.numel() for weight in module.build().parameters()) == parameter_count(case.model)


def test_shapes_in_the_comments_are_those_of_the_maps(case, tmp_path, imported):
    source, weights = _exported(case, tmp_path)
    text = source.read_text()
    written = dict(re.findall(r"self\.(\w+) = .*# -> (\[.*\])$", text, re.MULTILINE))
    written |= {f"cells.{index}": shape for index, shape in re.findall(r"# (\d+) -> (\[.*\])$", text, re.MULTILINE)}
    model, found = imported(source).load(weights), {}
    for name in written:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: found.update({name: str(list(output.shape[1:]))})
        )
    model(case.inputs)
    assert written == found
    places = [name for name in written if name.startswith(("cells", "stage"))]
    assert len(places) == len(getattr(model, "cells", case.spec.genotype.to_data().get("depths", ())))


def test_source_uses_torch_and_the_standard_library_only(case):
    source = network_source(case.spec)
    assert source == network_source(case.spec)
    compile(source, "network.py", "exec")
    for node in ast.walk(ast.parse(source)):
        modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            assert module.partition(".")[0] in {"torch", *sys.stdlib_module_names}


def test_source_holds_only_the_classes_it_uses(case):
    tree = ast.parse(network_source(case.spec))
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert defined - named <= {"load"}


@pytest.mark.skipif(RUFF is None, reason="ruff is not installed")
def test_source_is_clean(cases, tmp_path):
    for name, make in cases.items():
        (tmp_path / f"{name}.py").write_text(network_source(make().spec))
    command = [RUFF, "check", "--isolated", "--no-cache", "--select", "E,F", "--line-length", "120"]
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_source_is_a_program(arnas, tmp_path, capsys, monkeypatch):
    # A name that no terminal can print must not stop it.
    source, weights = _exported(replace(arnas, spec=replace(arnas.spec, classes=("\ud800",) * 10)), tmp_path)
    monkeypatch.setattr(sys, "argv", [str(source), str(weights)])
    runpy.run_path(str(source), run_name="__main__")
    output = capsys.readouterr().out
    assert f"{parameter_count(arnas.model):,} parameters" in output
    assert "a black image is" in output


def test_exporting_leaves_the_model_alone(pruned, tmp_path):
    model = pruned.model.train()
    before = weights_digest(model)
    _exported(pruned, tmp_path)
    assert model.training
    assert weights_digest(model) == before


def test_masks_are_baked_in_and_the_auxiliary_head_is_left_out(pruned):
    state = deployed_state(pruned.spec, pruned.model)
    masked = [layer for layer in pruned.spec.plans[0].layers if layer.action == "masked"]
    zeros = sum(int((value == 0).sum()) for name, value in state.items() if value.dim() == 4)
    kept = sum(int(layer.reason.split()[0]) for layer in masked)
    total = sum(int(layer.reason.split()[2]) for layer in masked)
    assert zeros == total - kept
    assert not any("auxiliary" in name or "parametrizations" in name for name in state)


def test_class_name(arnas):
    assert "class Digits(nn.Module):" in network_source(arnas.spec, "Digits")
    for name in ["", "a b", "1", "class", "Preprocess", "Tensor", "load", "größe", "ValueError", "x\n"]:
        with pytest.raises(InputError, match="name of the exported class"):
            network_source(arnas.spec, name)
    # A kind of cell gives way to the name asked for.
    assert "class AccurateCell2(nn.Module):" in network_source(arnas.spec, "AccurateCell")


def test_what_cannot_be_described_is_refused(arnas, case):
    with pytest.raises(InputError, match="finite"):
        network_source(replace(arnas.spec, mean=(float("nan"),)))
    if case.spec != arnas.spec and not case.spec.plans:
        with pytest.raises(InputError, match="not the network described"):
            deployed_state(case.spec, arnas.model)


# Loading


def _rewritten(content: bytes, change) -> bytes:
    """A safetensors file whose header went through ``change``."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _entry(**values):
    return lambda header: header["classifier.weight"].update(values)


HEADER_CHANGES = {
    "other type": _entry(dtype="F16"),
    "type not text": _entry(dtype=["F32"]),
    "other shape": _entry(shape=[1]),
    "shape not a list": _entry(shape=None),
    "beyond the end": _entry(data_offsets=[10**9, 10**9 + 32 * 10 * 4]),
    "before the start": _entry(data_offsets=[-32 * 10 * 4, 0]),
    "too short": _entry(data_offsets=[0, 4]),
    "not numbers": _entry(data_offsets=["0", "4"]),
    "one offset": _entry(data_offsets=[0]),
    "no offsets": lambda header: header["classifier.weight"].pop("data_offsets"),
    "entry not an object": lambda header: header.update({"classifier.weight": 3}),
    "missing tensor": lambda header: header.pop("classifier.weight"),
    "unknown tensor": lambda header: header.update({"more": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
}


def test_foreign_and_damaged_weights_are_refused(arnas, pruned, tmp_path, imported):
    source, weights = _exported(arnas, tmp_path)
    module, content = imported(source), weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    files = {
        "empty": b"",
        "short": b"1234",
        "text": b"no weights at all",
        "length only": (2**63).to_bytes(8, "little"),
        "nested": (10**6).to_bytes(8, "little") + b"[" * 10**6,
        "list": (2).to_bytes(8, "little") + b"[]",
        "not utf-8": (2).to_bytes(8, "little") + b"\xff\xff",
        "cut in the header": content[: length // 2],
        "cut in the tensors": content[:-1],
        "longer": content + b"\0",
        **{name: _rewritten(content, change) for name, change in HEADER_CHANGES.items()},
    }
    save_file(arnas.model.state_dict(), tmp_path / "package.safetensors")
    files["weights of the package"] = (tmp_path / "package.safetensors").read_bytes()
    for damaged in files.values():
        (tmp_path / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape("damaged.safetensors")):
            module.load(tmp_path / "damaged.safetensors")
    with pytest.raises(FileNotFoundError):
        module.load(tmp_path / "absent.safetensors")
    (tmp_path / "same.safetensors").write_bytes(_rewritten(content, lambda header: None))
    module.load(tmp_path / "same.safetensors")
