#!/usr/bin/env bash
# tabletop-pick from few demonstrations: success of imitation, after 4 minutes of online RL, and after 10.
#
#   benchmarks/rl_pick.sh FOLDER [SEED ...]     writes FOLDER/SEED/{imitation,rl4,rl10}.json; about 17 minutes a seed
#
# The minutes are those of `vla rl` itself: calibration, learning and its own evaluations. Scenes of the final
# evaluations take no part in them. Run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/rl-pick}
shift || true
for seed in "${@:-0}"; do
    run=$out/$seed
    mkdir -p "$run"
    judge() { # POLICY NAME
        [ -e "$run/$2.json" ] && return
        ./bascule eval "$1" --suite tabletop-pick --episodes 400 --no-controls --json "$run/$2.json"
    }
    refine() { # MINUTES
        [ -e "$run/rl$1.json" ] && return
        local resume=()
        [ -e "$run/rl" ] && resume=(--resume)
        ./bascule rl tabletop-pick --init "$run/imitation" --seed "$seed" --minutes "$1" --processes 2 --workers 1 \
            --out "$run/rl" "${resume[@]}"
        judge "$run/rl/best" "rl$1"
    }
    if [ ! -e "$run/imitation.json" ]; then
        rm -rf "$run/imitation"
        ./bascule demos tabletop-pick --episodes "${DEMOS:-60}" --seed $((seed * 20000)) --out "$run/demos"
        ./bascule train --dataset "$run/demos" --steps 700 --seed "$seed" --out "$run/imitation"
    fi
    judge "$run/imitation" imitation
    refine 4
    refine 10
done
