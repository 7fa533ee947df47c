#!/usr/bin/env bash
# robosuite's Lift from ten demonstrations: success of imitation, and after online RL.
#
#   benchmarks/rl_lift.sh FOLDER SEED ...     writes FOLDER/SEED/{imitation,rl20}.json; about half an hour a seed
#
# DEMOS=10, MINUTES=20 of RL, BACKBONE=small, RECIPE=robosuite-lift-guided (robosuite-lift: by the reward alone),
# IMITATION=tabletop-few (`tabletop` in figures of before). Needs `./run setup robosuite`. The backbone has seen
# robosuite's pictures, no actions.
# Scenes of the evaluations take no part in learning.
set -euo pipefail
cd "$(dirname "$0")/.."
. benchmarks/steps.sh
suite=robosuite-lift out=$1 RECIPE=${RECIPE:-robosuite-lift-guided}
teach_and_refine "${DEMOS:-10}" 200 "${MINUTES:-20}" "${*:2}" --recipe "${IMITATION:-tabletop-few}" --backbone "${BACKBONE:-small}" --num-threads "${OMP_NUM_THREADS:-2}"
