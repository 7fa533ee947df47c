#!/usr/bin/env bash
# Ten tabletop tasks in one policy: imitation, then 45 minutes of online RL, tasks drawn by their success and evenly.
#
#   benchmarks/rl_multitask.sh FOLDER SEED ...     writes FOLDER/SEED/*.json; about two hours a seed on two cores
#
# MINUTES=45 of RL, DEMOS=300, STEPS=2000 of imitation, BACKBONE=small, RULES="vla-rl uniform", RECIPE=multitask; TASKS
# to be shown in turn. The scenes of the evaluations (60 a task) take no part in learning, nor in choosing the best
# checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
. benchmarks/steps.sh
# the harder ones oftener
tasks=${TASKS:-stack drawer push plate bowl zone stack drawer lift open stack push plate bowl zone stack drawer close press}
suite=tabletop-ten out=$1
for seed in "${@:2}"; do
    run=$out/$seed
    imitate "${DEMOS:-300}" --recipe tabletop-ten --steps "${STEPS:-2000}" --backbone "${BACKBONE:-small}" \
        --num-threads "${OMP_NUM_THREADS:-2}"
    judge "$run/imitation" imitation --episodes 600
    for rule in ${RULES:-vla-rl uniform}; do
        refine "${RECIPE:-multitask}" "$rule" "$rule" "${MINUTES:-45}" --horizon 100 --curriculum "$rule" --demos "$run/demos"
        judge "$run/$rule/best" "$rule" --episodes 600
        judge "$run/$rule/best" "$rule-heldout" --episodes 600 --phrasings heldout
    done
done
