#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: tests marked gpu, then every benchmark. Results go to $OUT.
#   OUT=results bash scripts/gpu_pass.sh
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-outputs/benchmarks}
PYTHON=${PYTHON:-python}
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv | tee "$OUT/gpu.txt"
$PYTHON -m pytest -m gpu tests/test_gpu.py tests/test_previews.py -q -p no:cacheprovider 2>&1 | tail -40 | tee "$OUT/tests.txt"
$PYTHON benchmarks/step.py --cases toy block full --out "$OUT/step.json" 2>&1 | tee "$OUT/step.txt"
$PYTHON benchmarks/trainer.py --full --seconds 60 --out "$OUT/trainer.json" 2>&1 | tee "$OUT/trainer.txt"
$PYTHON benchmarks/vram.py --out "$OUT/vram.json" 2>&1 | tee "$OUT/vram.txt"
$PYTHON benchmarks/scaling.py --full --out "$OUT/scaling.json" 2>&1 | tee "$OUT/scaling.txt"
$PYTHON benchmarks/preprocess.py --real-vae --real-words --out "$OUT/preprocess.json" 2>&1 | tee "$OUT/preprocess.txt"
