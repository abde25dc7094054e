"""What RobustBench says of an exported network, beside what the export says of itself.

    nas export RUN --to py,robustbench,card --out EXPORT
    python -m benchmarks.robustbench_agreement EXPORT --data cifar10.npz --limit 150

Needs robustbench, the reference AutoAttack it calls (github fra31/auto-attack) and huggingface_hub, whose parser reads
the model card. EXPORT is loaded by its own robustbench_model.py alone. RobustBench would download CIFAR-10; it is given
the test images that a recipe with ``test_limit = LIMIT`` has, those of the run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import robustbench.eval
from huggingface_hub import ModelCard

from nas.data.arrays import Arrays
from nas.tensor_file import write_text


def measure(export: Path, data: str, limit: int) -> dict[str, Any]:
    """Natural and robust accuracy by ``robustbench.eval.benchmark``, those of model_info and of the parsed card."""
    images = Arrays(data, test_limit=limit)()
    x, y = images.x_test.float() / 255, images.y_test
    robustbench.eval.load_clean_dataset = lambda *_: (x, y)
    entry = json.loads(next((export / "model_info").rglob("*.json")).read_text())
    spec = importlib.util.spec_from_file_location("robustbench_model", export / "robustbench_model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    upper, lower = entry["eps"].split("/")
    start = time.perf_counter()
    natural, robust = robustbench.eval.benchmark(
        module.load_model(),
        n_examples=limit,
        dataset=entry["dataset"],
        threat_model="Linf",
        eps=int(upper) / int(lower),
        batch_size=limit,
    )
    seconds = time.perf_counter() - start
    card = ModelCard.load(export / "MODEL_CARD.md").data
    return {
        "network": entry["name"],
        "images": len(y),
        "epsilon": entry["eps"],
        "robustbench": {"clean_acc": round(100 * natural, 2), "autoattack_acc": round(100 * robust, 2)},
        "model_info": {key: float(entry[key]) for key in ("clean_acc", "autoattack_acc") if key in entry},
        "card": {result.metric_name: result.metric_value for result in card.eval_results or ()},
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in ("robustbench", "huggingface_hub", "torch")},
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("export", type=Path)
    parser.add_argument("--data", required=True, help="an .npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--limit", type=int, default=150, help="test_limit of the run's recipe")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "robustbench.json")
    given = parser.parse_args()
    text = json.dumps(measure(given.export, given.data, given.limit), indent=1)
    write_text(text + "\n", given.out)
    print(text)


if __name__ == "__main__":
    main()
