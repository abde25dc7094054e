"""The picture of saliency: what is in it, and that it is the same each time."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image
from torch import nn

from nas.analysis.saliency_picture import draw_saliency
from nas.errors import InputError


def _networks(channels):
    torch.manual_seed(0)
    return {
        title: nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, 3)) for title in ("before", "after")
    }  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_an_svg_shows_each_image_with_two_maps_of_each_network(channels, tmp_path):
    x, y = torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    networks = _networks(channels)
    for name in ("one.svg", "two.svg"):
        draw_saliency(networks, x, y, tmp_path / name, classes=("cat", "costs $5 & <more>", "a fish"))
    text = (tmp_path / "one.svg").read_text()
    root = ElementTree.fromstring(text)
    assert len(root.findall(".//{*}image")) == 2 * (1 + 2 * 2)
    assert text == (tmp_path / "two.svg").read_text()
    swapped = dict(zip(networks, reversed(networks.values()), strict=True))
    draw_saliency(swapped, x, y, tmp_path / "three.svg")
    assert (tmp_path / "three.svg").read_text() != text


def test_a_png_can_be_looked_at(tmp_path):
    draw_saliency(_networks(1), torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2]), tmp_path / "maps.png")
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.size[0] > 300 and picture.size[1] > 300
        assert len(picture.convert("RGB").getcolors(10**6)) > 100


def test_maps_of_nothing_are_drawn_dark(tmp_path):
    blind = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(blind[1].weight)
    draw_saliency({"blind": blind}, torch.rand(1, 1, 8, 8), torch.tensor([0]), tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size > 0


def test_what_cannot_be_drawn_is_refused(tmp_path):
    x, y = torch.rand(1, 1, 8, 8), torch.tensor([0])
    with pytest.raises(InputError, match=r"maps\.gif"):
        draw_saliency(_networks(1), x, y, tmp_path / "maps.gif")
    with pytest.raises(InputError):
        draw_saliency({}, x, y, tmp_path / "maps.svg")
    with pytest.raises(InputError):
        draw_saliency(_networks(1), x[:0], y[:0], tmp_path / "maps.svg")
    assert not list(tmp_path.iterdir())
