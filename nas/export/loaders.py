"""Files beside network.py through which other programs load a network: RobustBench's evaluation, timm's registry."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from nas.model_file import ModelSpec
from nas.tensor_file import write_text

ROBUSTBENCH = '''\
"""The network in network.py, as RobustBench evaluates networks: eval mode, pixels in [0, 1], normalisation inside.

    from robustbench.eval import benchmark
    from robustbench_model import load_model

    clean, robust = benchmark(load_model(), model_name="{name}", dataset="cifar10", threat_model="Linf", eps=8 / 255)

The data set and the threat model have to be those that the network was trained for: see MODEL_CARD.md. Its forward pass
is deterministic, without an optimisation inside; what is known of its gradients is in the card, too.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn

HERE = Path(__file__).resolve().parent


def load_model(
    model_name: str = "{name}", model_dir: str | Path = HERE, device: str = "cpu", **ignored: object
) -> nn.Module:
    """The network with its weights from ``model_dir``, in eval mode on ``device``."""
    spec = importlib.util.spec_from_file_location("network", Path(model_dir) / "network.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(Path(model_dir) / "network.safetensors").eval().to(device)
'''

TIMM = '''\
"""The network in network.py by name in timm: import this file, then timm.create_model("{name}", pretrained=True).

Without timm, {name}(pretrained=True) gives the same network. Pixels in [0, 1] go in: mean 0 and deviation 1, because
normalisation is inside.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn

HERE = Path(__file__).resolve().parent

try:
    from timm.models import register_model
except ImportError:

    def register_model(function):
        return function


_spec = importlib.util.spec_from_file_location("{name}_network", HERE / "network.py")
_network = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_network)

CONFIG = {{
    "architecture": "{name}",
    "num_classes": len(_network.CLASSES),
    "input_size": _network.INPUT_SHAPE,
    "mean": (0.0,) * _network.INPUT_SHAPE[0],
    "std": (1.0,) * _network.INPUT_SHAPE[0],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "file": str(HERE / "network.safetensors"),
}}


@register_model
def {name}(pretrained: bool = False, **settings: object) -> nn.Module:
    """The network, with its weights if ``pretrained``. Its classes and its input are fixed."""
    if settings.get("num_classes", CONFIG["num_classes"]) != CONFIG["num_classes"]:
        raise ValueError(f"{name} has {{CONFIG['num_classes']}} classes")
    model = _network.load(CONFIG["file"]) if pretrained else _network.build()
    model.pretrained_cfg = model.default_cfg = CONFIG
    model.num_classes = CONFIG["num_classes"]
    return model
'''


def entry_name(spec: ModelSpec) -> str:
    """What the network is called where it is registered: its space and genotype, as a Python name."""
    return "nas_" + re.sub("[^a-z0-9]", "_", f"{spec.genotype.space}_{spec.genotype.digest}".lower())


def write_robustbench(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    """Write robustbench_model.py; network.py and its weights are written by the format "py"."""
    del model
    write_text(ROBUSTBENCH.format(name=entry_name(spec)), folder / "robustbench_model.py")


def write_timm(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    """Write timm_model.py; network.py and its weights are written by the format "py"."""
    del model
    write_text(TIMM.format(name=entry_name(spec)), folder / "timm_model.py")
