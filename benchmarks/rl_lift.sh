#!/usr/bin/env bash
# robosuite's Lift from ten demonstrations: success of imitation, and after online RL.
#
#   benchmarks/rl_lift.sh FOLDER SEED ...     writes FOLDER/SEED/{imitation,rl}.json; about half an hour a seed
#
# DEMOS=10, MINUTES=20 of RL. Needs `./bascule setup robosuite`. Scenes of the evaluations take no part in learning.
set -euo pipefail
cd "$(dirname "$0")/.."
. benchmarks/steps.sh
suite=robosuite-lift out=${1:-runs/rl-lift}
for seed in "${@:2}"; do
    run=$out/$seed
    imitate "${DEMOS:-10}"
    judge "$run/imitation" imitation --episodes 200
    refine robosuite-lift rl rl "${MINUTES:-20}"
    judge "$run/rl/best" rl --episodes 200
done
