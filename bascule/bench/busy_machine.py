"""How much a busy machine slows training and control, by how long OpenMP's threads spin before they sleep.

    python -m bascule.bench.busy_machine [--rounds 5] [--smoke] [--out runs/busy-machine.json]

Each workload runs with two torch threads in a process of its own, alternately with every kind of waiting: `ours`
(`vla.core.waiting`), `sleeping` (at once) and `spinning` (GNU's default); first on the machine as it is, then beside as
many busy loops as there are cores. The result holds the median seconds of wall clock and of CPU, and the ratios that
matter: ours / spinning on the idle machine (what sleeping soon costs there), and busy / idle of each. `--smoke` also
times `vla quickstart --smoke` alone and beside the loops. Run it on a machine that does nothing else; the load that it
found is in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vla.core.config import save_json
from vla.core.paths import ROOT
from vla.core.waiting import CHOSEN_BY_USER, WAITING, usable_cores

KINDS = {
    "ours": WAITING,
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"},
    "spinning": {"GOMP_SPINCOUNT": "300000"},  # what GNU's OpenMP does if nothing is said
}
WORKLOADS = ("gelu", "imitation", "decision")


def main() -> None:
    """Time each workload with every kind of waiting, on the idle and on the busy machine; write --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="time the smoke quickstart too (minutes)")
    parser.add_argument("--out", type=Path, default=Path("runs/busy-machine.json"))
    parser.add_argument("--workload", choices=WORKLOADS, help=argparse.SUPPRESS)  # the child's end
    args = parser.parse_args()
    if args.workload:
        print(json.dumps(workload(args.workload)))
        return
    cores = round(usable_cores())
    result: dict = {"cores": cores, "load_before": os.getloadavg()[0], "rounds": args.rounds, "workloads": {}}
    for name in WORKLOADS:
        rows = {}
        for machine, loops in (("idle", 0), ("busy", cores)):
            with busy_loops(loops):
                rows |= {f"{machine} {kind}": row for kind, row in compare(name, args.rounds).items()}
        wall = {arm: row["wall_s"] for arm, row in rows.items()}
        result["workloads"][name] = {
            "seconds": rows,
            "ours / spinning, idle": wall["idle ours"] / wall["idle spinning"],
            "sleeping / spinning, idle": wall["idle sleeping"] / wall["idle spinning"],
            **{f"busy / idle, {kind}": wall[f"busy {kind}"] / wall[f"idle {kind}"] for kind in KINDS},
        }
        print(name, json.dumps({k: round(v, 3) for k, v in result["workloads"][name].items() if k != "seconds"}))
    if args.smoke:
        idle = smoke()
        with busy_loops(cores):
            busy = smoke()
        result["smoke quickstart"] = {"idle_s": idle, "busy_s": busy, "busy / idle": busy / idle}
        print("smoke quickstart", json.dumps(result["smoke quickstart"]))
    save_json(args.out, result)


def compare(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds with every kind of waiting, measured alternately."""
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind, variables in KINDS.items():
            command = [sys.executable, "-m", "bascule.bench.busy_machine", "--workload", name]
            done = subprocess.run(command, env=environment(variables), capture_output=True, text=True, check=True)
            runs[kind].append(json.loads(done.stdout))
    return {kind: {key: statistics.median(run[key] for run in rows) for key in rows[0]} for kind, rows in runs.items()}


def environment(variables: dict[str, str]) -> dict[str, str]:
    """This process's, but for what says how many threads there are and how they wait."""
    kept = {k: v for k, v in os.environ.items() if k not in (*CHOSEN_BY_USER, "OMP_NUM_THREADS")}
    return kept | {"PYTHONPATH": str(ROOT), **variables}


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Run this many busy-loop processes, one core each, inside the context."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def smoke() -> float:
    """Seconds of the smoke quickstart, as a user starts it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bascule", "quickstart", "--smoke", "--out", f"{folder}/quickstart"]
        begin = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env=environment({}), check=True, capture_output=True)
        return time.perf_counter() - begin


def workload(name: str) -> dict[str, float]:
    """Seconds of wall clock and of CPU that this process needs for it, once warm."""
    import torch

    torch.set_num_threads(2)
    once, count = {"gelu": gelu, "imitation": imitation, "decision": decision}[name]()
    for _ in range(3):
        once()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        once()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def gelu():  # noqa: ANN201
    """800 GELUs over 200,000 numbers."""
    import torch

    numbers = torch.randn(200_000)
    return lambda: torch.nn.functional.gelu(numbers), 800


def imitation():  # noqa: ANN201
    """40 steps of imitation of the default policy on features of 64 frames."""
    import torch

    from bascule.bench.measuring import default_policy, random_observation

    vla = default_policy().vla
    with torch.no_grad():
        seen = vla.encode(vla.processor.prepare(random_observation(64))).float()
    proprio_BP, action_BCA, mask_BC = torch.randn(64, 8), torch.rand(64, 8, 4), torch.ones(64, 8)
    vla.train()
    vla.requires_grad_(False)
    vla.bridge.requires_grad_(True)
    optimiser = torch.optim.AdamW(vla.bridge.parameters(), 1e-3)

    def once() -> None:
        loss, _ = vla.loss(seen, proprio_BP, action_BCA, mask_BC)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return once, 40


def decision():  # noqa: ANN201
    """60 decisions of the default policy, one observation each."""
    from bascule.bench.measuring import default_policy, random_observation

    policy, obs = default_policy(), random_observation(1)
    return lambda: policy.act(obs), 60


if __name__ == "__main__":
    main()
