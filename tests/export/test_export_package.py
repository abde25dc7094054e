"""Exported files: written as asked, and checked in a fresh process against the model."""

import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nas
from nas.errors import InputError
from nas.export.onnx_file import onnx_bytes
from nas.export.package import FORMATS, ExportedFile, export_model
from nas.export.parity import ExportMismatch, check_exports
from nas.export.reload import answers
from search_spaces.genotype import read_genotype

AS_THEY_ARE = "((255 * x - (255 * x).round()).abs() < 1e-3).flatten(1).all(1)[:, None, None, None]"
"""Which images hold multiples of 1/255 only."""


def test_every_format_writes_its_files_and_nothing_else(arnas, tmp_path):
    folder = tmp_path / "new" / "export"
    files = export_model(arnas.spec, arnas.model, folder, [*FORMATS, "json"])
    expected = [ExportedFile(file, name) for name, entry in FORMATS.items() for file in entry.files]
    assert files == expected
    assert {path.name for path in folder.iterdir()} == {file.file for file in files}
    assert read_genotype(folder / "genotype.json") == arnas.spec.genotype


def test_unknown_format_is_refused_before_anything_is_written(arnas, tmp_path):
    with pytest.raises(InputError, match="unknown export format 'pickle': known: card, dot, graphml, json, onnx, pt2"):
        export_model(arnas.spec, arnas.model, tmp_path / "export", ["json", "pickle"])
    assert not (tmp_path / "export").exists()


def test_fresh_process_gives_the_same_logits(pruned, tmp_path, attack):
    files = export_model(pruned.spec, pruned.model, tmp_path, list(FORMATS))
    model = pruned.model.train()
    checked = check_exports(tmp_path, pruned.spec, model, pruned.inputs, attack)
    assert model.training
    assert [(file.file, file.format) for file in checked] == [(file.file, file.format) for file in files]
    for file in checked:
        if file.format in ("json", "graphml", "dot", "svg"):
            assert file.difference is file.adversarial is file.gradient is file.moved is None
        else:
            assert file.difference <= 1e-5 and file.adversarial <= 1e-5
            assert file.gradient is None if file.format == "onnx" else file.gradient <= 1e-3
            assert file.moved is None if file.format == "onnx" else file.moved <= 0.001


def test_altered_weight_is_found(arnas, tmp_path, attack):
    export_model(arnas.spec, arnas.model, tmp_path, ["json", "py"])
    weights = load_file(tmp_path / "network.safetensors")
    weights["cells.4.dil_conv_3x3_4_to_5.pointwise.weight"][0, 0] += 0.01
    save_file(weights, tmp_path / "network.safetensors")
    with pytest.raises(ExportMismatch, match=r"network\.py gives logits that differ") as caught:
        check_exports(tmp_path, arnas.spec, arnas.model, arnas.inputs, attack)
    assert caught.value.file == "network.py"
    assert caught.value.difference > 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # Pixels of images are multiples of 1/255: those of an attack are not, and lose what is between.
        ("x = (255 * x).round() / 255", "on adversarial images"),
        ("x = x.detach() + 0 * x", "gradients that differ"),
        ("x = x.detach()", "has no gradients"),
        # Clean images are where attacks start.
        (f"x = torch.where({AS_THEY_ARE}, x.detach(), x)", "other adversarial images"),
        # Clipped outside of the images as they are only.
        (f"x = torch.where({AS_THEY_ARE}, x, x.clamp(max=0.9))", "on adversarial images"),
    ],
)
def test_a_file_that_differs_under_attack_only_is_found(arnas, tmp_path, attack, change, message):
    export_model(arnas.spec, arnas.model, tmp_path, ["py"])
    source = (tmp_path / "network.py").read_text()
    start = source.index("def forward", source.index("class Network("))
    line = source.index("\n", start) + 1
    (tmp_path / "network.py").write_text(f"{source[:line]}        {change}\n{source[line:]}")
    inputs = (255 * arnas.inputs).round() / 255
    with pytest.raises(ExportMismatch, match=message):
        check_exports(tmp_path, arnas.spec, arnas.model, inputs, attack)


def test_source_that_needs_the_package_is_found(arnas, tmp_path, monkeypatch, attack):
    monkeypatch.setenv("PYTHONPATH", str(Path(nas.__file__).parents[1]))
    export_model(arnas.spec, arnas.model, tmp_path, ["py"])
    source = tmp_path / "network.py"
    source.write_text(source.read_text() + "\nimport nas.errors\n")
    with pytest.raises(ExportMismatch, match=r"network\.py cannot be used"):
        check_exports(tmp_path, arnas.spec, arnas.model, arnas.inputs, attack)


def test_other_specification_and_logits_that_are_no_numbers_are_found(arnas, tmp_path, monkeypatch, attack):
    from nas.export import parity

    def reports(plain, logits):
        found = {**right, "clean": logits}
        monkeypatch.setattr(parity, "_reloaded", lambda *_: ({"py": {"plain": plain}}, {"py": found}))

    (tmp_path / "network.py").touch()
    right = answers(arnas.model, {"clean": arnas.inputs, "adversarial": attack(arnas.model, arnas.inputs)})
    logits = right["clean"]
    arguments = (tmp_path, arnas.spec, arnas.model, arnas.inputs, attack)
    reports(list(arnas.spec.classes), logits + 0.9e-5)
    assert check_exports(*arguments)[0].difference == pytest.approx(0.9e-5, rel=0.1)
    for plain, wrong, message in [
        (list(arnas.spec.classes[::-1]), logits, "another network"),
        (list(arnas.spec.classes), logits + 1.2e-5, "differ"),
        (list(arnas.spec.classes), logits * float("nan"), "differ"),
        (list(arnas.spec.classes), logits[:1], "shape"),
    ]:
        reports(plain, wrong)
        with pytest.raises(ExportMismatch, match=message):
            check_exports(*arguments)


def test_folder_without_exports_is_refused(arnas, tmp_path, attack):
    with pytest.raises(InputError, match="no exported files"):
        check_exports(tmp_path, arnas.spec, arnas.model, arnas.inputs, attack)


def test_onnx_takes_any_number_of_images_and_names_its_classes(arnas):
    session = onnxruntime.InferenceSession(onnx_bytes(arnas.model, arnas.spec.input_shape, arnas.spec.classes))
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(arnas.spec.classes)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 3, 17):
        x = torch.rand(count, *arnas.spec.input_shape, generator=generator)
        with torch.no_grad():
            expected = arnas.model(x)
        (logits,) = session.run(None, {"pixels": x.numpy()})
        assert (torch.from_numpy(logits) - expected).abs().max() <= 1e-5


def test_a_network_without_a_form_in_onnx_is_an_input_error():
    class Sorted(nn.Module):
        def forward(self, x):
            return x[x > 0.5] if x.sum() > 0 else x

    with pytest.raises(InputError, match="no form in ONNX"):
        onnx_bytes(Sorted(), (1, 4, 4))


def test_a_network_that_torch_export_cannot_follow_leaves_nothing_behind(arnas, tmp_path):
    class Sorted(nn.Module):
        def forward(self, x):
            return x[x > 0.5] if x.sum() > 0 else x

    with pytest.raises(InputError, match=r"torch\.export cannot follow this network: .*--to py or onnx"):
        export_model(arnas.spec, Sorted(), tmp_path, ["json", "svg", "pt2"])
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_packages_says_what_to_install(arnas, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'dsara-nas\[onnx\]'"):
        export_model(arnas.spec, arnas.model, tmp_path / "new", ["json", "onnx"])
    assert not (tmp_path / "new").exists()
