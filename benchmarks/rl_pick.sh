#!/usr/bin/env bash
# tabletop-pick from few demonstrations: success of imitation, after 4 minutes of online RL, and after 10.
#
#   benchmarks/rl_pick.sh FOLDER [SEED ...]     writes FOLDER/SEED/{imitation,rl4,rl10}.json; about 15 minutes a seed
#
# The minutes are those of `vla rl` itself: calibration, learning and its own evaluations. Scenes of the final
# evaluations take no part in them.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/rl-pick}
shift || true
for seed in "${@:-0}"; do
    run=$out/$seed
    mkdir -p "$run"
    judge() { ./bascule eval "$1" --suite tabletop-pick --episodes 400 --no-controls --json "$run/$2.json"; }
    ./bascule demos tabletop-pick --episodes "${DEMOS:-60}" --seed $((seed * 20000)) --out "$run/demos"
    ./bascule train --dataset "$run/demos" --steps 700 --seed "$seed" --out "$run/imitation"
    judge "$run/imitation" imitation
    ./bascule rl tabletop-pick --init "$run/imitation" --seed "$seed" --minutes 4 --out "$run/rl"
    judge "$run/rl/best" rl4
    ./bascule rl tabletop-pick --init "$run/imitation" --seed "$seed" --minutes 10 --out "$run/rl" --resume
    judge "$run/rl/best" rl10
done
