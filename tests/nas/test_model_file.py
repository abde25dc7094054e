"""model.json and model.safetensors: rebuilt from plain data, and anything wrong in them is an InputError."""

import contextlib
import copy
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nas.compression.magnitude import MagnitudePruning
from nas.errors import InputError
from nas.model_file import ModelSpec, load_model, load_weights, save_model, weights_digest, with_plan
from search_spaces.dsara import SPACE
from search_spaces.genotype import StageGenotype

CLASSES = ("a", "größe", "new\nline", '"quoted"')


def _make(kind="cells", keep=(), seed=0):
    if kind == "cells":
        genotype = SPACE.random(torch.Generator().manual_seed(0))
    else:
        genotype = StageGenotype("plain", (1, 2), (3, 4))
    spec = ModelSpec(genotype, 2, 4, (2, 8, 9), CLASSES, (0.4, 0.5), (0.2, 0.3), auxiliary=kind == "cells")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = spec.build()
        for share in keep:
            plan = MagnitudePruning(share).plan(model)
            model, spec = plan.apply(model), with_plan(spec, plan)
        model.train()(torch.rand(8, 2, 8, 9))  # statistics and counters of its own
    return spec, model.eval()


CASES = [("cells", ()), ("plain", ()), ("cells", (0.5,)), ("plain", (0.6, 0.5))]


@pytest.mark.parametrize(("kind", "keep"), CASES, ids=str)
def test_a_model_comes_back_bit_for_bit(kind, keep, tmp_path):
    spec, model = _make(kind, keep)
    save_model(spec, model.train(), tmp_path)
    torch.manual_seed(123)
    again_spec, again = load_model(tmp_path)
    assert again_spec == spec
    assert not any(module.training for module in again.modules())
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    x = torch.rand(3, 2, 8, 9)
    assert torch.equal(again(x), model.eval()(x))
    assert weights_digest(again) == weights_digest(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]
    save_model(again_spec, again, tmp_path)
    assert load_model(tmp_path)[0] == spec


def test_the_specification_survives_json():
    for kind, keep in CASES:
        spec, _ = _make(kind, keep)
        assert ModelSpec.from_data(json.loads(json.dumps(spec.to_data()))) == spec


def test_the_digest_names_the_weights():
    _, model = _make()
    _, other = _make(seed=1)
    digest = weights_digest(model)
    assert digest == weights_digest(copy.deepcopy(model))
    assert digest != weights_digest(other)
    with torch.no_grad():
        model.classifier.bias[0] = torch.nextafter(model.classifier.bias[0], torch.tensor(9.0))
    assert weights_digest(model) != digest


