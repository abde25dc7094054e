#!/usr/bin/env bash
# All measurements that need a GPU, in one command and under ten minutes: bash benchmarks/gpu.sh [CIFAR-10 .npz]
# Tried out without one by: DEVICE=cpu STEP=c bash benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
out=${OUT:-benchmarks/results}
python -m benchmarks.search_step ${STEP:-d} --device "$device" --out "$out"
python -m benchmarks.retraining --device "$device" --out "$out"
if [ $# -gt 0 ]; then
    pip install --quiet -r benchmarks/requirements.txt
    python -m benchmarks.attacks --data "$1" --device "$device" --out "$out/attacks-$device.json"
fi
