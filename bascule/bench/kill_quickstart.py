"""Kills a smoke quickstart inside every stage and compares its report with that of an undisturbed run.

    python -m bascule.bench.kill_quickstart [--kills 12] [--seed 0] [--out runs/kill-quickstart] [--json FILE]

Every kill (SIGKILL, every third SIGTERM) comes at a random moment of the stage whose turn it is; `--resume` goes on.
Reports are equal if they differ in nothing but times, speeds, memory and the state of the stages on the way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from vla.core.config import load_json, save_json
from vla.runtime.provenance import provenance

STAGES = (
    "backbone", "demonstrations", "imitation", "evaluate-imitation", "online-RL", "evaluate-RL", "serve",
)  # fmt: skip
"""Names of the files in OUT/stages, in the order in which they appear."""
DIFFER = {"seconds", "latency_ms", "peak_memory_gib", "steps_per_s", "command", "state", "complete"}
_START_S = 600.0


def quickstart(out: Path, *flags: str) -> subprocess.Popen[bytes]:
    """A smoke quickstart into `out`, in a session of its own so that its children can be counted."""
    command = [sys.executable, "-m", "bascule", "quickstart", "--out", str(out), *flags]
    env = {"OMP_NUM_THREADS": "2", **os.environ}  # alike in all runs: the count changes the last bits of the weights
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env=env, start_new_session=True, stdout=quiet, stderr=quiet)


def members(session: int) -> list[int]:
    """Processes of a session that are still alive."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(OSError):  # it has ended in the meantime
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def kill_inside(stage: int, out: Path, rng: random.Random, number: int) -> dict[str, Any]:
    """Run until `stage` has begun, wait a random time, kill; what was killed, when, and how long a child lived on."""
    run = quickstart(out, "--resume") if out.exists() else quickstart(out, "--smoke")
    before = out / "stages" / f"{STAGES[stage - 1]}.json" if stage else out / "quickstart.json"
    deadline = time.monotonic() + _START_S
    while not before.exists():
        if run.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the quickstart did not get to {STAGES[stage]} (exit code {run.poll()})")
        time.sleep(0.1)
    waited = rng.uniform(1, 30)
    time.sleep(waited)
    number_sent = signal.SIGTERM if number % 3 == 2 else signal.SIGKILL
    run.send_signal(number_sent)
    run.wait()
    killed = time.monotonic()
    while members(run.pid) and time.monotonic() - killed < 60:
        time.sleep(0.1)
    row = {"stage": STAGES[stage], "signal": number_sent.name, "after_s": round(waited, 1)}
    row["left"] = len(members(run.pid))
    row["children_gone_after_s"] = round(time.monotonic() - killed, 1)
    row["stages_kept"] = len(list((out / "stages").glob("*.json")))
    print(json.dumps(row), flush=True)
    return row


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths at which two reports differ, without those that are allowed to."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted((set(one) | set(other)) - DIFFER)
        return [d for key in keys for d in differences(one.get(key), other.get(key), f"{path}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    return [] if one == other else [path]


def main() -> int:
    """0 if the killed run ended with the undisturbed run's report and left no process behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/kill-quickstart"))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.out.exists():
        parser.error(f"{asked.out} exists: remove it, or name another --out")
    rng = random.Random(asked.seed)
    turns = sorted(rng.choices(range(len(STAGES)), k=max(0, asked.kills - len(STAGES))) + list(range(len(STAGES))))
    rows = [kill_inside(stage, asked.out / "killed", rng, i) for i, stage in enumerate(turns[: asked.kills])]
    codes = [quickstart(asked.out / "killed", "--resume").wait(), quickstart(asked.out / "whole", "--smoke").wait()]
    reports = [load_json(asked.out / name / "report.json") for name in ("killed", "whole")]
    found = differences(*reports)
    result = {"bench": "kill_quickstart", **provenance(), "kills": rows, "exit_codes": codes, "differences": found}
    print(f"{len(rows)} kills, exit codes {codes}, {len(found)} differences {found[:5]}")
    if asked.json:
        save_json(asked.json, result)
    return int(bool(found) or any(codes) or any(row["left"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