@pytest.mark.parametrize("writer", ["write_bytes", "write_text"])
def test_a_crash_between_the_two_files_leaves_no_model(writer, tmp_path, monkeypatch):
    """Weights first: where model.json stands, its weights do."""
    spec, model = _make()

    def crash(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(f"nas.model_file.{writer}", crash)
    with pytest.raises(OSError, match="disk full"):
        save_model(spec, model, tmp_path)
    assert not (tmp_path / "model.json").exists()
    with pytest.raises(InputError, match=r"model\.json"):
        load_model(tmp_path)


def test_torn_part_files_are_ignored(tmp_path):
    spec, model = _make()
    save_model(spec, model, tmp_path)
    for name in ("model.json.part", "model.safetensors.part"):
        (tmp_path / name).write_bytes(b"torn")
    assert load_model(tmp_path)[0] == spec
    save_model(spec, model, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model, as bytes by file name."""
    folder = tmp_path_factory.mktemp("saved")
    spec, model = _make("cells", (0.5,))
    save_model(spec, model, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _write(files, folder, **changes):
    for name, content in {**files, **changes}.items():
        (folder / name).write_bytes(content)


def test_missing_files_are_input_errors(saved, tmp_path):
    with pytest.raises(InputError, match=r"model\.json"):
        load_model(tmp_path / "absent")
    for name in saved:
        _write(saved, tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(InputError, match=name):
            load_model(tmp_path)


def _tensors(saved, folder):
    _write(saved, folder)
    # Copies: what is loaded may be the file itself, mapped, which is written over.
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_weights_of_another_network_are_input_errors(saved, tmp_path):
    good = _tensors(saved, tmp_path)
    name = "classifier.weight"
    renamed = {("classifier.weights" if key == name else key): value for key, value in good.items()}
    missing = {key: value for key, value in good.items() if key != name}
    surplus = {**good, "extra": torch.ones(1)}
    shapes = [
        {**good, name: value} for value in (good[name].t().contiguous(), good[name][:-1].clone(), torch.tensor(1.0))
    ]
    for tensors in (renamed, missing, surplus, *shapes, {}):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=r"model\.safetensors"):
            load_model(tmp_path)
    save_file(good, tmp_path / "model.safetensors")
    load_model(tmp_path)
    _, plain = _make("plain")
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(InputError):
        load_weights(plain, tmp_path / "model.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())


def test_weights_of_another_kind_of_number_are_input_errors(saved, tmp_path):
    """Complex or integer weights would be cast silently to something else."""
    good = _tensors(saved, tmp_path)
    name = "classifier.weight"
    for value in (good[name].to(torch.complex64), (100 * good[name]).to(torch.int32), good[name] > 0):
        save_file({**good, name: value}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=name):
            load_model(tmp_path)


def _data(saved):
    return json.loads(saved["model.json"])


def _with(saved, path, value):
    data = _data(saved)
    *parents, last = path
    place = data
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


WRONG = {
    "no genotype": (["genotype"], ...),
    "genotype of an unknown space": (["genotype", "space"], "elsewhere"),
    "unknown operation": (["genotype", "cells", "robust", 0, 0, 0], "conv_9x9"),
    "cycle": (["genotype", "cells", "robust", 0, 0, 1], 5),
    "newer schema": (["schema"], 2),
    "no schema": (["schema"], ...),
    "schema as bool": (["schema"], True),
    "no channels": (["channels"], ...),
    "zero channels": (["channels"], 0),
    "bool channels": (["channels"], True),
    "text channels": (["channels"], "8"),
    "endless channels": (["channels"], 10**9),
    "too few cells": (["cells"], 3),
    "endless cells": (["cells"], 10**9),
    "flat image": (["input_shape"], [2, 8]),
    "negative image": (["input_shape"], [2, -8, 8]),
    "no image": (["input_shape"], None),
    "image without channels": (["input_shape"], [0, 8, 8]),
    "other channels": (["input_shape"], [3, 8, 8]),
    "no classes": (["classes"], []),
    "one class": (["classes"], ["a"]),
    "classes null": (["classes"], None),
    "other classes": (["classes"], ["a", "b"]),
    "mean too short": (["mean"], [0.5]),
    "mean of texts": (["mean"], ["a", "b"]),
    "mean beyond floats": (["mean"], [10**400, 0.5]),
    "mean not a number": (["mean"], [float("nan"), 0.5]),
    "zero std": (["std"], [0.0, 0.3]),
    "negative std": (["std"], [-1.0, 0.3]),
    "std not a number": (["std"], [float("nan"), 0.3]),
    "std infinite": (["std"], [float("inf"), 0.3]),
    "no plans": (["plans"], ...),
    "plans null": (["plans"], None),
    "plan without method": (["plans"], [{}]),
    "unknown method": (["plans", 0, "method"], "nothing"),
    "plan of another layer": (["plans", 0, "layers", 1, "name"], "elsewhere"),
    "damaged mask": (["plans", 0, "layers", 1, "data", "mask"], "eJw="),
    "other mask shape": (["plans", 0, "layers", 1, "data", "shape"], [1]),
    "no auxiliary": (["auxiliary"], False),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_entry_is_an_input_error_naming_the_file(kind, saved, tmp_path):
    path, value = WRONG[kind]
    _write(saved, tmp_path, **{"model.json": json.dumps(_with(saved, path, value)).encode()})
    with pytest.raises(InputError, match="model"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": ' + b"1" * 5000 + b"}", b"[" * 100_000 + b"]" * 100_000],
    ids=["empty", "half", "a list", "null", "no text", "endless number", "bottomless"],
)
def test_what_is_no_model_json_is_an_input_error(content, saved, tmp_path):
    _write(saved, tmp_path, **{"model.json": content})
    with pytest.raises(InputError, match=r"model\.json"):
        load_model(tmp_path)


def test_the_specification_itself_raises_input_errors_only(saved):
    for path, value in WRONG.values():
        with contextlib.suppress(InputError):  # the rest is found when the network is built
            ModelSpec.from_data(_with(saved, path, value))


def _damaged(content, chance):
    """One bit flipped near the beginning, where the structure is, or the end cut off."""
    damage = bytearray(content)
    if chance.random() < 0.3:
        del damage[chance.randrange(len(damage)) :]
    else:
        damage[chance.randrange(min(len(damage), 3000))] ^= 1 << chance.randrange(7)
    return bytes(damage)


def test_random_damage_to_model_json_is_an_input_error_or_a_model(saved, tmp_path):
    """What cannot be told from a sound file loads."""
    chance, refused = random.Random(1), 0
    for _ in range(60):
        _write(saved, tmp_path, **{"model.json": _damaged(saved["model.json"], chance)})
        try:
            _, model = load_model(tmp_path)
        except InputError:
            refused += 1
        else:
            assert isinstance(model, nn.Module)
    assert refused > 15


def test_random_damage_to_the_weights_is_an_input_error_or_loads(saved, tmp_path):
    _write(saved, tmp_path)
    _, model = load_model(tmp_path)
    path, chance, refused = tmp_path / "model.safetensors", random.Random(1), 0
    for _ in range(150):
        path.write_bytes(_damaged(saved["model.safetensors"], chance))
        try:
            load_weights(model, path)
        except InputError:
            refused += 1
    assert refused > 75
