#!/usr/bin/env bash
# The commands of docs/first-hour.md, each with the last lines it prints and its seconds, in a new folder.
# Usage: benchmarks/first_hour.sh CIFAR10.npz, with `nas` of a fresh environment on the path and nothing else running.
set -euo pipefail
data=$(realpath "$1")
cd "$(mktemp -d)"

timed() { # lines to show, command
    local shown=$1 start
    shift
    echo "\$ $*"
    start=$EPOCHREALTIME
    "$@" 2>&1 | tail -n "$shown"
    awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "  %.2f s\n", b - a }'
}

timed 6 nas
timed 6 nas doctor digits study-digits survey-grid
timed 14 nas run digits --out digits-run
python - "$data" <<'P'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

with np.load(sys.argv[1]) as data:
    images, labels = data["x_train"], data["y_train"].ravel()
for label, name in ((0, "airplane"), (1, "automobile"), (3, "cat"), (5, "dog")):
    folder = Path("images") / name
    folder.mkdir(parents=True)
    for row in np.flatnonzero(labels == label)[:120]:
        image = images[row] if images[row].shape[-1] == 3 else images[row].transpose(1, 2, 0)
        Image.fromarray(image).save(folder / f"{row}.png")
P
timed 6 nas new mine --data folder:./images --minutes 3
timed 12 nas run mine.toml --out mine-run
timed 6 nas export mine-run --to py,onnx
timed 6 nas attack mine-run --attack pgd --set steps=50
timed 6 nas analyse arnas
