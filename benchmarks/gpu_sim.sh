#!/usr/bin/env bash
# The MuJoCo Warp worlds on a GPU: checked against the CPU backend, then control steps/s and images/s over the number of
# worlds, and where the time goes. Without correctness there are no figures.
#
#   benchmarks/gpu_sim.sh [--device cuda|cpu] [--worlds N ...] [--suite S] [--out FOLDER]
#
# writes FOLDER/bench-warp.json ($OUT, or runs/benchmarks) after every number of worlds. Without a GPU, to see that it
# runs: benchmarks/gpu_sim.sh --device cpu --worlds 2 4
#
# On a machine with a GPU and this repository set up (`./run setup warp`) nothing else is needed. For a machine
# without network that has only a Python 3.12 with torch and numpy, and takes less than 64 MB at a time:
#
#   here    benchmarks/gpu_sim.sh pack             .gpu/part-a, .gpu/part-b: warp, mujoco, mujoco_warp, psutil of this .venv
#   here    benchmarks/gpu_sim.sh pack kernels 90  the same, and kernels compiled for sm_90 (H100, H200), minutes of CPU
#   there   benchmarks/gpu_sim.sh keep             with .gpu/part-a carried along: puts it aside, in $BASCULE_GPU
#   there   benchmarks/gpu_sim.sh                  with .gpu/part-b carried along: joins, unpacks, runs
#
# BASCULE_GPU (default: a folder in the system's temporary one) must be the same in both calls.
set -euo pipefail
cd "$(dirname "$0")/.."
aside=${BASCULE_GPU:-${TMPDIR:-/tmp}/bascule-gpu}

pack() {
    local site=.venv/lib/python3.12/site-packages names=() path ignored
    rm -rf .gpu && mkdir .gpu
    ignored=$(git rev-parse --git-path info/exclude)
    grep -qs '^/.gpu/$' "$ignored" || { mkdir -p "$(dirname "$ignored")" && echo '/.gpu/' >>"$ignored"; }
    if [ "${1:-}" = kernels ]; then compile_kernels "${2:-90}"; fi
    for path in "$site"/{warp,mujoco,mujoco.libs,mujoco_warp,psutil} "$site"/{warp_lang,mujoco_warp,mujoco}-*.dist-info; do
        if [ -e "$path" ]; then names+=("$(basename "$path")"); fi
    done
    # warp-clang.so compiles for CPUs only. The rest left out is documentation in code.
    tar -C "$site" --exclude=warp-clang.so --exclude=__pycache__ --exclude=warp/tests --exclude=warp/examples \
        --exclude='*_test.py' --exclude=test_data -cf - "${names[@]}" $([ -d .gpu/kernels ] && echo -C "$PWD/.gpu" kernels) |
        xz -3 >.gpu/all
    split -n 2 -a 1 .gpu/all .gpu/part-
    rm -rf .gpu/all .gpu/kernels
    ls -l .gpu
}

# Runs a few steps on Warp's CPU device, notes every kernel module that is launched and compiles each for a GPU.
compile_kernels() {
    nice -n 10 .venv/bin/python - "$1" .gpu/kernels <<'PY'
import os
import sys

import warp as wp

used = set()


def noting(launch):
    def call(kernel, *args, **options):
        used.add((kernel.module, options.get("block_dim", 256)))
        return launch(kernel, *args, **options)

    return call


wp.launch, wp.launch_tiled = noting(wp.launch), noting(wp.launch_tiled)
import numpy as np

from envs import make_vec

env = make_vec("tabletop-pick", 2, backend="warp", device="cpu")
env.reset(seeds=[1, 2])
env.step_chunk(np.zeros((2, 1, 4), np.float32))
arch, folder = int(sys.argv[1]), sys.argv[2]
failed = []
for module, block_dim in sorted(used, key=lambda pair: (pair[0].name, pair[1])):
    module.options["block_dim"], before = block_dim, module.options["block_dim"]
    try:
        to = os.path.join(folder, wp.config.version, module.get_module_identifier(block_dim))
        module._compile(None, to, output_arch=arch, use_ptx=False)
    except Exception as problem:
        failed.append(f"{module.name}: {problem}")
    module.options["block_dim"] = before
print(f"{len(used)} kernel modules compiled for sm_{arch}, {len(failed)} failed", *failed[:3], sep="\n")
PY
}

case ${1:-} in
pack)
    shift
    pack "$@"
    exit
    ;;
keep)
    mkdir -p "$aside"
    cp .gpu/part-* "$aside"
    ls -l "$aside"
    exit
    ;;
esac

out=${OUT:-runs/benchmarks}
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
    --out) out=$2 && shift 2 ;;
    *) arguments+=("$1") && shift ;;
    esac
done
mkdir -p "$out"

python=python3
if [ -x .venv/bin/python ] && .venv/bin/python -c 'import mujoco_warp' 2>/dev/null; then python=.venv/bin/python; fi
if ! "$python" -c 'import mujoco_warp' 2>/dev/null; then
    if [ -d .gpu ]; then mkdir -p "$aside" && cp .gpu/part-* "$aside"; fi
    if [ ! -e "$aside/part-b" ]; then
        echo "gpu_sim.sh: no mujoco_warp here: \`./run setup warp\`, or carry what \`$0 pack\` makes" >&2
        exit 1
    fi
    mkdir -p "$aside/site"
    cat "$aside"/part-? | xz -dc | tar -C "$aside/site" -xf -
    export PYTHONPATH="$aside/site${PYTHONPATH:+:$PYTHONPATH}"
    if [ -d "$aside/site/kernels" ]; then export WARP_CACHE_PATH="$aside/site/kernels"; fi
fi
export MUJOCO_GL=${MUJOCO_GL:-egl} PYTHONUNBUFFERED=1
exec "$python" - "$out/bench-warp.json" "${arguments[@]}" <<'PY'
import argparse
import sys

from bascule.bench.simulation_warp import WORLDS, bench_warp
from vla.core.config import save_json
from vla.runtime.provenance import provenance

parser = argparse.ArgumentParser(prog="gpu_sim.sh")
parser.add_argument("--device")
parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS)
parser.add_argument("--suite", default="tabletop-pick")
asked = parser.parse_args(sys.argv[2:])
shown = 0


def save(rows):
    global shown
    for row in rows[shown:]:
        ratio = "" if row["ratio"] is None else f", {row['ratio']:.2f} of {row['baseline']}"
        print(f"{row['name']}: {row['value']:.4g} {row['unit']}{ratio} ({row['config']})")
    shown = len(rows)
    save_json(sys.argv[1], {"bench": "sim", "backend": "warp", **provenance(), "results": rows})


try:
    bench_warp(device=asked.device, worlds=asked.worlds, suite=asked.suite, on_rows=save)
except (ValueError, RuntimeError) as problem:
    sys.exit(f"gpu_sim.sh: {problem}")
PY
