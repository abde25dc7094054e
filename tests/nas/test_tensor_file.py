"""Checkpoint files: whole or not at all, read back exactly, and a damaged one is always an InputError."""

import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import save

from nas import tensor_file
from nas.errors import InputError
from nas.tensor_file import read_tensors, read_tree, write_bytes, write_text, write_tree


def _tree():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(4, 6, generator=generator)
    return {
        "model": {"a.weight": weights, "a.count": torch.tensor(3), "none": torch.zeros(0, 2), "view": weights.t()[1:3]},
        "shared": {"first": weights, "second": weights},
        "kinds": {
            "half": torch.ones(2, dtype=torch.float16), "brain": torch.ones(2, dtype=torch.bfloat16),
            "double": torch.tensor([1 / 3], dtype=torch.float64), "mask": torch.tensor([True, False]),
            "bytes": torch.arange(4, dtype=torch.uint8), "large": torch.tensor([2**62]),
            "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        },
        "records": [{"epoch": 0, "loss": 0.1 + 0.2, "names": ["ä", "\n"], "nothing": None, "yes": True}],
        "best_key": [-1.0, 1e-300],
        "empty": {},
        "deep": {"a": {"b": {"c": {"d": torch.eye(2), "e": {}}}}},
        "tensor": {"tensor": 5, "tree": "tree", "value": [1]},
    }  # fmt: skip


def _same(ours, theirs):
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            _same(ours[key], theirs[key])
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        as_bytes = [tensor.contiguous().view(-1).view(torch.uint8).tolist() for tensor in (ours, theirs)]
        assert as_bytes[0] == as_bytes[1]
    else:
        assert ours == theirs


def test_a_tree_comes_back_bit_for_bit(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tree(_tree(), path)
    _same(read_tree(path), _tree())
    assert os.listdir(tmp_path) == ["a.safetensors"]
    write_tree({"x": torch.ones(1)}, path)
    _same(read_tree(path), {"x": torch.ones(1)})


def test_parameters_are_written_without_their_graph(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tree({"w": torch.nn.Parameter(torch.ones(2)) * 2}, path)
    assert not read_tree(path)["w"].requires_grad


def test_names_with_slashes_do_not_collide(tmp_path):
    """An attack may be called "pgd 8/255"."""
    tree = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1), "b/c": torch.full((1,), 2.0)}, "": {"": torch.ones(2)}}
    tree["a"]["b/"] = {"c": torch.full((1,), 3.0), "": torch.full((1,), 4.0)}
    write_tree(tree, tmp_path / "a.safetensors")
    _same(read_tree(tmp_path / "a.safetensors"), tree)


def test_a_torn_part_file_is_ignored_and_replaced(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tree({"x": torch.ones(1)}, path)
    torn = tmp_path / "a.safetensors.part"
    torn.write_bytes(b"half a che")
    _same(read_tree(path), {"x": torch.ones(1)})
    write_tree({"x": torch.zeros(1)}, path)
    _same(read_tree(path), {"x": torch.zeros(1)})
    assert not torn.exists()


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_content(tmp_path, monkeypatch, moment):
    path = tmp_path / "a.safetensors"
    write_tree({"x": torch.ones(3)}, path)

    def crash(*arguments):
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file.os, moment, crash)
        with pytest.raises(OSError, match="disk gone"):
            write_tree({"x": torch.zeros(3)}, path)
    _same(read_tree(path), {"x": torch.ones(3)})


def test_text_and_bytes(tmp_path):
    write_text("größe\n", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == "größe\n".encode()
    write_bytes(b"\x00\xff", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"\x00\xff"


def test_missing_and_foreign_files_are_input_errors(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("hello, this is not a tensor file")
    (tmp_path / "pickle").write_bytes(b"PK\x03\x04" + bytes(200))
    (tmp_path / "folder").mkdir()
    for name in ("absent", "empty", "text", "pickle", "folder"):
        for read in (read_tree, read_tensors):
            with pytest.raises(InputError, match=name):
                read(tmp_path / name)
    (tmp_path / "other").write_bytes(save({"x": torch.ones(1)}))
    with pytest.raises(InputError, match="not written by this program"):
        read_tree(tmp_path / "other")
    assert list(read_tensors(tmp_path / "other")) == ["x"]


HEADERS = {
    "no JSON": "{",
    "not a tree": "3",
    "a list": "[]",
    "a leaf": '{"value": 3}',
    "a tensor": '{"tensor": "/x"}',
    "no such tensor": '{"tree": {"y": {"tensor": "/y"}}}',
    "wrong keys": '{"tree": {"y": {"other": 1}}}',
    "tree is a list": '{"tree": [1, 2]}',
    "name is a list": '{"tree": {"y": {"tensor": ["/x"]}}}',
    "node is a text": '{"tree": {"y": "tensor"}}',
    "node is null": '{"tree": {"y": null}}',
    "endless number": '{"tree": {"y": {"value": ' + "1" * 5000 + "}}}",
    "bottomless": '{"tree":{"a":' * 20_000 + "1" + "}}" * 20_000,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_wrong_header_is_an_input_error(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"/x": torch.ones(1)}, metadata={"tree": HEADERS[kind]}))
    with pytest.raises(InputError, match=r"a\.safetensors"):
        read_tree(path)


def _damaged(content, chance):
    """Flipped bits, changed bytes, cut ends, and a header length or body that no longer fits."""
    damage = bytearray(content)
    (header,) = struct.unpack("<Q", content[:8])
    kind = chance.randrange(5)
    if kind == 0:
        for _ in range(chance.choice([1, 1, 2, 5])):
            damage[chance.randrange(len(damage))] ^= 1 << chance.randrange(8)
    elif kind == 1:  # in the header, where it matters most
        damage[8 + chance.randrange(header)] = chance.choice(b'{}[]":,0129aT/\\\x00\xff -')
    elif kind == 2:
        del damage[chance.randrange(len(damage)) :]
    elif kind == 3:
        damage[:8] = struct.pack("<Q", max(0, header + chance.choice([-1, 1, 8, -header, 2**40])))
    else:
        start = chance.randrange(8, len(damage))
        del damage[start : start + chance.randrange(1, 20)]
    return bytes(damage)


def test_random_damage_never_raises_anything_but_an_input_error(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tree(_tree(), path)
    content, chance = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(700):
        path.write_bytes(_damaged(content, chance))
        for read in (read_tree, read_tensors):
            try:
                read(path)
            except InputError:
                refused += 1
    assert refused > 900
    (header,) = struct.unpack("<Q", content[:8])
    assert json.loads(content[8 : 8 + header])  # the undamaged file was sound


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tree({"x": torch.arange(8.0), "y": {"z": 1}}, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(InputError):
            read_tree(path)
