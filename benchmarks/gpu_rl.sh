#!/usr/bin/env bash
# Ten tasks in one policy by online RL in MuJoCo Warp worlds: wall time to 90%, decisions/s, and where the time goes.
#
#   benchmarks/gpu_rl.sh POLICY FOLDER [OPTION OF vla rl ...]     writes FOLDER/rl-warp.json; ten minutes
#
# POLICY is an imitation policy of suite tabletop-ten, its demonstrations beside it in `demos`, as
# benchmarks/rl_multitask.sh makes them on any machine. Needs a GPU and `./run setup warp`; to see that it runs
# without: --device cpu --num-envs 4 --minutes 1
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n "4s/^# *//p" "$0" >&2; exit 2; }
policy=$1 out=$2
mkdir -p "$out"
resume=()
if [ -e "$out/rl/last" ]; then resume=(--resume); fi
./run rl multitask --suite tabletop-ten --backend warp --init "$policy" --demos "$(dirname "$policy")/demos" \
    --num-envs 1024 --horizon 100 --minutes 8 --out "$out/rl" "${resume[@]}" "${@:3}"
exec .venv/bin/python - "$out" <<'PY'
import json
import sys
from pathlib import Path

from vla.core.config import save_json
from vla.runtime.provenance import provenance

out = Path(sys.argv[1])
rows = [json.loads(line) for line in (out / "rl/metrics.jsonl").read_text().splitlines()]
spent = {name: sum(row[f"seconds_{name}"] for row in rows) for name in ("policy", "worlds", "update", "eval")}
decisions = rows[-1]["env_steps"] / 4  # n_action_steps of the recipe
reached = [row["seconds"] for row in rows if row.get("eval_success_rate", 0.0) >= 0.9]
figures = {
    "seconds_to_90": reached[0] if reached else None,
    "best_eval": max((row["eval_success_rate"] for row in rows if "eval_success_rate" in row), default=None),
    "control_steps": rows[-1]["env_steps"],
    "decisions_per_s": decisions / (sum(spent.values()) - spent["eval"]),
    "shares": {name: seconds / sum(spent.values()) for name, seconds in spent.items()},
}
save_json(out / "rl-warp.json", {"bench": "rl", "backend": "warp", **provenance(), **figures})
print(*(f"{name}: {value}" for name, value in figures.items()), sep="\n")
PY
