#!/usr/bin/env bash
# tabletop-pick from few demonstrations: success of imitation, after 4 minutes of online RL, and after 10.
#
#   benchmarks/rl_pick.sh FOLDER SEED ...     writes FOLDER/SEED/{imitation,rl4,rl10}.json; about 17 minutes a seed
#
# DEMOS=60, MINUTES="4 10", BACKBONE=small, RECIPE=tabletop-pick or tabletop-pick-guided (from DEMOS=1 on),
# IMITATION=tabletop-few (`tabletop` in figures of before).
# PROCESSES=1 and OMP_NUM_THREADS=1: on one core. The minutes are those of `vla rl` itself: calibration or practice,
# learning, its own evaluations. Scenes of the final evaluations take no part in them.
set -euo pipefail
cd "$(dirname "$0")/.."
. benchmarks/steps.sh
suite=tabletop-pick out=$1
teach_and_refine "${DEMOS:-60}" 400 "${MINUTES:-4 10}" "${*:2}" --recipe "${IMITATION:-tabletop-few}" --steps 700 --backbone "${BACKBONE:-small}" --num-threads "${OMP_NUM_THREADS:-2}"
