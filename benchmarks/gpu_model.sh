#!/usr/bin/env bash
# The model's figures on a GPU: decisions/s of a 0.5B-class policy with a CUDA graph, training samples/s and MFU in bf16.
# Correctness is checked first; without it there are no figures.
#
#   benchmarks/gpu_model.sh [FOLDER]     writes FOLDER/bench-gpu.json ($OUT, or runs/benchmarks)
#
# It needs a Python with torch (CUDA), transformers, tokenizers, safetensors, psutil and numpy: `./run setup` makes one in
# .venv. On a machine without network, put wheels of what is missing (transformers==5.5.*, tokenizers, psutil) into .whl/.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-runs/benchmarks}}
mkdir -p "$out"
python=python3
if [ -x .venv/bin/python ] && .venv/bin/python -c 'import torch' 2>/dev/null; then python=.venv/bin/python; fi
if [ -d .whl ]; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" - "$out/bench-gpu.json" <<'PY'
import sys

from bascule.bench.model_gpu import bench
from vla.core.config import save_json
from vla.runtime.provenance import provenance

try:
    rows = bench()
except (ValueError, RuntimeError) as problem:
    sys.exit(f"gpu_model.sh: {problem}")
save_json(sys.argv[1], {"bench": "gpu", **provenance(), "results": rows})
for row in rows:
    print(f"{row['name']}: {row['value']:.1f} {row['unit']} ({row['config']})")
PY
