#!/usr/bin/env bash
# Ours beside LeRobot's ACT, Diffusion and SmolVLA (random weights) in full size on a GPU: same demonstrations and scenes.
#
#   benchmarks/gpu_peers.sh FOLDER [OPTION of vla experiment ...]     writes FOLDER/peers-SUITE.json; hours
#
# Equal seconds by the wall's clock (ten minutes) and equal steps (10,000 of 64 frames), three seeds, for every suite of
# SUITES that is installed. Needs a GPU and `./run setup peers robosuite`; ImageNet's weights of ResNet-18 are taken
# where torch has them in its cache. Stopped, the same command continues with the arms that are not finished. To see that
# it runs without a GPU: SUITES=tabletop-pick ... --seconds 5 --steps 2 --seeds 0 --episodes 4 --arms ours act blind
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n "4s/^# *//p" "$0" >&2; exit 2; }
out=$1
mkdir -p "$out"
for suite in ${SUITES:-robosuite-lift robosuite-can tabletop-pick metaworld-mt10 libero-object}; do
    case $suite in
    metaworld-*) .venv/bin/python -c 'import metaworld' 2>/dev/null || { echo "$suite: ./run setup metaworld"; continue; } ;;
    libero-*) [ -x .venv-libero/bin/python ] || { echo "$suite: ./run setup libero"; continue; } ;;
    esac
    ./run experiment peers --suite "$suite" --arms ours ours-rl act diffusion smolvla-random blind --seconds 600 --steps 10000 \
        --batch-size 64 --out "$out/$suite" --json "$out/peers-$suite.json" "${@:2}"
done
