#!/usr/bin/env bash
# Ten tabletop tasks in one policy: imitation, then 45 minutes of online RL, tasks drawn by their success and evenly.
#
#   benchmarks/rl_multitask.sh FOLDER [SEED ...]     writes FOLDER/SEED/*.json; about two hours a seed on two cores
#
# MINUTES=45 of RL, DEMOS=300. The scenes of the evaluations (60 a task) take no part in learning, nor in choosing the
# best checkpoint. Run again, it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/rl-multitask}
shift || true
for seed in "${@:-0}"; do
    run=$out/$seed
    mkdir -p "$run"
    judge() { # POLICY NAME [OPTION ...]
        local policy=$1 name=$2
        shift 2
        [ -e "$run/$name.json" ] && return
        ./bascule eval "$policy" --suite tabletop-ten --episodes 600 --no-controls --json "$run/$name.json" "$@"
    }
    if [ ! -e "$run/imitation.json" ]; then
        rm -rf "$run/imitation"
        ./bascule demos tabletop-ten --episodes "${DEMOS:-300}" --seed $((seed * 20000)) --out "$run/demos"
        ./bascule train --recipe tabletop-ten --dataset "$run/demos" --seed "$seed" --out "$run/imitation"
    fi
    judge "$run/imitation" imitation
    for rule in vla-rl uniform; do
        if [ ! -e "$run/$rule.json" ]; then
            resume=()
            [ -e "$run/$rule" ] && resume=(--resume)
            ./bascule rl multitask --suite tabletop-ten --curriculum "$rule" --init "$run/imitation" --seed "$seed" \
                --minutes "${MINUTES:-45}" --processes 2 --workers 1 --out "$run/$rule" "${resume[@]}"
        fi
        judge "$run/$rule/best" "$rule"
        judge "$run/$rule/best" "$rule-heldout" --phrasings heldout
    done
done
