"""Files beside network.py through which other programs load a network: RobustBench's evaluation, timm's registry."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from torch import nn

from nas.model_file import ModelSpec
from nas.tensor_file import write_text

ROBUSTBENCH = '''\
"""The network in network.py, as RobustBench evaluates networks: eval mode, pixels in [0, 1], normalisation inside.

    from robustbench.eval import benchmark
    from robustbench_model import load_model

    clean, robust = benchmark(load_model(), dataset="cifar10", threat_model="Linf", eps=8 / 255)

That is for a network trained on CIFAR-10 against changes of 8/255. What this one was trained for, and how it did, is in
model_info/<data>/<threat model>/{name}.json and in MODEL_CARD.md. RobustBench knows the data sets cifar10, cifar100 and
imagenet only; for others its attack works alone, on pixels x [N, C, H, W] in [0, 1] and labels y [N]:

    from autoattack import AutoAttack

    AutoAttack(load_model(), norm="Linf", eps=...).run_standard_evaluation(x, y)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent


def load_model(device: str | torch.device = "cpu") -> nn.Module:
    """The network with its weights, in eval mode on ``device``."""
    spec = importlib.util.spec_from_file_location("{name}_network", HERE / "network.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(HERE / "network.safetensors").eval().to(device)
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
WEIGHTS = HERE / "network.safetensors"

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
    "fixed_input_size": True,
    "mean": (0.0,) * _network.INPUT_SHAPE[0],
    "std": (1.0,) * _network.INPUT_SHAPE[0],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}}
if WEIGHTS.exists():
    CONFIG["file"] = str(WEIGHTS)
default_cfgs = {{"{name}": CONFIG}}  # where timm looks for it


@register_model
def {name}(pretrained: bool = False, **settings: object) -> nn.Module:
    """The network, with its weights and in eval mode if ``pretrained``. Its classes and its input are fixed."""
    fixed = {{"num_classes": CONFIG["num_classes"], "in_chans": CONFIG["input_size"][0]}}
    for key, value in settings.items():
        if value is not None and value != fixed.get(key):
            has = f"has {{key}}={{fixed[key]}}" if key in fixed else "takes no such setting"
            raise ValueError(f"{{key}}={{value!r}}: {name} {{has}}")
    if pretrained and not WEIGHTS.exists():
        raise FileNotFoundError(f"no weights: network.safetensors does not lie beside {{Path(__file__).name}}")
    model = _network.load(WEIGHTS) if pretrained else _network.build()
    model.pretrained_cfg = model.default_cfg = CONFIG
    model.num_classes = CONFIG["num_classes"]
    return model
'''


def entry_name(spec: ModelSpec) -> str:
    """What the network is called where it is registered, as a Python name: its space, its genotype, all of ``spec``."""
    whole = hashlib.blake2b(json.dumps(spec.to_data(), sort_keys=True).encode(), digest_size=3).hexdigest()
    return "nas_" + re.sub("[^a-z0-9]", "_", f"{spec.genotype.space}_{spec.genotype.digest}_{whole}".lower())


def write_robustbench(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    """Write robustbench_model.py; network.py and its weights are written by the format "py"."""
    del model
    write_text(ROBUSTBENCH.format(name=entry_name(spec)), folder / "robustbench_model.py")


def write_timm(spec: ModelSpec, model: nn.Module, folder: Path) -> None:
    """Write timm_model.py; network.py and its weights are written by the format "py"."""
    del model
    write_text(TIMM.format(name=entry_name(spec)), folder / "timm_model.py")
