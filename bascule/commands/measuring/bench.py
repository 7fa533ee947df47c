"""`vla bench`: speed."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from bascule.commands.base import Command, check_file, check_numbers, given
from vla.core.config import lookup

BENCHES = {
    "sim": "simulation",
    "serve": "serving",
    "model": "model_cpu",
    "policy": "evaluation",
    "gpu": "model_gpu",
    "startup": "startup",
    "backbones": "evaluation:backbones",
}
"""Module of `bascule.bench` of every benchmark; its function `bench`, or the one named, returns the rows."""


@dataclass(frozen=True)
class Bench(Command):
    """Measure speed: sim, serve, model, policy, backbones, gpu or startup."""

    name: Positional[str]
    """sim, serve, model, policy, backbones, gpu or startup."""
    json: Path | None = None
    """Write the result to this file too."""
    backend: Literal["cpu", "warp"] = "cpu"
    """sim: warp measures the MuJoCo Warp environments, after checking them against the CPU backend."""
    device: str | None = None
    """warp: the device. Default: the first GPU, else Warp's CPU device."""
    worlds: tuple[int, ...] | None = None
    """warp: numbers of environments, one measurement each."""
    suite: str | None = None
    """warp: the suite. Default: tabletop-pick."""
    clients: int | None = None
    """serve: number of concurrent clients, for --seconds, instead of sequential round trips."""
    seconds: float | None = None
    """serve: duration of the load test with --clients. Default: 20."""

    def run(self) -> None:
        """Run the benchmark, print the table and write --json. ValueError for flags that it does not take."""
        check_numbers(self, worlds=(1, 1_000_000), clients=(1, 10_000), seconds=(0.1, 86_400))
        check_file("--json", self.json)
        from vla.core.config import save_json
        from vla.runtime.console import bench_table, stdout
        from vla.runtime.provenance import provenance

        module, _, function = lookup(self.name, BENCHES, "bench").partition(":")
        bench = getattr(import_module(f"bascule.bench.{module}"), function or "bench")
        asked = given(device=self.device, worlds=self.worlds, suite=self.suite)
        load = given(clients=self.clients, seconds=self.seconds)
        if load and (self.name != "serve" or self.clients is None):
            raise ValueError("--clients and --seconds go together, for `vla bench serve`")
        if self.backend == "warp" and self.name == "sim":
            from bascule.bench.simulation_warp import bench_warp

            results = bench_warp(**asked)
        elif asked or self.backend == "warp":
            raise ValueError("--backend warp, --device, --worlds and --suite are for `vla bench sim --backend warp`")
        else:
            results = bench(**load)
        report = {"bench": self.name, **provenance(), "results": results}
        stdout().print(bench_table(report))
        if self.json is not None:
            save_json(self.json, report)
